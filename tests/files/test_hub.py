"""Addresses of the hub: their grammar, their copies, and one line for each way in which the hub refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cskd.config import from_dict
from cskd.config.load import PATHS, READ_FROM_HUB
from cskd.config.pins import pinned, read_pins, record_pins
from cskd.errors import HubError, PathError
from cskd.files.hub import HubAddress, is_hub, local_copy, parse_address
from cskd.files.paths import local_path
from tests.hub_server import READER, Hub, running_hub

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://me/net", HubAddress("model", "me/net")),
        ("hf://models/me/net", HubAddress("model", "me/net")),
        ("hf://datasets/me/net", HubAddress("dataset", "me/net")),
        ("hf:/datasets/me/net", HubAddress("dataset", "me/net")),  # a Path has lost a slash
        ("hf://me/net@v1.0", HubAddress("model", "me/net", "v1.0")),
        ("hf://me/net@refs/pr/3/a", HubAddress("model", "me/net", "refs/pr/3", "a")),
        ("hf://me/net@a%2Fb", HubAddress("model", "me/net", "a/b")),
        (f"hf://me/net@{COMMIT}/a/b.pt:ema", HubAddress("model", "me/net", COMMIT, "a/b.pt:ema")),
        ("hf://me/net:ema", HubAddress("model", "me/net", "", ":ema")),
        ("hf://me/net/a/", HubAddress("model", "me/net", "", "a")),
    ],
)
def test_an_address_has_parts_and_is_written_again_from_them(text: str, address: HubAddress) -> None:
    assert parse_address(text, "K") == address == parse_address(str(address), "K")
    assert address.pinned == (COMMIT in text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "hf://net",
            "hf://me/",
            "hf://me/a--b",
            "hf://me/net@",
            "hf://me/../net",
            "hf://me/net/../x",
            "hf://me/net//x",
        ),
        *(
            "hf://datasets/net",
            "hf://me/-net",
            "hf://m e/net",
            "hf://me/net@..",
            "hf://spaces/me/net",
            "hf://buckets/a/b",
        ),
        f"hf://me/{'n' * 97}",
    ],
)
def test_a_malformed_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PathError) as caught:
        from_dict({"cache": {"path": text}})
    said = str(caught.value)
    assert said.startswith("cache.path 'hf://") and "hf://[datasets/]OWNER/NAME[@REVISION][/PATH]" in said
    assert len(said) <= 300 and "\n" not in said


@pytest.mark.parametrize("key", PATHS)
def test_an_address_is_for_what_is_read(key: str, hub: Hub) -> None:
    section, _, name = key.partition(".")
    raw = {section: {name: "hf://me/net"}}
    if key in READ_FROM_HUB:
        assert getattr(getattr(from_dict(raw), section), name) == "hf://me/net"
    else:
        with pytest.raises(
            PathError, match=rf"^{key} 'hf://me/net' is an address \(hf:\), expected a local path; the hub is only read"
        ):
            from_dict(raw)
    assert hub.log == []


def test_a_copy_is_what_the_repository_holds_and_a_path_brings_only_its_own(hub: Hub) -> None:
    files = {"a/x.bin": b"large", "a/config.json": b"{}", "b.txt": b"text", "a/y.txt": b"other"}
    first = hub.put("model", "me/net", files)
    assert local_path("hf://me/net/a/x.bin", "K", hub=True).read_bytes() == b"large"
    assert local_path("hf://me/net/a/x.bin:ema", "K", hub=True).name == "x.bin:ema"
    folder = local_copy(HubAddress("model", "me/net", first), "K")  # nothing is there twice
    assert hub.count("GET", "/resolve/.*x.bin") == 1
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    with pytest.raises(HubError, match=r"the repository has no such file"):
        local_path("hf://me/net/c.txt", "K", hub=True)


def test_an_address_stands_for_the_commit_that_it_stood_for_at_first(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("model", "me/net", {"model.safetensors": b"1"})
    hub.put("model", "me/net", {"model.safetensors": b"1"}, branch="v1")
    config = from_dict({"student": {"init": "hf://me/net"}, "teacher": {"weights": f"hf://me/net@{first}"}})
    begun, pins = pinned(config, ("student.init", "teacher.weights", "cache.path"), tmp_path)
    assert begun.student.init == begun.teacher.weights == f"hf://me/net@{first}"
    assert pins == {"hf://me/net": f"hf://me/net@{first}"}
    record_pins(tmp_path, pins)

    second = hub.put("model", "me/net", {"model.safetensors": b"2"})
    from cskd.files import hub as addresses

    addresses._snapshot.cache_clear()  # as a new process
    again, _ = pinned(config, ("student.init",), tmp_path)
    assert again.student.init == f"hf://me/net@{first}"
    fresh, _ = pinned(config, ("student.init",), tmp_path / "other")
    assert fresh.student.init == f"hf://me/net@{second}"
    other = from_dict({"student": {"init": "hf://me/net@v1"}})
    assert pinned(other, ("student.init",), tmp_path)[0].student.init not in (begun.student.init, "hf://me/net@v1")


@pytest.mark.parametrize("text", ["", "[]", '{"pins": {"hf://me/net": "hf://me/net@main"}}', '{"pins": {"a": "/etc"}}'])
def test_a_record_that_is_damaged_pins_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "hub.json").write_text(text)
    assert read_pins(tmp_path) == {}


def test_without_a_network_a_whole_copy_will_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from cskd.files import hub as addresses

    hub.put("model", "me/net", {"a": b"1"})
    folder = local_path("hf://me/net", "K", hub=True)
    addresses._snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_path("hf://me/net", "K", hub=True) == folder
    with pytest.raises(
        HubError, match=r"^K 'hf://me/other': HF_HUB_OFFLINE is set and no whole copy is in the hub's cache"
    ):
        local_path("hf://me/other", "K", hub=True)


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("hf://me/data", None, "there is no model repository of that name, but a dataset: hf://datasets/me/data"),
        ("hf://datasets/me/net", None, "but a model: hf://me/net"),
        ("hf://me/none", None, "that this user may read (a private one needs `hf auth login`)"),
        ("hf://me/secret", None, "that this user may read"),
        ("hf://me/net@v2", None, "it has no revision 'v2'; give a branch, a tag or a commit"),
        ("hf://me/net", 429, "asks for fewer requests; run the same command again later"),
        ("hf://me/net", 503, "the hub answered 503"),
        ("hf://me/net", 403, "does not let this token read it"),
        ("hf://me/net", 0, "the hub can't be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, address: str, status: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("model", "me/net", {"a": b"1"})
    hub.put("dataset", "me/data", {"a": b"1"})
    hub.put("model", "me/secret", {"a": b"1"})
    hub.repos["model", "me/secret"].private = True
    monkeypatch.setenv("HF_TOKEN", READER)
    if status:
        hub.refuse = lambda method, path: status
    elif status == 0:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError) as caught:
        local_path(address, "cache.path", hub=True)
    text = str(caught.value)
    assert text.startswith(f"cache.path '{address}': ") and words in text
    assert len(text) <= 300 and "\n" not in text


def test_what_only_looks_like_an_address_is_a_path() -> None:
    assert [text for text in ("hf-hub:me/net", "hf/x", "./hf:/x", "HF://me/net", "hub", None) if is_hub(text)] == []
