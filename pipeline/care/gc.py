"""Remove what no commit record speaks of: temp files and unit files that writers left behind when they were killed."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cskd.errors import CacheError, counted
from cskd.files import claims
from cskd.files.paths import location_text
from cskd.pipeline.show.progress import print_lines
from cskd.storage import Stat, Storage
from cskd.storage.posix import Posix
from cskd.store.cache import open_cache
from cskd.store.commit import read_commits, record_names
from cskd.store.format import PROBE, TABLES
from cskd.store.tables import COPIES, tables_file

LEFT = (
    "units/*/*",
    "codecs/*",
    "commits/*/.*.tmp",
    ".*.tmp",
    ".inventory.partial*/*",
    "claims/*",
)  # where left-overs can be
SETTLED = 600.0  # seconds: on an object store a unit that is this old has its record, or will have none
YOUNG = 3600.0  # seconds: what is younger may be of a writer that lives


@dataclass(frozen=True)
class GcReport:
    """Files removed (or found, in a dry run), relative to the cache; the bytes that this frees (a second name of a file that
    stays frees none); those left because they are young."""

    cache: str
    removed: list[str]
    bytes: int
    young: int
    dry_run: bool


def gc(path: Path, older_than: float = YOUNG, dry_run: bool = False, data: Path | None = None) -> GcReport:
    """Remove left-over files that have not been written to for `older_than` seconds.

    Raises:  CacheError where a commit record is damaged: what it spoke of can't be told from left-overs; and where files
             were wanted that may be of a writer that lives.
    """
    cache = open_cache(location_text(str(path), "CACHE", write=True), data=data, images=False, index=False)
    local = isinstance(cache.storage, Posix)
    writers = claims.held(cache.root) if local else 0
    if writers and older_than < claims.LEASE:
        raise CacheError(
            f"{cache.location} is being written to ({writers} claims have an owner that lives), expected none with --older-than "
            f"{older_than:g}; wait until `cskd cache-teacher` has ended, or take --older-than {claims.LEASE:g} or more"
        )
    if not local and older_than < SETTLED:
        raise CacheError(
            f"{cache.location} is on an object store, where nothing tells whether a file without a record is still to get one; "
            f"take --older-than {SETTLED:g} or more"
        )
    kept = {str(tables_file(*of, copy)) for of in (cache.manifest.tables or {}).items() for copy in COPIES}
    for block, names in enumerate(record_names(cache.storage, cache.blocks)):
        # Those too that a manifest put back from an older day does not know.
        views = [int(name[1:-5]) for name in names if re.fullmatch(r"v\d{4,6}\.json", name)]
        for commit in read_commits(cache.storage, [(block, view) for view in sorted(views)]):
            kept |= {file.path for file in cache.own(commit).files} if commit else set()
    found = _left_over(cache.root) if local else _unnamed(cache.storage)
    now, removed, size, young = time.time(), [], 0, 0
    for left in found:
        if left.key in kept:
            continue
        if now - left.modified < older_than:
            young += 1
            continue
        size += left.size
        removed.append(left.key)
        if not dry_run:
            cache.storage.delete(left.key)
            if local and (folder := (cache.root / left.key).parent).name.startswith(".") and not any(folder.iterdir()):
                folder.rmdir()
    return GcReport(cache.location, removed, size, young, dry_run)


def _left_over(root: Path) -> Iterator[Stat]:
    """Files of a folder that may be left over; the size of one is what its removal frees."""
    for file in sorted(file for pattern in LEFT for file in root.glob(pattern)):
        if not file.is_file() or not file.parent.resolve().is_relative_to(root.resolve()):
            continue  # a folder that is a link leads out of the cache: what is there is not ours to remove
        with contextlib.suppress(FileNotFoundError):  # a writer that lives has put it in place, or given its claim back
            about = file.lstat()
            key = file.relative_to(root).as_posix()
            yield Stat(key, about.st_size if about.st_nlink == 1 else 0, about.st_mtime)


def _unnamed(storage: Storage) -> Iterator[Stat]:
    """The same of an object store: files of units and tables, and what probes leave."""
    for about in sorted(storage.list(), key=lambda about: about.key):
        if about.key.startswith(("units/", f"{TABLES}/", PROBE)):
            yield about


def render(report: GcReport, console: Console) -> None:
    """The report for people."""
    did = "to remove" if report.dry_run else "removed"
    left = f"; {report.young:,} younger left alone" if report.young else ""
    files = counted(len(report.removed), "left-over file")
    print_lines(console, *report.removed, f"{report.cache}: {files}, {report.bytes:,} bytes, {did}{left}")
