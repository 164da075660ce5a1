"""What the documents tell readers to type: fenced blocks with the marks before them, and the commands in them.

CONTRIBUTING.md, "Commands in documents", says what the marks mean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELL = ("bash", "console", "sh", "shell")
REASONS = ("network", "GPU", "cluster", "hours")  # for which a command of the tutorial or of a how-to is not run
# What may stand before a program; their options are not looked at.
LAUNCHERS = ("torchrun", "srun", "nohup", "time", "timeout", "watch", "exec")
KEYWORDS = ("do", "then", "else", "if", "while", "until", "!", "{")

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$"
    r"|<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, or the commands of a `<!-- run` comment; mark: the comment right before it."""

    document: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def saved_as(self) -> str:
        """The file that this block is the text of, or nothing."""
        return self.mark.removeprefix("save ") if self.mark.startswith("save ") else ""

    @property
    def kept_from_running(self) -> str:
        """Why its commands are not run, or nothing."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""

    @property
    def script(self) -> str:
        """The commands of a shell's block: of a `console`, the lines after `$ `; its other lines are what was printed."""
        if self.language != "console":
            return self.text
        lines, more = [], False
        for line in self.text.splitlines():
            if more or line.startswith("$ "):
                lines.append(line if more else line[2:])
                more = line.endswith("\\")
        return "\n".join(lines) + "\n"


def blocks(document: Path, text: str | None = None) -> Iterator[Block]:
    """The blocks of a document in their order; text: instead of what is in the file."""
    text = document.read_text(encoding="utf-8") if text is None else text
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if found["hidden"] is not None:
            yield Block(document, line, "bash", found["hidden"], "")
        else:
            body = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
            yield Block(document, line, found["language"], body, found["mark"] or "")


def spans(document: Path) -> Iterator[str]:
    """The inline code of a document, each on one line."""
    prose = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        yield " ".join(found[1].split())


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell script, without redirections, assignments and what starts them."""
    for words in _lines(script):
        command: list[str] = []
        skip = False
        for word in [*words, ";"]:
            if skip:
                skip = False
            elif set(word) <= set("<>&") and set(word) & set("<>"):
                skip = True
                if command and command[-1].isdigit():  # 2> FILE
                    command.pop()
            elif set(word) <= set("|&;()"):
                if command := _program(command):
                    yield command
                command = []
            else:
                command.append(word)


def _lines(script: str) -> Iterator[list[str]]:
    """The words of each line; a line ends where its quotes do."""
    begun = ""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(f"{begun}{line}", posix=True, punctuation_chars=True)
        words.commenters = "#"
        words.whitespace_split = True
        try:
            yield list(words)
            begun = ""
        except ValueError:
            begun += f"{line}\n"


def _program(words: list[str]) -> list[str]:
    while words and (words[0] in KEYWORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    if words and words[0] in LAUNCHERS:
        at = next((i for i, word in enumerate(words[1:], 1) if _is_program(word)), 0)
        return words[at:]
    return words


def _is_program(word: str) -> bool:
    return Path(word).name in ("cskd", "python", "python3")


def of_cskd(script: str) -> Iterator[list[str]]:
    """The arguments of each call of `cskd` in a script."""
    for name, *arguments in commands(script):
        if Path(name).name == "cskd":
            yield arguments
        elif Path(name).name.startswith("python") and arguments[:2] == ["-m", "cskd"]:
            yield arguments[2:]
