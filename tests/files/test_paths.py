"""Every path is one of this machine, but for caches: any other address is refused by the name of its key or argument, and nothing
is made of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cskd import cli
from cskd.config import from_dict, load_config
from cskd.config.load import ON_OBJECT_STORES, PATHS, WRITTEN
from cskd.dataset.inventory import open_inventory
from cskd.errors import PathError
from cskd.files.own_code import load_own
from cskd.files.paths import local_path, local_text
from cskd.packing.index import index
from cskd.packing.pack import pack
from cskd.pipeline.demo import run_demo
from cskd.store.cache import open_cache

SERVED = {  # where a cache may lie -> in its usual form
    "s3://bucket/x": "s3://bucket/x",
    "s3:/bucket/x": "s3://bucket/x",
    "gs://b/x/": "gs://b/x",
    "AZ://b": "az://b",
    "https://h/x": "https://h/x",
}
ADDRESSES = [*SERVED, "HF://d", "file:///data/x", "node7:/data", "ftp://h/x"]


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_a_config_is_refused_by_its_key(key: str, address: str) -> None:
    section, _, name = key.partition(".")
    if key in ON_OBJECT_STORES and address in SERVED and not (key in WRITTEN and "http" in address):
        assert getattr(getattr(from_dict({section: {name: address}}), section), name) == SERVED[address]
        return
    with pytest.raises(PathError) as caught:
        from_dict({section: {name: address}})
    text = str(caught.value)
    if key in WRITTEN and "http" in address:
        assert text.startswith(f"{key} '{address}' is on a web server, which is only read")
        return
    assert text.startswith(f"{key} '{address}' is an address (") and len(text) <= 300 and "\n" not in text


def test_no_key_that_is_a_path_is_left_out() -> None:
    """A new key of text is a path, or is named here."""
    import typing

    from cskd.config import Config

    texts = {
        f"{section}.{key}"
        for section, kind in typing.get_type_hints(Config).items()
        if section != "given"
        for key, value in typing.get_type_hints(kind).items()
        if value is str or str in typing.get_args(value)
    }
    no_path = {"recipe.randaugment", "cache.device", "cache.codecs", "train.device", "train.opt", "train.best"}
    no_path |= {"teacher.kwargs", "student.kwargs"}  # those of timm that name files are refused as such
    no_path |= {"train.save_every", "student.tokens"}
    no_path |= {"train.caches"}  # whose values are made local when they are opened
    assert texts - no_path == set(PATHS)


@pytest.mark.parametrize("address", [*ADDRESSES, "hf://me/net"])
def test_an_address_is_no_place_of_own_code(address: str) -> None:
    place = f"{address.rstrip('/')}/own.py:Own"
    keys: dict[str, dict[str, Any]] = {
        "loss.terms[1].own": {"loss": {"terms": [{}, {"own": place}]}},
        "cache.codecs": {"cache": {"codecs": [place]}},
        "train.caches.other": {"train": {"caches": {"other": place}}},
    }
    if address in SERVED:
        assert from_dict(keys.pop("train.caches.other")).train.caches
    for key, raw in keys.items():
        with pytest.raises(PathError) as caught:
            from_dict(raw)
        assert str(caught.value).startswith(f"{key} '{place}' is an address (")
    with pytest.raises(PathError, match="is an address"):
        load_own(place, "K", "cskd.losses", "function")


@pytest.mark.parametrize(
    "text",
    [
        *("data/mine", "./a", "/a/b", "C:/data", r"C:\data", "run:3/x", "2026-01-01T10:00/x", "a.py:build", ""),
        *("hub", "hf-hub:timm/resnet50", "local-dir:/models/x", "resnet50.a1_in1k"),
    ],
)
def test_what_is_a_path_or_a_name_stays_as_it_was_written(text: str) -> None:
    assert from_dict({"teacher": {"model": text, "weights": text if ":/m" not in text else None}}).teacher.model == text


@pytest.mark.parametrize("place", ["CONFIG", "--set", "variable"])
def test_the_shell_s_own_words_are_no_names_of_folders(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--set train.output=~/x` comes here with its ~; a folder of that name was made."""
    monkeypatch.setenv("HOME", "/home of/one")
    Path("c.yaml").write_text("train: {output: ~/x}\n" if place == "CONFIG" else "train: {output: '${OUT:-~/x}'}\n")
    sets = ["train.output=~/x"] if place == "--set" else None
    assert load_config("c.yaml", sets).train.output == "/home of/one/x"


def test_an_empty_argument_is_not_the_current_folder() -> None:
    with pytest.raises(PathError, match=r"OUT is empty, expected a path"):
        local_path("", "OUT")


def test_the_plain_path_is_the_cure_for_a_file_address() -> None:
    with pytest.raises(PathError, match=r"expected a local path; write /data/x$"):
        local_text("file:///data/x", "data.train")


COMMANDS = [
    ("demo X", "OUT"),
    ("pack X out", "SRC"),
    ("pack src X", "OUT"),
    ("pack src out --classes X", "--classes"),
    ("index X", "SHARDS"),
    ("index in --classes X", "--classes"),
    ("cache-teacher X", "CONFIG"),
    ("cache-teacher c.yaml --set cache.path=X", "cache.path"),
    ("train X", "CONFIG"),
    ("train c.yaml --set train.output=X", "train.output"),
    ("train c.yaml --set student.init=X --online", "student.init"),
    ("eval X data", "CHECKPOINT"),
    ("eval run X", "DATA"),
    ("inspect X", "CACHE"),
    ("inspect cache --data X", "--data"),
    ("inspect cache --png X", "--png"),
    ("verify X", "CACHE|DATA"),
    ("verify cache --data X", "--data"),
    ("repair X", "CACHE"),
    ("repair cache --data X", "--data"),
    ("gc X", "CACHE"),
    ("gc cache --data X", "--data"),
    ("push X me/net", "RUN|CACHE"),
]
# Arguments and keys that may be the address of an object store.
_ON_STORES = (
    "CACHE",
    "CACHE|DATA",
    "RUN|CACHE",
    "cache.path",
    "--data",
    "CHECKPOINT",
    "DATA",
    "train.output",
    "student.init",
)


@pytest.mark.parametrize(
    ("command", "name", "address"),
    [
        (*of, address)
        for of in COMMANDS
        for address in ADDRESSES
        if address not in SERVED or not (of[1] in _ON_STORES or of[0] == "pack src X")
    ],
)
def test_an_address_is_refused_by_every_command_before_anything_is_made(
    command: str,
    name: str,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    empty: Path,
) -> None:
    (empty / "c.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["cskd", *command.replace("X", address).split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (1, "") and err.startswith(f"cskd: {name} '{address}' is an address (")
    assert err.count("\n") == 1 and len(err) <= 300
    assert [path.name for path in empty.iterdir()] == ["c.yaml"]


FROM_HUB = {
    ("evaluate", "checkpoint"),
    ("inspect", "cache"),
    ("verify", "cache"),
}  # which only read, and may lie on the hub
FROM_STORES = {
    ("evaluate", "checkpoint"),
    ("evaluate", "data"),
    ("pack", "out"),
    ("export", "out"),
    ("push", "source"),
}  # and `--data` of every command
ON_OBJECTS = {(command, "cache") for command in ("inspect", "verify", "repair", "gc", "export")}


def test_no_argument_that_is_a_path_goes_unchecked() -> None:
    """Every parameter of every command that becomes a Path has the parser that refuses addresses, and those of the store, or but for three the hub's."""
    import typing

    for command in cli.app.registered_commands:
        assert command.callback is not None
        for name, kind in typing.get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(typing.get_args(kind)[:1]):
                about = typing.get_args(kind)[1]
                assert about.parser is not None, f"{command.callback.__name__} {name}"
                if name == "data" or (command.callback.__name__, name) in {*FROM_STORES, *ON_OBJECTS}:
                    assert about.parser("s3://bucket/x") == Path("s3://bucket/x")
                    with pytest.raises(PathError):
                        about.parser("ftp://host/x")
                else:
                    with pytest.raises(PathError):
                        about.parser("s3://bucket/x")
                if (command.callback.__name__, name) in FROM_HUB:
                    assert about.parser("hf://datasets/a/b") == Path("hf://datasets/a/b")
                    with pytest.raises(PathError, match="is no address of the hub"):
                        about.parser("hf://a")
                else:
                    with pytest.raises(
                        PathError, match=r"is an address \(hf:\), expected a local path; the hub is only read"
                    ):
                        about.parser("hf://datasets/a/b")


def test_the_library_refuses_what_the_command_line_refuses(empty: Path) -> None:
    (empty / "src").mkdir()
    for call in (
        lambda: pack("s3://b/x", "out"),
        lambda: pack("src", "s3://b/x"),
        lambda: index(Path("s3://b/x")),
        lambda: open_inventory("ftp://b/x"),
        lambda: open_cache(Path("ftp://b/x")),
        lambda: open_cache("s3://b/../x"),
        lambda: load_config("s3://b/x.yaml"),
        lambda: run_demo(Path("s3://b/x")),
    ):
        with pytest.raises(PathError, match=r"is (an|no) address"):
            call()
    assert [path.name for path in empty.iterdir()] == ["src"]
