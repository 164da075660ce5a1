"""An S3 of this process, by moto: a bucket of its own for each test module."""

from __future__ import annotations

import itertools
import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_BUCKETS = itertools.count()


@contextmanager
def moto_server() -> Iterator[str]:
    """An empty S3 on a free port; what its endpoint is."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def new_bucket(endpoint: str) -> str:
    """The address of a bucket that nobody else has."""
    name = f"bucket{next(_BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"


def use_endpoint(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Have this process find an S3 as users do: by variables of the environment."""
    for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
        patch.setenv(f"AWS_{name}", value)
