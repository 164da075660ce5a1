"""What the command line says of itself: every command in a group with an example that parses, every option with its help."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cskd import cli
from cskd.config.shipped import copy_config, shipped

COMMAND: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = COMMAND.commands
GROUPS = {cli.START, cli.DATA, cli.STAGES, cli.CACHES, cli.CONFIGS}


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["cskd", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_a_group_and_every_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.rich_help_panel in GROUPS
    assert command.help and command.help.strip()
    for parameter in [*command.params, *COMMAND.params]:
        assert (parameter.help or "").strip().endswith((".", "...")), f"{name} {parameter.name} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_usage_line_names_each_argument_by_a_word(name: str) -> None:
    pieces = COMMANDS[name].collect_usage_pieces(COMMANDS[name].make_context(name, [], resilient_parsing=True))
    assert not [piece for piece in pieces if "[[" in piece or piece.startswith(("[]", " "))], pieces


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_line_of_that_command_that_parses(name: str) -> None:
    word, line = COMMANDS[name].epilog.split(": ", 1)
    program, command, *arguments = shlex.split(line.split(" > ")[0])
    assert (word, program, command) == ("Example", "cskd", name)
    COMMANDS[name].make_context(name, arguments)  # raises a usage error where it does not parse


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_and_the_program_answers_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    code, script, _ = call(monkeypatch, capsys, "completion", shell)
    assert code == 0 and f"complete_{shell}" in script and cli.COMPLETE in script
    monkeypatch.setenv(cli.COMPLETE, f"complete_{shell}")
    words = {"COMP_WORDS": "cskd pl", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "cskd pl"}
    for variable, value in {**words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}.items():
        monkeypatch.setenv(variable, value)
    code, answer, _ = call(monkeypatch, capsys)
    assert code == 0 and "plan" in answer and "train" not in answer.replace("training", "")


def test_a_shell_that_is_unknown_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, capsys, "completion", "tcsh")[0] == 2


def test_configs_are_listed_printed_and_copied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, listed, _ = call(monkeypatch, capsys, "configs")
    assert code == 0 and "cifar10 " in listed
    _, text, _ = call(monkeypatch, capsys, "configs", "cifar10")
    assert call(monkeypatch, capsys, "configs", "cifar10", "--copy")[:2] == (0, "cifar10.yaml\n")
    assert (tmp_path / "cifar10.yaml").read_text() == text.replace("configs/cifar10.yaml", "cifar10.yaml")
    for argv, words in ((["cifar10", "--copy"], "is there already"), (["--copy"], "no name"), (["x"], "nearest")):
        code, out, err = call(monkeypatch, capsys, "configs", *argv)
        assert (code, out) == (1, "") and words in err and err.count("\n") == 1
    names = [entry["name"] for entry in json.loads(call(monkeypatch, capsys, "configs", "--json")[1])["configs"]]
    assert names == [line.split()[0] for line in listed.splitlines()]


@pytest.mark.parametrize("name", [one.name for one in shipped().configs])
def test_the_commands_of_a_copied_config_name_the_copy(tmp_path: Path, name: str) -> None:
    copy = copy_config(name, tmp_path)
    calls = [line for line in copy.read_text().splitlines() if line.startswith("#   ") and "cskd " in line]
    files = [word for line in calls for word in line.split(" > ")[0].split() if word.endswith(".yaml")]
    assert copy.name in files and "configs/" not in " ".join(files)


def test_a_resolved_config_says_where_each_value_is_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "c [bold].yaml"
    path.write_text("train:\n  epochs: 7\n")
    code, out, _ = call(monkeypatch, capsys, "config", str(path), "--set", "cache.views=9")
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert code == 0
    assert {f"epochs: 7 # {path}:2", "views: 9 # --set cache.views=9", "views: 0 # default"} <= lines
    facts = json.loads(call(monkeypatch, capsys, "config", str(path), "--json")[1])
    assert {"key": "train.epochs", "value": 7, "origin": f"{path}:2"} in facts["settings"]
