"""Where an export goes, `OUT`: a folder, whose processes share the work by claims, or the address of an object store, where each begins
far from the others and looks for a unit right before it makes it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd.errors import CacheError, PathError
from cskd.files.claims import Claims, NoClaims
from cskd.files.durable import json_bytes
from cskd.files.folders import MARKER, marker, refuse_output
from cskd.files.paths import is_remote, location_text
from cskd.files.read import MAX_TEXT, parse_json
from cskd.machine.launch import worker
from cskd.pipeline.outputs import of_a_cache, refuse_unfit
from cskd.pipeline.show.progress import Progress
from cskd.storage import Storage, join, open_storage
from cskd.storage.ahead import ahead
from cskd.storage.places import refuse_objects
from cskd.storage.posix import Posix
from cskd.store.cache import Cache
from cskd.store.format import MANIFEST, OWN_NAMES

FACTS, SUMS = "export.json", "SHA256SUMS"
POLL_WAIT = 2.0  # seconds between two looks at what other processes are making
Place = tuple[int, int]  # block, view


def open_out(out: Path, cache: Cache, kind: str) -> Storage:
    """OUT, which nothing else may be in; nothing is written. kind: "export", of targets, or "cache".

    Raises:  PathError for a place of another kind, or one that an input lies in; CacheError, StorageError for a store that can hold no
             cache.
    """
    data = str(cache.inventory.remote.location if cache.inventory.remote else cache.inventory.root)
    inputs = {"CACHE": cache.location} | ({} if kind == "cache" else {"the data folder": data})
    if not is_remote(out):
        local = {key: Path(text) for key, text in inputs.items() if not is_remote(text)}
        refuse_output(out, kind, "OUT", inputs=local, names=OWN_NAMES if kind == "cache" else ())
        return open_storage(out)
    location = location_text(str(out), "OUT", write=True)
    if is_remote(cache.location) and location.startswith(f"{cache.location}/"):
        raise PathError(f"OUT {location} lies in CACHE {cache.location}; give a place of its own")
    if kind == "cache":
        place = refuse_objects(location, "OUT", "a cache", of_a_cache, MANIFEST, inputs)
        refuse_unfit(location, "OUT")
        return place
    return refuse_objects(location, "OUT", "an export", (FACTS, MARKER).__contains__, FACTS, inputs)


def begin(cache: Cache, out: Storage, what: dict[str, Any], logits: str | None) -> str | None:
    """Have `out` say what it is of. CacheError where it is of something else. logits: of which codec they should be. Returns: of which
    they are; those of an export that was begun stay, of an older version the first codec's, where int8 or topk: of others it wrote none."""
    facts = {"fingerprint": cache.fingerprint, "inventory": cache.inventory.id, "grid": list(cache.grid), **what}
    facts["logits"], soft = logits, [name for name, codec in cache.codecs.items() if codec.soft]
    of_old = next((name if name.startswith(("int8", "topk")) else None for name in soft), None)
    out.create(FACTS, json_bytes(facts))
    if out.stat(MARKER) is None:
        out.put(MARKER, marker("export"))
    try:
        there = {"logits": of_old, **parse_json(out.get(FACTS, limit=MAX_TEXT))}
        chosen = facts["logits"] = there["logits"] if there["logits"] in (None, *soft) else logits
        differs = [key for key in sorted(facts | there) if facts.get(key) != there.get(key)]
    except (ValueError, TypeError, AttributeError):
        raise CacheError(
            f"{join(out.location, FACTS)} is damaged, expected the facts of an export; give another OUT"
        ) from None
    if differs:
        old, new = (str(of.get(differs[0]))[:40] for of in (there, facts))
        raise CacheError(
            f"OUT {out.location} holds an export with {differs[0]} = {old}, this one has {new}; give another folder"
        )
    return chosen


def make_all(
    cache: Cache,
    out: Storage,
    lacking: Callable[[], list[Place]],
    made: Callable[[Place], bool],
    make: Callable[[int, int], None],
    quiet: bool,
) -> None:
    """Make what is not made, unit by unit, with every other process that is at it. lacking: by a list of what is there."""
    sizes = [stop - first for first, stop in map(cache.inventory.block_range, range(cache.blocks))]
    todo, done = lacking(), 0
    total = sum(sizes[block] for block, _ in todo)
    local = isinstance(out, Posix)
    with (
        Claims(out.root) if isinstance(out, Posix) else NoClaims() as claims,
        Progress("export", total, "views", quiet=quiet) as progress,
    ):
        while todo:
            before = done
            for block, view in todo if local else _apart(todo):
                claim = claims.take(f"b{block:05d}.v{view:04d}")
                if claim is None:
                    continue
                if not made((block, view)):  # others may have made it since
                    make(block, view)
                claims.release([claim])
                done += sizes[block]
                progress.update(done)
            todo = lacking()
            if todo and done == before:
                time.sleep(POLL_WAIT)
            done = total - sum(sizes[block] for block, _ in todo)
            progress.update(done)


def _apart(places: list[Place]) -> list[Place]:
    """The same in a circle, from a place on where few of the other processes begin."""
    me = worker()
    share = me.number / me.count if me.count else random.random()
    first = int(share * len(places))
    return places[first:] + places[:first]


def write_sums(out: Storage, names: Sequence[str], hashes: dict[str, str], there: Mapping[str, int]) -> None:
    """The hashes of all tars, as sha256sum writes and checks them. hashes: of those just made; there: what `out` holds, with bytes."""
    known: dict[str, str] = {}
    if SUMS in there:
        lines = out.get(SUMS, limit=MAX_TEXT).decode(errors="replace").splitlines()
        known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    known = {name: digest for name, digest in known.items() if name in there} | hashes
    unknown = (name for name in names if name not in known)
    read = ahead(unknown, lambda name: hashlib.sha256(out.get(name)).hexdigest(), there.__getitem__)
    found = known | {name: digest.result() for name, digest in read}
    out.put(SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())).encode())
