"""YAML to `Config`, strictly: an unknown key or a wrong type is an error that names the key and the nearest known one.

All that is wrong is found in one reading; `load_config` stops at it, and `cskd check` shows each.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml

from cskd.config.bounds import bound_of, holds, written
from cskd.config.other_trainers import elsewhere, same_precision
from cskd.config.schema import Config, Precision
from cskd.config.yaml_text import EXPECTED, MAX_BYTES, Words, as_read, misread, read_yaml
from cskd.errors import ConfigError, CskdError, PathError, shortened, why
from cskd.files.paths import local_path, local_text, location_text
from cskd.files.read import check_depth, read_file
from cskd.near import absent, did_you_mean, nearest

PATHS = (
    *("data.train", "data.val", "teacher.model", "teacher.weights", "teacher.classes"),
    *("cache.path", "student.model", "student.init", "train.output", "train.scratch", "data.node_cache"),
)  # a model may be the path of a file
READ_FROM_HUB = ("teacher.model", "teacher.weights", "teacher.classes", "cache.path", "student.init")  # see docs/HUB.md
ON_OBJECT_STORES = (  # see docs/STORAGE.md
    *("data.train", "data.val", "teacher.weights", "teacher.classes", "student.init", "cache.path", "train.output"),
)
WRITTEN = ("train.output",)
NEWER = {  # keys of older versions
    **{"teacher.autocast": "teacher.precision", "teacher.dtype": "teacher.precision"},
    "train.tensorboard": "train.trackers",
}
_OF_TIMM = "local-dir:"  # one of its own ways to name a model
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def load_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
) -> Config:
    """The config of a YAML file, or of a nested dict; `${NAME:-default}` in its strings is expanded.

    Relative paths in it stay as they are: they are of the folder that the program is started in, not of the config's.

    Args:    overrides, as `--set` has them: 'section.key=value' (values in YAML), or a dict {'section.key': value}.
    Raises:  ConfigError for a missing or malformed file, an unknown key, a wrong type, an unset variable.
    """
    return _whole(*read_config(config, overrides))


def read_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
) -> tuple[Config, list[CskdError]]:
    """A config as `load_config` reads it, with all that is wrong with its keys; those have their defaults.

    Raises:  ConfigError for a file that can't be read at all.
    """
    if isinstance(config, Config) and not overrides:
        return config, []
    words: Words = {}
    raw, wrong = _raw(config, words), list[CskdError]()
    if isinstance(overrides, str) or not isinstance(overrides, Mapping | Sequence | None):
        raise ConfigError(f"overrides is {_short(overrides)}, expected a list of 'section.key=value', or a dict")
    for override in overrides.items() if isinstance(overrides, Mapping) else overrides or []:
        try:
            _override(raw, override, words)
        except ConfigError as e:
            wrong.append(e)
    read, more = _read(raw, words)
    return read, wrong + more


def _raw(config: Any, words: Words) -> dict[str, Any]:
    """The nested dict that a config is, or that its file holds; it may be changed."""
    if isinstance(config, Config):
        return _written_keys(config)
    if isinstance(config, Mapping):
        return dict(_as_yaml_has_it(config))
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"the config is a {type(config).__name__}, expected the path of a YAML file, or a dict of sections"
        )
    path = local_path(os.fspath(config), "CONFIG")
    raw = read_yaml(config_text(path), str(path), words)
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected sections such as 'teacher:' and 'train:'")
    return raw or {}


def _as_yaml_has_it(value: Any, levels: int = 20) -> Any:
    """A value out of Python in the types of YAML, copied: paths become texts, tuples lists, NumPy's numbers Python's."""
    if isinstance(value, Mapping) and levels:
        return {key: _as_yaml_has_it(v, levels - 1) for key, v in value.items()}
    if isinstance(value, list | tuple) and levels:
        return [_as_yaml_has_it(v, levels - 1) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _written_keys(config: Config) -> dict[str, Any]:
    """The keys of a config that were written, or differ from the default."""
    ours, defaults = to_dict(config), to_dict(Config())
    return {
        section: {
            key: value
            for key, value in keys.items()
            if f"{section}.{key}" in config.given or value != defaults[section][key]
        }
        for section, keys in ours.items()
    }


def config_text(path: str | Path) -> str:
    """The text of a config. Raises ConfigError for a file that is missing, or is none of text."""
    path = local_path(path, "CONFIG")
    try:
        return read_file(path, MAX_BYTES).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {absent(path)}; give the path of a YAML file; `cskd configs` lists those to begin from"
        ) from None
    except OSError as e:
        raise ConfigError(f"{path} can't be read: {why(e)}") from None
    except ValueError as e:  # of UTF-8, or a zero byte in the path
        raise ConfigError(
            f"{path} is not readable YAML: {shortened(' '.join(str(e).split()), 120)}; {EXPECTED}"
        ) from None


def from_dict(raw: dict[str, Any]) -> Config:
    """The config a nested dict states; missing keys take their defaults. Raises ConfigError as `load_config`."""
    return _whole(*_read(raw, {}))


def _whole(config: Config, wrong: list[CskdError]) -> Config:
    if len(wrong) > 1:
        raise type(wrong[0])(f"{wrong[0]} ({len(wrong) - 1} more: `cskd check` lists all)")
    if wrong:
        raise wrong[0]
    return config


def _read(raw: dict[str, Any], words: Words) -> tuple[Config, list[CskdError]]:
    wrong: list[CskdError] = []
    try:
        check_depth(raw)
    except ValueError as e:
        return Config(), [ConfigError(f"the config is {e}; flatten it")]
    try:
        raw = _in_todays_words(raw)
    except ConfigError as e:
        wrong.append(e)
        raw = {
            s: {k: v for k, v in keys.items() if f"{s}.{k}" not in NEWER} if isinstance(keys, dict) else keys
            for s, keys in raw.items()
        }
    given = frozenset(f"{s}.{key}" for s, section in raw.items() if isinstance(section, dict) for key in section)
    config = _build(Config, raw, "", _Reading(words, wrong))
    assert isinstance(config, Config)
    return dataclasses.replace(_with_local_paths(config, wrong), given=given), wrong


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
    old = {key for key in teacher if f"teacher.{key}" in NEWER} if isinstance(teacher, dict) else set()
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


def _with_local_paths(config: Config, wrong: list[CskdError]) -> Config:
    """The config, each of its paths one on this machine; of others it says what is wrong."""
    for key in PATHS:
        section, _, name = key.partition(".")
        of = getattr(config, section)
        text = getattr(of, name)
        if not isinstance(text, str) or text.startswith(_OF_TIMM):
            continue
        try:
            hub, write = key in READ_FROM_HUB, key in WRITTEN
            known = key in ON_OBJECT_STORES
            local = location_text(text, key, hub=hub, write=write) if known else local_text(text, key, hub)
        except PathError as e:
            wrong.append(e)
            continue
        if local != text:
            config = dataclasses.replace(config, **{section: dataclasses.replace(of, **{name: local})})
    own = [("cache.codecs", name) for name in config.cache.codecs]  # each may be the place of a user's own code
    own += [(f"train.caches.{name}", path) for name, path in config.train.caches.items()]
    for key, text in [*own, *((f"loss.terms[{i}].own", term.own) for i, term in enumerate(config.loss.terms))]:
        try:
            (location_text if key.startswith("train.caches.") else local_text)(text or "", key)
        except PathError as e:
            wrong.append(e)
    return config


def _override(raw: dict[str, Any], override: str | tuple[str, Any], words: Words) -> None:
    """Set one key: by 'section.key=value' in YAML, or by the key and a value out of Python."""
    if not isinstance(override, str | tuple):
        raise ConfigError(f"override {_short(override)} is no text, expected 'section.key=value'")
    key, eq, text = override.partition("=") if isinstance(override, str) else (str(override[0]), "=", "")
    said = f"--set {shortened(override, 100)}" if isinstance(override, str) else f"override {_short(key)}"
    if not eq or not key.strip():
        raise ConfigError(f"--set {_short(override)} is not KEY=VALUE, for example --set train.epochs=10")
    key = key.strip()
    if "[" in key:
        whole = key.partition("[")[0]
        raise ConfigError(f"{said}: an item of a list is not set alone; write it in the file, or --set '{whole}=[...]'")
    *sections, last = key.split(".")
    at = raw
    for section in sections:
        below = at.setdefault(section, {})
        if below is None:
            below = at[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{said}: {section} holds a value, not keys; write all of it in the file")
        at = below
    for under in [word for word in words if word == key or word.startswith((f"{key}.", f"{key}["))]:
        del words[under]
    if not isinstance(override, str):
        at[last] = _as_yaml_has_it(override[1])
        return
    try:
        at[last] = read_yaml(text, "it", words, key)
    except ConfigError as e:
        raise ConfigError(
            f"--set {shortened(override, 80)}: {_short(text, 60)} is no value in YAML ({e}); put the value in quotes"
        ) from None


def _expand(value: Any, key: str) -> Any:
    """A value with its variables replaced. ConfigError for what no key holds."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, key) for v in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError(f"{key} is a whole number of more than 63 bits; nothing in the config needs one")
    if not isinstance(value, str):
        return value
    text = _VARIABLE.sub(lambda match: _variable(match, key), value)
    if odd := next((c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000), None):
        raise ConfigError(f"{key}: the text {_short(text)} holds the character {odd!r}; expected a name or a path")
    return text


def _variable(match: re.Match[str], key: str) -> str:
    name, default = match[1], match[2]
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError(f"{key}: the config uses ${{{name}}}, which is not set; export {name}=...")
    return value


@dataclasses.dataclass(frozen=True)
class _Reading:
    """words: how values were written; wrong: gets what is wrong with each key."""

    words: Words
    wrong: list[CskdError]


def _build(cls: type[Any], raw: dict[str, Any], prefix: str, reading: _Reading) -> Any:
    """A section of the keys that are right; the others keep their defaults, and what is wrong with them is noted."""
    bounded = typing.get_type_hints(cls, include_extras=True)
    # Of a key that takes a number or a word the bound says which words.
    known = {
        name: bounded[name] if {int, str} <= {*get_args(kind)} else kind
        for name, kind in typing.get_type_hints(cls).items()
        if name != "given"
    }
    values = {}
    for key, value in raw.items():
        try:
            if key not in known:
                raise _unknown(key, known, prefix)
            # A text with nothing after its key is empty, as in `--set cache.path=`; null means something in other keys.
            value = "" if value is None and known[key] is str else value
            value = value if dataclasses.is_dataclass(known[key]) else _expand(value, prefix + key)
            values[key] = _check(known[key], value, prefix + key, reading)
        except ConfigError as e:
            reading.wrong.append(e)

    def made(values: dict[str, Any]) -> Any:
        try:
            return cls(**values)
        except ConfigError as e:  # of an item of a list, which does not know its number
            raise ConfigError(str(e).replace(re.sub(r"\[\d+\]", "[]", prefix), prefix, 1)) from None

    try:
        return made(values)
    except ConfigError as e:
        alone: dict[str, ConfigError] = {}
        for key, value in values.items():
            try:
                made({key: value})
            except ConfigError as of_key:
                alone[key] = of_key
        reading.wrong.extend(alone.values() or [e])
    try:
        return made({key: value for key, value in values.items() if key not in alone})
    except ConfigError as e:  # two keys that do not fit together
        reading.wrong.extend([e] if alone else [])
        return cls()


def _unknown(key: Any, known: Collection[str], prefix: str) -> ConfigError:
    key = shortened(key, 80) if isinstance(key, str) else _short(key, 80)
    if said := elsewhere(key, prefix):
        return ConfigError(f"unknown key '{prefix}{key}'; {said}")
    inside = did_you_mean(prefix + key, [prefix + name for name in known if nearest(key, [name], 0.5)], 0.0)
    hint = inside or did_you_mean(key, _all_keys(), 0.5) or "expected one of " + ", ".join(known)
    return ConfigError(f"unknown key '{prefix}{key}'; {hint}")


def _all_keys() -> list[str]:
    sections = typing.get_type_hints(Config)
    return [f"{s}.{k}" for s, cls in sections.items() if s != "given" for k in typing.get_type_hints(cls)]


def _check(kind: Any, value: Any, key: str, reading: _Reading) -> Any:
    """`value` as type `kind`, or a ConfigError that names the key, the value and what was expected."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict | None):
            colon = "; write a space after the colon" if isinstance(value, str) and ":" in value else ""
            raise ConfigError(f"{key} is {_short(value)}, expected a section of keys{colon}")
        return _build(typing.cast(type[Any], kind), value or {}, key + ".", reading)
    if typing.get_origin(kind) is Annotated:
        if (
            type(value) in get_args(get_args(kind)[0])
            and holds(kind, value)
            and not misread(reading.words.get(key, ""), value)
        ):
            return value
        raise _wrong(kind, value, key, reading)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        lists = [option for option in get_args(kind) if typing.get_origin(option) is list]
        if lists and isinstance(value, list):  # what is wrong is an item
            return _check(lists[0], value, key, reading)
        for option in get_args(kind):
            try:
                return _check(option, value, key, reading)
            except ConfigError:
                continue
        raise _wrong(kind, value, key, reading)
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind) and isinstance(value, str):
            return value
        raise _wrong(kind, value, key, reading)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_check(typing.get_args(kind)[0], v, f"{key}[{i}]", reading) for i, v in enumerate(value)]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}", reading) for k, v in value.items()}
    if misread(reading.words.get(key, ""), value):
        raise _wrong(kind, value, key, reading)
    plain = _number(value) if kind is float else value
    if isinstance(kind, type) and isinstance(plain, kind) and not (kind is not bool and isinstance(plain, bool)):
        return plain
    raise _wrong(kind, value, key, reading)


def _wrong(kind: Any, value: Any, key: str, reading: _Reading) -> ConfigError:
    """What a value is, what was expected, and what YAML made of the word that was written, and how to write it."""
    word, options = reading.words.get(key, ""), get_args(kind) or (kind,)
    if typing.get_origin(kind) is Annotated:
        options = (int,)  # a word that is none of its own was meant as a number, if as any
    read, hint = as_read(word, value) if word else "", ""
    texts, number = [option for option in options if isinstance(option, str)], _number(_THOUSANDS.sub("", str(value)))
    none = str(word or value).lower() in _NONE
    if texts and none and "none" in texts:
        hint = "write none"
    elif texts and not read:
        hint = same_precision(str(value), texts) or did_you_mean(str(value), texts)
    elif typing.get_origin(kind) is Annotated and (":" in word or not isinstance(number, float) or number < 0):
        hint = ""
    elif read and misread(word, value) and str not in options:
        hint = f"write {value}" + (f", or {int(word.replace('_', ''))}" if ":" not in word else "")
    elif read and str in options:
        hint = f"write '{word}' in quotes" + (", or null for none" if type(None) in options else "")
    elif none and type(None) in options:
        hint = "write null for none"
    elif bool in options and str(word or value).lower() in _YES_NO:
        hint = f"write {_YES_NO[str(word or value).lower()]}"
    elif typing.get_origin(kind) is list:  # one that is none
        hint = ""
    elif {int, float} & set(options) and isinstance(value, str | float) and isinstance(number, float):
        hint = (
            f"write {int(number) if number.is_integer() else number}" if number.is_integer() or float in options else ""
        )
        hint += ", without quotes" if hint == f"write {value}" else ""
    ends = f" (YAML reads {read})" if read else ""
    return ConfigError(f"{key} is {_short(value)}, expected {describe(kind)}{ends}{hint and f'; {hint}'}")


_THOUSANDS = re.compile(r"(?<=[1-9]),(?=\d{3}$)|(?<=[1-9]\d),(?=\d{3}$)|(?<=[1-9]\d\d),(?=\d{3}$)")  # 1,024; not 0,001
_NONE = ("none", "off", "no", "false", "~", "nil")
_YES_NO = {word: "true" for word in ("yes", "y", "on", "1", "true", "t")} | {
    word: "false" for word in ("no", "n", "off", "0", "false", "f", "none")
}


def _plain(value: Any, key: str, reading: _Reading) -> Any:
    """What a constructor may be given: it is recorded as JSON. YAML has dates, bytes, sets and infinities, too."""
    word = reading.words.get(key, "")
    if isinstance(value, list):
        return [_plain(v, f"{key}[{i}]", reading) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}", reading) for k, v in value.items()}
    if misread(word, value) or (word and isinstance(value, str)):
        number = value if not isinstance(value, str) else _number(value)
        how = f"{float(number)!r}" if isinstance(value, str) and isinstance(number, float) else f"{value}"
        raise ConfigError(
            f"{key}: YAML reads {as_read(word, value)}; write {how} for a number, '{word}' in quotes for text"
        )
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    ends = f" (YAML reads {as_read(word, value)}); for text write '{word}' in quotes" if word else ""
    raise ConfigError(
        f"{key} is {_short(value)}, expected a number, text, true, false, null, a list or a mapping of them{ends}"
    )


def _short(value: Any, most: int = 120) -> str:
    return shortened(written(value), most)


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
        words = [describe(option) for option in get_args(kind)]
        return (", or " if "a list, " in words[0] else " or ").join(words)
    if typing.get_origin(kind) is Annotated:
        return bound_of(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        each = typing.get_args(kind)[0]
        return "a list of mappings" if dataclasses.is_dataclass(each) else "a list, each " + describe(each)
    return _TYPE_NAMES.get(kind, "a mapping")
