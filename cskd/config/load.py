"""YAML to `Config`, strictly: an unknown key or a wrong type is an error that names the key and the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, get_args

import yaml

from cskd.config.schema import Config, Precision
from cskd.config.yaml_text import MAX_BYTES, read_yaml
from cskd.errors import ConfigError
from cskd.files.paths import local_path, local_text
from cskd.files.read import check_depth, read_file

PATHS = (
    *("data.train", "data.val", "teacher.model", "teacher.weights", "teacher.classes"),
    *("cache.path", "student.model", "student.init", "train.output"),
)  # a model may be the path of a file
_OF_TIMM = "local-dir:"  # one of its own ways to name a model
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply `section.key=value` overrides (values in YAML), expand `${NAME:-default}` in strings.

    Raises:  ConfigError for a missing or malformed file, an unknown key, a wrong type, an unset variable.
    """
    path = local_path(path, "CONFIG")
    try:
        raw = read_yaml(read_file(path, MAX_BYTES).decode(), str(path))
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; give the path of a YAML file (some are in configs/)") from None
    except (UnicodeDecodeError, OSError, ValueError) as e:  # ValueError: a zero byte in the path
        raise ConfigError(
            f"{path} is not readable YAML: {' '.join(str(e).split())}; expected a file such as those in configs/"
        ) from None
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected sections such as 'teacher:' and 'train:'")
    raw = raw or {}
    for override in overrides or []:
        _override(raw, override)
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Config:
    """The config a nested dict states; missing keys take their defaults. Raises ConfigError as `load_config`."""
    try:
        check_depth(raw)
    except ValueError as e:
        raise ConfigError(f"the config is {e}; flatten it") from None
    raw = _in_todays_words(raw)
    given = frozenset(f"{s}.{key}" for s, section in raw.items() if isinstance(section, dict) for key in section)
    config = _build(Config, _expand(raw), "")
    assert isinstance(config, Config)
    return dataclasses.replace(_with_local_paths(config), given=given)


def _in_todays_words(raw: dict[str, Any]) -> dict[str, Any]:
    """A config of an older version, as caches keep it: `teacher.autocast` and `teacher.dtype` are `teacher.precision` now,
    `train.tensorboard` is a name in `train.trackers`."""
    teacher, train = raw.get("teacher"), raw.get("train")
    if isinstance(train, dict) and "tensorboard" in train:
        if "trackers" in train or not isinstance(train["tensorboard"], bool):
            raise ConfigError(
                f"train.tensorboard is {_short(train['tensorboard'])}: it is one of train.trackers now; set that alone, "
                "for example train.trackers=[tensorboard]"
            )
        train = {key: value for key, value in train.items() if key != "tensorboard"} | (
            {"trackers": ["tensorboard"]} if train["tensorboard"] else {}
        )
        raw = {**raw, "train": train}
    old = {"autocast", "dtype"} & teacher.keys() if isinstance(teacher, dict) else set()
    if not isinstance(teacher, dict) or not old:
        return raw
    autocast, dtype = teacher.get("autocast", "none"), teacher.get("dtype", "float32")
    precision = dtype if autocast == "none" else autocast if dtype == "float32" else None
    if "precision" in teacher or precision not in ("float32", "float64", "bf16", "auto"):
        key = min(old)
        raise ConfigError(
            f"teacher.{key} is {_short(teacher[key])}: arithmetic is set by teacher.precision now, one of "
            f"{', '.join(get_args(Precision))}; set that alone"
        )
    kept = {key: value for key, value in teacher.items() if key not in old}
    return {**raw, "teacher": {**kept, "precision": precision}}


def to_dict(config: Any) -> dict[str, Any]:
    """A config, or a section of one, as plain dicts and lists: what `from_dict` reads back."""
    plain = dataclasses.asdict(config)
    plain.pop("given", None)
    return plain


def to_yaml(config: Config | dict[str, Any]) -> str:
    """A config as YAML, every key written out; one that was recorded, as it was recorded."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text in a quarter of the time
    return str(yaml.dump(config if isinstance(config, dict) else to_dict(config), Dumper=dumper, sort_keys=False))


def _with_local_paths(config: Config) -> Config:
    """The config, each of its paths one on this machine. PathError naming the key of another."""
    for key in PATHS:
        section, _, name = key.partition(".")
        of = getattr(config, section)
        text = getattr(of, name)
        if isinstance(text, str) and not text.startswith(_OF_TIMM) and (local := local_text(text, key)) != text:
            config = dataclasses.replace(config, **{section: dataclasses.replace(of, **{name: local})})
    return config


def _override(raw: dict[str, Any], text: str) -> None:
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"--set {text!r} is not KEY=VALUE, for example --set train.epochs=10")
    *sections, last = key.strip().split(".")
    at = raw
    for section in sections:
        below = at.setdefault(section, {})
        if below is None:
            below = at[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {text}: {section} holds a value, not keys")
        at = below
    try:
        at[last] = read_yaml(value, f"--set {key}")
    except ConfigError:
        raise ConfigError(f"--set {text}: {value!r} is not a YAML value; put it in quotes") from None


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v) for v in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError("the config holds a whole number of more than 63 bits; nothing in it needs one")
    if not isinstance(value, str):
        return value
    text = _VARIABLE.sub(_variable, value)
    if odd := next((c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000), None):
        raise ConfigError(f"the text {_short(text)} holds the character {odd!r}; expected a name or a path")
    return text


def _variable(match: re.Match[str]) -> str:
    name, default = match[1], match[2]
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError(f"the config uses ${{{name}}}, which is not set; export {name}=...")
    return value


def _build(cls: type[Any], raw: dict[str, Any], prefix: str) -> Any:
    known = {name: kind for name, kind in typing.get_type_hints(cls).items() if name != "given"}
    for key in raw:
        if key not in known:
            key = _short(key) if not isinstance(key, str) else key[:80]
            near = difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.5)
            inside = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
            nearest = prefix + inside[0] if inside else near[0] if near else None
            hint = f"the nearest known one is '{nearest}'" if nearest else "expected one of " + ", ".join(known)
            raise ConfigError(f"unknown key '{prefix}{key}'; {hint}")
    # A text with nothing after its key is empty, as in `--set cache.path=`; null stays what it is where it means something.
    empty = {key: "" for key, value in raw.items() if value is None and known[key] is str}
    values = {key: _check(known[key], value, prefix + key) for key, value in {**raw, **empty}.items()}
    return cls(**values)


def _all_keys() -> list[str]:
    sections = typing.get_type_hints(Config)
    return [f"{s}.{k}" for s, cls in sections.items() if s != "given" for k in typing.get_type_hints(cls)]


def _check(kind: Any, value: Any, key: str) -> Any:
    """`value` as type `kind`, or a ConfigError that names the key, the value and what was expected."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict | None):
            raise ConfigError(f"{key} is {_short(value)}, expected a section of keys")
        return _build(typing.cast(type[Any], kind), value or {}, key + ".")
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        for option in typing.get_args(kind):
            try:
                return _check(option, value, key)
            except ConfigError:
                continue
        raise ConfigError(f"{key} is {_short(value)}, expected {describe(kind)}")
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
        near = difflib.get_close_matches(str(value)[:80], [str(a) for a in typing.get_args(kind)], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"{key} is {_short(value)}, expected {describe(kind)}{hint}")
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_check(typing.get_args(kind)[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}") for k, v in value.items()}
    if kind is float:
        value = _number(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} is {_short(value)}, expected {describe(kind)}")


def _plain(value: Any, key: str) -> Any:
    """What a constructor may be given: it is recorded as JSON. YAML has dates, bytes, sets and infinities, too."""
    if isinstance(value, list):
        return [_plain(v, key) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, key) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{key} is {_short(value)}, expected a number, text, true, false, null, a list or a mapping of them"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; integers are numbers too. NaN and infinities stay what they are and are refused."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(kind: Any) -> str:
    """A type in the words of a config: `a whole number or null`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(describe(o) for o in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return "a list, each " + describe(typing.get_args(kind)[0])
    return _TYPE_NAMES.get(kind, "a mapping")
