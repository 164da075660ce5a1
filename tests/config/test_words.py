"""What YAML 1.1 makes of a word is said where it is not what was meant, and how to write it; and all that is wrong is found at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd.config import load_config, read_config
from cskd.config.schema import Config
from cskd.errors import ConfigError, shown


def refusal(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as info:
        load_config(path, list(overrides))
    line = shown(info.value)
    assert len(line) <= 300 and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: {randaugment: off}", ["recipe.randaugment", "off as false", "'off' in quotes", "null"]),
        ("train: {opt: on}", ["train.opt", "on as true", "'on' in quotes"]),
        ("loss: {decay: off}", ["loss.decay", "off as false", "one of linear"]),
        ("train: {autocast: no}", ["train.autocast", "no as false", "write none"]),
        ("train: {clip_grad: off}", ["train.clip_grad", "off as false", "write null"]),
        ("train: {ema: none}", ["train.ema", "'none'", "write null"]),
        ("train: {lr: yes}", ["train.lr", "yes as true", "a number"]),
        ("train: {epochs: ~}", ["train.epochs", "~ as null", "a whole number"]),
        ("train: {epochs: 1:30}", ["train.epochs", "1:30 as 90, in base 60", "write 90"]),
        ("train: {lr: 1:30.5}", ["train.lr", "in base 60"]),
        ("train: {epochs: 010}", ["train.epochs", "010 as 8, in base 8", "write 8, or 10"]),
        ("teacher: {grid: [010, 7]}", ["teacher.grid[0]", "010 as 8, in base 8"]),
        ("train: {epochs: 1e3}", ["train.epochs", "1e3 as text", "write 1000"]),
        ("train: {epochs: 100.0}", ["train.epochs", "write 100"]),
        ("train:\n  epochs: 1,024", ["train.epochs", "'1,024'", "write 1024"]),
        ("train: {lr: .inf}", ["train.lr", ".inf", "a number"]),
        ("train: {compile: y}", ["train.compile", "'y'", "write true"]),
        ("train: {compile: 'off'}", ["train.compile", "'off'", "write false"]),
        ("cache: {path: 0x10}", ["cache.path", "0x10 as 16", "'0x10' in quotes"]),
        ("train: {epochs: '100'}", ["train.epochs is '100', expected a whole number; write 100, without quotes"]),
        ("train: {save_every: '100'}", ["train.save_every is '100'", "15min", "write 100, without quotes"]),
        ("train: {save_every: '1,000'}", ["15min", "; write 1000"]),
        ("train: {save_every: 100.0}", ["15min", "; write 100"]),
        ("train: {save_every: 1e3}", ["15min", "1e3 as text", "; write 1000"]),
        ("train: {save_every: 1.5}", ["expected a number of steps, a time such as 15min, 90s or 2h, or 0 for none"]),
        ("train: {save_every: 1:30}", ["15min", "1:30 as 90, in base 60)"]),
        ("train: {save_every: 010}", ["15min", "in base 8", "; write 8, or 10"]),
        ("train: {save_every: off}", ["15min", "or 0 for none (YAML reads off as false)"]),
        ("train: {save_every: null}", ["15min", "or 0 for none"]),
        ("train: {save_every: '-1'}", ["15min", "or 0 for none"]),
        ("teacher: {grid: ['7', 7]}", ["teacher.grid[0] is '7', expected a whole number; write 7, without quotes"]),
        ("teacher: {classes: [0, '2']}", ["teacher.classes[1] is '2'", "write 2, without quotes"]),
        ("data: {train: 2024}", ["data.train", "2024", "'2024' in quotes"]),
        ("data: {train: 2024-01-01}", ["data.train", "as a date", "'2024-01-01' in quotes"]),
        ("cache: {codecs: [envelope, no]}", ["cache.codecs[1]", "no as false", "'no' in quotes"]),
        ("student: {kwargs: {drop: 1e-3}}", ["student.kwargs.drop", "1e-3 as text", "write 0.001", "'1e-3' in quotes"]),
        ("teacher: {kwargs: {x: [1:30]}}", ["teacher.kwargs.x[0]", "in base 60"]),
        ("teacher: {kwargs: {x: 2024-01-01}}", ["teacher.kwargs.x", "as a date", "in quotes"]),
    ],
)
def test_a_word_that_yaml_reads_otherwise_is_named_with_what_to_write(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    line = refusal(tmp_path, text)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("text", ["train: {lr: 1e-3, tf32: off, seed: 0x10, epochs: 1_000, best: ~}", "\ufeffdata:\n"])
def test_words_that_say_what_they_seem_to_are_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    train = load_config(tmp_path / "c.yaml", ["train.warmup_lr=1e-7"]).train
    assert (train.lr, train.warmup_lr, train.best) == (1e-3, 1e-7, None)
    assert (train.tf32, train.seed, train.epochs) in ((False, 16, 1000), (True, 0, 300))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 3, epochs: 4}", ["train.epochs twice", "line 1"]),
        ("train:\n  lr: 1\ndata:\ntrain:\n  lr: 2", ["train twice", "line 1 and line 4"]),
        ("teacher: {kwargs: {x: [{e\u0301: 1, \u00e9: 2}]}}", ["twice"]),
        ("train:\n\tepochs: 3", ["line 2 has a tab", "spaces"]),
        ("train:\n  epochs:3", ["train is 'epochs:3'", "a space after the colon"]),
        ("data:\n  train: a: b", ["line 2", "second ': '", "quotes"]),
        ("data: {train: @x}", ["line 1", "'@'", "quotes"]),
        ("data: {train: *x}", ["line 1", "alias 'x'", "quotes"]),
        ("data: {train: !x y}", ["line 1", "'!x'", "quotes"]),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_its_line_and_what_is_mostly_meant(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    line = refusal(tmp_path, text)
    assert [word for word in words if word not in line] == [], line


def test_a_value_of_set_says_the_same_and_replaces_what_the_file_wrote(tmp_path: Path) -> None:
    assert "1:30 as 90, in base 60" in refusal(tmp_path, "", "train.epochs=1:30")
    for key in ("loss.terms[0].epochs", "loss.terms[0]"):
        assert "--set 'loss.terms=[...]'" in refusal(tmp_path, "", f"{key}=[1, null]")
    assert "student.kwargs.a twice" in refusal(tmp_path, "", "student.kwargs={a: 1, a: 2}")
    (tmp_path / "c.yaml").write_text("train: {epochs: 010}\nstudent: {kwargs: {drop: 1e-3}}")
    config = load_config(tmp_path / "c.yaml", ["train.epochs=10", "student.kwargs={drop: 0.1}"])
    assert (config.train.epochs, config.student.kwargs) == (10, {"drop": 0.1})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("epo\u200bchs", ["ZERO WIDTH SPACE", "'train.epochs'", "\\u200b"]),
        ("epo\u00adchs", ["SOFT HYPHEN", "'train.epochs'"]),
        ("'epochs '", ["'train.epochs'", "a space at its end"]),
        ("Epochs", ["'train.epochs'", "upper and lower case"]),
        ("\u00a0epochs", ["'train.epochs'", "\\xa0"]),
        ("\uff45pochs", ["'train.epochs'", "FULLWIDTH LATIN SMALL LETTER E"]),
        ("epoch", ["did you mean 'train.epochs'?"]),
    ],
)
def test_a_key_that_only_looks_like_one_says_in_what_it_differs(tmp_path: Path, key: str, words: list[str]) -> None:
    lines = [
        refusal(tmp_path, f"train: {{{key}: 3}}"),
        refusal(tmp_path, "", f"train.{key}.x=3") if key[0] != "'" else "",
    ]
    for line in filter(None, lines):
        assert [word for word in words if word not in line] == [], line


def test_a_choice_that_only_looks_like_one_says_in_what_it_differs(tmp_path: Path) -> None:
    assert "NON-BREAKING HYPHEN" in refusal(tmp_path, "loss: {method: cskd\u2011hard}")
    assert "a space at its end" in refusal(tmp_path, "loss: {method: 'cskd-hard '}")


def test_all_that_is_wrong_is_found_in_one_reading_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "train: {epochs: 0, lr: -1, global_batch: x, batchsize: 3, keep: 7, export: ema}\n"
        "teacher: {batch: 3, weights: ftp://a/b}\ndata: {train: '${CSKD_UNSET_}', val: v}\nnonsense: 1\n"
    )
    config, wrong = read_config(path, ["loss.tau=[", "loss.tau=0"])
    keys = [
        "batchsize",
        "epochs",
        "lr",
        "global_batch",
        "train.export",
        "batch",
        "weights",
        "data.train",
        "nonsense",
        "[",
    ]
    assert len(wrong) == len(keys) + 1 and [key for key in keys if not any(key in str(e) for e in wrong)] == []
    assert (config.train.keep, config.train.epochs, config.data.val) == (7, Config().train.epochs, "v")
    with pytest.raises(ConfigError, match=rf"\({len(wrong) - 1} more: `cskd check` lists all\)"):
        load_config(path, ["loss.tau=[", "loss.tau=0"])
