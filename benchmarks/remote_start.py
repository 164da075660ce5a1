"""How long a run waits for a cache on an object store: one of ImageNet x 300 views, sealed, and one that is not.

    python -m benchmarks.remote_start [--latency MS] [--blocks N] [--views N] [--records N]

A cache of 157 blocks x 300 views, whose 47,100 commit records are made up, on an S3 of this process (moto) behind a proxy that
holds each request back for 30 ms. It is opened as `cskd train` opens it: manifest, inventory, seal and index, all records known.
Next to it a cache of `--records` records that is not sealed: listed and read with many requests in flight, and read one by one.
Nothing is extrapolated: the rates of these stand for themselves. Seconds of CPU are of all that this process does, the S3 too.
Goal: the sealed one in under 5 s. Needs `cskd[dev]`; half a minute. Prints the machine, a table, and one JSON line last; exits 1
where the goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from urllib.request import Request, urlopen

GOAL = 5.0
ONE_BY_ONE = 100  # records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=30.0, help="milliseconds of each request")
    parser.add_argument("--blocks", type=int, default=157)
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--records", type=int, default=1000, help="of the cache that is not sealed")
    options = parser.parse_args(arguments)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.latency:g} ms a request"
    )
    with tempfile.TemporaryDirectory() as folder, slow_s3(options.latency / 1000) as bucket:
        os.environ["XDG_CACHE_HOME"] = folder
        rows = measure(Path(folder), bucket, options.blocks, options.views, options.records)
    for name, row in rows.items():
        print(
            f"{name:40} {row['records']:7,.0f} records {row['requests']:7,.0f} requests {row['seconds']:8.2f} s, {row['cpu']:.2f} s of CPU"
        )
    whole = rows["sealed: index"]
    print(json.dumps({"benchmark": "remote_start", "latency_ms": options.latency, "rows": rows}))
    return int(whole["seconds"] > GOAL)


def measure(folder: Path, bucket: str, blocks: int, views: int, records: int) -> dict[str, dict[str, float]]:
    """Records known, requests and seconds of each way to open."""
    from cskd.storage import open_storage
    from cskd.store.cache import open_cache
    from cskd.store.commit import read_commit

    def opened(location: str) -> int:
        cache = open_cache(location, images=False)
        cache.quarantined()
        assert cache.missing() == []
        return cache.storage.counts.requests

    def one_by_one(location: str) -> int:
        storage = open_storage(location)
        for i in range(one):
            assert read_commit(storage, *divmod(i, views)) is not None
        return storage.counts.requests

    few = max(1, records // views)
    one = min(ONE_BY_ONE, few * views)
    sealed = make(folder / "sealed", f"{bucket}/sealed", blocks, views, seal=True)
    loose = make(folder / "loose", f"{bucket}/loose", few, views, seal=False)
    ways: tuple[tuple[str, str, int, Callable[[str], int]], ...] = (
        ("sealed: index", sealed, blocks * views, opened),
        ("sealed: index, inventory here already", sealed, blocks * views, opened),
        ("not sealed: records, many in flight", loose, few * views, opened),
        ("not sealed: records, one by one", loose, one, one_by_one),
    )
    rows = {}
    for name, location, count, call in ways:
        begun, used = time.perf_counter(), time.process_time()
        requests = call(location)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used
        rows[name] = {"records": count, "requests": requests, "seconds": round(seconds, 2), "cpu": round(cpu, 2)}
    return rows


def make(folder: Path, location: str, blocks: int, views: int, seal: bool) -> str:
    """A cache without units, but with their records. Returns its location."""
    from cskd.codecs.measured import Measured
    from cskd.config import RecipeConfig, from_dict, to_dict
    from cskd.dataset.inventory import Sample, ShardFile, write_inventory
    from cskd.files.durable import json_bytes
    from cskd.store.cache import create_cache
    from cskd.store.commit import Commit, UnitFile, record_bytes
    from cskd.store.format import INDEX, SEAL, commit_file, unit_file
    from cskd.store.identity import identity_of
    from cskd.store.index import content_root
    from cskd.store.manifest import Manifest
    from cskd.store.seal import Seal, seal_facts, sealed_index

    folder.mkdir()
    samples = [Sample(f"image{i}", i % 5, i, i // 2, 512, 9) for i in range(2 * blocks)]
    shards = [ShardFile(f"{i:05d}.tar", 10240) for i in range(blocks)]
    inventory = write_inventory(folder, samples, classes=[*"abcde"], shards=shards, block=2)
    recipe = RecipeConfig()
    identity = identity_of(inventory, recipe, {"model": "made up"}, (7, 7), ["envelope"])
    raw = {"data": {"train": str(folder)}, "recipe": to_dict(recipe), "cache": {"views": views}}
    manifest = Manifest(identity=identity, views=views, config=to_dict(from_dict(raw)), data=str(folder))
    cache = create_cache(location, manifest, inventory)

    def made(block: int, view: int) -> Commit:
        digest, content = (
            hashlib.sha256(f"{what} {block} {view}".encode()).hexdigest() for what in ("file", "content")
        )
        file = UnitFile("envelope", str(unit_file(block, view, "envelope", digest)), 1_600_000, digest, 1_400_000)
        stats = {"envelope": Measured(8192, 0.01 * view, 0.001, 0.99).facts}
        return Commit(block, view, [file], content, cache.fingerprint, 2, 2, {}, stats=stats)

    commits = {(b, v): made(b, v) for b in range(cache.blocks) for v in range(views)}
    if not seal:
        for (block, view), commit in commits.items():
            cache.storage.put(str(commit_file(block, view)), record_bytes(commit))
        return location
    hashes = {unit: commit.content_hash for unit, commit in commits.items()}
    root = content_root(cache.fingerprint, None, cache.blocks, views, hashes)
    facts = Seal(cache.fingerprint, views, len(commits), 2 * len(commits), 0, root)
    data = sealed_index(cache, facts, commits)
    assert data is not None
    print(f"index: {len(commits):,} records in {len(data):,} bytes")
    cache.storage.put(SEAL, json_bytes(seal_facts(facts)))
    cache.storage.put(INDEX, data)
    return location


@contextmanager
def slow_s3(latency: float) -> Iterator[str]:
    """A bucket of an S3 of this process, each request of which takes so many seconds more."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    ready: Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Queue()

    async def serve() -> None:
        end = asyncio.Event()
        proxy = await asyncio.start_server(lambda r, w: _forward(r, w, host, port, latency), "127.0.0.1", 0)
        ready.put((asyncio.get_running_loop(), end, proxy.sockets[0].getsockname()[1]))
        await end.wait()
        proxy.close()

    # `run` ends what is left of it: the client keeps its connections open as long as its process lives
    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    loop, end, proxy_port = ready.get()
    urlopen(Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy_port}"
    try:
        yield "s3://bucket"
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        server.stop()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, latency: float
) -> None:
    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter, wait: float) -> None:
        last = 0.0
        while data := await source.read(1 << 16):
            if time.monotonic() - last > latency:  # the parts of one request come together
                await asyncio.sleep(wait)
            last = time.monotonic()
            target.write(data)
            await target.drain()
        target.close()

    there_reader, there_writer = await asyncio.open_connection(host, port)
    try:
        ways = pipe(reader, there_writer, latency), pipe(there_reader, writer, 0.0)
        await asyncio.gather(*ways, return_exceptions=True)
    except asyncio.CancelledError:  # the proxy ends; a task that is cancelled would be told as an error of its callback
        pass
    finally:
        writer.close()
        there_writer.close()


if __name__ == "__main__":
    raise SystemExit(main())
