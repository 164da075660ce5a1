"""What a field may hold beyond its type: the bounds that stand on it, checked and put into words.

The vocabulary is that of annotated-types: `Annotated[int, Ge(1), Le(1024), Unit("processes")]`. A bound on a field that may be
null says nothing about null. A predicate is a function whose docstring is the bound in words.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen, MultipleOf, Predicate, Unit

from cskd.errors import ConfigError

_TESTS: dict[type, Callable[[Any, Any], bool]] = {
    Ge: lambda bound, value: value >= bound.ge,
    Gt: lambda bound, value: value > bound.gt,
    Le: lambda bound, value: value <= bound.le,
    Lt: lambda bound, value: value < bound.lt,
    MinLen: lambda bound, value: len(value) >= bound.min_length,
    MaxLen: lambda bound, value: len(value) <= bound.max_length,
    MultipleOf: lambda bound, value: value % bound.multiple_of == 0,
    Predicate: lambda bound, value: bound.func(value),
    Unit: lambda bound, value: True,
}


@cache
def fields(section: Any) -> dict[str, Any]:
    """The annotation of each field of a section, bounds included, in the order of the source."""
    return typing.get_type_hints(section, include_extras=True)


def check(name: str, section: Any) -> None:
    """ConfigError for the first value of a section that is outside its field's bounds; it names the key `name.field`."""
    for key, kind in fields(section.__class__).items():
        value = getattr(section, key)
        if not holds(kind, value):
            expected = [bound_of(kind), *(["or null"] if may_be_null(kind) else [])]
            unit = f" ({unit_of(kind)})" if unit_of(kind) else ""
            raise ConfigError(f"{name}.{key} is {written(value)}, expected {', '.join(expected)}{unit}")


def bound_of(kind: Any) -> str:
    """The bounds of an annotation in words: `from 1 to 1,024`, `2 values, each above 0`; empty for none."""
    inner, marks = _split(kind)
    of = {type(mark): mark for mark in marks}
    words = [*_interval(of), *_length(of)]
    if MultipleOf in of:
        words.append(f"a multiple of {_number(of[MultipleOf].multiple_of)}")
    if typing.get_origin(inner) is list and (each := bound_of(typing.get_args(inner)[0])):
        words.append(f"each {each}")
    if Predicate in of:
        words.append(str(of[Predicate].func.__doc__))
    return ", ".join(words)


def unit_of(kind: Any) -> str:
    """The unit of an annotation; empty for none."""
    return next((mark.unit for mark in _split(kind)[1] if isinstance(mark, Unit)), "")


def may_be_null(kind: Any) -> bool:
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return type(None) in typing.get_args(inner)


def holds(kind: Any, value: Any) -> bool:
    """Whether a value is inside all bounds of its annotation. One of another type, which has no order or length, is not."""
    if value is None and may_be_null(kind):
        return True
    inner, marks = _split(kind)
    try:
        if not all(_TESTS[type(mark)](mark, value) for mark in marks):
            return False
        of_list = typing.get_origin(inner) is list and bound_of(typing.get_args(inner)[0])
        return not of_list or all(holds(typing.get_args(inner)[0], v) for v in value)
    except TypeError:
        return False


def written(value: Any, levels: int = 20) -> str:
    """A value as a config has it: `[1.0, null]`."""
    if isinstance(value, list) and levels:
        return f"[{', '.join(written(one, levels - 1) for one in value)}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)


@cache  # there are as many as fields, and each is asked for with every config
def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type without null where that leaves one type, bounds one by one) of an annotation."""
    inner, *marks = typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind,)
    if typing.get_origin(inner) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(inner) if option is not type(None)]
        inner = options[0] if len(options) == 1 else inner
    return inner, tuple(one for mark in marks for one in (mark if isinstance(mark, GroupedMetadata) else (mark,)))


def _interval(of: dict[type, Any]) -> list[str]:
    if Ge in of and Le in of:
        return [f"from {_number(of[Ge].ge)} to {_number(of[Le].le)}"]
    words = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
    return [f"{word} {_number(getattr(of[kind], name))}" for kind, (word, name) in words.items() if kind in of]


def _length(of: dict[type, Any]) -> list[str]:
    least = of[MinLen].min_length if MinLen in of else 0
    most = of[MaxLen].max_length if MaxLen in of else None
    if least == most:
        return [f"{least} values"]
    words = [("at least", least)] if least else []
    words += [("at most", most)] if most is not None else []
    return [f"{word} {count} value{'s' if count != 1 else ''}" for word, count in words]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
