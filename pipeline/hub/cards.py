"""The card of a cache on the hub; a run has its own."""

from __future__ import annotations

import json
from typing import Any

import yaml

import cskd
from cskd.store.cache import Cache

CARD = "README.md"
MADE = "<!-- made by cskd push: remove this line where you edit the card, and it stays as it is -->"
TAG, PAPER = "knowledge-distillation", "https://arxiv.org/abs/2307.08500"


def cache_card(cache: Cache, repo: str, size: int, whole: bool) -> str:
    """A dataset card of a cache: what it is, what it was made of, and how to train from it. size: bytes of its units."""
    manifest, identity = cache.manifest, cache.identity
    teacher, views = dict(identity.teacher), cache.inventory.n * cache.views
    top1 = "" if manifest.clean_top1 is None else f", top-1 {100 * manifest.clean_top1:.1f} % on clean images"
    name = teacher.get("model", teacher.get("source", "a network of the user's own"))
    rows = {
        "fingerprint": f"`{cache.fingerprint}`",
        "teacher": f"`{_line(name)}`{top1}",
        "its weights (sha256)": f"`{_line(teacher.get('weights_sha256', ''))}`",
        "cells": " x ".join(map(str, cache.grid)),
        "codecs": ", ".join(f"`{codec}`" for codec in cache.codecs),
        "images": f"{cache.inventory.n:,}, {len(cache.classes):,} classes, data set `{cache.inventory.id[:16]}`",
        "views": f"{cache.views:,} per image, {views:,} in all{'' if whole else ' (not all are there)'}",
        "bytes": f"{size:,}, {size / max(1, views):.0f} per view",
        "written by": f"cskd {cskd.__version__}, format {manifest.sealed['format']}",
    }
    front = {"pretty_name": repo.partition("/")[2], "tags": [TAG, "cskd"], "viewer": False}
    lines = [
        *_front(front),
        f"# {_line(repo.partition('/')[2])}",
        f"A teacher cache of [CSKD]({PAPER}): what a CNN says of each augmented view of a data set, per cell of its last map. "
        "There are no images in it: views are made again from your own copy of the images, each from its 64-bit seed, and "
        "checked against a stored checksum. Targets are joined to images by the sample's key.",
        "| what | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        "```bash\ncskd train CONFIG --set cache.path=hf://datasets/" + repo + " --set data.train=FOLDER\n"
        "cskd inspect hf://datasets/" + repo + "\n```",
        "`FOLDER` is the same data set, made by `cskd pack` or `cskd index`; another one is refused.",
        "The recipe of the views:\n\n```json\n" + json.dumps(dict(identity.recipe), indent=1) + "\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _front(facts: dict[str, Any]) -> tuple[str, str]:
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---", MADE


def _line(text: object) -> str:
    """A text of anybody's in a line of Markdown: no table, code or markup of it is kept."""
    return "".join(c for c in str(text) if c.isprintable() and c not in "|`<>")[:200]
