"""Promises of the bounds on config fields: the same for every way in, and in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le, Len, Lt, MultipleOf, Unit

from cskd.config import RecipeConfig, TeacherConfig, TrainConfig, from_dict, load_config
from cskd.config.bounds import bound_of, unit_of
from cskd.errors import ConfigError


def test_a_bound_is_the_same_in_yaml_on_the_command_line_in_a_dict_and_in_python(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("teacher: {batch: 3}")
    ways = (
        lambda: load_config(path),
        lambda: load_config(path, ["teacher.batch=3"]),
        lambda: from_dict({"teacher": {"batch": 3}}),
        lambda: TeacherConfig(batch=3),
        lambda: dataclasses.replace(TeacherConfig(), batch=3),
    )
    for way in ways:
        with pytest.raises(ConfigError) as info:
            way()
        assert str(info.value) == "teacher.batch is 3, expected from 4 to 65,536, a multiple of 4 (images)"


@pytest.mark.parametrize(
    ("section", "key", "inside", "outside"),
    [
        (TeacherConfig, "batch", [4, 1 << 16], [0, -4, 6, (1 << 16) + 4]),
        (TeacherConfig, "input_size", [None, 8192], [8193]),
        (TeacherConfig, "grid", [None, [1, 1024]], [[0, 7], [7], [7, 7, 7], [1, 1025]]),
        (RecipeConfig, "size", [1, 8192], [0, 8193]),
        (RecipeConfig, "flip", [0.0, 1.0], [-0.001, 1.001, float("nan")]),
        (RecipeConfig, "scale", [[1e-9, 1e-9], [0.1, 2.0]], [[0.0, 1.0], [0.2, 0.1], [0.1], [0.1, 0.2, 0.3]]),
        (RecipeConfig, "std", [[1e-6, 1.0, 0.5]], [[0.0, 0.5, 0.5], [0.5, 0.5, 1.1], [0.5, 0.5], None, "abc"]),
        (TrainConfig, "ema", [None, 0.0, 0.9999], [1.0, -0.1]),
        (TrainConfig, "clip_grad", [None, 0.1], [0.0]),
        (TrainConfig, "eval_crop_pct", [1.0, 0.001], [0.0, 1.001]),
        (TrainConfig, "threads", [None, 1, 1024], [0, 1025]),
    ],
)
def test_the_ends_of_a_bound_are_where_the_field_says(
    section: type[Any], key: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        assert getattr(section(**{key: value}), key) == value
    for value in outside:
        with pytest.raises(ConfigError, match=f"{key} is .*, expected "):
            section(**{key: value})


def test_bounds_are_put_into_words() -> None:
    assert bound_of(Annotated[int, Ge(1), Le(1 << 16)]) == "from 1 to 65,536"
    assert bound_of(Annotated[float, Ge(0), Lt(1), Unit("share")]) == "at least 0, below 1"
    assert bound_of(Annotated[int | None, Gt(0), MultipleOf(4)]) == "above 0, a multiple of 4"
    assert bound_of(Annotated[list[Annotated[float, Gt(0)]] | None, Len(2, 2)]) == "2 values, each above 0"
    assert bound_of(Annotated[list[str], Len(1)]) == "at least 1 value"
    assert bound_of(int) == unit_of(int) == ""
    assert unit_of(Annotated[float | None, Unit("share")]) == "share"
