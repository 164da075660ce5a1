"""Where each value of a config comes from, and that what is printed of it is the same config again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd.config import Config, from_dict, load_config, to_dict
from cskd.config.origins import as_yaml, resolve
from cskd.config.shipped import copy_config, shipped, shipped_config
from cskd.errors import ConfigError, PathError

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = """\
common: &common
  epochs: 7
data:
  train: ${NOWHERE:-here}/train
teacher: {model: resnet18, autocast: bf16}
student:
  kwargs: {depth: 2}
train:
  <<: *common
  lr: 1e-3
  epochs:
    8
"""


def origins(tmp_path: Path, text: str, *overrides: str) -> dict[str, str]:
    (tmp_path / "c.yaml").write_text(text)
    found = resolve(tmp_path / "c.yaml", list(overrides))
    return {setting.key: setting.origin.replace(f"{tmp_path}/", "") for setting in found.settings}


def test_each_value_names_its_line_its_override_or_the_default(tmp_path: Path) -> None:
    text = "\n".join(TEXT.splitlines()[2:]).replace("  <<: *common\n", "")
    found = origins(tmp_path, text, "student.kwargs.heads=3", "cache.views=9", "train.lr=2", "train.lr=3")
    assert found.keys() == {f"{s}.{k}" for s, keys in to_dict(Config()).items() for k in keys}
    assert found["data.train"] == "c.yaml:2, ${NOWHERE:-here}"
    assert found["teacher.precision"] == "c.yaml:3"  # by the key that it had in an older version
    assert found["student.kwargs"] == "c.yaml:5, --set student.kwargs.heads=3"
    assert (found["cache.views"], found["train.lr"]) == ("--set cache.views=9", "--set train.lr=3")
    assert (found["train.epochs"], found["train.opt"]) == ("c.yaml:8", "default")


def test_merged_keys_name_the_place_they_are_merged_from(tmp_path: Path) -> None:
    text = "train: &a\n  epochs: 7\n  lr: 1\ncache: {}\n"
    assert origins(tmp_path, text)["train.epochs"] == "c.yaml:2"
    merged = "recipe:\n  <<: {size: 32, flip: 0}\n  flip: 1\n"
    found = origins(tmp_path, merged)
    assert (found["recipe.size"], found["recipe.flip"]) == ("c.yaml:2", "c.yaml:3")


def test_an_override_of_a_section_takes_the_place_of_all_of_it(tmp_path: Path) -> None:
    found = origins(tmp_path, "train:\n  epochs: 7\n  lr: 1\n", "train={epochs: 9}")
    assert (found["train.epochs"], found["train.lr"]) == ("--set train={epochs: 9}", "default")
    assert origins(tmp_path, "train:\n  epochs: 7\n", "train=")["train.epochs"] == "default"


@pytest.mark.parametrize("config", shipped().configs, ids=lambda c: c.name)
def test_what_is_printed_is_the_same_config_again(tmp_path: Path, config: object) -> None:
    path = copy_config(config.name, tmp_path)  # type: ignore[attr-defined]
    overrides = ["data.train=a # b: 'c'", "teacher.kwargs={a: [1, null, 'x: y']}", "train.lr=1e-05"]
    text = as_yaml(resolve(path, overrides))
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml") == _all_given(load_config(path, overrides))


def _all_given(config: Config) -> Config:
    return from_dict(to_dict(config))


def test_a_config_that_is_refused_has_no_origins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        resolve(tmp_path / "c.yaml")


def test_shipped_configs_are_those_of_the_folder_each_with_a_header_that_says_what_it_is() -> None:
    there = {path.stem: path.read_text() for path in (ROOT / "configs").glob("*.yaml")}
    assert {config.name: config.text for config in shipped().configs} == there
    for config in shipped().configs:
        assert config.text.startswith(f"# {config.about}\n")
        assert 20 < len(config.about) < 130 and config.about.endswith(".")


@pytest.mark.parametrize("name", ["cifar10", "cifar10.yaml", "configs/cifar10.yaml"])
def test_a_shipped_config_is_found_by_any_of_its_names(name: str) -> None:
    assert shipped_config(name).name == "cifar10"


def test_a_copy_takes_nothing_s_place_and_an_unknown_name_hears_of_the_nearest(tmp_path: Path) -> None:
    path = copy_config("cifar10", tmp_path)
    path.write_text("mine")
    with pytest.raises(PathError, match="is there already"):
        copy_config("cifar10", tmp_path)
    assert path.read_text() == "mine"
    for name in ("cifr", "../x", "", "\x1b[2J"):
        with pytest.raises(ConfigError, match=r"nearest is|no name") as refused:
            copy_config(name, tmp_path)
        assert len(str(refused.value)) <= 300 and str(refused.value).isprintable()
