"""The page of `cskd inspect --html`: the template next to this file, its data put in, nothing loaded from anywhere.

Names, keys and paths are other people's text: they are in the page as JSON that no HTML parser can leave, and its script sets
them as text. A policy in the page lets only that one script and that one style run, and pictures only out of the page itself.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cskd.config import from_dict
from cskd.errors import printable
from cskd.pipeline.look.html_data import Say, command, page_data
from cskd.pipeline.look.inspection import Inspection, PageFacts
from cskd.pipeline.outputs import PAGE_START, save_file
from cskd.store.cache import Cache
from cskd.store.commit import Commit
from cskd.teacher.arithmetic import in_words
from cskd.views.digest import changed_versions

MOVING = ("linear", "quadratic", "cosine")  # decays for which a slider over training shows something
LISTED = 500  # quarantined samples
SCRIPTS = (
    "state.js",
    "targets.js",
    "sample.js",
    "cells.js",
    "gallery.js",
    "overview.js",
    "charts.js",
    "main.js",
)  # one after the other, as one


def write_page(
    cache: Cache,
    commits: Mapping[tuple[int, int], Commit],
    found: Inspection,
    path: Path,
    count: int,
    seed: int,
    samples: Sequence[int],
    view: int,
    moved: Path | None,
    say: Say | None = None,
) -> PageFacts:
    """The page of a cache, put in place whole. commits: of the units that may be read; say: of a student to show; the other arguments as of `inspect`.

    Raises:  CacheError where there is nothing to show; DataError, PathError where the page can't be written.
    """
    data = page_data(cache, commits, count, seed, samples, view, say)
    for sample in data["samples"]:
        sample["command"] = command(found.cache, moved, sample["key"], sample["i"])
    facts = {key: value for key, value in found.facts.items() if key not in ("samples", "student")}
    title = Path(os.path.abspath(found.cache)).name or found.cache
    student = found.facts.get("student")
    page = page_of(
        {**data, "student": student, "facts": facts, "about": _about(cache, commits, found, title)},
        f"{title} · cskd inspect",
    )
    save_file(path, "--html", page)
    shown = [one for sample in data["samples"] for one in sample["views"]]
    return PageFacts(str(path), len(page), len(data["samples"]), len(shown), sum(one["src"] is None for one in shown))


def _about(cache: Cache, commits: Mapping[tuple[int, int], Commit], found: Inspection, title: str) -> dict[str, Any]:
    """What the overview shows next to the facts of `inspect`."""
    manifest, config = cache.manifest, from_dict({})
    decay, epochs = (_recorded(manifest.config, *key) for key in (("loss", "decay"), ("train", "epochs")))
    reasons = {
        cache.inventory.block_range(block)[0] + int(position): reason
        for (block, _), commit in commits.items()
        for position, reason in commit.quarantine.items()
    }
    versions = manifest.versions or {}
    return {
        "title": title,
        "gives": {name: codec.gives for name, codec in found.codecs.items()},
        "size": cache.recipe.size,
        "recorded": str(decay),
        "decay": decay if decay in MOVING else config.loss.decay,
        "epochs": epochs if type(epochs) is int and epochs > 0 else config.train.epochs,
        "precision": in_words(found.teacher.precision) if found.teacher.precision else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "changed": changed_versions(dict(versions)) if versions else "",
        "quarantine": [[cache.inventory.key(i), reasons[i]] for i in sorted(reasons)[:LISTED]],
    }


def _recorded(config: Mapping[str, Any], section: str, key: str) -> Any:
    """A key of the config that the cache was begun with; older ones lack some."""
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None


def page_of(data: dict[str, Any], title: str) -> bytes:
    """The page. data: JSON-able."""
    template = files(__package__) / "page"
    script = "\n".join((template / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (template / "page.css").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(printable(title)),
        "POLICY": (
            f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    # Cut at the marks of the template, so that no value that is put in is searched for marks again.
    pieces = (template / "page.html").read_text(encoding="utf-8").split("%%")
    body = "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
    return PAGE_START + body.encode()


def embedded(data: Any) -> str:
    """JSON for the inside of a script element: what HTML could read as the end of it, or as a comment, is escaped."""
    text = json.dumps(_shown(data), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(value: Any) -> Any:
    """The data with every text in one line that can be shown."""
    if isinstance(value, str):
        return value if value.startswith("data:image/webp;base64,") else printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _shown(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return value


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
