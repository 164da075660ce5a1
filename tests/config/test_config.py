"""Promises of cskd.config: what is not understood is refused in one line that says where and what to do."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cskd.config import Config, DataConfig, RecipeConfig, from_dict, load_config, to_dict, to_yaml
from cskd.config.bounds import written
from cskd.config.schema import Decay, Method
from cskd.errors import ConfigError

Write = Callable[[str], Path]  # a config of this text

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as info:
        from_dict(raw)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_its_header_gives_the_commands(path: Path) -> None:
    config = load_config(path)
    assert config.student.model and config.train.output
    if config.loss.method == "none":
        assert not config.teacher.model and not config.cache.path  # labels alone
    else:
        assert config.teacher.model and config.cache.path
    header = path.read_text(encoding="utf-8").split("\ndata:")[0]
    assert "cskd pack" in header and f"configs/{path.name}" in header


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_config_written_out_reads_back_as_itself(path: Path, write: Write) -> None:
    config = load_config(path)
    assert to_dict(load_config(write(to_yaml(config)))) == to_dict(from_dict(to_dict(config))) == to_dict(config)


def test_an_empty_file_is_all_defaults_and_every_default_passes_its_own_checks(write: Write) -> None:
    assert load_config(write("")) == Config()
    assert to_dict(load_config(write(to_yaml(Config())))) == to_dict(Config())


def test_a_config_is_frozen_and_two_do_not_share_lists() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 3  # type: ignore[misc]
    assert RecipeConfig().scale is not RecipeConfig().scale


@pytest.mark.parametrize(
    ("raw", "named", "nearest"),
    [
        ({"train": {"epoch": 3}}, "train.epoch", "train.epochs"),
        ({"teacher": {"modle": "x"}}, "teacher.modle", "teacher.model"),
        ({"trian": {}}, "trian", "train"),
        ({"epochs": 3}, "epochs", "train.epochs"),
        ({"loss": {"epochs": 3}}, "loss.epochs", "train.epochs"),
        ({"data": {"zzzzzz": 3}}, "data.zzzzzz", "one of train, val"),
        ({"train": {5: 3}}, "train.5", "one of output, scratch"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(raw: dict[str, Any], named: str, nearest: str) -> None:
    text = refusal(raw)
    assert f"'{named}'" in text
    assert nearest in text.split(f"'{named}'")[1]


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "epochs", "ten", "a whole number"),
        ("train", "epochs", 1.5, "a whole number"),
        ("train", "epochs", True, "a whole number"),
        ("train", "epochs", None, "a whole number"),
        ("train", "lr", "fast", "a number"),
        ("train", "lr", True, "a number"),
        ("train", "lr", float("nan"), "a number"),
        ("train", "lr", float("inf"), "a number"),
        ("train", "lr", "nan", "a number"),
        ("train", "compile", 1, "true or false"),
        ("train", "compile", "yes", "true or false"),
        ("train", "lr_batch", 1.5, "a whole number or null"),
        ("teacher", "model", 5, "text"),
        ("teacher", "weights", 5, "text or null"),
        ("teacher", "mean", 0.5, "a list, each a number, or null"),
        ("teacher", "mean", ["a", 1, 1], "teacher.mean[0] is 'a', expected a number"),
        ("teacher", "kwargs", ["x"], "a mapping"),
        ("cache", "codecs", "envelope", "a list, each text"),
        ("cache", "codecs", [1], "text"),
        ("loss", "method", "cskd", "one of none, deit-hard, deit-soft, cskd-hard, cskd-soft"),
    ],
)
def test_a_value_of_another_type_is_refused_with_key_value_and_what_was_expected(
    section: str, key: str, value: object, expected: str
) -> None:
    text = refusal({section: {key: value}})
    assert text.startswith(f"{section}.{key}")
    assert expected in text
    assert written(value[0] if isinstance(value, list) else value).strip("'") in text


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("teacher", "batch", 0),
        ("teacher", "batch", 6),
        ("teacher", "mean", [0.5, 0.5]),
        ("teacher", "std", [0.5]),
        ("teacher", "grid", [7]),
        ("teacher", "grid", [7, 0]),
        ("recipe", "size", 0),
        ("recipe", "flip", 1.5),
        ("recipe", "mix_prob", -0.1),
        ("recipe", "mixup", -1.0),
        ("recipe", "scale", [0.5, 0.1]),
        ("recipe", "scale", [0.0, 1.0]),
        ("recipe", "ratio", [1.0]),
        ("recipe", "mix_group", 4),
        ("cache", "views", 0),
        ("cache", "codecs", []),
        ("cache", "codecs", ["topk10", "topk:10"]),
        ("cache", "workers", -1),
        ("loss", "alpha", 1.1),
        ("loss", "tau", 0.0),
        ("loss", "smoothing", 1.0),
        ("train", "epochs", 0),
        ("train", "global_batch", -2),
        ("train", "repeats", 0),
        ("train", "warmup_epochs", -3.0),
        ("train", "workers", -1),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_value(section: str, key: str, value: object) -> None:
    text = refusal({section: {key: value}})
    assert text.startswith(f"{section}.{key} is {value!r}, expected ")


def test_what_the_user_wrote_is_told_apart_from_defaults(write: Write) -> None:
    config = load_config(write("train: {epochs: 300}"), ["loss.decay=linear"])
    assert config.given == {"train.epochs", "loss.decay"}
    assert "given" not in to_dict(config)
    assert "unknown key 'given'" in refusal({"given": ["train.epochs"]})


def test_a_misspelt_choice_is_answered_with_the_nearest() -> None:
    assert "did you mean 'cosine'?" in refusal({"loss": {"decay": "cosin"}})


def test_all_methods_and_decays_are_accepted() -> None:
    for method in typing.get_args(Method):
        for decay in typing.get_args(Decay):
            terms = [{"target": "label"}] if method == "terms" else []
            assert from_dict({"loss": {"method": method, "decay": decay, "terms": terms}}).loss.decay == decay


def test_numbers_are_read_as_people_write_them(write: Write) -> None:
    config = load_config(write("train: {lr: 1e-3, weight_decay: 0, clip_grad: 5, lr_batch: 512}"))
    assert config.train.lr == 0.001
    assert isinstance(config.train.weight_decay, float)
    assert config.train.clip_grad == 5.0
    assert config.train.lr_batch == 512


def test_variables_are_expanded_at_every_depth_and_an_unset_one_is_named(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_TEST_ROOT", "/data")
    monkeypatch.delenv("CSKD_TEST_UNSET", raising=False)
    data = "data: {train: '${CSKD_TEST_ROOT}/t', val: '${CSKD_TEST_UNSET:-here}/v'}"
    config = load_config(write(data + "\ncache: {codecs: ['${CSKD_TEST_UNSET:-int8}']}"))
    assert config.data == DataConfig(train="/data/t", val="here/v")
    assert config.cache.codecs == ["int8"]
    with pytest.raises(ConfigError, match=r"CSKD_TEST_UNSET.*not set; export CSKD_TEST_UNSET="):
        load_config(write("data: {train: '${CSKD_TEST_UNSET}'}"))


def test_overrides_win_over_the_file_and_make_sections(write: Write) -> None:
    path = write("train: {epochs: 3}\nloss:\n")
    config = load_config(
        path, ["train.epochs=5", "loss.decay=cosine", "teacher.kwargs.drop=0.1", "recipe.scale=[0.2, 1]"]
    )
    assert config.train.epochs == 5
    assert config.loss.decay == "cosine"
    assert config.teacher.kwargs == {"drop": 0.1}
    assert config.recipe.scale == [0.2, 1.0]
    assert load_config(path, ["train.lr_batch=null", "train.epochs=6"]).train.epochs == 6


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.epochs.x=3", "train.epochs=[", "train.epoch=3"])
def test_an_override_that_makes_no_sense_is_refused(write: Write, override: str) -> None:
    with pytest.raises(ConfigError) as info:
        load_config(write("train: {epochs: 3}"), [override])
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "just text", "train: [", "train: 5", "\ttrain: 1", "data: {train: !!python/object/apply:os.getcwd []}"],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(write: Write, text: str) -> None:
    with pytest.raises(ConfigError) as info:
        load_config(write(text))
    assert "\n" not in str(info.value)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config at .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="it is a folder, expected a file"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not readable"):
        load_config(tmp_path / "latin.yaml")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=3))


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """Known sections with known keys, but any values: what a strict schema has to survive."""
    raw: dict[str, Any] = {}
    for section in draw(st.sets(st.sampled_from(list(SECTIONS)), max_size=3)):
        keys = st.sampled_from(list(typing.get_type_hints(SECTIONS[section])))
        raw[section] = draw(st.dictionaries(keys, values, max_size=3) | scalars)
    return raw


@given(anything())
def test_whatever_the_values_the_answer_is_a_config_that_reads_back_or_a_refusal_in_one_line(
    raw: dict[str, Any],
) -> None:
    try:
        config = from_dict(raw)
    except ConfigError as e:
        assert "\n" not in str(e)
    else:
        assert to_dict(from_dict(yaml.safe_load(to_yaml(config)))) == to_dict(config)


def test_the_two_keys_of_older_configs_that_are_one_now_are_read() -> None:
    for old, now in (
        ({"autocast": "none", "dtype": "float32"}, "float32"),
        ({"autocast": "bf16"}, "bf16"),
        ({"autocast": "auto", "dtype": "float32"}, "auto"),
        ({"dtype": "float64"}, "float64"),
    ):
        config = from_dict({"teacher": {"model": "resnet18", **old}})
        assert config.teacher.precision == now and {"teacher.model", "teacher.precision"} == config.given
    for wrong in ({"autocast": "bf16", "dtype": "float64"}, {"autocast": "fp8"}, {"dtype": "fp16"}, {"autocast": [1]}):
        with pytest.raises(ConfigError, match=r"teacher\.(autocast|dtype) is .*teacher\.precision now"):
            from_dict({"teacher": wrong})
    with pytest.raises(ConfigError, match=r"teacher\.autocast is .*set that alone"):
        from_dict({"teacher": {"precision": "bf16", "autocast": "bf16"}})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "lr_batch", 0, "at least 1, or null"),
        ("student", "std", [0, 0, 0], "3 values, each above 0, or null"),
        ("teacher", "std", [-1, 1, 1], "3 values, each above 0, or null"),
        ("teacher", "crop_pct", 5, "above 0, at most 1, or null"),
        ("teacher", "crop_pct", 0, "above 0, at most 1, or null"),
        ("teacher", "min_top1", 1.5, "from 0 to 1, or null"),
        ("teacher", "input_size", 0, "from 1 to 8,192, or null"),
    ],
)
def test_a_number_that_nothing_can_be_done_with_is_refused_where_it_is_read(
    section: str, key: str, value: Any, expected: str
) -> None:
    """Not by a division by zero, nor by losses that are no numbers."""
    assert f"{section}.{key} is " in (text := refusal({section: {key: value}})) and f"expected {expected}" in text
