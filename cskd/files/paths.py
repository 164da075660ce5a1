"""Which texts are paths of this machine. An address such as s3://bucket/x would become the folder ./s3:/bucket/x."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cskd.errors import PathError

# Two letters or more: C:/data is a drive. One slash is enough: a Path has lost the second one already.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_SHOWN = 100  # characters of an address that a refusal quotes


def local_text(text: str, what: str) -> str:
    """A path as it was written, with `~` replaced by the home folder: only shells do that, and not in `--set key=~/x`.

    Args:    what names the key or argument.
    Raises:  PathError for an address of any scheme.
    """
    if address := _ADDRESS.match(text):
        scheme = address[1].lower()
        local = f"write {'/' + text[address.end() :]}"
        cure = local if scheme == "file" else "copy or mount it here, and give that path"
        raise PathError(f"{what} {text[:_SHOWN]!r} is an address ({scheme}:), expected a local path; {cure[:120]}")
    return os.path.expanduser(text) if text.startswith("~") else text


def local_path(path: str | Path, what: str) -> Path:
    """The same as a `Path`; an empty text, which would be the current folder, is refused too."""
    if not str(path):
        raise PathError(f"{what} is empty, expected a path; give one ('.' is the current folder)")
    return Path(local_text(str(path), what))
