"""Addresses of the hub in a config, each with the commit that it stands for: a run or a cache that goes on reads the same again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from cskd.config.schema import Config
from cskd.files.hub import is_hub, local_copy, parse_address, pin, read_pins

TEACHER = ("teacher.model", "teacher.weights", "teacher.classes")


def pinned(
    config: Config, keys: Collection[str], folder: Path, tell: Callable[[str], None] = lambda line: None
) -> tuple[Config, dict[str, str]]:
    """The config with a commit in each address under `keys`, and which stands for which; all are downloaded.

    Args:    folder of the run or cache: an address that is recorded in it stands for what it stood for then. tell: called with a
             line before each download, which may take long.
    Raises:  HubError in one line, OSError where the disk refuses.
    """
    known, pins = read_pins(folder), dict[str, str]()
    for key in keys:
        section, _, name = key.partition(".")
        of = getattr(config, section)
        text = getattr(of, name)
        if not isinstance(text, str) or not is_hub(text):
            continue
        address = parse_address(known.get(text, text), key)
        tell(f"{key} {address} is read from the hub's cache on this machine; what is missing there is downloaded first")
        if ".py" not in address.path:  # code is refused where the teacher is built
            address = pin(address, key)
            local_copy(address, key)
        config = dataclasses.replace(config, **{section: dataclasses.replace(of, **{name: str(address)})})
        if str(address) != text:
            pins[text] = str(address)
    return config, pins
