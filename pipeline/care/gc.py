"""Remove what no commit record speaks of: temp files and unit files that writers left behind when they were killed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cskd.errors import CacheError, counted
from cskd.files import claims
from cskd.pipeline.show.progress import print_lines
from cskd.store.cache import open_cache
from cskd.store.commit import record_names
from cskd.store.tables import COPIES, tables_file

LEFT = (
    "units/*/*",
    "codecs/*",
    "commits/*/.*.tmp",
    ".*.tmp",
    ".inventory.partial*/*",
    "claims/*",
)  # where left-overs can be
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
    cache = open_cache(path, data=data, images=False)
    writers = claims.held(path)
    if writers and older_than < claims.LEASE:
        raise CacheError(
            f"{path} is being written to ({writers} claims have an owner that lives), expected none with --older-than "
            f"{older_than:g}; wait until `cskd cache-teacher` has ended, or take --older-than {claims.LEASE:g} or more"
        )
    kept = {path / tables_file(*of, copy) for of in (cache.manifest.tables or {}).items() for copy in COPIES}
    for block in range(cache.blocks):
        # Those too that a manifest put back from an older day does not know.
        for name in filter(re.compile(r"v\d{4,6}\.json").fullmatch, sorted(record_names(cache.root, block))):
            commit = cache.commit_of(block, int(name[1:-5]))
            kept |= {path / f.path for f in commit.files} if commit else set()
    now, removed, size, young = time.time(), [], 0, 0
    for file in sorted(file for pattern in LEFT for file in path.glob(pattern)):
        if file in kept or not file.is_file() or not file.parent.resolve().is_relative_to(path.resolve()):
            continue  # a folder that is a link leads out of the cache: what is there is not ours to remove
        try:
            about = file.lstat()
        except FileNotFoundError:  # a writer that lives has put it in place, or given its claim back
            continue
        if now - about.st_mtime < older_than:
            young += 1
            continue
        size += about.st_size if about.st_nlink == 1 else 0
        removed.append(str(file.relative_to(path)))
        if not dry_run:
            file.unlink(missing_ok=True)
            if file.parent.name.startswith(".") and not any(file.parent.iterdir()):
                file.parent.rmdir()
    return GcReport(str(path), removed, size, young, dry_run)


def render(report: GcReport, console: Console) -> None:
    """The report for people."""
    did = "to remove" if report.dry_run else "removed"
    left = f"; {report.young:,} younger left alone" if report.young else ""
    files = counted(len(report.removed), "left-over file")
    print_lines(console, *report.removed, f"{report.cache}: {files}, {report.bytes:,} bytes, {did}{left}")
