"""Addresses of the Hugging Face hub, and copies of what they name: hf://[datasets/]OWNER/NAME[@REVISION][/PATH].

A revision is a branch, a tag or a commit; none means the newest commit. Copies lie in the hub's own cache on this machine
(`HF_HOME`), one folder per commit, and are read only. `pinned` gives the address with its commit: what a run or a cache records, so
that it reads the same when it goes on. No torch in here.

Source of the grammar: huggingface_hub, "HF URIs".
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from cskd.errors import CskdError, HubError, PathError, fitted, one_line
from cskd.files.waiting import said_when_long

FORM = "hf://[datasets/]OWNER/NAME[@REVISION][/PATH]"
PINS = "hub.json"  # of a run or a cache: address as it was written -> the same with its commit
Kind = Literal["model", "dataset"]
_SCHEME = re.compile(r"hf:/+")
_OTHER_KINDS = ("spaces", "buckets", "kernels")
# Letters, digits, single dots and hyphens, and underscores: at most 96 of them, none of . and - at an end.
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"@(refs/(?:pr|convert)/[^/:]+|[^/:]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAddress:
    """What an hf:// address says. revision: empty for the newest commit. path: inside the repository, may end in `:KEY`."""

    kind: Kind
    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        at = "@" + (self.revision if self.revision.startswith("refs/") else quote(self.revision, safe=""))
        below = self.path if self.path.startswith(":") else f"/{self.path}"
        kind = "datasets/" if self.kind == "dataset" else ""
        return f"hf://{kind}{self.repo}{at if self.revision else ''}{below if self.path else ''}"

    @property
    def pinned(self) -> bool:
        """Whether it names one commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


_TRANSPORT = ("httpx", "httpcore", "requests")  # what the hub's client speaks by


def is_hub(text: str | Path | None) -> bool:
    """Whether a text is meant as an address of the hub. A Path has lost one of the two slashes, which is seen to."""
    return text is not None and _SCHEME.match(str(text)) is not None


def parse_address(text: str | Path, what: str) -> HubAddress:
    """The parts of an address. `what` names the key or argument. PathError for one that is malformed."""
    rest = _SCHEME.sub("", str(text), count=1)
    first, _, more = rest.partition("/")
    if first in _OTHER_KINDS:
        raise PathError(
            f"{what} {_shown(text)} is one of the hub's {first}, expected a model or dataset repository: {FORM}"
        )
    kind: Kind = "dataset" if first == "datasets" else "model"
    owner, _, rest = (more if first in ("datasets", "models") else rest).partition("/")
    end = next((i for i, c in enumerate(rest) if c in "@/:"), len(rest))
    name, rest = rest[:end], rest[end:]
    at = _REVISION.match(rest)
    path = (rest[at.end() :] if at else rest).rstrip("/")
    revision = unquote(at[1]) if at else ""
    parts = path.removeprefix("/").partition(":")[0].split("/")
    odd = rest.startswith("@") and at is None
    odd = (
        odd
        or ".." in revision.split("/")
        or (path.startswith("/") and any(part in ("", ".", "..") for part in parts[:-1]))
    )
    if odd or parts[-1] in (".", "..") or not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)):
        raise PathError(f"{what} {_shown(text)} is no address of the hub, expected {FORM}")
    return HubAddress(kind, f"{owner}/{name}", revision, path.removeprefix("/"))


def local_copy(address: HubAddress, what: str) -> Path:
    """The folder, or what `path` names in it, on this machine: downloaded, where it is not there yet. Never write to it.

    Without a path the whole repository; with one, that file or folder, and next to it the config.json and heads of tokens.

    Raises:  HubError in one line, OSError where the disk refuses.
    """
    folder = _snapshot(replace(address, path=""), _patterns(address.path), what)
    if not address.path:
        return folder
    path = Path(f"{folder}{address.path}") if address.path.startswith(":") else folder / address.path
    if not path.exists() and not (":" in path.name and path.with_name(path.name.rpartition(":")[0]).exists()):
        raise HubError(f"{what} {_shown(address)}: the repository has no such file; look at its page on the hub")
    return path


def pin(address: HubAddress, what: str) -> HubAddress:
    """The same address with the commit that it names now; downloads what it names. Raises as `local_copy`."""
    if address.pinned:
        return address
    folder = _snapshot(replace(address, path=""), _patterns(address.path), what)
    return replace(address, revision=folder.name)


@functools.cache  # of the addresses of one process: a repository that changes meanwhile changes nothing here
def _snapshot(address: HubAddress, patterns: tuple[str, ...], what: str) -> Path:
    import huggingface_hub

    with hub_calls(what, address):
        folder = huggingface_hub.snapshot_download(
            address.repo,
            repo_type=address.kind,
            revision=address.revision or None,
            allow_patterns=list(patterns) or None,
        )
    return Path(folder)


def _patterns(path: str) -> tuple[str, ...]:
    """What is downloaded for a path; what follows a colon may be a key."""
    if not path or path.startswith(":"):
        return ()
    names = {path, path.rpartition(":")[0] or path}
    beside = glob.escape(path.rpartition("/")[0])
    return (
        *(pattern for name in sorted(map(glob.escape, names)) for pattern in (name, f"{name}/*")),
        *(f"{beside}/{name}" if beside else name for name in ("config.json", "heads*.safetensors")),
    )


@contextlib.contextmanager
def hub_calls(what: str, address: HubAddress, doing: str = "read") -> Iterator[None]:
    """Calls of huggingface_hub, as in `quiet_hub`, each error as one line.

    Args:    what: the key or argument. doing: 'read' or 'write'.
    Raises:  HubError; errors of the disk as they are.
    """
    try:
        with (
            quiet_hub(),
            waiting_for_hub(f"{what} {_shown(address)}", "a folder or file here in its place")
            if doing == "read"
            else contextlib.nullcontext(),
        ):
            yield
    except CskdError:
        raise
    except Exception as e:  # of the hub's client, its transport, and what they are built on
        if (why := _why(e, address, doing)) is None:
            raise
        raise HubError(fitted(f"{what} {_shown(address)}: {why}")) from e


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Calls of huggingface_hub, ours or another library's: bars on terminals only, no log lines."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled() and not sys.stderr.isatty()
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def waiting_for_hub(what: str, instead: str) -> contextlib.AbstractContextManager[None]:
    """Say what is asked of the hub, where it takes long. instead: what does without a network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # nobody is asked: a large model takes its time to build
        return contextlib.nullcontext()
    return said_when_long(f"{what} from {constants.ENDPOINT}", f"without a network give {instead}")


def refusal_of(error: Exception, repo: str) -> str | None:
    """Cause and cure, as the second half of a line, of an error that another library met when it read a model of the hub; None
    where the hub has nothing to do with it."""
    of_the_hub = any(type(e).__module__.startswith((*_TRANSPORT, "huggingface_hub")) for e in _chain(error))
    return _why(error, HubAddress("model", repo), "read") if of_the_hub else None


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it came of."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return chain


def _why(error: Exception, address: HubAddress, doing: str) -> str | None:
    """Cause and cure, as the second half of a line; None for errors of this machine's disk."""
    from huggingface_hub import errors

    chain = _chain(error)
    kinds = {type(e).__name__ for e in chain}
    status = next(
        (e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError) and e.response is not None),
        None,
    )
    if isinstance(error, OSError) and error.errno is not None:
        return None
    if "OfflineModeIsEnabled" in kinds or _offline():
        copy = " and no whole copy is in the hub's cache on this machine" if doing == "read" else ""
        return f"HF_HUB_OFFLINE is set{copy}; unset it"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page on the hub, and run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {address.revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "it has no such file; look at its page on the hub"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return _not_there(address, doing)
    if status == 401:
        return "the hub does not accept the token; run `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the hub does not let this token {doing} it; take a token with that right, or another owner"
    if status == 429:
        return "the hub asks for fewer requests; run the same command again later, it goes on where this one stopped"
    if status == 413:
        return "the hub finds a file or commit too large; see its limits for the plan of this owner"
    if status is not None:
        return f"the hub answered {status} ({one_line(chain[0], 100)}); run the same command again later"
    if any(type(e).__module__.startswith(_TRANSPORT) for e in chain):
        last = next(e for e in reversed(chain) if str(e))
        return f"the hub can't be reached ({one_line(last, 80)}); see to the network, and run the same command again"
    return f"{one_line(error, 140)}; run the same command again"


def _not_there(address: HubAddress, doing: str) -> str:
    other: Kind = "model" if address.kind == "dataset" else "dataset"
    if repo_exists(address.repo, other):
        other_address = HubAddress(other, address.repo, address.revision, address.path)
        return f"there is no {address.kind} repository of that name, but a {other}: {other_address}"
    right = "may read (a private one needs `hf auth login`)" if doing == "read" else "may write to"
    return f"there is no {address.kind} repository of that name that this user {right}; look for it on the hub"


def repo_exists(repo: str, kind: Kind) -> bool:
    """Whether the hub shows a repository of that kind; False where it does not answer."""
    import huggingface_hub

    try:
        return bool(huggingface_hub.HfApi().repo_exists(repo, repo_type=kind))
    except Exception:  # asked for a hint only
        return False


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _shown(text: object) -> str:
    return repr(str(text)[:100])
