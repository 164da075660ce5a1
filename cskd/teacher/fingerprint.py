"""What decides a teacher's function from pixels to logits: a cache is of one such teacher, and is finished by no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cskd.errors import TeacherError, one_line


@dataclass(frozen=True)
class Fingerprint:
    """Equal ones mean the same function, up to rounding. Raises TeacherError where kwargs are no plain values."""

    source: Mapping[str, Any]  # constructor and kwargs, or the hash of the user's file
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    input_size: int  # pixels of the network's input
    image_size: int  # of the views
    dtype: str
    autocast: str  # what came of it: bf16 or none
    channels_last: bool
    compile: bool
    batch: int  # rows of a forward
    dense: str  # how dense logits were asked for, and how they are made
    head: str
    grid: tuple[int, int]
    classes: int
    class_map: str | None  # sha256 of the outputs that are kept, in order
    fold: bool

    def __post_init__(self) -> None:
        try:
            json.dumps({**vars(self), "source": dict(self.source)}, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TeacherError(
                f"teacher.kwargs must be plain values, they are part of the fingerprint: {one_line(e)}"
            ) from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """As JSON, for the identity of a cache. `fold` is absent where it is off, as in caches older than it."""
        facts = {name: value for name, value in vars(self).items() if name not in ("source", "fold")}
        return dict(json.loads(json.dumps({**self.source, **facts, **({"fold": True} if self.fold else {})})))
