"""What was passed over, counted by kind of file, with one of each to show."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz)$", re.IGNORECASE)
_EXTENSION = re.compile(r"\.\w{1,10}$")
MACOS = "__MACOSX"
MOST_KINDS = 12  # that a line shows


@dataclass
class Tally:
    """Files that were passed over."""

    count: int = 0
    first: str = ""
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind -> how many, the first by name

    def add(self, name: str, kind: str = "", times: int = 1) -> None:
        """One more (or `times`); the smallest name is shown, so that the order of a folder doesn't matter."""
        self.first = min(self.first, name) if self.count else name
        self.count += times
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = count + times, min(first, name)

    def add_file(self, path: str) -> None:
        """One more file (or hidden folder) of a source, counted by its extension."""
        self.add(path, file_kind(path))

    def by_kind(self, most: int = MOST_KINDS) -> str:
        """'2 hidden, 1 .md'; the most frequent first, at most so many kinds."""
        kinds = sorted(self.kinds.items(), key=lambda item: (-item[1][0], item[0]))
        more = f", {len(kinds) - most} other kinds" if len(kinds) > most else ""
        return ", ".join(f"{count} {kind}" for kind, (count, _) in kinds[:most]) + more

    def notes(self, what: str, most: int = MOST_KINDS) -> list[str]:
        """A line for the user with at most so many kinds, or none."""
        if not self.count:
            return []
        more = " ..." if self.count > 1 else ""
        by_kind = f" ({self.by_kind(most)})" if any(self.kinds) else ""
        return [f"{self.count} {what} passed over{by_kind}: {self.first}{more}"]


def is_hidden(path: str) -> bool:
    """Whether a file or folder, or one that it is in, is hidden, or what macOS puts into its zips."""
    return path.startswith((".", MACOS)) or "/." in path or f"/{MACOS}" in path


def file_kind(path: str) -> str:
    """'hidden', '.tar.gz', '.md' or 'without extension'."""
    if is_hidden(path):
        return "hidden"
    name = path.rpartition("/")[2]
    found = _TAR.search(name) or _EXTENSION.search(name)
    return found[0].lower() if found else "without extension"


def is_compressed_tar(name: str) -> bool:
    """Whether a name says that the file is a compressed tar."""
    return _TAR.search(name) is not None


def plain_tar_name(name: str) -> str:
    """The name of a tar when it is not compressed: x.tar for x.tar, x.tar.gz and x.tgz."""
    return _TAR.sub(".tar", name)
