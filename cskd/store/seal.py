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
from cskd.files.durable import json_bytes
from cskd.files.read import MAX_TEXT, parse_json
from cskd.store.cache import Cache
from cskd.store.commit import Commit, read_commits, record_names
from cskd.store.format import FORMAT, INDEX, SEAL, record_name
from cskd.store.index import index_bytes, wrong_index
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
    commits = all_commits(cache, views)
    hashes = {unit: commit.content_hash for unit, commit in commits.items()}
    if old is not None:
        check_seal(cache, old, hashes)
        if old.views >= cache.views:  # more: another process has let the cache grow since this one opened it
            write_index(cache, old, commits)
            return old
    if old is None:
        refuse_too_many_in_all(int(cache.quarantined().sum()), cache.inventory.n, max_quarantine)
    if lacks := cache.blocks * views - len(commits):
        raise CacheError(f"{cache.location} lacks {lacks} units; `cskd cache-teacher` makes them")
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
            f"{cache.location}: {seal.cached} views cached + {seal.quarantined} quarantined, expected {cache.inventory.n} "
            f"images * {cache.views}; run `cskd verify {cache.location}`"
        )
    data = json_bytes(seal_facts(seal))
    if old is not None:
        cache.storage.put(SEAL, data)
    elif not cache.storage.create(SEAL, data):  # another process was first
        return seal_cache(cache, max_quarantine)
    write_index(cache, seal, commits)
    return seal


def all_commits(cache: Cache, views: int) -> dict[tuple[int, int], Commit]:
    """(block, view) -> its record, of the first so many views, as they are there now. CacheError for one that is damaged."""
    names = record_names(cache.storage, cache.blocks)
    units = [
        (block, view) for block in range(cache.blocks) for view in range(views) if record_name(view) in names[block]
    ]
    found = zip(units, read_commits(cache.storage, units), strict=True)
    return {unit: cache.own(commit) for unit, commit in found if commit is not None}


def write_index(cache: Cache, seal: Seal, commits: Mapping[tuple[int, int], Commit]) -> None:
    """Put the index of what is sealed in place, where it is not there already; records may have been made again meanwhile."""
    data = sealed_index(cache, seal, commits)
    if data is not None:
        try:
            if cache.storage.get(INDEX) == data:
                return
        except OSError:  # there is none, or it can't be read
            pass
        cache.storage.put(INDEX, data)


def check_index(cache: Cache, seal: Seal, commits: Mapping[tuple[int, int], Commit]) -> None:
    """CacheError where there is an index and it does not hold these records; a cache that an older version sealed has none."""
    if wrong := wrong_index_of(cache, seal, commits):
        raise CacheError(f"{cache.path(INDEX)} {wrong}; `cskd repair {cache.location}` writes it again")


def wrong_index_of(cache: Cache, seal: Seal, commits: Mapping[tuple[int, int], Commit] | None = None) -> str:
    """What is wrong with the index of a sealed cache, see `cskd.store.index.wrong_index`. commits: the records, where they are known."""
    data = sealed_index(cache, seal, all_commits(cache, seal.views) if commits is None else commits)
    return "" if data is None else wrong_index(cache.storage, data)


def sealed_index(cache: Cache, seal: Seal, commits: Mapping[tuple[int, int], Commit]) -> bytes | None:
    """The index that a sealed cache should have; None where a record of it is missing."""
    units = [(block, view) for block in range(cache.blocks) for view in range(seal.views)]
    if any(unit not in commits for unit in units):
        return None
    in_order = (commits[unit] for unit in units)
    return index_bytes(in_order, seal.fingerprint, cache.blocks, seal.views, seal.content_root)


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
            f"{cache.location} was sealed with content {seal.content_root[:16]}, its units now give {found[:16]}: some were made "
            f"otherwise; cache again in another folder, or accept them by removing {cache.path(SEAL)}"
        )


def read_seal(cache: Cache) -> Seal | None:
    """The seal, None where there is none. CacheError when it is damaged or of another cache."""
    path = cache.path(SEAL)
    mend = f"`cskd repair {cache.location}` checks every unit and seals it again"
    try:
        written = cache.storage.get(SEAL, limit=MAX_TEXT)
        facts = parse_json(written)
        seal = Seal(**facts["seal"])
        fits = seal.views > 0 and (seal.views <= cache.views or seal.views <= read_manifest(cache.storage).views)
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
        raise CacheError(f"{path} seals {seal.views} views, {cache.location} has {cache.views}; {mend}")
    return seal


def seal_facts(seal: Seal) -> dict[str, object]:
    """A seal as its file holds it, with a hash of its own."""
    facts = asdict(seal)
    return {"seal": facts, "sha256": hashlib.sha256(json_bytes(facts)).hexdigest()}
