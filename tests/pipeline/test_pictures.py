"""Drawing: pixels mean what they say, on any grid, with any names."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cskd.pipeline.draw import pictures
from cskd.pipeline.draw.pictures import (
    CLASS_COLOURS,
    OTHER,
    UNUSED,
    class_key,
    class_map,
    cut,
    font,
    grid,
    legend,
    panel,
    scalar_map,
)
from cskd.pipeline.draw.wordnet import readable


@pytest.mark.parametrize(("h", "w", "side"), [(1, 1, 224), (7, 7, 224), (7, 7, 300), (3, 5, 224), (14, 14, 224)])
def test_every_cell_of_a_class_map_has_the_colour_of_its_class(h: int, w: int, side: int) -> None:
    map_hw = np.random.default_rng(0).integers(0, 5, (h, w)).astype(np.uint16)
    key = class_key([map_hw])
    pixels = np.asarray(class_map(map_hw, key, side))
    assert pixels.shape == (side, side, 3)
    for i in range(h):
        for j in range(w):  # a point off the letter in the middle and off the line at the border
            y, x = int((i + 0.2) * side / h), int((j + 0.2) * side / w)
            assert tuple(pixels[y, x]) == key.colour(int(map_hw[i, j]))


def test_named_classes_come_first_then_the_most_frequent_and_the_rest_share_one_colour() -> None:
    map_hw = np.repeat(np.arange(12), np.arange(12, 0, -1))[None]
    key = class_key([map_hw], first=[9, 77, UNUSED, 4])
    assert key.slots == (9, 77, UNUSED, 4, 0, 1, 2, 3, 5, 6, 7) and key.classes == (*key.slots[:2], *key.slots[3:])
    assert [key.colour(c) for c in key.classes] == [*CLASS_COLOURS[:2], *CLASS_COLOURS[3:]]
    assert key.letter(9) == "A" and key.letter(4) == "D" and key.colour(8) == OTHER and key.letter(8) == ""


def test_class_colours_differ_in_lightness_or_hue_for_colour_blind_readers() -> None:
    # Deuteranopia in linear RGB by Vienot, Brettel and Mollon (1999): red and green collapse to one axis.
    linear = (np.array([*CLASS_COLOURS, OTHER]) / 255.0) ** 2.2
    red_green = linear @ np.array([0.29275, 0.70725, 0.0])
    seen = np.stack([red_green, linear[:, 2]], 1) ** (1 / 2.2)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(len(seen), dtype=bool)]
    assert apart.min() > 0.08


def test_scalar_maps_run_from_dark_to_bright_and_clip_outside_their_range() -> None:
    values = np.array([[-5.0, 0.0, 0.5, 1.0, 9.0]])
    pixels = np.asarray(scalar_map(values, 0.0, 1.0, 20))  # too small for numbers
    light = pixels[10, 2::4].astype(int).sum(-1)
    assert light[0] == light[1] < light[2] < light[3] == light[4]


def test_an_image_shows_through_an_overlay() -> None:
    map_hw = np.zeros((1, 1), np.uint16)
    over = Image.new("RGB", (8, 8), (255, 0, 0))
    red = np.asarray(class_map(map_hw, class_key([map_hw]), 100, over=over))[5, 5]
    assert red[0] > 120 and tuple(red) != CLASS_COLOURS[0]


def test_captions_are_cut_to_their_picture_and_never_hold_what_the_typeface_lacks() -> None:
    face = font(14)
    long = cut("an endless caption " * 20, face, 200)
    assert long.endswith("...") and face.getlength(long) <= 200
    assert cut("crème brûlée", face, 500) == "creme brulee"
    assert cut("\x1b[31m寿司\n", face, 500) == "?[31m???"
    assert cut("anything", face, 1) == "..."


def test_a_panel_keeps_the_pictures_pixels_and_adds_text_below() -> None:
    picture = Image.new("RGB", (224, 224), (1, 2, 3))
    out = np.asarray(panel(picture, "title", "note"))
    assert out.shape[1] == 224 and (out[:224] == (1, 2, 3)).all() and (out[224:] < 120).any()


def test_grids_place_pictures_without_overlap() -> None:
    red, blue = Image.new("RGB", (30, 20), (255, 0, 0)), Image.new("RGB", (10, 50), (0, 0, 255))
    out = np.asarray(grid([[red, blue], [blue]], gap=4))
    assert out.shape == (50 + 50 + 3 * 4, 30 + 10 + 3 * 4, 3)
    assert (out == (255, 0, 0)).all(-1).sum() == 600 and (out == (0, 0, 255)).all(-1).sum() == 1000


def test_a_legend_names_every_class_and_stays_inside_its_width() -> None:
    map_hw = np.arange(12).reshape(3, 4)
    key = class_key([map_hw])
    one_line = legend(key, {c: "x" for c in range(12)}, 0, 2000)
    several = legend(key, {c: "a rather long name of a class" for c in range(12)}, 5, 300)
    assert several.width == 300 and several.height > 4 * one_line.height
    pixels = {tuple(p) for p in np.asarray(several).reshape(-1, 3).tolist()}
    assert {*CLASS_COLOURS, OTHER} <= pixels


def test_pictures_are_the_same_every_time() -> None:
    map_hw = np.arange(9).reshape(3, 3)
    once, again = (class_map(map_hw, class_key([map_hw]), 90).tobytes() for _ in range(2))
    assert once == again and pictures.font(12) is pictures.font(12)


def test_wordnet_ids_become_words_and_other_names_stay() -> None:
    assert readable(["n01440764", "n99999999", "cat"]) == ["tench", "n99999999", "cat"]
    assert readable(["cat", "dog"]) == ["cat", "dog"]
