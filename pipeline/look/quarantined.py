"""All samples of a cache that have no targets, with the reasons: `cskd inspect CACHE --quarantined`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cskd.errors import CacheError
from cskd.pipeline.show.progress import print_lines
from cskd.store.cache import Cache, open_cache
from cskd.store.records import records


@dataclass(frozen=True)
class QuarantinedSample:
    """A sample without targets: its key, its label's name, the shard it is in, and why stage 1 could not decode it."""

    sample: int
    key: str
    label: str
    shard: str
    reason: str


@dataclass(frozen=True)
class QuarantineList:
    """`errors`: commit records that can't be read, one line each: their samples may be missing here."""

    cache: str
    samples: int
    quarantined: list[QuarantinedSample]
    errors: list[str]


def list_quarantined(path: Path, data: Path | None = None) -> QuarantineList:
    """The quarantined samples of a cache, in the order of the inventory. Raises CacheError where it can't be opened."""
    cache = open_cache(path, data, images=False)
    reasons, errors = quarantine_reasons(cache)
    inventory = cache.inventory
    found = [
        QuarantinedSample(
            sample=i,
            key=inventory.key(i),
            label=inventory.classes[inventory.label[i]],
            shard=inventory.shards[inventory.shard[i]].name,
            reason=reasons[i],
        )
        for i in sorted(reasons)
    ]
    return QuarantineList(cache.location, inventory.n, found, errors)


def quarantine_reasons(cache: Cache) -> tuple[dict[int, str], list[str]]:
    """sample -> reason, by all commit records; and what is wrong with records that can't be read."""
    reasons: dict[int, str] = {}
    errors = []
    for block, view, record in records(cache):
        first = cache.inventory.block_range(block)[0]
        try:
            commit = record()
        except CacheError as e:
            errors.append(f"block {block}, view {view}: {e}")
            continue
        if commit is not None:
            reasons |= {first + int(position): reason for position, reason in commit.quarantine.items()}
    return reasons, errors


def render_list(report: QuarantineList, console: Console) -> None:
    """The list for people: a line for each, without a table, so that a pager or grep can have it."""
    lines = [f"{one.key} ({one.label}) in {one.shard}: {one.reason}" for one in report.quarantined]
    count = f"{report.cache}: {len(report.quarantined):,} of {report.samples:,} samples are quarantined"
    print_lines(console, *report.errors, *lines, count)
