"""Object stores of this machine that tests and benchmarks run against: moto's S3, and Azurite for Azure's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AZURITE_KEY = (  # of its one account, which everyone knows
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@contextmanager
def local_store(kind: str, folder: Path) -> Iterator[str]:
    """A store in a process of its own: HOST:PORT. kind: s3 (moto) or azurite (by npm, on the PATH or in $AZURITE)."""
    port = _free_port()
    if kind == "s3":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
        program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
        if program is None:
            raise FileNotFoundError("no azurite-blob; `npm install azurite`, and name it in $AZURITE")
        command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
        command += ["--skipApiVersionCheck", "--inMemoryPersistence"]
        command = [part for part in command if part != "--location" and part != str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def environment(kind: str, endpoint: str) -> dict[str, str]:
    """Variables by which a process finds the store."""
    if kind == "s3":
        return {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
        "AZURE_STORAGE_ENDPOINT": f"{endpoint}/devstoreaccount1",
    }


def make_bucket(kind: str, upstream: str, name: str) -> str:
    """The address of a new bucket, or container."""
    if kind == "s3":
        urllib.request.urlopen(urllib.request.Request(f"http://{upstream}/{name}", method="PUT")).close()
        return f"s3://{name}"
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    date, account = formatdate(usegmt=True), "devstoreaccount1"
    headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
    text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\n{headers}/{account}/{account}/{name}\nrestype:container"
    key = base64.b64encode(hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()).decode()
    request = urllib.request.Request(f"http://{upstream}/{account}/{name}?restype=container", method="PUT")
    for header, value in (("x-ms-date", date), ("x-ms-version", "2021-08-06")):
        request.add_header(header, value)
    request.add_header("Authorization", f"SharedKey {account}:{key}")
    urllib.request.urlopen(request).close()
    return f"az://{name}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the store did not start ({process.args!r})")
