"""Every command in the documents works: options and config keys of all of them, and the tutorial and the how-tos for real."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import cskd
from cskd.cli import app
from cskd.config import from_dict, load_config
from cskd.config.schema import Config
from tests.documents import DOCUMENTS, REASONS, ROOT, SHELL, blocks, commands, of_cskd, spans

GROUP: Any = typer.main.get_command(app)
SECTIONS = tuple(name for name in Config.__dataclass_fields__ if name != "given")
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
FILES = {block.saved_as: block.text for block in BLOCKS if block.saved_as}
HOWTOS = [page for page in DOCUMENTS if page.parent.name == "howto" and any(b.language in SHELL for b in blocks(page))]
HISTORY = ("CHANGELOG.md", "LOG.md")  # what they name may be gone


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The parameters of a call of `cskd`. Raises what the command line raises: an error with `format_message`."""
    name, *rest = arguments or ["--help"]
    if name.startswith("-"):
        return dict(GROUP.make_context("cskd", list(arguments), resilient_parsing=True).params)
    if name not in GROUP.commands:
        raise ValueError(f"no command {name!r}")
    return dict(GROUP.commands[name].make_context(name, list(rest)).params)


def wrong(arguments: list[str], folder: Path, whole: bool = True) -> str:
    """What the command line or the config has against a call of `cskd`, or nothing. whole: it is to be typed as it is."""
    try:
        given = parsed(arguments)
        config = given.get("config")
        if sets := given.get("set_"):
            known = config if config and (ROOT / config).is_file() else folder / "known.yaml"
            if known == folder / "known.yaml":
                known.write_text(FILES.get(str(config), ""))
            load_config(ROOT / known, sets)
    except Exception as e:
        text = str(e.format_message() if hasattr(e, "format_message") else e)
        return "" if not whole and re.match(r"Missing|Option '\S+' requires an argument", text) else text
    return ""


def test_every_call_in_a_block_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    found = [
        f"{block.where}: cskd {' '.join(arguments)}: {error}"
        for block in BLOCKS
        if block.language in SHELL
        for arguments in of_cskd(block.script)
        if (error := wrong(arguments, tmp_path))
    ]
    assert found == []


def test_every_call_in_the_prose_names_commands_options_and_keys_that_exist(tmp_path: Path) -> None:
    found = [
        f"{document.name}: `{span}`: {error}"
        for document in DOCUMENTS
        if document.name not in HISTORY
        for span in spans(document)
        for arguments in of_cskd(span)
        if arguments and not arguments[0].isupper() and "..." not in arguments
        if (error := wrong([re.sub("^N$", "1", word) for word in arguments], tmp_path, whole=False))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("cskd trian cifar10.yaml", "no command 'trian'"),
        ("cskd train", "Missing argument"),
        ("cskd train a.yaml --epochs 3", "No such option"),
        ("cskd train a.yaml --set train.epoch=3", "unknown key 'train.epoch'"),
        ("cskd train configs/cifar10.yaml --set loss.method=cskd", "loss.method is 'cskd'"),
        ("cskd train cifar10.yaml --set 'train.warmup_epochs=-1'", "train.warmup_epochs is -1"),
        ("OMP_NUM_THREADS=1 srun -n 2 cskd inspect x --nothing | head", "No such option"),
        ("for s in 1 2; do cskd eval runs/$s; done", "Missing argument"),
        ("true && cskd pack a b --block many  # with a comment", "--block"),
        ("cskd train \\\n  a.yaml --sett x=y", "No such option"),
        ("$ cskd doctor --jso > x.json\nprinted: cskd nothing", "No such option"),
        ("cskd train configs/nothing.yaml --set train.epoch=3", "unknown key"),
    ],
)
def test_a_call_that_would_fail_is_found(line: str, says: str, tmp_path: Path) -> None:
    language = "console" if line.startswith("$") else "bash"
    (block,) = blocks(ROOT / "x.md", f"text\n\n```{language}\n{line}\n```\n")
    (arguments,) = of_cskd(block.script)
    assert says in wrong(arguments, tmp_path)


def test_every_example_of_help_and_of_a_configs_header_is_one_that_works(tmp_path: Path) -> None:
    texts = {
        name: command.epilog.removeprefix("Example: ") for name, command in GROUP.commands.items() if command.epilog
    }
    for path in ROOT.glob("configs/*.yaml"):
        head = path.read_text(encoding="utf-8").partition("\n\n")[0]
        texts[path.name] = "\n".join(
            re.sub(r" {4,}[(\d].*", "", line[4:]) for line in head.splitlines() if line[:4] == "#   "
        )
    calls = [(where, arguments) for where, text in texts.items() for arguments in of_cskd(text)]
    assert [(where, error) for where, arguments in calls if (error := wrong(arguments, tmp_path))] == []
    assert len(calls) > len(GROUP.commands)


def test_the_page_of_commands_has_every_option_with_its_default_in_tables_of_two_columns() -> None:
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs/conf.py")
    assert spec and spec.loader
    spec.loader.exec_module(conf := importlib.util.module_from_spec(spec))
    for name, command in GROUP.commands.items():
        page = conf._command(name, command)
        rows = [re.split(r"(?<!\\)\|", line) for line in page.splitlines() if line.startswith("| `")]
        assert {len(row) for row in rows} == {4}, name
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            words = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
            shown = [row[2] for row in rows if words[0] in re.split(r"[` ,:]", row[1].replace("\\|", "|"))]
            default = parameter.default if isinstance(parameter.default, int | float | str) else None
            expected = f"[default: {default}" if default is not None and not isinstance(default, bool) else ""
            assert shown and expected in shown[0], (name, words)


def test_every_public_name_of_the_library_is_on_its_page() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    homes = {name: cskd._HOME[name] for name in cskd.__all__ if name in cskd._HOME}
    documented = set(re.findall(r"automodule:: (\S+)", page))
    classes = set(re.findall(r"autoclass:: cskd\.(\w+)", page))
    assert {name for name, home in homes.items() if home not in documented} - classes == set()


def test_marks_are_known_and_reasons_are_few() -> None:
    marks = {block.where: block.mark for block in BLOCKS if block.mark}
    known = re.compile(rf"checks|commands|save [\w./-]+|not run: ({'|'.join(REASONS)})\b.*|file \S+|families: begin")
    assert {where: mark for where, mark in marks.items() if not known.fullmatch(mark)} == {}


def test_every_module_that_is_run_exists_and_has_the_options_that_are_written() -> None:
    found = []
    for document in DOCUMENTS:
        texts = [b.script for b in blocks(document) if b.language in SHELL]
        texts += [s for s in spans(document) if document.name not in HISTORY]
        for command in (c for text in texts for c in commands(text)):
            if Path(command[0]).name.startswith("python") and command[1:2] == ["-m"]:
                spec = importlib.util.find_spec(command[2])
                if spec is None:
                    found.append(f"{document.name}: {command[2]}")
                elif command[2].startswith("benchmarks."):
                    folder = Path(str(spec.origin))
                    files = folder.parent.glob("*.py") if folder.name == "__init__.py" else [folder]
                    source = "".join(path.read_text(encoding="utf-8") for path in files)
                    options = [word for word in command[3:] if re.fullmatch(r"--[a-z-]+", word)]
                    found += [f"{document.name}: {command[2]} {o}" for o in options if f'"{o}"' not in source]
    assert found == []


def _configs(document: Path) -> list[tuple[str, dict[str, Any]]]:
    """The YAML of a document that states keys of a config: fenced, or indented by four columns."""
    text = document.read_text(encoding="utf-8")
    parts = [b.text for b in blocks(document) if b.language == "yaml"]
    parts += re.findall(rf"^(?:    (?:{'|'.join(SECTIONS)}):\n(?:    .*\n)+)", text, re.MULTILINE)
    return [(part, yaml.safe_load(part)) for part in parts]


def test_every_piece_of_a_config_has_keys_that_exist_and_values_that_they_take() -> None:
    checked = 0
    for document in DOCUMENTS:
        for text, raw in _configs(document):
            if not set(raw) <= set(SECTIONS):
                continue
            try:
                from_dict(raw)
            except Exception as e:
                pytest.fail(f"{document.name}: {e}\n{text}")
            checked += 1
    assert checked > 4


def test_every_key_that_the_prose_names_exists() -> None:
    """`train.epochs` in inline code; a module of that name is fine, too."""
    keys = set(FILES) | {"teacher.autocast", "teacher.dtype", "train.tensorboard"}  # of older versions, still read
    keys |= {"student.by_epoch"}  # of the JSON of `cskd inspect`
    keys |= {f"{s}.{key}" for s in SECTIONS for key in type(getattr(Config(), s)).__dataclass_fields__}
    named = re.compile(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z][a-z_0-9]*)(?![\w./])")
    gone = [
        f"{document.name}: {key}"
        for document in DOCUMENTS
        if document.name not in HISTORY
        for span in spans(document)
        for key in named.findall(span)
        if key not in keys
        and not any((ROOT / "cskd" / f"{key.replace('.', '/')}{end}").exists() for end in ("", ".py"))
    ]
    assert gone == []


def run_page(document: Path, folder: Path) -> None:
    """The blocks of a page in order: files are saved, commands are run by bash, which stops at the first that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(document):
        if block.saved_as:
            (folder / block.saved_as).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.saved_as).write_text(block.text, encoding="utf-8")
        elif not block.kept_from_running and block.language in (*SHELL, "python"):
            command = ["bash", "-euo", "pipefail", "-c"] if block.language != "python" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, block.script], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tutorial leaves."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_page(ROOT / "docs/tutorial.md", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", HOWTOS, ids=lambda page: page.stem)
def test_the_commands_of_the_tutorial_and_then_of_each_how_to_run(page: Path, tutorial: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(tutorial, folder)
    run_page(page, folder)
