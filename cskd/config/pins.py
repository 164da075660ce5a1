"""Addresses of the hub in a config, each with the commit that it stands for: a run or a cache that goes on reads the same again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping

from cskd.config.schema import Config
from cskd.errors import PathError
from cskd.files.hub import PINS, is_hub, local_copy, parse_address, pin
from cskd.files.read import MAX_TEXT, parse_json
from cskd.storage import Place, open_storage

TEACHER = ("teacher.model", "teacher.weights", "teacher.classes")


def pinned(
    config: Config, keys: Collection[str], folder: Place, tell: Callable[[str], None] = lambda line: None
) -> tuple[Config, dict[str, str]]:
    """The config with a commit in each address under `keys`, and which stands for which; all are downloaded.

    Args:    folder of the run or cache: an address that is recorded in it stands for what it stood for then. tell: called with a
             line before each download, which may take long.
    Raises:  HubError in one line, OSError where the disk refuses.
    """
    pins = dict[str, str]()
    texts = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in keys}
    on_hub = {key: text for key, text in texts.items() if isinstance(text, str) and is_hub(text)}
    known = read_pins(folder) if on_hub else {}
    for key, text in on_hub.items():
        section, _, name = key.partition(".")
        address = parse_address(known.get(text, text), key)
        tell(f"{key} {address} is read from the hub's cache on this machine; what is missing there is downloaded first")
        if ".py" not in address.path:  # code is refused where the teacher is built
            address = pin(address, key)
            local_copy(address, key)
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: str(address)})}
        )
        if str(address) != text:
            pins[text] = str(address)
    return config, pins


def read_pins(folder: Place) -> dict[str, str]:
    """What a run or a cache has recorded: address as written -> with its commit. Empty where there is nothing, or it is damaged:
    what reads another content than before is refused by the hashes of that."""
    try:
        pins = parse_json(open_storage(folder).get(PINS, limit=MAX_TEXT))["pins"]
        return {str(key): str(value) for key, value in pins.items() if parse_address(value, PINS).pinned}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, PathError):
        return {}


def record_pins(folder: Place, pins: Mapping[str, str]) -> None:
    """Add to what is recorded, durably; nothing is written where it is all there."""
    before = read_pins(folder)
    if (now := before | dict(pins)) != before:
        open_storage(folder).put(PINS, (json.dumps({"version": 1, "pins": now}, indent=1) + "\n").encode())
