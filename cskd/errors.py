"""One tree of exceptions. The text of each is the one line a user sees: what, what was expected, what to do next.

`said` is the same for what the system refuses: cause and cure by error number, in one table for all callers.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class CskdError(Exception):
    """Anything the user can mend. The command line prints it as one line and exits with 1.

    Texts quote names out of other people's files; whatever controls a terminal in them, or ends a line, shows as \\x1b.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(CskdError):
    """A key, type or value of a config, or a combination of them, is not usable."""


class PathError(CskdError):
    """A path is no path of this machine, a folder is of another kind than what would be written, or has a writer already."""


class StorageError(CskdError):
    """An object store is out of reach, has no such bucket, or does not let this user in: no object is to blame."""


class HubError(CskdError):
    """The Hugging Face hub is out of reach, has not what was asked for, or does not let this user read or write it."""


class DataError(CskdError):
    """A source, shard, inventory or image is missing, damaged or disagrees with what was recorded."""


class ImageError(DataError):
    """An image that can't be decoded as a whole; stage 1 quarantines it with this reason."""


class ReadError(DataError):
    """Bytes that could not be read after some tries; never a reason to quarantine."""


class LimitError(CskdError):
    """This process, or this machine, may open no more files: no file is to blame, and none is damaged."""


class TeacherError(CskdError):
    """The teacher can't be built, has no exact dense form, or its outputs are not usable."""


class StudentError(CskdError):
    """The student can't be built, or does not fit the cached teacher grid or classes."""


class RankError(CskdError):
    """Another rank of the run failed, so that this one can't go on."""


class NotFiniteError(StudentError):
    """A loss, weights or logits hold NaN or an infinity. `what` says which, `step` since which update where that is known;
    the message adds what to do."""

    def __init__(self, what: str, advice: str, step: int | None = None) -> None:
        super().__init__(f"{what}{'' if step is None else f' at step {step}'}; {advice}")
        self.what, self.step = what, step


class OutOfMemoryError(CskdError):
    """A device, or the machine, has too little memory for a batch. The text says what fits, and which keys make it less."""


class CodecError(CskdError):
    """Teacher outputs that a codec can't hold, or stored arrays that are not this codec's."""


class CacheError(CskdError):
    """A cache is missing, unfinished, damaged, or made from something else than asked for."""


class PlanError(CskdError):
    """Views, repeats, group and batch size do not fit together."""


class ReplayError(CskdError):
    """A replayed view is not, byte for byte, what the teacher saw."""


MOST = 300  # characters of a line that says what went wrong
_KEPT = 24  # characters of a long word that stay at each of its ends


def fitted(text: str, most: int = MOST) -> str:
    """A message in one line of at most `most` characters, with its beginning, the cause, and its end, the next step.

    What is long gives way first: of paths, lists and quoted values the middle is left out, the longest first. Where that is not
    enough, the middle of the whole is.
    """
    words = printable(" ".join(text.split())).split(" ")
    while (over := sum(map(len, words)) + len(words) - 1 - most) > 0:
        at = max(range(len(words)), key=lambda i: len(words[i]))
        if len(words[at]) <= 2 * _KEPT:
            break
        words[at] = shortened(words[at], max(2 * _KEPT, len(words[at]) - over))
    return shortened(" ".join(words), most)


def shortened(text: str, most: int) -> str:
    """A text without its middle, where it is longer."""
    head = (most - 3) // 2
    return text if len(text) <= most else f"{text[:head]}...{text[len(text) - (most - 3 - head) :]}"


def shown(error: BaseException) -> str:
    """An error as the line that a user sees. Of an error of the system, which is no `CskdError`, with its path."""
    if isinstance(error, OSError) and error.filename:
        return fitted(f"{error.filename}: {error.strerror or error}")
    return fitted(str(error))


def one_line(error: BaseException, most: int = 160) -> str:
    """An exception of anybody's as part of one line: its type, and at most `most` characters of its text.

    Of one that another process raised, whose text is a whole traceback, the last line.
    """
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        return shortened(printable(text.splitlines()[-1].strip()), most)
    return f"{type(error).__name__}: {shortened(printable(' '.join(text.split())), most)}"


_AGAIN = "run the same command again"
_OTHER = "give another path"
_NETWORK = f"see that it is mounted and its server answers, and {_AGAIN}"
_SAID = {  # error number -> cause, cure
    errno.EMFILE: (
        "too many files are open in this process, over its limit{limit}",
        f"raise its limit (`ulimit -n 65536`) and {_AGAIN}",
    ),
    errno.ENFILE: ("too many files are open on this machine", f"end other programs or raise fs.file-max, and {_AGAIN}"),
    errno.ENOMEM: ("the system has no memory left for it", f"end other programs, and {_AGAIN}"),
    errno.ENOSPC: (
        "no room (or no inode) is left on its disk",
        f"make room (`df -h`, `df -i`) and {_AGAIN}, or {_OTHER}",
    ),
    errno.EDQUOT: ("your quota on its disk is used up", f"delete files (`quota -s`) and {_AGAIN}, or {_OTHER}"),
    errno.EFBIG: ("the file is larger than its disk, or `ulimit -f`, allows", _OTHER),
    errno.EROFS: ("its disk is mounted read-only", f"{_OTHER}, or mount it for writing"),
    errno.EACCES: ("you have no permission for it", f"change that (`ls -ld`, chmod), or {_OTHER}"),
    errno.EPERM: ("the system does not permit it", f"look at its owner and attributes (`ls -ld`, lsattr), or {_OTHER}"),
    errno.ENOENT: ("there is no such file or folder", "give a path that exists"),
    errno.ENOTDIR: ("a part of the path is a file, expected a folder", _OTHER),
    errno.EISDIR: ("it is a folder, expected a file", _OTHER),
    errno.EEXIST: ("it exists already", f"remove it, or {_OTHER}"),
    errno.ENOTEMPTY: ("the folder is not empty", f"empty it, or {_OTHER}"),
    errno.ENAMETOOLONG: ("the name is too long (mostly 255 bytes, 4,096 in a path)", "give a shorter one"),
    errno.ELOOP: ("its links lead in a circle", "mend the link"),
    errno.EXDEV: ("it lies on two file systems", "give paths on one disk"),
    errno.EBUSY: ("another program holds it", f"end that, and {_AGAIN}"),
    errno.ETXTBSY: ("another program runs or writes it", f"end that, and {_AGAIN}"),
    errno.EIO: ("its disk failed to read or write", f"look at the disk (`dmesg`), restore the file, and {_AGAIN}"),
    errno.ENXIO: ("its device is gone", _NETWORK),
    errno.ENODEV: ("its device is gone", _NETWORK),
    errno.ESTALE: ("its network file system has lost it (stale handle)", f"mount that again, and {_AGAIN}"),
    errno.ENOTCONN: ("its file system is not connected", _NETWORK),
    errno.ETIMEDOUT: ("its file system did not answer in time", _NETWORK),
    errno.EHOSTDOWN: ("the server of its file system is down", _NETWORK),
    errno.ECONNRESET: ("its file system broke the connection", _NETWORK),
    errno.ENOLCK: ("its file system gives no locks", f"{_OTHER}, on a disk that has locks"),
    errno.EPIPE: ("what reads the output has ended", f"{_AGAIN} without it"),
    errno.EINVAL: ("the system finds it invalid", _OTHER),
    errno.ENOSYS: ("its file system can't do that", f"{_OTHER}, on another disk"),
    errno.EOPNOTSUPP: ("its file system can't do that", f"{_OTHER}, on another disk"),
}
LIMITS = frozenset([errno.EMFILE, errno.ENFILE])
NO_WRITING = frozenset([errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT])


def why(error: OSError) -> str:
    """Cause and cure of what the system refused, as the second half of a line about a file."""
    known = _SAID.get(error.errno or 0)
    own = error.strerror and error.strerror != os.strerror(error.errno or 0)  # what our own code says of a file
    if known is None or own:
        text = error.strerror or " ".join(str(error).split())
        return text if ";" in text else f"{text}; mend that, or {_OTHER}, and {_AGAIN}"
    return f"{known[0].format(limit=_limit())} ({os.strerror(error.errno or 0)}); {known[1]}"


def said(error: OSError, where: str | Path = "") -> str:
    """The whole line: the file (of a move both), else `where`, then `why`."""
    names = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    return f"{names or where or 'the system'}: {why(error)}"


def limit_said(error: BaseException) -> str:
    """The line for any library's exception that comes from too many open files; empty for others."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in LIMITS:
            return said(error)
        for number in LIMITS:
            if os.strerror(number) in str(error) or (number == errno.EMFILE and "ancdata" in str(error)):
                return said(OSError(number, os.strerror(number)))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return ""


def _limit() -> str:
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    return f" of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"


def counted(n: int, noun: str) -> str:
    """'1 unit' or '1,024 units'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def printable(text: str) -> str:
    """The text in one line a terminal can show: control, direction and lone surrogate characters as \\x1b or \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
