"""Which texts are paths of this machine. An address such as s3://bucket/x would become the folder ./s3:/bucket/x.

Where a path is only read, it may be an address of the Hugging Face hub (`cskd.files.hub`): hub=True."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cskd.errors import PathError
from cskd.files.hub import FORM, is_hub, local_copy, parse_address

# Two letters or more: C:/data is a drive. One slash is enough: a Path has lost the second one already.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_OBJECTS = ("s3", "gs", "az")  # schemes of object stores that are read and written, see `cskd.storage`
_READ_ONLY = ("http", "https")
_SHOWN = 100  # characters of an address that a refusal quotes


def local_text(text: str, what: str, hub: bool = False) -> str:
    """A path as it was written, with `~` replaced by the home folder: only shells do that, and not in `--set key=~/x`.

    Args:    what names the key or argument. hub: an address of the hub will do, which is then given in its usual form.
    Raises:  PathError for an address of any other scheme. Nothing is downloaded.
    """
    if is_hub(text) and hub:
        return str(parse_address(text, what))
    if address := _ADDRESS.match(text):
        scheme = address[1].lower()
        cure = {
            "file": f"write {'/' + text[address.end() :]}",
            "hf": "the hub is only read, as cache.path, student.init or the teacher; write here, and `cskd push` it",
        }.get(scheme, "copy or mount it here, and give that path")
        expected = f"a local path or {FORM}" if hub else "a local path"
        raise PathError(f"{what} {text[:_SHOWN]!r} is an address ({scheme}:), expected {expected}; {cure[:120]}")
    return os.path.expanduser(text) if text.startswith("~") else text


def is_remote(location: str | Path) -> bool:
    """Whether a location is one of an object store or a web server, which only `cskd.storage` reads and writes."""
    address = _ADDRESS.match(str(location))
    return address is not None and address[1].lower() in (*_OBJECTS, *_READ_ONLY)


def location_text(text: str, what: str, *, hub: bool = False, write: bool = False) -> str:
    """A path of this machine as `local_text`, or the address of an object store in its usual form: s3://BUCKET/PREFIX.

    Args:    hub: an address of the hub will do, too. write: it is written to, so that http(s) will not do.
    Raises:  PathError for any other address, and for one without a bucket or with a part that leads out of it.
    """
    if not is_remote(text):
        if (address := _ADDRESS.match(text)) and not is_hub(text) and address[1].lower() != "file":
            known = ", ".join(f"{scheme}://" for scheme in (*_OBJECTS, *(() if write else _READ_ONLY)))
            raise PathError(
                f"{what} {text[:_SHOWN]!r} is an address ({address[1].lower()}:), expected a local path or one of {known}; "
                f"{_TWINS.get(address[1].lower(), 'copy or mount it here, and give that path')}"
            )
        return local_text(text, what, hub)
    address = _ADDRESS.match(text)
    assert address is not None
    scheme, rest = address[1].lower(), text[address.end() :].rstrip("/")
    shown = f"{scheme}://{rest}"[:_SHOWN]  # a Path has lost one slash
    if write and scheme in _READ_ONLY:
        raise PathError(
            f"{what} {shown!r} is on a web server, which is only read; give a local path or s3://BUCKET/NAME"
        )
    if any(part in ("", ".", "..") for part in rest.split("/")) or any(c in rest for c in "?#\\\0"):
        raise PathError(
            f"{what} {shown!r} is no address of an object store, expected {scheme}://"
            f"{'HOST' if scheme in _READ_ONLY else 'BUCKET'}/NAME without '..', '?' or '#'; write it so"
        )
    return f"{scheme}://{rest}"


_TWINS = {  # what other programs call the same stores
    **dict.fromkeys(("s3a", "s3n"), "write s3://BUCKET/NAME"),
    **dict.fromkeys(("gcs",), "write gs://BUCKET/NAME"),
    **dict.fromkeys(("abfs", "abfss", "adl", "azure", "wasb", "wasbs"), "write az://CONTAINER/NAME (docs/STORAGE.md)"),
}


def local_path(path: str | Path, what: str, hub: bool = False) -> Path:
    """The same as a `Path`; an empty text, which would be the current folder, is refused too. Of an address its copy on this
    machine, downloaded where it is not there yet: HubError, see `cskd.files.hub.local_copy`."""
    if not str(path):
        raise PathError(f"{what} is empty, expected a path; give one ('.' is the current folder)")
    text = local_text(str(path), what, hub)
    return local_copy(parse_address(text, what), what) if is_hub(text) else Path(text)
