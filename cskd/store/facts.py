"""JSON that other versions of the program write too, as a frozen dataclass: read, changed and written again without a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A key that the JSON lacks is None; one that this version does not know is kept in `other`, and so is a null."""

    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        """From a JSON object, unchecked."""
        names = {f.name for f in fields(cls)} - {"other"}
        known = {key: value for key, value in raw.items() if key in names and value is not None}
        return cls(**known, other={key: value for key, value in raw.items() if key not in known})

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON object that `of` reads."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "other"}
        return {**self.other, **{name: value for name, value in named.items() if value is not None}}
