"""One interface over a folder and an S3: the same answers; and what goes wrong with a store is one line."""

from __future__ import annotations

import copy
import errno
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.proxy import FaultyProxy
from cskd.errors import CskdError, PathError, StorageError
from cskd.storage import Range, Storage, join, open_storage
from tests.s3 import use_endpoint


@pytest.fixture(params=["posix", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(join(request.getfixturevalue("s3"), "some/folder"))
    return open_storage(tmp_path / "some" / "folder")


def test_objects_and_ranges(storage: Storage) -> None:
    storage.put("a/b", b"0123456789")
    storage.put("empty", b"")
    storage.put("a/b", b"abcdefghij")
    ranges: list[tuple[int, int | None, bytes]] = [
        (0, None, b"abcdefghij"),
        (2, 3, b"cde"),
        (8, 9, b"ij"),
        (7, None, b"hij"),
        (10, 5, b""),
        (11, None, b""),
        (3, 0, b""),
    ]
    for start, size, expected in ranges:
        assert storage.get("a/b", start, size) == expected
    assert storage.get("empty") == storage.get("empty", 0, 5) == b""
    assert storage.get_many([Range("a/b", 1, 2), "empty", "a/b", Range("a/b", 99)]) == [b"bc", b"", b"abcdefghij", b""]
    assert storage.get("a/b", limit=10) == b"abcdefghij"
    with pytest.raises(OSError) as info:
        storage.get("a/b", limit=9)
    assert info.value.errno == errno.EFBIG


def test_the_first_writer_wins(storage: Storage) -> None:
    assert storage.create("x/record", b"one") is True
    assert storage.create("x/record", b"two") is False
    assert storage.get("x/record") == b"one"
    answers: list[bool] = []
    racers = [
        threading.Thread(target=lambda i=i: answers.append(storage.create("x/race", b"%d" % i))) for i in range(6)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(answers) == [False] * 5 + [True]


def test_what_is_there(storage: Storage) -> None:
    assert [*storage.list()] == [] and storage.stat("a") is None
    for key in ("a/one", "a/b/two", "ab"):
        storage.put(key, key.encode())
    found = {about.key: about.size for about in storage.list()}
    assert found == {"a/one": 5, "a/b/two": 7, "ab": 2}
    assert {about.key for about in storage.list("a")} == {"a/one", "a/b/two"}
    assert [*storage.list("nothing")] == []
    about = storage.stat("ab")
    assert about is not None and about.size == 2 and about.modified > 1e9 and storage.stat("a") is None
    assert storage.location.startswith("/") == (about.version == "")
    assert about in [*storage.list()]
    storage.delete("ab")
    storage.delete("ab")
    assert storage.stat("ab") is None


def test_absent_objects_and_keys_that_lead_out(storage: Storage) -> None:
    storage.put("a", b"a")
    for call in (lambda: storage.get("b/c"), lambda: storage.get_many(["a", "b/c"]), lambda: storage.get("b/c", 1, 2)):
        with pytest.raises(FileNotFoundError) as info:
            call()
        assert info.value.filename == join(storage.location, "b/c")
    for key in ("../a", "a//b", "", "/a", "a/./b"):
        with pytest.raises(ValueError, match="no key"):
            storage.get(key)


def test_counts_and_pickles(storage: Storage) -> None:
    storage.put("a", b"12345")
    before = storage.counts.requests
    assert storage.get_many(["a"] * 20) == [b"12345"] * 20
    assert (storage.counts.requests - before, storage.counts.read, storage.counts.written) == (20, 100, 5)
    again: Storage = copy.copy(storage)  # by what pickles it
    assert again.get("a") == b"12345" and again.counts.requests == 1


class Stub(http.server.BaseHTTPRequestHandler):
    """A store whose answers to PUT are made up: it keeps what it is told to keep, and answers what it is told to answer."""

    kept: dict[str, bytes]
    answers: list[tuple[bool, int]]  # of the next PUTs: whether the object is kept, the status

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        keep, status = self.answers.pop(0) if self.answers else (True, 200)
        if self.path in self.kept and status == 200:
            status, keep = 412, False
        if keep:
            self.kept.setdefault(self.path, data)
        self._answer(status)

    def do_GET(self) -> None:
        found = self.kept.get(self.path)
        self._answer(404 if found is None else 200, found or b"")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Fri, 27 Nov 2026 12:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stub]]:
    pytest.importorskip("obstore")
    handler = type("Handler", (Stub,), {"kept": {}, "answers": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("answers", "there", "won"),
    [
        ([(True, 412)], None, True),  # the answer to the first request was lost, obstore asked again
        ([(True, 409)], None, True),
        ([(False, 412)], b"other", False),
        ([(False, 412)], None, True),  # "exists already", of one that another writer has removed since
        ([(False, 409), (False, 409)], None, True),
        ([(True, 500)], None, True),  # kept, and the store failed afterwards
        ([(False, 503)], None, True),
    ],
)
def test_a_lost_answer_is_not_a_lost_race(
    stub: type[Stub], answers: list[tuple[bool, int]], there: bytes | None, won: bool
) -> None:
    if there is not None:
        stub.kept["/bucket/record"] = there
    stub.answers[:] = answers
    assert open_storage("s3://bucket").create("record", b"mine") is won
    assert stub.kept["/bucket/record"] == (there or b"mine")


def test_a_store_that_never_has_what_exists_is_given_up(stub: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cskd.storage.objects._backoff", lambda tried: 0.0)
    stub.answers[:] = [(False, 412)] * 9
    with pytest.raises(StorageError, match="conditional writes"):
        open_storage("s3://bucket").create("record", b"mine")


def test_nothing_is_lost_nor_given_up_behind_a_proxy_that_refuses_loses_and_cuts(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"].partition("://")[2], 3, {"refuse": 0.1, "lose": 0.1, "cut": 0.1})
    use_endpoint(monkeypatch, proxy.endpoint)
    monkeypatch.setattr("cskd.storage.objects._backoff", lambda tried: 0.01)
    storage, names = open_storage(join(s3, "faulty")), [f"{i:04d}" for i in range(24)]
    try:
        for name in names[:12]:
            storage.put(name, name.encode())
        assert all(storage.create(name, name.encode()) for name in names[12:])
        assert not storage.create(names[0], b"other")
        assert storage.get_many(names) == [name.encode() for name in names]
        assert [storage.get(name, 1, 2) for name in names] == [name[1:3].encode() for name in names]
        for _ in range(8):
            assert [stat.key for stat in storage.list()] == names
        for name in names[1:]:
            storage.delete(name)
        assert [stat.key for stat in storage.list()] == names[:1]
    finally:
        proxy.close()
    assert min(proxy.counts[fault] for fault in ("refuse", "lose", "cut")) > 3


@pytest.mark.parametrize(
    ("location", "environment", "says"),
    [
        ("s3://nobody/x", {}, "there is no bucket 'nobody'; make it"),
        (
            "s3://nobody",
            {"AWS_ACCESS_KEY_ID": ""},
            "no credentials were found in the environment; set AWS_ACCESS_KEY_ID",
        ),
        (
            "s3://nobody",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "http://127.0.0.1:9 can't be reached; check AWS_ENDPOINT",
        ),
        ("az://box/x", {}, "no credentials were found in the environment; set AZURE_STORAGE_ACCOUNT_NAME"),
        ("http://127.0.0.1:9/x", {}, "http://127.0.0.1:9 can't be reached; check the network"),
    ],
)
def test_stores_that_give_nothing_are_refused_in_one_line(
    s3: str, monkeypatch: pytest.MonkeyPatch, location: str, environment: dict[str, str], says: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    calls = ("get", ("a",)), ("put", ("a", b"")), ("create", ("a", b"")), ("get_many", (["a", "b"],)), ("list", ())
    for name, arguments in calls[: 1 if "9" in location + str(environment) else None]:
        with pytest.raises(CskdError) as info:
            answer = getattr(open_storage(location), name)(*arguments)
            _ = [*answer]
        text = str(info.value)
        assert says in text and text.startswith(location) and len(text) <= 300 and "\n" not in text


def test_a_web_server_is_only_read(stub: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    stub.kept["/folder/a"] = b"12345"
    web = open_storage(os.environ["AWS_ENDPOINT_URL"] + "/folder/")
    assert web.get("a") == b"12345" and web.get_many(["a", "a"]) == [b"12345"] * 2
    for call in (
        lambda: web.put("b", b""),
        lambda: web.create("b", b""),
        lambda: web.delete("a"),
        lambda: [*web.list()],
    ):
        with pytest.raises(StorageError, match="web server"):
            call()


@pytest.mark.parametrize(
    ("location", "cure"),
    [
        ("ftp://host/x", "copy or mount it here"),
        ("hdfs://host/x", "copy or mount it here"),
        ("s3a://bucket/x", "write s3://BUCKET/NAME"),
        ("gcs://bucket/x", "write gs://BUCKET/NAME"),
        ("abfs://box@account/x", "write az://CONTAINER/NAME"),
        ("file://host/x", "write /host/x"),
        ("s3://", "expected s3://BUCKET/NAME"),
        ("s3://bucket/../other", "without '..'"),
        ("https://host/x?y=z", "without '..', '?'"),
    ],
)
def test_addresses_that_cannot_be_served(location: str, cure: str) -> None:
    with pytest.raises(PathError) as info:
        open_storage(location, "cache.path")
    assert str(info.value).startswith("cache.path ") and cure in str(info.value) and len(str(info.value)) <= 300


def test_an_address_in_other_words_is_the_same_location(s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    for text in (f"S3://{bucket}/a/", f"s3:/{bucket}/a", Path(f"s3://{bucket}/a")):
        assert open_storage(text).location == f"s3://{bucket}/a"
    assert (join("s3://b/a/", "c"), join("here", "c")) == ("s3://b/a/c", "here/c")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"] + ["obstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StorageError, match=r"pip install 'cskd\[cloud\]'"):
        open_storage("s3://bucket/x")
