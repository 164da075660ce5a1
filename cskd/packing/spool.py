"""A file of bytes that a source holds packed, so that they can be read in any order; removed with the folder of the pack."""

from __future__ import annotations

import shutil
from pathlib import Path

from cskd.errors import DataError

MAX_SPOOL = 1 << 40  # bytes a compressed source may decompress to
# Bytes from one compressed byte: images are 1 to 2, gzip's own limit is 1,032, a bomb is made at it.
MAX_RATIO = 200
FREE_BYTES = 1 << 26  # decompressed before the ratio is looked at: small files of flat pictures may pass it


class Spool:
    """The file at `path`, written from start to end, for a source that messages call `shown`."""

    def __init__(self, path: Path, shown: Path, limit: int) -> None:
        self.path, self.size, self._shown = path, 0, shown
        self._room, self._limit = shutil.disk_usage(path.parent).free, limit
        self._file = path.open("xb")

    def add(self, data: bytes | memoryview, taken: int) -> int:
        """Append bytes that come from the first `taken` of the source; returns where they are.

        Raises:  DataError when the file would pass the limit or fill the disk, or grows as no images do.
        """
        at = self.size
        self._file.write(data)
        self.size += len(data)
        if self.size > min(self._limit, self._room):
            free = f"the {self._room} bytes free in {self.path.parent.parent}"
            what = f"the limit of {self._limit} bytes" if self._limit < self._room else free
            raise DataError(f"{self._shown} decompresses to more than {what}; decompress it elsewhere and pack that")
        if self.size > FREE_BYTES + MAX_RATIO * taken:
            raise DataError(
                f"{self._shown} decompresses to {self.size} bytes from {taken}, expected at most {MAX_RATIO} from one: images "
                "do not; if it is what you want, decompress it elsewhere and pack that"
            )
        return at

    def close(self) -> None:
        """All bytes are in the file after this."""
        self._file.close()
