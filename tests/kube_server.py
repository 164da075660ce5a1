"""As much of the API server of Kubernetes as `kubectl apply` and `kubectl get` ask for: discovery, and objects that are kept.

A Job that was made is complete at the third look at it, so that whoever waits for it waits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = {  # group and version -> plural, kind
    "v1": [("configmaps", "ConfigMap"), ("services", "Service")],
    "batch/v1": [("jobs", "Job")],
}
LOOKS = 3


class Kube:
    """The objects by path, in the order in which they were made; looks: at each after it was made."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.looks: dict[str, int] = {}
        self.failing: set[str] = set()  # names of Jobs that fail
        self.url = ""


@contextmanager
def kube_server() -> Iterator[Kube]:
    kube = Kube()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if (found := _discovery(path)) is not None:
                self._answer(200, found)
            elif path in kube.objects:
                self._answer(200, _looked_at(kube, path))
            else:
                self._answer(
                    404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
                )

        def do_POST(self) -> None:
            made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kube.objects[f"{self.path.partition('?')[0]}/{made['metadata']['name']}"] = made
            self._answer(201, made)

        def do_PATCH(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, kube.objects[self.path.partition("?")[0]])

        def _answer(self, code: int, facts: Any) -> None:
            body = json.dumps(facts).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kube.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield kube
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _discovery(path: str) -> dict[str, Any] | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        known = {"groupVersion": "batch/v1", "version": "v1"}
        group = {"name": "batch", "versions": [known], "preferredVersion": known}
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
    for version, kinds in KINDS.items():
        if path == f"/{'apis' if '/' in version else 'api'}/{version}":
            verbs = ["create", "get", "list", "patch", "update"]
            resources = [
                {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
                for plural, kind in kinds
            ]
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    return None


def _looked_at(kube: Kube, path: str) -> Any:
    found, name = kube.objects[path], path.rsplit("/", 1)[-1]
    kube.looks[path] = kube.looks.get(path, 0) + 1
    if found["kind"] != "Job" or kube.looks[path] < LOOKS:
        return found
    kind = "Failed" if name in kube.failing else "Complete"
    return found | {"status": {"conditions": [{"type": kind, "status": "True"}]}}
