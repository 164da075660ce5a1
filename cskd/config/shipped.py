"""The configs that are installed with the program: their names, what each is for, and a copy of one."""

from __future__ import annotations

import difflib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from cskd.errors import ConfigError, PathError
from cskd.files.durable import put

_SUFFIX = ".yaml"


@dataclass(frozen=True)
class Shipped:
    """One of them. about: the first line of its header."""

    name: str
    about: str
    text: str


@dataclass(frozen=True)
class ShippedConfigs:
    """All of them, by name."""

    configs: list[Shipped]


def shipped() -> ShippedConfigs:
    """Those that this installation has."""
    folder = importlib.resources.files("cskd.configs")
    texts = {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir() if item.name.endswith(_SUFFIX)}
    return ShippedConfigs(
        [
            Shipped(name.removesuffix(_SUFFIX), text.split("\n")[0].lstrip("# "), text)
            for name, text in sorted(texts.items())
        ]
    )


def shipped_config(name: str) -> Shipped:
    """The one of that name, with or without folder and ending. ConfigError for another."""
    by_name, wanted = {config.name: config for config in shipped().configs}, Path(name).name.removesuffix(_SUFFIX)
    if wanted not in by_name:
        near = difflib.get_close_matches(wanted, list(by_name), n=1, cutoff=0)
        raise ConfigError(f"no shipped config {name[:80]!r}; the nearest is {near[0]!r}, `cskd configs` lists them")
    return by_name[wanted]


def as_text(all_of_them: ShippedConfigs) -> str:
    """The list for people."""
    width = max((len(config.name) for config in all_of_them.configs), default=0)
    return "".join(f"{config.name:<{width}}  {config.about}\n" for config in all_of_them.configs)


def copy_config(name: str | None, folder: Path) -> Path:
    """Write one of them to folder/NAME.yaml, by which its own commands name it then. ConfigError without a name, PathError where
    that is there already."""
    if not name:
        raise ConfigError("--copy writes one config and no name is given; for example: cskd configs cifar10 --copy")
    config = shipped_config(name)
    target = folder / f"{config.name}{_SUFFIX}"
    text = config.text.replace(f"configs/{target.name}", target.name)
    if not put(target, text.encode(), first=True):
        raise PathError(
            f"{target} is there already; remove it, or write elsewhere: cskd configs {config.name} > my.yaml"
        )
    return target
