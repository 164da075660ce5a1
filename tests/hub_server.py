"""A stand-in for the Hugging Face hub: as much of its HTTP as `huggingface_hub` uses to push and to download, on this machine.

Repositories are kept in memory: each branch a list of commits, each commit its files. Tokens: `TOKEN` may write to OWNER's
repositories, `READER` may only read. Large files take the LFS way, by their suffix, as the hub's .gitattributes has it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

OWNER, TOKEN, READER = "me", "hf_writes", "hf_reads"
LFS = (".zip", ".safetensors", ".npy", ".png", ".pth", ".bin")


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": ["0" * 40]})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit_of(self, revision: str) -> str | None:
        at = unquote(revision)
        return self.branches[at][-1] if at in self.branches else at if at in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.commit_of(revision) or ""]


@dataclass
class Hub:
    """The server's state. log: method and path of each request; refuse: called first, may give a status to answer with."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    refuse: Callable[[str, str], int | None] = lambda method, path: None

    def put(self, kind: str, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files. Returns the commit."""
        repo = self.repos.setdefault((kind, name), Repo(private=False))
        commits = repo.branches.setdefault(branch, [repo.branches["main"][-1]])
        now = repo.commits[commits[-1]] | files
        return self.commit(repo, branch, now)

    @staticmethod
    def commit(repo: Repo, branch: str, files: dict[str, bytes]) -> str:
        history = repo.branches[branch]
        sha = hashlib.sha1(f"{branch} {len(history)} {sorted(files)} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = files
        history.append(sha)
        return sha

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.log)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", (headers or {}).pop("Content-Length", str(len(data))))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code})

    def do_HEAD(self) -> None:
        self._handle(b"")

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self.do_POST()

    def _handle(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        self.hub.log.append((self.command, path))
        if status := self.hub.refuse(self.command, path):
            self._answer(status, {"error": "refused"})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif found := re.fullmatch(r"/lfs/(\w+)", path):
            whole = hashlib.sha256(body).hexdigest() == found[1]  # not so where the sender was killed
            self.hub.blobs |= {found[1]: body} if whole else {}
            self._answer(200 if whole else 400)
        elif path in ("/api/validate-yaml", "/api/repos/create"):
            self._create(json.loads(body), token) if path.endswith("create") else self._answer(200, {})
        elif found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [self._lfs(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._file("dataset" if found[1] else "model", *found.groups()[1:])
        elif found := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+))?", path):
            self._api(found[1], found[2], found[3] or "revision", found[4] or "main", body, token)
        else:
            self._missing("EntryNotFound")

    def _create(self, wanted: dict[str, Any], token: str) -> None:
        name, kind = f"{wanted['organization'] or OWNER}/{wanted['name']}", wanted.get("type") or "model"
        if token != TOKEN or not name.startswith(f"{OWNER}/"):
            self._answer(403 if token else 401, {"error": "You don't have the rights to create this"})
        elif (kind, name) in self.hub.repos:
            self._answer(409, {"error": "You already created this repo"})
        else:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repos[kind, name] = Repo(private=private)
            self._answer(200, {"url": f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"})

    def _lfs(self, oid: str, size: int) -> dict[str, Any]:
        there = {"oid": oid, "size": size}
        return (
            there if oid in self.hub.blobs else there | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}}
        )

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (commit := repo.commit_of(revision)) is None:
            self._missing("RepoNotFound" if repo is None else "RevisionNotFound")
        elif (data := repo.commits[commit].get(unquote(path))) is None:
            self._missing("EntryNotFound")
        else:
            about = {
                "X-Repo-Commit": commit,
                "ETag": f'"{_oid(unquote(path), data)}"',
                "Content-Length": str(len(data)),
            }
            self._answer(200, data, about)

    def _api(self, kind: str, name: str, what: str, revision: str, body: bytes, token: str) -> None:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and token != TOKEN):
            self._missing("RepoNotFound")
        elif self.command == "POST" and (token != TOKEN or not name.startswith(f"{OWNER}/")):
            self._answer(403, {"error": "no write access"})
        elif what == "branch":
            there = unquote(revision) in repo.branches
            repo.branches.setdefault(unquote(revision), list(repo.branches["main"]))
            self._answer(409 if there else 200)
        elif (commit := repo.commit_of(revision)) is None:
            self._missing("RevisionNotFound")
        elif what == "revision":
            self._answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": []})
        elif what == "tree":
            self._answer(200, [_entry(path, data) for path, data in sorted(repo.commits[commit].items())])
        elif what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            files_now = dict(repo.commits[commit])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files_now[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files_now[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files_now[value["path"]]
            sha = Hub.commit(repo, unquote(revision), files_now)
            self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    about = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    return about | (
        {"lfs": {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}} if path.endswith(LFS) else {}
    )


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The stand-in, and `huggingface_hub` told to use it: with TOKEN, and with the folder `cache` for what it downloads."""
    from cskd.files import hub as addresses

    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        *(("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_CACHE", str(cache))),
        *(("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("HF_TOKEN_PATH", str(cache / "token"))),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    addresses._snapshot.cache_clear()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        addresses._snapshot.cache_clear()
