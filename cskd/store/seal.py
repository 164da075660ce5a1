"""The seal of a finished cache: the views it was whole with, its counts, and one hash over all content.

Records alone say what exists, so one that vanishes would look like one that was never made. Of a sealed cache it is known
that each was there: `cskd verify` calls it lost, and what is made again must give the hash that was sealed. A cache that grows
keeps the seal of its first views until the new ones are whole too.

Also how many images that can't be decoded a cache or a run bears: `cache.max_quarantine`, of each block and in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError
from cskd.files.durable import json_bytes, put
from cskd.files.read import parse_json, read_file
from cskd.store.cache import Cache
from cskd.store.format import FORMAT, SEAL
from cskd.store.manifest import read_manifest


@dataclass(frozen=True)
class Seal:
    """`cached` + `quarantined` = images of the inventory * `views`; `content_root`: of those views; `fingerprint`: the cache's."""

    fingerprint: str
    views: int
    units: int
    cached: int
    quarantined: int
    content_root: str
    format: int = FORMAT


def seal_cache(cache: Cache, max_quarantine: float) -> Seal:
    """Seal a cache all of whose units are there; one that is sealed already must have the content it was sealed with.

    max_quarantine: share of the images that may be unreadable; what is sealed already is not asked again.

    Raises:  CacheError when a unit is missing, its content is not what was sealed, or too many images are unreadable.
    """
    old = read_seal(cache)
    views = max(cache.views, old.views if old else 0)
    units = [(block, view) for block in range(cache.blocks) for view in range(views)]
    commits = {unit: commit for unit in units if (commit := cache.commit_of(*unit)) is not None}
    hashes = {unit: commit.content_hash for unit, commit in commits.items()}
    if old is not None:
        check_seal(cache, old, hashes)
        if old.views >= cache.views:  # more: another process has let the cache grow since this one opened it
            return old
    if old is None:
        refuse_too_many_in_all(int(cache.quarantined().sum()), cache.inventory.n, max_quarantine)
    if len(commits) < len(units):
        raise CacheError(f"{cache.root} lacks {len(units) - len(commits)} units; `cskd cache-teacher` makes them")
    seal = Seal(
        fingerprint=cache.fingerprint,
        views=cache.views,
        units=len(commits),
        cached=sum(commit.cached for commit in commits.values()),
        quarantined=sum(len(commit.quarantine) for commit in commits.values()),
        content_root=cache.content_root(hashes=hashes),
    )
    if seal.cached + seal.quarantined != cache.inventory.n * cache.views:
        raise CacheError(
            f"{cache.root}: {seal.cached} views cached + {seal.quarantined} quarantined, expected {cache.inventory.n} "
            f"images * {cache.views}; run `cskd verify {cache.root}`"
        )
    if not put(cache.root / SEAL, json_bytes(seal_facts(seal)), first=old is None):  # another process was first
        return seal_cache(cache, max_quarantine)
    return seal


def refuse_too_many(quarantine: dict[int, str], n: int, inventory: Inventory, first: int, limit: float) -> None:
    """CacheError when more than `limit` of a block's n samples can't be decoded. quarantine: position -> reason."""
    if len(quarantine) > max(1, limit * n):
        position, reason = next(iter(quarantine.items()))
        raise CacheError(
            f"{len(quarantine)} of {n} images of a block are unreadable, more than cache.max_quarantine {limit}; the first is "
            f"'{inventory.key(first + position)}': {reason}; mend the data set, or raise the limit"
        )


def refuse_too_many_in_all(unreadable: int, n: int, limit: float) -> None:
    """CacheError when more than `limit` of all n images can't be decoded; one is always borne. Stage 1 stops at such a block,
    but bears one in each: many small blocks would hide what a large one shows."""
    if unreadable > max(1, limit * n):
        raise CacheError(
            f"{unreadable} of {n} images are unreadable, more than cache.max_quarantine {limit}; `cskd verify DATA --images` "
            "names them: mend the data set, or raise the limit and run the same command again"
        )


def check_seal(cache: Cache, seal: Seal, hashes: Mapping[tuple[int, int], str] | None = None) -> None:
    """CacheError when the units are not those that were sealed. hashes: see `Cache.content_root`."""
    found = cache.content_root(seal.views, hashes)
    if found != seal.content_root:
        raise CacheError(
            f"{cache.root} was sealed with content {seal.content_root[:16]}, its units now give {found[:16]}: some were made "
            f"otherwise; cache again in another folder, or accept them by removing {cache.root / SEAL}"
        )


def read_seal(cache: Cache) -> Seal | None:
    """The seal, None where there is none. CacheError when it is damaged or of another cache."""
    path = cache.root / SEAL
    mend = f"`cskd repair {cache.root}` checks every unit and seals it again"
    try:
        written = read_file(path)
        facts = parse_json(written)
        seal = Seal(**facts["seal"])
        fits = seal.views > 0 and (seal.views <= cache.views or seal.views <= read_manifest(cache.root).views)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CacheError(f"{path} is not a readable seal ({' '.join(str(e).split())}); {mend}") from None
    if written != json_bytes(seal_facts(seal)):
        raise CacheError(f"{path} is not, byte for byte, what was written; {mend}")
    if seal.fingerprint != cache.fingerprint:
        raise CacheError(
            f"{path} is the seal of another cache, with fingerprint {str(seal.fingerprint)[:12]}; this one has "
            f"{cache.fingerprint[:12]}; {mend}"
        )
    if not fits:
        raise CacheError(f"{path} seals {seal.views} views, {cache.root} has {cache.views}; {mend}")
    return seal


def seal_facts(seal: Seal) -> dict[str, object]:
    """A seal as its file holds it, with a hash of its own."""
    facts = asdict(seal)
    return {"seal": facts, "sha256": hashlib.sha256(json_bytes(facts)).hexdigest()}
