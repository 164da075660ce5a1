"""One tree of exceptions. The text of each is the one line a user sees: what, what was expected, what to do next."""


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


class DataError(CskdError):
    """A source, shard, inventory or image is missing, damaged or disagrees with what was recorded."""


class ImageError(DataError):
    """An image that can't be decoded as a whole; stage 1 quarantines it with this reason."""


class ReadError(DataError):
    """Bytes that could not be read after some tries; never a reason to quarantine."""


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


def counted(n: int, noun: str) -> str:
    """'1 unit' or '1,024 units'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def printable(text: str) -> str:
    """The text in one line a terminal can show: control, direction and lone surrogate characters as \\x1b or \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
