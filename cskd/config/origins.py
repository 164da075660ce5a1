"""Where each value of a config comes from: a default, a line of its file, or --set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cskd.config.load import NEWER, config_text, load_config, to_dict
from cskd.config.yaml_text import read_yaml

DEFAULT = "default"
_VARIABLES = re.compile(r"\$\{\w+(?::-[^}]*)?\}")
_COLUMN = 48  # where the origins begin, next to values that are not longer


@dataclass(frozen=True)
class Setting:
    """A key `section.name`, its value, and its origin: `default`, `FILE:LINE` (and the variables in it), `--set KEY=VALUE`."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """Every key of a config, in the order of docs/CONFIG.md."""

    config: str
    settings: list[Setting]


def resolve(path: str | Path, overrides: list[str] | None = None) -> Resolved:
    """A config as the commands read it, each value with its origin. Raises ConfigError as `load_config`."""
    config = load_config(path, overrides)
    found = _origins(path, overrides or [])
    settings = [
        Setting(f"{section}.{name}", value, found.get(f"{section}.{name}", DEFAULT))
        for section, values in to_dict(config).items()
        for name, value in values.items()
    ]
    return Resolved(str(path), settings)


def as_yaml(resolved: Resolved) -> str:
    """The config as YAML, each origin a comment: a file that the commands read again."""
    lines, last = [], ""
    for setting in resolved.settings:
        section, _, name = setting.key.partition(".")
        if section != last:
            lines += [*([""] if last else []), f"{section}:"]
            last = section
        value = yaml.safe_dump([setting.value], default_flow_style=True, width=1 << 30, allow_unicode=True).strip()[
            1:-1
        ]
        lines.append(f"{f'  {name}: {value}':<{_COLUMN}}  # {setting.origin}")
    return "\n".join(lines) + "\n"


def _origins(path: str | Path, overrides: list[str]) -> dict[str, str]:
    """Key -> origin of all that the file and the overrides state, the last word of each."""
    found = _lines(path)
    for text in overrides:
        key, _, value = text.partition("=")
        section, *rest = key.strip().split(".")
        if not rest:  # a whole section, or nothing in its place
            found = {name: origin for name, origin in found.items() if not name.startswith(f"{section}.")}
            given = read_yaml(value, f"--set {key}")
            found |= {f"{section}.{name}": f"--set {text}" for name in given or {}}
            continue
        name = f"{section}.{rest[0]}"
        before = f"{found[name]}, " if name in found and len(rest) > 1 else ""
        found[name] = f"{before}--set {text}"
    return {NEWER.get(name, name): " ".join(origin.split()) for name, origin in found.items()}


def _lines(path: str | Path) -> dict[str, str]:
    """Key -> FILE:LINE of what a file states; of a merged key that of the place it is merged from."""
    loader = yaml.SafeLoader(config_text(path))
    root, found = loader.get_single_node(), {}
    for section, keys in _pairs(loader, root):
        for name, value in _pairs(loader, keys):
            line, text = name.start_mark.line + 1, value.value if isinstance(value, yaml.ScalarNode) else ""
            used = ", ".join(_VARIABLES.findall(text))
            found[f"{section.value}.{name.value}"] = f"{path}:{line}" + (f", {used}" if used else "")
    return found


def _pairs(loader: yaml.SafeLoader, node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping, merges written out; none of anything else."""
    if not isinstance(node, yaml.MappingNode):
        return []
    loader.flatten_mapping(node)
    return list(node.value)
