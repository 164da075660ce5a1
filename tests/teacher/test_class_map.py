"""Labels meet the teacher outputs they belong to, and nothing else passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from cskd.errors import TeacherError
from cskd.teacher.class_map import class_map

NAMES = ["cat", "dog", "emu"]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(classes: str | list[int] | None, names: list[str], outputs: int) -> str:
    with pytest.raises(TeacherError) as e:
        class_map(classes, names, outputs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_equal_counts_and_no_map_keep_the_outputs_as_they_are() -> None:
    assert class_map(None, NAMES, 3) is None


def test_a_list_names_the_output_of_each_label() -> None:
    indices = class_map([4, 0, 2], NAMES, 5)
    assert indices is not None
    assert indices.dtype == np.int64 and indices.tolist() == [4, 0, 2]


def test_the_identity_is_no_map_so_that_it_shares_caches_with_none() -> None:
    assert class_map([0, 1, 2], NAMES, 3) is None


def test_the_first_outputs_of_a_larger_teacher_are_a_subset_not_the_identity() -> None:
    indices = class_map([0, 1, 2], NAMES, 5)
    assert indices is not None and indices.tolist() == [0, 1, 2]


def test_a_file_maps_label_names_to_the_lines_that_hold_them(tmp_path: Path) -> None:
    path = write(tmp_path / "teacher.txt", "\ufeffemu\nfox\n  cat \r\ndog\n\n")
    indices = class_map(path, NAMES, 4)
    assert indices is not None and indices.tolist() == [2, 3, 0]


def test_sizes_that_disagree_are_refused_with_both_numbers_and_the_fix() -> None:
    text = refusal(None, NAMES, 1000)
    assert "1000" in text and "3 classes" in text and "teacher.classes" in text and "num_classes: 3" in text
    text = refusal([0, 1], NAMES, 5)
    assert "2 indices" in text and "3 classes" in text


def test_a_file_that_does_not_name_every_output_is_refused_with_both_numbers(tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "t.txt", "cat\ndog\nemu\n"), NAMES, 4)
    assert "3 classes" in text and "4 logits" in text


@pytest.mark.parametrize("classes", [[0, 1, 5], [-1, 1, 2]])
def test_indices_out_of_range_are_refused(classes: list[int]) -> None:
    bad = next(i for i in classes if not 0 <= i < 5)
    text = refusal(classes, NAMES, 5)
    assert f"output {bad}" in text and "0 to 4" in text


def test_duplicates_are_refused_in_lists_and_in_files(tmp_path: Path) -> None:
    assert "'1' twice" in refusal([1, 1, 2], NAMES, 5)
    assert "'dog' in lines 2 and 3" in refusal(write(tmp_path / "t.txt", "cat\ndog\ndog\nemu\n"), NAMES, 4)


def test_a_label_the_teacher_does_not_know_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "t.txt", "cat\ndogs\nemu\n"), NAMES, 3)
    assert "'dog'" in text and "'dogs'" in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.txt" in refusal(str(tmp_path / "absent.txt"), NAMES, 3)


def test_more_classes_than_uint16_holds_are_refused() -> None:
    assert "65536" in refusal(None, [str(i) for i in range(65536)], 65536)
    assert class_map(None, [str(i) for i in range(65535)], 65535) is None


def test_timm_is_the_order_of_timms_own_folder_reader(tmp_path: Path) -> None:
    names = sorted(["ant", "Ibis", "type2", "type10", "Type1", "x007y9", "x7y10", "é1", "n01440764", "0", "10", "9"])
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    _, index = find_images_and_targets(str(tmp_path))
    indices = class_map("timm", names, len(names))
    assert indices is not None and indices.tolist() == [index[name] for name in names]


def test_words_number_the_names_as_other_programs_do() -> None:
    names = ["b", "B2", "a", "C10", "c9"]  # as a class file may order them
    for word, expected in (
        ("sorted", [3, 0, 2, 1, 4]),  # B2 C10 a b c9
        ("caseless", [1, 2, 0, 3, 4]),  # a b B2 C10 c9
        ("timm", [1, 2, 0, 4, 3]),  # a b B2 c9 C10
    ):
        indices = class_map(word, names, 5)
        assert indices is not None and indices.tolist() == expected
    assert class_map("sorted", NAMES, 3) is None  # the identity: caches are shared with no word at all


def test_a_shift_says_where_the_first_label_is_and_wraps() -> None:
    for word, outputs, expected in (("shift:1", 4, [1, 2, 3]), ("shift:1", 3, [1, 2, 0]), ("shift:-1", 4, [3, 0, 1])):
        indices = class_map(word, NAMES, outputs)
        assert indices is not None and indices.tolist() == expected
    assert class_map("shift:0", NAMES, 3) is None


def test_a_word_that_does_not_say_one_order_is_refused() -> None:
    assert "3 class names" in refusal("timm", NAMES, 4)
    assert "'Ant' and 'ant' alike" in refusal("timm", ["Ant", "ant", "bee"], 3)
    assert "'type2' and 'type02' alike" in refusal("timm", ["type2", "type02"], 2)
    assert "twice" in refusal("shift:1", NAMES, 2)


def test_one_output_more_or_less_than_classes_is_told_the_usual_reason() -> None:
    names = [str(i) for i in range(1000)]
    assert "shift:1" in refusal(None, names, 1001) and "background" in refusal(None, names, 1001)
    assert "count from 1" in refusal(None, names, 999)
    assert max(len(refusal(None, names, n)) for n in (999, 1001)) <= 300
