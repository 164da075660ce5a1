"""YAML of bounded size: aliases and merges can make a few lines stand for billions of values, or for themselves.

PyYAML reads YAML 1.1, where off is false, 1:30 is 90 and 010 is 8, and where the last of two equal keys wins. What it makes of
a word that means something else to most readers can be asked for here; a key that stands twice is refused.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import yaml

from cskd.errors import ConfigError, shortened

MAX_BYTES = 1 << 19  # PyYAML reads about 100 kB a second; a list of 65,535 classes takes 450 kB
MAX_YAML_VALUES = 100_000  # once every alias is written out
MAX_YAML_DEPTH = 32
EXPECTED = "expected a file such as those that `cskd configs` lists"
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
# A number to YAML 1.2, to people and to JSON, which YAML 1.1 takes for text: it wants a point, and a sign after the e.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|0o[0-7]+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")

Words = dict[str, str]  # dotted key -> how a value was written that is no plain text to YAML, or should be none


def read_yaml(text: str, origin: str, words: Words | None = None, key: str = "") -> Any:
    """What a YAML text of at most MAX_BYTES states, as plain Python values.

    Args:    words: gets how values were written, by key; key: of the whole text.
    Raises:  ConfigError, naming `origin`, for what is no YAML, has a key twice, or stands for more than MAX_YAML_VALUES values.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin} has {len(text)} characters, expected at most {MAX_BYTES}; make it shorter")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0, origin)
        _walk(node, key, {} if words is None else words, origin)
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{origin} is nested deeper than {MAX_YAML_DEPTH} levels; flatten it") from None
    except ConfigError:
        raise
    except Exception as e:  # PyYAML's constructors raise ValueError, AttributeError and more for a bad date or number
        raise ConfigError(f"{origin} is not readable YAML: {_why(e, text)}") from None


def as_read(word: str, value: Any) -> str:
    """What YAML made of a word, where that surprises: `off as false`, `1:30 as 90, in base 60`; '' where it does not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) or value is None:
        said = {True: "true", False: "false", None: "null"}[value]
        return "" if word.lower() == said else f"{word or 'nothing'} as {said}"
    if number and ":" in word:
        return f"{word} as {value}, in base 60"
    if number and _OCTAL.fullmatch(word):
        return f"{word} as {value}, in base 8"
    if number:
        return f"{word} as {'the number ' if word == str(value) else ''}{value}"
    if isinstance(value, str):
        return f"{word} as text"
    return f"{word} as a {type(value).__name__}"


def misread(word: str, value: Any) -> bool:
    """Whether a number is one that nobody meant by the word: base 60, and base 8 by a mere 0 in front."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (":" in word or _OCTAL.fullmatch(word) is not None)


def _walk(node: yaml.Node, key: str, words: Words, origin: str) -> None:
    """Note how values were written. ConfigError for a key that stands twice in a mapping."""
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _walk(child, f"{key}[{i}]", words, origin)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, child in node.value:
            if name.tag == _MERGE:
                _walk(child, key, words, origin)
            elif isinstance(name, yaml.ScalarNode):
                below, line = f"{key}.{name.value}" if key else name.value, name.start_mark.line + 1
                if (plain := unicodedata.normalize("NFC", name.value)) in lines:
                    where = dict.fromkeys((lines[plain], line))
                    said = " and ".join(f"line {number}" for number in where)
                    raise ConfigError(f"{origin} has the key {below} twice, in {said}; leave one out")
                lines[plain] = line
                _walk(child, below, words, origin)
    elif (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and (node.tag != _TEXT or _NUMBER.fullmatch(node.value))
    ):
        words[key] = node.value


def _why(error: Exception, text: str) -> str:
    """A complaint of PyYAML's, of several lines, in one, with what is mostly meant."""
    mark = getattr(error, "problem_mark", None)
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    if mark is None:
        return f"{shortened(said, 160)}; {EXPECTED}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"line {mark.line + 1}"
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in said:
        return f"{where} has a tab where it is indented, YAML takes spaces alone; put spaces there"
    if "mapping values" in said:
        return f"{where} has a second ': '; put the text in quotes, or mend how the line is indented"
    if said.startswith("could not find expected ':'"):
        return f"{where}, or the one before, is no 'key: value'; write a colon and a space after the key"
    if "could not determine a constructor" in said or "undefined alias" in said or "cannot start any token" in said:
        return f"{where}: {shortened(said, 120)}; put a text that begins with a sign in quotes"
    return f"{where}: {shortened(said, 120)}; {EXPECTED}"


def _size(node: yaml.Node, known: dict[int, int], depth: int, origin: str) -> int:
    """Values a node stands for. ConfigError when they are too many, too deep, or hold themselves."""
    if depth > MAX_YAML_DEPTH:
        raise ConfigError(f"{origin} is nested deeper than {MAX_YAML_DEPTH} levels, or holds itself; flatten it")
    if id(node) in known:
        return known[id(node)]
    count = 1
    if isinstance(node, yaml.CollectionNode):
        children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        for child in children:
            count += _size(child, known, depth + 1, origin)
            if count > MAX_YAML_VALUES:
                raise ConfigError(f"{origin} stands for more than {MAX_YAML_VALUES} values; write it without aliases")
    known[id(node)] = count
    return count
