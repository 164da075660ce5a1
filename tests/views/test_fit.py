"""How sizes fit together: what nobody sees is refused, cells that do not meet are noted, and what fits says nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cskd.config import RecipeConfig, StudentConfig, TeacherConfig
from cskd.errors import ConfigError, StudentError
from cskd.student import Student, build_student
from cskd.views.fit import evaluation_notes, image_notes, multiples, patch_notes, refuse_views, teacher_notes, windows
from tests.teachers import load, tiny_teacher

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def student(size: int | tuple[int, int], model: str = "vit_tiny_patch16_224", **kwargs: Any) -> Student:
    return build_student(StudentConfig(model, TINY | kwargs), 5, size)


def seen(made: Student, size: int) -> int:
    """Rows of pixels that any output depends on."""
    images = torch.randn(1, 3, size, size, requires_grad=True)
    out = made(images, (1, 1))
    (out.cls_logits.sum() + out.patch_logits.pow(2).sum()).backward()
    assert images.grad is not None
    return int((images.grad.abs().sum((0, 1, 3)) > 0).sum())


def test_pixels_that_no_patch_covers_are_refused_with_the_sizes_that_fit() -> None:
    with pytest.raises(
        StudentError, match=r"last 8 rows and 8 columns .* 200 x 200, .* 16 x 16; set recipe.size to 192 or 208"
    ):
        student(200)
    with pytest.raises(StudentError, match=r"last 4 columns .* recipe.size to 32 or 48"):
        student((32, 36))
    with pytest.raises(StudentError, match=r"recipe.size to 16, another"):
        student(8)
    alone: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"dynamic_img_pad": True})
    for kwargs in alone:  # each alone breaks at the first image
        with pytest.raises(StudentError, match="dynamic_img_size: true, dynamic_img_pad: true"):
            student(200, **kwargs)
    with pytest.raises(StudentError) as refused:
        student(200)
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_what_is_refused_is_not_seen_and_what_is_taken_is() -> None:
    blind = build_student(StudentConfig("vit_tiny_patch16_224", TINY), 5, 200, trained=True)
    assert seen(blind, 200) == 192
    assert any("does not see the last 8 rows" in note for note in blind.notes)
    padded = student(200, dynamic_img_size=True, dynamic_img_pad=True)
    assert seen(padded, 200) == 200
    assert any("13 x 13 patches" in note and "padding" in note for note in padded.notes)
    assert seen(student(192), 192) == 192 and student(192).notes == []
    assert student(40, patch_size=8).notes == []


def test_a_hybrids_patches_are_those_of_the_image() -> None:
    assert student(64, "vit_tiny_r_s16_p8_224", patch_size=1, depth=1).notes == []


@pytest.mark.parametrize("fine", [(14, 14), (12, 12), (7, 7), (9, 6)])
@pytest.mark.parametrize("coarse", [(7, 7), (5, 5), (3, 2), (1, 1)])
def test_windows_are_those_of_the_pooling(fine: tuple[int, int], coarse: tuple[int, int]) -> None:
    ones = torch.eye(fine[0] * fine[1]).reshape(-1, 1, *fine)  # an image for each cell
    counts = (F.adaptive_avg_pool2d(ones, coarse) > 0).sum(0)[0]  # cells in each window
    shared = int(counts.sum()) > fine[0] * fine[1]
    said = windows(fine, coarse)
    assert (said is not None) == shared
    if said and fine[0] == fine[1] and coarse[0] == coarse[1]:
        sides = counts.float().sqrt()
        assert f"{int(sides.min())}" in said and f"{int(sides.max())}" in said


def test_patches_that_do_not_divide_into_cells_are_noted_with_a_grid_that_would() -> None:
    assert patch_notes((14, 14), (7, 7)) == patch_notes((8, 8), (8, 8)) == patch_notes((14, 7), (7, 7)) == []
    (note,) = patch_notes((14, 14), (5, 5))
    assert "14 x 14 patches" in note and "5 x 5 cells by windows of 3 to 4" in note and "7 x 7 would meet" in note
    assert "6 x 6 would meet" in student(192).grid_notes((7, 7))[0]
    with pytest.raises(StudentError, match="too few"):
        student(192).grid_notes((13, 13))


def test_a_teacher_whose_cells_tile_its_input_at_the_views_own_size_has_no_note() -> None:
    for size, cells, stated in ((224, 7, 32), (224, 14, 16), (32, 8, None), (96, 4, None), (224, 1, 32), (64, 4, 32)):
        assert teacher_notes(size, size, (cells, cells), (cells, cells), stated) == []


def test_a_teacher_whose_cells_do_not_tile_its_input_is_noted_with_the_sizes_that_would() -> None:
    for stated in (32, None):
        (note,) = teacher_notes(230, 230, (8, 8), (8, 8), stated)
        assert "8 x 8 cells, 32 pixels apart, do not tile its input of 230" in note and "224 or 256" in note
    (note,) = teacher_notes(224, 224, (4, 4), (4, 4), 64)  # 4 x 56 would, but its stride is 64
    assert "192 or 256" in note
    (note,) = teacher_notes(299, 299, (8, 8), (8, 8), 32)  # convolutions without padding: no size does
    assert "do not tile its input of 299" in note and "would" not in note


def test_another_input_size_an_uneven_pooling_and_cells_that_are_not_square_are_noted() -> None:
    assert "enlarged to the teacher's 288 x 288" in teacher_notes(224, 288, (9, 9), (9, 9), 32)[0]
    assert "reduced to the teacher's 128 x 128" in teacher_notes(224, 128, (4, 4), (4, 4), 32)[0]
    assert "averaged to teacher.grid 5 x 5 by windows of 2 to 3" in teacher_notes(224, 224, (7, 7), (5, 5), 32)[0]
    assert "grid is 7 x 1" in teacher_notes(224, 224, (7, 7), (7, 1), 32)[0]


def test_a_loaded_teacher_says_where_its_cells_lie(tmp_path: Path) -> None:
    config = tiny_teacher(tmp_path)
    assert load(config).notes == []
    notes = load(config, size=56, input_size=70, grid=[4, 4]).notes
    assert [n.split(" (")[0] for n in notes[:1]] == ["views of 56 x 56 pixels are enlarged to the teacher's 70 x 70"]
    assert "5 x 5 cells, 16 pixels apart, do not tile its input of 70 pixels" in notes[1] and "64 or 80" in notes[1]
    assert "averaged to teacher.grid 4 x 4" in notes[2]


def test_a_teacher_that_states_half_of_its_preprocessing_says_what_is_guessed(tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text(
        "from timm import create_model\n"
        "def build(cfg):\n"
        "    model = create_model('resnet18', channels=[8, 8, 8, 8], num_classes=5)\n"
        "    model.pretrained_cfg = cfg\n"
        "    return model\n"
    )

    def notes(cfg: dict[str, Any], **settings: Any) -> str:
        config = TeacherConfig(f"{net}:build", kwargs={"cfg": cfg}, **settings)
        return " ".join(load(config).notes)

    half = [0.5, 0.5, 0.5]
    assert "state its mean and std: ImageNet's" in notes({})
    assert "state its std: ImageNet's" in notes({"mean": half})
    assert "state its std: ImageNet's" in notes({}, mean=half)
    assert "state its mean: ImageNet's" in notes({"std": half})
    assert "ImageNet" not in notes({"mean": half}, std=half)
    assert "'lanczos': bicubic is used" in notes({"interpolation": "lanczos"})


def test_images_that_are_smaller_than_views_or_of_other_shapes_are_noted() -> None:
    large = [(300, 400)] * 3
    for crop in ("resized", "center"):
        recipe = RecipeConfig(size=224, crop=crop)
        assert image_notes(large, recipe) == image_notes([], recipe) == []
        assert "short side of at most 48" in image_notes([*large, *[(48, 64)] * 4], recipe)[0]
    padded = RecipeConfig(size=32, crop="padded")
    assert image_notes([(32, 32)], padded) == []
    assert "1 of 2 looked at, one of 300 x 400" in image_notes([(32, 32), (300, 400)], padded)[0]


def test_an_evaluation_that_shows_less_than_training_is_noted() -> None:
    padded = RecipeConfig(crop="padded")
    assert "the middle 87.5 %" in evaluation_notes(0.875, padded)[0]
    assert evaluation_notes(1.0, padded) == evaluation_notes(0.875, RecipeConfig()) == []


def test_views_that_may_be_padding_alone_are_refused() -> None:
    recipe = RecipeConfig(size=32, crop="padded", padding=32)
    with pytest.raises(ConfigError, match=r"recipe.padding is 32"):
        refuse_views(recipe)
    refuse_views(dataclasses.replace(recipe, padding=31))
    refuse_views(dataclasses.replace(recipe, crop="center"))


def test_cuts_that_are_all_larger_than_their_image_are_refused() -> None:
    recipe = RecipeConfig(size=32, scale=[2.0, 3.0])
    with pytest.raises(ConfigError, match=r"recipe.scale is \[2.0, 3.0\], .* every view would be the whole one"):
        refuse_views(recipe)
    refuse_views(dataclasses.replace(recipe, scale=[1.0, 3.0]))
    refuse_views(dataclasses.replace(recipe, crop="center"))


def test_multiples_are_the_nearest_ones() -> None:
    assert (multiples(200, 16), multiples(8, 16)) == ("192 or 208", "16")
