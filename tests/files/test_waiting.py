"""Who waits for another machine is told within seconds what for, from where, and what does without; who does not is told nothing."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torchvision
from huggingface_hub import constants

from cskd.config import TeacherConfig
from cskd.errors import CskdError
from cskd.files import waiting
from cskd.files.paths import local_path
from cskd.files.waiting import SOON, said_when_long
from cskd.storage import open_storage
from cskd.teacher.build import build
from tests.s3 import use_endpoint


class Slow(http.server.BaseHTTPRequestHandler):
    """Has nothing, and takes its time to say so."""

    pause = 2.4

    def do_GET(self) -> None:
        time.sleep(self.pause)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET  # noqa: N815 - names of the library

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    use_endpoint(monkeypatch, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(waiting, "_said", {})
    yield endpoint
    server.shutdown()
    server.server_close()


def of_timm(_: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(timm, "create_model", stopped)
    build(TeacherConfig(model="resnet18", weights="hub"))


def of_torchvision(_: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torchvision.models, "get_model", stopped)
    build(TeacherConfig(model="torchvision:resnet18", weights="hub"))


def stopped(*_: object, **__: object) -> None:
    time.sleep(Slow.pause)
    raise OSError("timed out")


CALLS: dict[str, tuple[Callable[[str, pytest.MonkeyPatch], object], str]] = {
    "s3": (lambda _, __: open_storage("s3://bucket/x").get("a"), "s3://bucket/x from {}; check AWS_ENDPOINT_URL and"),
    "several": (lambda _, __: open_storage("s3://bucket/x").get_many(["a", "b"]), "s3://bucket/x from {}; check AWS_"),
    "created": (lambda _, __: open_storage("s3://bucket/x").create("a", b""), "s3://bucket/x from {}; check AWS_"),
    "http": (lambda end, _: open_storage(f"{end}/x").get("a"), "{}/x; check the address and the network, or give a local"),
    "hub": (lambda _, __: local_path("hf://me/x", "K", hub=True), "K 'hf://me/x' from {}; without a network give a folder"),
    "timm": (of_timm, "timm's weights of resnet18 from {}; without a network give a file: --set teacher.weights=FILE"),
    "torchvision": (of_torchvision, "the weights of torchvision:resnet18 from https://download.pytorch.org; without a"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_who_waits_is_told_what_for_and_what_does_without(
    name: str, slow: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, words = CALLS[name]
    timer = threading.Timer

    def of_other_seconds(after: float, *arguments: Any) -> threading.Timer:
        assert after == SOON
        return timer(0.1 if Slow.pause else 60.0, *arguments)

    monkeypatch.setattr(threading, "Timer", of_other_seconds)
    for pause, lines in ((0.0, 0), (2.4, 1)):  # far from 60 and 0.1, as a busy machine needs
        monkeypatch.setattr(Slow, "pause", pause)
        with pytest.raises((CskdError, OSError)):
            call(slow, monkeypatch)
        err = capsys.readouterr().err
        assert err.count("\n") == lines and (not lines or err.startswith(f"note: waiting for {words.format(slow)}"))


def test_offline_the_hub_is_not_waited_for(
    slow: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CskdError):
        of_timm(slow, monkeypatch)
    assert capsys.readouterr().err == ""


def test_the_line_comes_while_the_wait_lasts_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "_said", {})
    for line in ("note: waiting for x from y; give z\n", ""):
        with said_when_long("x from y", "give z", 0.05):
            time.sleep(0.4)
            assert capsys.readouterr().err == line


def test_of_many_threads_that_wait_for_one_thing_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slowly(dict[str, float]):
        def get(self, *arguments: Any) -> Any:
            found = super().get(*arguments)
            time.sleep(0.05)
            return found

    said: list[str] = []
    monkeypatch.setattr(waiting, "_said", Slowly())
    monkeypatch.setattr("builtins.print", lambda line, **_: said.append(line))
    threads = [threading.Thread(target=waiting._say, args=("note: waiting",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["note: waiting"]


def test_without_standard_error_the_line_does_not_come_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of `cskd ... --json 2>&-`: printing to no file is printing to standard output."""
    monkeypatch.setattr(waiting, "_said", {})
    monkeypatch.setattr("sys.stderr", None)
    waiting._say("note: waiting")
    assert capsys.readouterr().out == ""
