"""Put a run or a cache on the Hugging Face hub: `cskd push RUN|CACHE OWNER/NAME`. The same command goes on where it was stopped.

list    what goes there, by `contents.py`: a cache must be sealed, and within the hub's limits
open    the repository, made where there is none; one of another kind, or with another cache, is refused
compare each file with the one there; what is the same is left out
commit  in parts; last what makes the repository be a run or a cache, so that half of one is taken for none
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import cskd
from cskd.errors import HubError, PathError, counted
from cskd.files.hub import FORM, HubAddress, hub_calls, is_hub, parse_address, repo_exists, waiting_for_hub
from cskd.files.paths import location_text
from cskd.files.read import parse_json, read_file
from cskd.files.temporary import temporary_folder
from cskd.pipeline.hub.cards import CARD, MADE
from cskd.pipeline.hub.contents import Contents, HubFile, opened
from cskd.pipeline.model_card import unedited
from cskd.pipeline.show.progress import Progress, print_lines
from cskd.storage.ahead import ahead
from cskd.store.format import MANIFEST

# Of one commit: the hub takes 128 in an hour, and 1,000 files in each by its own client.
PART_FILES, PART_BYTES = 1_000, 5_000_000_000
_KINDS = {"run": "model", "cache": "dataset"}


@dataclass(frozen=True)
class PushedFile:
    path: str
    bytes: int


@dataclass(frozen=True)
class PushReport:
    """files: all that belong there. sent, sent_bytes: of this run of the command. address: with the commit, for `cache.path` or
    `student.init`; without one after --dry-run, which sends nothing."""

    source: str
    kind: str
    address: str
    files: list[PushedFile]
    bytes: int
    sent: int
    sent_bytes: int
    removed: list[str]
    private: bool | None
    dry_run: bool
    notes: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)


def push(
    source: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    allow_incomplete: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> PushReport:
    """Put a run or a cache on the hub, from its folder or from an object store.

    Args:    repo: OWNER/NAME. revision: a branch, made where there is none. message: of the commit.
    Raises:  PathError for a folder or a name that can't be; CacheError, StudentError for one that is not whole; HubError where the
             hub refuses or is out of reach.
    """
    target = target_of(repo, revision)
    with opened(source, target.repo, allow_incomplete) as found:
        target = _of_kind(target, found, repo)
        files = [PushedFile(file.path, file.size) for file in found.files]
        report = PushReport(
            source=location_text(str(source), "RUN|CACHE"),
            kind=found.kind,
            address=str(target),
            files=files,
            bytes=sum(file.bytes for file in files),
            sent=0,
            sent_bytes=0,
            removed=[],
            private=private or None,
            dry_run=dry_run,
            notes=list(found.notes),
        )
        return report if dry_run else _push(found, target, private, message, quiet, report)


def target_of(repo: str, revision: str | None) -> HubAddress:
    """OWNER/NAME, or an address of the hub, and the branch. PathError for others."""
    text = repo if is_hub(repo) else f"hf://{repo}"
    try:
        target = parse_address(text, "REPO")
    except PathError:
        raise PathError(f"REPO {repo[:100]!r} is no name of a repository, expected OWNER/NAME") from None
    if target.path or (target.revision and revision):
        raise PathError(f"REPO {repo[:100]!r} names more than a repository, expected OWNER/NAME (and --revision)")
    target = replace(target, revision=revision or target.revision)
    if target.pinned or any(c.isspace() for c in target.revision):
        raise PathError(
            f"--revision {target.revision[:60]!r} is no branch that can be written to; give a branch's name"
        )
    return target


def _of_kind(target: HubAddress, found: Contents, repo: str) -> HubAddress:
    """The target as a repository of the kind that such a folder goes to. PathError where REPO says another one."""
    said = repo.removeprefix("hf://").partition("/")[0]
    kind = _KINDS[found.kind]
    if said in ("models", "datasets") and said != f"{kind}s":
        raise PathError(
            f"REPO {repo[:100]!r} is a {said[:-1]} repository, a {found.kind} goes to a {kind}; expected {FORM}"
        )
    return HubAddress("dataset" if kind == "dataset" else "model", target.repo, target.revision)


def _push(
    found: Contents, target: HubAddress, private: bool, message: str | None, quiet: bool, report: PushReport
) -> PushReport:
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"REPO {target.repo!r}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    if huggingface_hub.get_token() is None:
        raise HubError(f"REPO {target.repo!r}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi(library_name="cskd", library_version=cskd.__version__)
    where: dict[str, Any] = {"repo_id": target.repo, "repo_type": target.kind, "revision": target.revision or None}
    with hub_calls("REPO", target, "write"):
        with waiting_for_hub(f"REPO {target.repo!r}", "it later: the same command goes on"):
            is_private = _open_repo(api, target, private)
        there = {f.path: f for f in api.list_repo_tree(recursive=True, **where) if hasattr(f, "blob_id")}
        _refuse_another(api, found, target, there, where)
        changed = [file for file in found.files if not _same(file, there.get(file.path))]
        if any(file.made for file in changed) and CARD in there and not _ours(api, where):
            changed = [file for file in changed if not file.made]
            report.notes.append(f"the {CARD} that is there was edited, and stays")
        removed = sorted(there.keys() - {file.path for file in found.files})
        removed = [path for path in removed if found.stale.fullmatch(path)]
        size, done, commit = sum(file.size for file in changed), 0, ""
        parts = list(_parts(changed)) or ([[]] if removed else [])
        subject = message or f"{found.kind} by cskd {cskd.__version__}"
        with Progress("push", size, "bytes", quiet=quiet) as progress:
            for i, part in enumerate(parts, 1):
                last = i == len(parts)
                deletions = [CommitOperationDelete(path) for path in removed] if last else []
                numbered = f" (part {i} of {len(parts)})" if len(parts) > 1 else ""
                with _here(part) as sources:
                    additions = [CommitOperationAdd(file.path, sources[file.path]) for file in part]
                    commit = api.create_commit(
                        operations=[*additions, *deletions], commit_message=f"{subject}{numbered}", **where
                    ).oid
                done += sum(file.size for file in part)
                progress.update(done)
        commit = commit or str(api.repo_info(**where).sha)
    return replace(
        report,
        address=str(replace(target, revision=commit)),
        sent=len(changed),
        sent_bytes=size,
        removed=removed,
        private=is_private,
    )


def _open_repo(api: Any, target: HubAddress, private: bool) -> bool | None:
    """Make the repository, and the branch, where there is none. Returns: whether it is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(target.repo, repo_type=target.kind)
    except RepositoryNotFoundError:
        other: Any = "model" if target.kind == "dataset" else "dataset"
        if repo_exists(target.repo, other):
            raise HubError(
                f"REPO {target.repo!r} is a {other} repository, and this goes to a {target.kind}; give another name"
            ) from None
        api.create_repo(target.repo, repo_type=target.kind, private=private or None, exist_ok=True)
        info = api.repo_info(target.repo, repo_type=target.kind)
    if private and info.private is False:
        raise HubError(
            f"REPO {target.repo!r} is public, and --private was asked for; make it private in its settings, or give another name"
        )
    if target.revision and not target.revision.startswith("refs/"):
        api.create_branch(target.repo, repo_type=target.kind, branch=target.revision, exist_ok=True)
    return None if info.private is None else bool(info.private)


def _refuse_another(
    api: Any, found: Contents, target: HubAddress, there: dict[str, Any], where: dict[str, Any]
) -> None:
    """HubError where the repository holds a cache of another fingerprint."""
    if found.kind != "cache" or MANIFEST not in there:
        return
    fingerprint = parse_json(read_file(api.hf_hub_download(filename=MANIFEST, **where))).get("fingerprint")
    if fingerprint != found.fingerprint:
        raise HubError(
            f"REPO {target.repo!r} holds another cache, with fingerprint {str(fingerprint)[:12]}, this one has "
            f"{found.fingerprint[:12]}; give another name, or another branch with --revision"
        )


def _ours(api: Any, where: dict[str, Any]) -> bool:
    """Whether the card in the repository is one that was generated."""
    data = read_file(api.hf_hub_download(filename=CARD, **where))
    return MADE.encode() in data or unedited(data)


def _same(file: HubFile, there: Any) -> bool:
    """Whether the repository has this file: by size and hash, of a large one sha256, of others git's own of a blob."""
    if there is None or there.size != file.size:
        return False
    if file.fixed:
        return True
    if there.lfs is not None:
        return bool(there.lfs.sha256 == _hash(file, "sha256", b""))
    return bool(there.blob_id == _hash(file, "sha1", f"blob {file.size}\0".encode()))


@contextmanager
def _here(part: list[HubFile]) -> Iterator[dict[str, Path | bytes]]:
    """What a commit sends, by path: of files on an object store copies, which go with the commit, so that the disk holds one part."""
    with temporary_folder("push") as folder:
        sources = {file.path: file.source for file in part if isinstance(file.source, Path | bytes)}
        stored = {file.path: file for file in part if file.path not in sources}

        def fetched(path: str) -> Path:
            file, copy = stored[path], Path(folder, hashlib.sha256(path.encode()).hexdigest())
            copy.write_bytes(file.source.get(path))  # type: ignore[union-attr]
            return copy

        for path, copy in ahead(iter(stored), fetched, lambda path: stored[path].size):
            sources[path] = copy.result()
        yield sources


def _hash(file: HubFile, name: str, head: bytes) -> str:
    digest = hashlib.new(name, head)
    if isinstance(file.source, Path):
        with file.source.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    else:  # of a store small ones alone: a unit's name holds its hash
        digest.update(file.source if isinstance(file.source, bytes) else file.source.get(file.path))
    return digest.hexdigest()


def _parts(files: list[HubFile]) -> Iterator[list[HubFile]]:
    """The files by commits; what comes last has one of its own where there are others."""
    part: list[HubFile] = []
    for file in sorted(files, key=lambda file: file.last):
        full = len(part) == PART_FILES or sum(f.size for f in part) + file.size > PART_BYTES
        if part and (full or file.last != part[-1].last):
            yield part
            part = []
        part.append(file)
    if part:
        yield part


def render(report: PushReport, console: Console) -> None:
    """The report for people."""
    lines = list(report.notes)
    if report.dry_run:
        lines += [f"{file.bytes:>15,} {file.path}" for file in report.files]
    whole = f"{counted(len(report.files), 'file')}, {report.bytes:,} bytes"
    if report.dry_run:
        lines.append(f"{report.source}, a {report.kind}: {whole} would be at {report.address}; nothing was sent")
    else:
        gone = f", removed {counted(len(report.removed), 'file')}" if report.removed else ""
        lines.append(
            f"{report.source}, a {report.kind}: {whole}; sent {report.sent:,}, {report.sent_bytes:,} bytes{gone}"
        )
        lines.append(report.address)
        if report.kind == "cache":
            lines.append(f"train from it: cskd train CONFIG --set cache.path={report.address} --set data.train=FOLDER")
        else:
            address = parse_address(report.address, "REPO")
            lines.append(f'load it: timm.create_model("hf-hub:{address.repo}@{address.revision}", pretrained=True)')
    print_lines(console, *lines)
