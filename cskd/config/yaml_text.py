"""YAML of bounded size: aliases and merges can make a few lines stand for billions of values, or for themselves."""

from __future__ import annotations

from typing import Any

import yaml

from cskd.errors import ConfigError

MAX_BYTES = 1 << 19  # PyYAML reads about 100 kB a second; a list of 65,535 classes takes 450 kB
MAX_YAML_VALUES = 100_000  # once every alias is written out
MAX_YAML_DEPTH = 32
EXPECTED = "expected a file such as those that `cskd configs` lists"


def read_yaml(text: str, origin: str) -> Any:
    """What a YAML text of at most MAX_BYTES states, as plain Python values.

    Raises:  ConfigError, naming `origin`, for what is no YAML or stands for more than MAX_YAML_VALUES values.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin} has {len(text)} characters, expected at most {MAX_BYTES}; make it shorter")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0, origin)
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{origin} is nested deeper than {MAX_YAML_DEPTH} levels; flatten it") from None
    except ConfigError:
        raise
    except Exception as e:  # PyYAML's constructors raise ValueError, AttributeError and more for a bad date or number
        raise ConfigError(f"{origin} is not readable YAML: {' '.join(str(e).split())[:160]}; {EXPECTED}") from None


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
