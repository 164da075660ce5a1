"""Every message is one line of at most 300 characters that keeps the cause and the next step; the nearest name is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cskd.errors import MOST, ConfigError, DataError, fitted, one_line, shown
from cskd.loading.stream import why_died
from cskd.near import absent, did_you_mean


@given(st.text(max_size=2000), st.integers(40, 400))
def test_whatever_the_text_it_is_one_line_that_fits(text: str, most: int) -> None:
    line = fitted(text, most)
    assert len(line) <= most and (line == "" or len(line.splitlines()) == 1)
    assert fitted(line, most) == line


@pytest.mark.parametrize("long", ["/".join(["folder"] * 200), "x" * 3000, ", ".join(["name"] * 400), "a\nb\n" * 500])
def test_what_is_long_gives_way_and_the_cause_and_the_next_step_stay(long: str) -> None:
    line = shown(DataError(f"data.val: no inventory at {long}; make one with 'cskd pack' or 'cskd index'"))
    assert len(line) <= MOST and line.startswith("data.val: no inventory at ")
    assert line.endswith("; make one with 'cskd pack' or 'cskd index'") and "..." in line


def test_a_message_that_fits_stays_as_it_is() -> None:
    assert shown(ConfigError("train.epochs is 'x', expected a whole number")) == (
        "train.epochs is 'x', expected a whole number"
    )
    assert shown(OSError(2, "No such file", "/" + "a/" * 400)).endswith(": No such file")


def test_an_error_out_of_another_process_is_its_last_line() -> None:
    told = 'Caught TypeError in DataLoader worker process 0.\nTraceback (most recent call last):\n  File "x"\nTypeError: why'
    assert one_line(TypeError(told)) == "TypeError: why"
    assert len(one_line(ValueError("\n".join(["long"] * 500)), 100)) < 120


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tinny", "did you mean 'vit_tiny'?"),
        ("VIT_TINY", "it is 'vit_tiny' but for upper and lower case"),
        ("vit_tiny ", "it is 'vit_tiny' but for a space at its end"),
        ("vit\u2060_tiny", "it is 'vit_tiny' but for the character U+2060, WORD JOINER"),
        ("cafe\u0301", "it is 'caf\u00e9' but for its Unicode form: accents are composed in one and not in the other"),
        ("zzzz", ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_said_and_in_what_one_that_looks_alike_differs(name: str, said: str) -> None:
    assert did_you_mean(name, ["vit_tiny", "vit_small", "caf\u00e9"]) == said


def test_a_path_that_is_not_there_says_what_was_looked_for_and_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    line = absent("data/trian")
    assert f"{tmp_path}/data/trian" in line and "working folder" in line and "did you mean 'train'" in line
    assert "a space at its end" in absent("data/train ")
    assert absent(tmp_path / "data" / "zzzz") == f"{tmp_path}/data/zzzz"
    assert f"(in {tmp_path})" in absent("dta/train")
    assert "ZERO WIDTH" in absent("data/tra\u200bin") and "\\u200b" in absent("data/tra\u200bin")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. " + "x " * 900,
            -signal.SIGBUS,
            ["SIGBUS", "--shm-size"],
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file </t>: No space left "
            "on device (28)\n" + "line\n" * 400,
            None,
            ["/dev/shm", "--shm-size", "train.prefetch"],
        ),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", -signal.SIGBUS, ["SIGBUS", "--shm-size"]),
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            -signal.SIGKILL,
            ["SIGKILL", "memory", "fewer workers"],
        ),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", -signal.SIGKILL, ["SIGKILL", "memory"]),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", -signal.SIGSEGV, ["SIGSEGV"]),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", 1, ["exited unexpectedly", "fewer workers"]),
    ],
)
def test_what_ended_a_worker_is_named_with_its_cure(text: str, code: int | None, words: list[str]) -> None:
    line = why_died(text, [None, code])
    assert line is not None and len(line) <= MOST and "\n" not in line
    assert [word for word in words if word not in line] == []


def test_a_bug_in_a_worker_is_not_taken_for_its_death() -> None:
    assert why_died("Caught RuntimeError in DataLoader worker process 0.\nwrong shape", [None]) is None
    assert why_died("wrong shape", [None, None]) is None


def test_a_relative_path_is_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cskd.config import load_config

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.yaml").write_text("data: {train: here/train}")
    monkeypatch.chdir(tmp_path)
    train = load_config("configs/c.yaml").data.train
    assert os.path.abspath(train) == str(tmp_path / "here" / "train")
