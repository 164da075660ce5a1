"""Kills, races and damage once more, with the cache on an object store that behaves badly. Counts are printed.

    python -m benchmarks.faults.remote --store s3       # moto; pip install 'moto[s3,server]'
    python -m benchmarks.faults.remote --store azurite  # npm install azurite; AZURITE=node_modules/.bin/azurite-blob
    python -m benchmarks.faults.remote --store s3 --tally s3.json --minutes 20  # again and again, until all is counted

Stage 1 writes its cache through `benchmarks.faults.proxy`, which refuses, loses answers, cuts them and dawdles. What is
silently wrong ends with status 1: another content than that of an undisturbed run on a local disk, or damage that
`cskd verify` does not find. A run that gives up and says so is counted, and must finish when it is run again.

The counts can be taken in several sittings: with `--tally FILE` each adds its own to the file, for one store, and does what is
still missing there, in slices of which each has its share of all parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import KILLED, in_child
from benchmarks.faults.bench import Bench, flipped
from benchmarks.faults.kills import RACERS, at_once
from benchmarks.faults.proxy import FaultyProxy
from benchmarks.faults.run import add_to
from benchmarks.faults.stores import environment, local_store, make_bucket
from cskd.config import Config, from_dict, to_dict
from cskd.errors import CskdError
from cskd.pipeline import unit_line
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.storage import open_storage
from cskd.store.format import PROBE

SPARE = ("sealed.json", "index.jsonl.zst")  # what a cache can do without
SLICES = 40  # of the full counts
TRIES = 20  # of a run that gives up and says so


class Remote:
    """Caches in a bucket, each under a name of its own. This process opens no storage: its children do, which it forks."""

    def __init__(self, bench: Bench, bucket: str) -> None:
        self.bench, self.bucket, self._made = bench, bucket, 0

    def fresh(self) -> str:
        self._made += 1
        return f"{self.bucket}/cache{self._made}"

    def make(self, cache: str, kill_after: float | None = None) -> tuple[int, Any]:
        """Stage 1 in a child: its exit status, and the content hash as its value."""
        return in_child(lambda: cache_teacher(self.config(cache), quiet=True).content_root, kill_after)

    def finish(self, cache: str, counts: Counter[str]) -> bool:
        """Stage 1 to its end: is the content that of an undisturbed run? Runs that give up, and say so, are counted."""
        for _ in range(TRIES):
            status, answer = self.make(cache)
            if answer and "value" in answer:
                return bool(answer["value"] == self.bench.root)
            counts["gave_up"] += 1
            if not (answer and "StorageError" in answer["error"]):
                print(f"{cache}: ended with {status}, {answer}", file=sys.stderr)
                return False
        return False

    def config(self, cache: str) -> Config:
        raw = to_dict(self.bench.config(Path("unused")))
        raw["cache"]["path"] = cache
        return from_dict(raw)


def kills(remote: Remote, count: int) -> Counter[str]:
    """kill -9 of stage 1 at a random moment, one to three times in a row; then to the end."""
    counts, seconds = Counter(kills=0, kills_wrong=0), 2 * remote.bench.seconds
    while counts["kills"] < count:
        cache = remote.fresh()
        for _ in range(remote.bench.rng.choice((1, 1, 2, 3))):
            status, answer = remote.make(cache, kill_after=remote.bench.rng.uniform(0.0, seconds))
            seconds *= 1.02 if status == KILLED else 0.9
            counts["kills"] += status == KILLED
            counts["gave_up"] += status == 0 and "value" not in (answer or {})
        counts["kills_wrong"] += not remote.finish(cache, counts)
    return counts


def races(remote: Remote, count: int) -> Counter[str]:
    """Processes at once on a cache that is not there yet; all end with the content of an undisturbed run, or say why not."""
    counts = Counter(races=0, races_wrong=0)
    for _ in range(count):
        cache = remote.fresh()

        def race(cache: str = cache) -> str:
            return cache_teacher(remote.config(cache), quiet=True).content_root

        answers = [answer or {"error": "died"} for _, answer in at_once(race, RACERS)]
        odd = [a for a in answers if a.get("value") != remote.bench.root and "StorageError" not in a.get("error", "")]
        counts["gave_up"] += sum("StorageError" in a.get("error", "") for a in answers)
        if odd:
            print(f"{cache}: {odd}", file=sys.stderr)
        counts.update(Counter(races=1, races_wrong=bool(odd) or not remote.finish(cache, counts)))
    return counts


def damage(remote: Remote, count: int) -> Counter[str]:
    """One object flipped, cut, emptied, removed or exchanged for another's bytes: does `verify` name it?"""
    cache, counts = remote.fresh(), Counter(damaged=0, damaged_missed=0)
    begin = remote.bench.rng.randrange(1 << 16)
    if not remote.finish(cache, counts):
        return Counter(damaged_missed=1)

    def run() -> dict[str, int]:
        rng, storage = remote.bench.rng, open_storage(cache)
        whole = {stat.key: _patient(partial(storage.get, stat.key)) for stat in _patient(lambda: list(storage.list()))}
        names = sorted(name for name in whole if not name.startswith(PROBE))
        for i in range(begin, begin + count):
            name, data = names[i % len(names)], whole[names[i % len(names)]]
            kind = rng.choice(("flip", "flip", "cut", "empty", "remove", "swap"))
            cut, other = data[: rng.randrange(len(data))], whole[rng.choice(names)]
            changed = {"flip": flipped(data, rng), "cut": cut, "empty": b"", "swap": other, "remove": None}[kind]
            if changed == data:
                continue
            _patient(partial(storage.delete, name) if changed is None else partial(storage.put, name, changed))
            found = _patient(lambda: verify(cache, quiet=True), tell=True)
            # Without its seal or its index a cache is as before it: whole, and said not to be sealed.
            spare = changed is None and name in SPARE and not isinstance(found, str) and not found.errors
            missed = not isinstance(found, str) and found.sound and not spare
            counts.update({"damaged": 1, f"damaged_{kind}": 1, "damaged_missed": int(missed)})
            if missed:
                print(f"{kind} of {name} was not found", file=sys.stderr)
            _patient(partial(storage.put, name, data))
        return dict(counts)

    status, answer = in_child(run)
    if not answer or "value" not in answer:
        raise RuntimeError(f"damage ended with {status}, {answer}")
    return Counter(answer["value"])


def _patient(call: Callable[[], Any], tell: bool = False) -> Any:
    """Again, where the store gave up. tell: give what else the cache is refused by, as text."""
    for _ in range(TRIES):
        try:
            return call()
        except CskdError as e:
            if type(e).__name__ != "StorageError":
                if tell:
                    return str(e)
                raise
    raise RuntimeError(f"the store gave up {TRIES} times")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("s3", "azurite"), default="s3")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--damage", type=int, default=2000)
    parser.add_argument("--tally", type=Path, help="JSON file that counts are added to, and that says what is missing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no slice after so many")
    parser.add_argument("--seed", type=int, default=None, help="of moments, places and faults; default: the clock")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns()
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    unit_line.PATIENCE = 0.5  # a pass of these caches takes less
    total: Counter[str] = Counter(
        json.loads(options.tally.read_text()) if options.tally and options.tally.exists() else {}
    )
    with tempfile.TemporaryDirectory() as folder, local_store(options.store, Path(folder) / "store") as upstream:
        bucket = make_bucket(options.store, upstream, "cskd")
        bench = Bench(Path(folder) / "bench", random.Random(seed))  # forks: before the proxy's threads begin
        with _proxy_process(upstream, seed) as proxy:
            os.environ |= environment(options.store, proxy.endpoint)
            remote = Remote(bench, bucket)
            wanted = {
                kills: ("kills", options.kills),
                races: ("races", options.races),
                damage: ("damaged", options.damage),
            }
            while any(total[name] < full for name, full in wanted.values()):
                for part, (name, full) in wanted.items():
                    if (left := full - total[name]) <= 0:
                        continue
                    if time.monotonic() > end:
                        wanted = {}
                        break
                    clock = time.perf_counter()
                    counts = part(remote, min(left, -(-full // SLICES)))
                    said = "  ".join(f"{k} {n}" for k, n in sorted(counts.items()))
                    print(f"{part.__name__:<8}{time.perf_counter() - clock:>7.0f} s  {said}", flush=True)
                    counts.update(proxy.counted())
                    total.update(counts)
                    if options.tally:
                        add_to(options.tally, counts)
    wrong = sum(n for name, n in total.items() if name.endswith(("_wrong", "_missed")))
    print(json.dumps({"benchmark": "faults.remote", "store": options.store, "seed": seed, "wrong": wrong, **total}))
    return int(wrong > 0)


class _Proxy:
    """A proxy in another process."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self.endpoint = pipe, str(pipe.recv())

    def counted(self) -> Counter[str]:
        """Its requests and faults since the last call, as `proxy_...`."""
        self._pipe.send("counts")
        return Counter({f"proxy_{name}": n for name, n in self._pipe.recv().items()})


@contextmanager
def _proxy_process(upstream: str, seed: int) -> Iterator[_Proxy]:
    """The proxy in a process of its own, since this one forks."""
    pipe, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(upstream, seed, its), daemon=True)
    process.start()
    try:
        yield _Proxy(pipe)
    finally:
        process.terminate()
        process.join()


def _serve(upstream: str, seed: int, pipe: Any) -> None:
    proxy = FaultyProxy(upstream, seed)
    pipe.send(proxy.endpoint)
    before: Counter[str] = Counter()
    while True:
        pipe.recv()
        now = Counter(dict(proxy.counts))
        pipe.send(dict(now - before))
        before = now


if __name__ == "__main__":
    raise SystemExit(main())
