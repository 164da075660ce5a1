"""Which files of a run or a cache go to the hub, and how: nothing but what is listed here leaves this machine.

Texts are given without the folders of this machine: of an absolute path its last name stays. A manifest without them is another
file with the same fingerprint; units, records and seal are the same bytes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cskd.config import to_yaml
from cskd.config.yaml_text import read_yaml
from cskd.dataset.inventory_format import DTYPES, HEADER, header_bytes, header_hash, read_header
from cskd.errors import CacheError, CskdError, HubError, PathError, StudentError, counted
from cskd.files import claims
from cskd.files.durable import json_bytes
from cskd.files.folders import kind_of
from cskd.files.paths import is_remote, local_path, location_text
from cskd.files.read import parse_json, read_file
from cskd.files.temporary import temporary_folder
from cskd.files.writer import LOCK, by
from cskd.near import absent
from cskd.pipeline.hub.cards import CARD, cache_card
from cskd.pipeline.model_card import unedited
from cskd.storage import Storage, open_storage
from cskd.storage.posix import Posix
from cskd.store.cache import Cache, open_cache
from cskd.store.format import INDEX, INVENTORY, MANIFEST, MANIFEST_COPY, RESOLVED, SEAL, TABLES, commit_file
from cskd.store.manifest import has_cache
from cskd.store.seal import check_seal, read_seal
from cskd.store.tables import COPIES, read_copy, tables_file
from cskd.student.checkpoint import MODEL

# Limits and recommendations of the hub, https://huggingface.co/docs/hub/repositories-recommendations
MOST_FILES, MOST_IN_FOLDER, LARGEST = 100_000, 10_000, 50_000_000_000
WEIGHTS = "model_*.safetensors"
_OF_A_RUN = (MODEL, WEIGHTS, "heads*.safetensors", "config.json", RESOLVED, "*.jsonl", "*.csv", CARD)
_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.svg", "*.gif", "*.webp")
# The folders before the last name of an absolute path inside a text; of https://host/a/b none.
_FOLDERS = re.compile(r"""(?<![\w:/.~*-])~?/(?:[^\s/'",;:()\[\]{}]+/)+(?=[^\s/])""")


@dataclass(frozen=True)
class HubFile:
    """path: in the repository. source: a file of this machine, the bytes themselves, or the store that has them by `path`. last:
    after all others, since it makes the repository be a run or a cache. fixed: its name holds the hash of its bytes. made: generated; a card that somebody wrote on
    the hub stays."""

    path: str
    source: Path | bytes | Storage
    size: int
    last: bool = False
    fixed: bool = False
    made: bool = False


@dataclass(frozen=True)
class Contents:
    """stale: pattern of what is removed from the repository where it is not among the files. fingerprint: of a cache."""

    kind: Literal["run", "cache"]
    files: list[HubFile]
    stale: re.Pattern[str]
    fingerprint: str = ""
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def opened(source: Path, repo: str, allow_incomplete: bool) -> Iterator[Contents]:
    """`contents_of` a folder, or of what lies on an object store: of a run from a copy of what goes to the hub, made while this is
    open; a cache's files stay there. Raises as `contents_of`."""
    if not is_remote(source):
        yield contents_of(local_path(source, "RUN|CACHE"), repo, allow_incomplete)
        return
    where = location_text(str(source), "RUN|CACHE", write=True)  # a store that is only read has no list of its files
    storage = open_storage(where)
    if has_cache(storage):
        found = _cache(storage, repo, allow_incomplete)
        _refuse_limits(storage.location, found.files)
        yield found
        return
    names = [about.key for about in storage.list()]
    if MODEL not in names:
        raise PathError(
            f"RUN|CACHE is {storage.location}, which holds neither; expected the address of a run or of a cache"
        )
    with temporary_folder("push") as folder:
        for name in names:
            if "/" not in name and any(fnmatch(name, pattern) for pattern in (*_OF_A_RUN, *_PICTURES)):
                with contextlib.suppress(FileNotFoundError):  # a run that goes on has replaced it
                    (folder / name).write_bytes(storage.get(name))
        try:
            found = _run(folder)
        except CskdError as e:
            raise type(e)(str(e).replace(str(folder), storage.location)) from None
        _refuse_limits(storage.location, found.files)
        busy = (f"{storage.location} is being trained, or was killed ({LOCK}): its files may be of two epochs",)
        yield replace(found, notes=found.notes + (busy if LOCK in names else ()))


def contents_of(source: Path, repo: str, allow_incomplete: bool) -> Contents:
    """What goes to the hub of a run's or a cache's folder.

    Raises:  PathError where it is neither, or is being written; CacheError for a cache that is not whole; StudentError for a run
             without weights; HubError over the hub's limits.
    """
    kind = kind_of(source)
    if kind == "run":
        found = _run(source)
    elif kind == "cache":
        found = _cache(open_storage(source), repo, allow_incomplete)
    else:
        what = (
            absent(source)
            if not source.exists()
            else f"{source}, {f'a folder of kind {kind}' if kind else 'which is neither'}"
        )
        raise PathError(f"RUN|CACHE is {what}; expected the folder of a run (train.output) or of a cache (cache.path)")
    _refuse_limits(str(source), found.files)
    return found


def _run(folder: Path) -> Contents:
    if (owner := claims.holder(folder / LOCK)) is not None:
        raise PathError(f"{folder} is being trained{by(owner)}; push it when that has ended")
    for name in (MODEL, "config.json", RESOLVED):
        if not (folder / name).is_file():
            raise StudentError(f"{folder} has no {name}; `cskd train` writes it at the end of an epoch")
    files = []
    for path in sorted({path for pattern in (*_OF_A_RUN, *_PICTURES) for path in folder.glob(pattern)}):
        if path.name.startswith(".") or not path.is_file():
            continue
        data = _without_folders(path)
        last = path.name in ("config.json", CARD)
        made = path.name == CARD and unedited(path.read_bytes())
        files.append(HubFile(path.name, data or path, len(data) if data else path.stat().st_size, last, made=made))
    has_card = (folder / CARD).is_file()
    notes = (
        ()
        if has_card
        else (f"no {CARD}, the model card that `cskd train` writes after each epoch: there will be none",)
    )
    return Contents("run", files, re.compile(r"(model_\w+|heads\w*)\.safetensors"), notes=notes)


def _without_folders(path: Path) -> bytes | None:
    """The bytes of a text without folders of this machine; None where it has none."""
    try:
        data = read_file(path) if path.name in (RESOLVED, "config.json", "metrics.jsonl", "metrics.csv") else None
        if path.name == RESOLVED and data:
            return to_yaml(plain(read_yaml(data.decode(), str(path)))).encode()
        if path.name == "config.json" and data:
            facts = parse_json(data)
            facts["cskd"]["changed"] = plain(facts["cskd"]["changed"])
            return (json.dumps(facts, indent=2) + "\n").encode()
        if path.name == "metrics.jsonl" and data:
            rows = [json.loads(line) for line in data.decode().splitlines()]
            return "".join(json.dumps(_plain_row(row)) + "\n" for row in rows).encode()
        if path.name == "metrics.csv" and data:
            table = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
            out = io.StringIO(newline="")
            writer = csv.DictWriter(out, list(table[0]))
            writer.writeheader()
            writer.writerows(map(_plain_row, table))
            return out.getvalue().encode()
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, IndexError) as e:
        raise StudentError(f"{path} can't be read ({str(e)[:100]}); restore it, or train again") from None
    return None


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"changed": plain(row["changed"])} if "changed" in row else row


def plain(value: Any) -> Any:
    """A value of JSON in which no text names a folder of this machine."""
    if isinstance(value, str):
        return PurePosixPath(value).name if value.startswith(("/", "~/")) else _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _cache(storage: Storage, repo: str, allow_incomplete: bool) -> Contents:
    cache = open_cache(storage, images=False)
    seal, missing, notes = read_seal(cache), cache.missing(), list[str]()
    whole = seal is not None and seal.views >= cache.views and not missing
    if not whole and not allow_incomplete:
        units = cache.blocks * cache.views
        state = f"lacks {len(missing):,} of {units:,} units" if missing else "is not sealed"
        raise CacheError(
            f"{cache.location} {state}; finish it with `cskd cache-teacher {cache.path(RESOLVED)}`, or push what there is with "
            "--allow-incomplete"
        )
    if seal is not None and not missing:
        check_seal(cache, seal)
    if not whole:
        notes.append(f"incomplete: {counted(len(missing), 'unit')} missing, not sealed")
    sizes, inventory = {about.key: about.size for about in storage.list()}, cache.inventory.path
    units_and_records = list(_units(cache, sizes))
    header = {key: value for key, value in read_header(inventory).items() if key not in ("root", "hash")}
    header |= {"made": plain(header.get("made", {})), "notes": plain(header.get("notes", []))}
    manifest = replace(
        cache.manifest,
        data=None,
        config=plain(dict(cache.manifest.config)),
        notes=plain(list(cache.manifest.notes)) if cache.manifest.notes else None,
    )
    written = json_bytes(manifest.sealed)
    total = sum(file.size for file in units_and_records)
    files = [
        *_tables(cache, sizes),
        *units_and_records,
        *(_column(inventory / f"{name}.npy") for name in DTYPES),
        _made(f"{INVENTORY}/{HEADER}", header_bytes(header | {"hash": header_hash(header)})),
        _made(RESOLVED, manifest.resolved.encode()),
        _made(CARD, cache_card(cache, repo, total, whole).encode()),
        *((_file(cache, sizes, INDEX),) if whole and INDEX in sizes else ()),
        *((replace(_file(cache, sizes, SEAL), last=True),) if whole else ()),
        _made(MANIFEST_COPY, written),
        _made(MANIFEST, written),
    ]
    stale = re.compile(rf"(?:units|commits|{TABLES})/.*|{re.escape(SEAL)}|{re.escape(INDEX)}" if whole else "$^")
    return Contents("cache", files, stale, cache.fingerprint, tuple(notes))


def _column(path: Path) -> HubFile:
    return HubFile(f"{INVENTORY}/{path.name}", path, path.stat().st_size)


def _tables(cache: Cache, sizes: Mapping[str, int]) -> Iterator[HubFile]:
    """Both copies of what the units of a codec share. CacheError for one that is not as it was written."""
    for codec, digest in (cache.manifest.tables or {}).items():
        for copy in COPIES:
            read_copy(cache.storage, codec, digest, copy)
            yield replace(_file(cache, sizes, str(tables_file(codec, digest, copy))), fixed=True)


def _units(cache: Cache, sizes: Mapping[str, int]) -> Iterator[HubFile]:
    """The files of every unit that is there, and its record. CacheError for one that is not as recorded."""
    for block in range(cache.blocks):
        for view in range(cache.views):
            commit = cache.commit_of(block, view)
            if commit is None:
                continue
            for unit in commit.files:
                file = replace(_file(cache, sizes, unit.path), fixed=True)
                if file.size != unit.size:
                    raise CacheError(
                        f"{cache.path(unit.path)} has {file.size:,} bytes, its record says {unit.size:,}; run `cskd verify "
                        f"{cache.location}`"
                    )
                yield file
            yield _file(cache, sizes, str(commit_file(block, view)))


def _file(cache: Cache, sizes: Mapping[str, int], path: str) -> HubFile:
    if path not in sizes:
        raise CacheError(f"{cache.path(path)} is not there; run `cskd verify {cache.location}`")
    here = isinstance(cache.storage, Posix)
    return HubFile(path, cache.root / path if here else cache.storage, sizes[path])


def _made(path: str, data: bytes) -> HubFile:
    return HubFile(path, data, len(data), last=True, made=path == CARD)


def _refuse_limits(source: str, files: list[HubFile]) -> None:
    """HubError over what a repository of the hub can take."""
    if len(files) > MOST_FILES:
        raise HubError(
            f"{source} has {len(files):,} files, a repository of the hub at most {MOST_FILES:,}; cache fewer views or one codec, or "
            "share it by other means"
        )
    folders: dict[str, int] = {}
    for file in files:
        folder = file.path.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
        if file.size > LARGEST:
            raise HubError(
                f"{source}/{file.path} has {file.size:,} bytes, the hub takes files of at most {LARGEST:,}; make smaller blocks "
                "(cskd pack --block)"
            )
    if (most := max(folders.items(), key=lambda at: at[1]))[1] > MOST_IN_FOLDER:
        raise HubError(
            f"{source}/{most[0]} has {most[1]:,} files, a folder on the hub at most {MOST_IN_FOLDER:,}; cache fewer views or one codec"
        )
