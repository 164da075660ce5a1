"""What a cache and a training run survive: killed processes, failing writes, damaged and swapped files, racing writers.

    python -m benchmarks.faults [--quick] [--only PART ...] [--tally FILE]

    kills        kill -9 of stage 1 at random moments, then the same call again: the content hash of an undisturbed run
    deaths       death, EIO and ENOSPC at every write, fsync, rename and link of one unit's commit, then again
    flips        single bits, over every kind of file of a cache: found by `verify`, the unit named; some of them repaired
    truncations  files cut short
    swaps        valid files exchanged between units, views and caches
    images       single bits of images in the shards
    races        four processes on one cache: one commit a unit, the content hash of one process
    training     kill -9 of training at random moments, some twice: the weights of an undisturbed run
    cli          kill -9 of the real command line, with worker processes, then the same command again

Made on tiny images in forked children of this process. `--tally FILE` adds this run's counts to those of earlier ones.
Prints one JSON line last. Exits 1 when anything was silently wrong.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cskd.store.commit
from cskd.config import Config, from_dict, to_yaml
from cskd.errors import CskdError
from cskd.inventory import open_inventory
from pipeline.cache_teacher import cache_teacher
from pipeline.packing import pack_data
from pipeline.repair import repair
from pipeline.train import train
from pipeline.verify import verify

ROOT = Path(__file__).resolve().parent.parent
FULL = {"kills": 300, "deaths": 1, "flips": 10_000, "truncations": 1_000, "swaps": 200, "images": 1_000, "races": 100}
FULL |= {"training": 50, "cli": 30}
QUICK = {
    "kills": 10,
    "deaths": 1,
    "flips": 100,
    "truncations": 20,
    "swaps": 10,
    "images": 20,
    "races": 4,
    "training": 3,
}
REPAIRS = 100  # one in so many flips is repaired, and the cache compared with what it was
TEACHER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 4)

    def forward_features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

def build():
    return Net()
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts, under a minute")
    parser.add_argument("--only", nargs="+", choices=list(FULL), help="these parts")
    parser.add_argument("--tally", type=Path, help="JSON file that counts are added to")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and places; default: the clock")
    options = parser.parse_args(arguments)
    sizes = {
        part: n for part, n in (QUICK if options.quick else FULL).items() if not options.only or part in options.only
    }
    rng = random.Random(options.seed if options.seed is not None else time.time_ns())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), rng)
        for part, count in sizes.items():
            clock = time.perf_counter()
            getattr(bench, part)(count)
            counts = {k: n for k, n in bench.counts.items() if k.startswith(part)}
            print(f"{part:<12} {counts} in {time.perf_counter() - clock:.0f} s", flush=True)
    total = bench.counts
    if options.tally:
        earlier = json.loads(options.tally.read_text()) if options.tally.exists() else {}
        total = total + Counter(earlier)
        options.tally.write_text(json.dumps(total, indent=1, sort_keys=True) + "\n")
    wrong = sum(n for name, n in total.items() if name.endswith(("_wrong", "_missed")))
    print(json.dumps({"benchmark": "faults", "wrong": wrong, **dict(sorted(total.items()))}))
    return int(wrong > 0)


def in_child(function: Callable[[], Any], kill_after: float | None = None) -> tuple[int, Any]:
    """Run in a forked child. Returns its exit status (-9 when killed after so many seconds) and what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1  # whatever happens, this copy of the process ends here
        try:
            try:
                result: Any = {"value": function()}
            except (CskdError, OSError) as e:
                result = {"error": f"{type(e).__name__}: {e}"}
            with os.fdopen(write, "w") as out:
                json.dump(result, out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(text) if text else None


class Bench:
    """A tiny data set, its cache and its student, made once undisturbed; `counts` of what was done to copies of them."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.counts = folder, rng, Counter[str]()
        (folder / "net.py").write_text(TEACHER)
        noise = np.random.default_rng(0)
        for i in range(48):
            path = folder / "images" / "abcd"[i % 4] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        pack_data(folder / "images", folder / "data", shard_size=12, block=24, quiet=True)
        clock = time.perf_counter()
        self.root = self.make(folder / "cache")
        self.seconds = time.perf_counter() - clock
        self.other = folder / "other"
        in_child(lambda: cache_teacher(self.config(self.other, seed=5), quiet=True).units)
        clock = time.perf_counter()
        self.weights = self.student("whole")
        self.train_seconds = time.perf_counter() - clock
        self.whole = files(folder / "cache")

    def config(self, cache: Path, run: str = "run", seed: int = 0, workers: int = 0) -> Config:
        return from_dict(
            {
                "data": {"train": str(self.folder / "data")},
                "teacher": {"model": f"{self.folder / 'net.py'}:build", "batch": 8, "min_top1": 0.0, "check_images": 8},
                "recipe": {"size": 32, "seed": seed},
                "cache": {"path": str(cache), "views": 3, "workers": workers, "device": "cpu"},
                "student": {
                    "model": "deit_tiny_distilled_patch16_224",
                    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
                    "drop_path": 0.1,
                },
                "train": {
                    "output": str(self.folder / run),
                    "epochs": 3,
                    "global_batch": 8,
                    "warmup_epochs": 1,
                    "save_every": 1,
                    "workers": 0,
                    "device": "cpu",
                },
            }
        )

    def make(self, cache: Path, kill_after: float | None = None) -> str | None:
        """Stage 1 in a child: the content hash, or None where the child was killed."""
        status, answer = in_child(lambda: cache_teacher(self.config(cache), quiet=True).content_root, kill_after)
        return answer["value"] if status == 0 and answer and "value" in answer else None

    def student(self, run: str, kill_after: float | None = None) -> str | None:
        """Stage 2 in a child: sha256 of the weights, or None where the child was killed."""

        def weights() -> str:
            output = Path(train(self.config(self.folder / "cache", run), quiet=True).output)
            return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()

        status, answer = in_child(weights, kill_after)
        return answer["value"] if status == 0 and answer and "value" in answer else None

    def sound(self, cache: Path) -> bool:
        """Is it whole, and what an undisturbed run makes?"""
        _, answer = in_child(lambda: [verify(cache, quiet=True).sound, verify(cache, quiet=True).content_root])
        return bool(answer) and answer.get("value") == [True, self.root]

    def errors(self, cache: Path, images: bool = False) -> list[str]:
        """What `verify` says of a cache, in this process: forking ten thousand times would take long."""
        try:
            return verify(cache, images=images, quiet=True).errors
        except CskdError as e:
            return [str(e)]

    def kills(self, count: int) -> None:
        done = 0
        while done < count:
            cache = self.folder / "killed"
            shutil.rmtree(cache, ignore_errors=True)
            for _ in range(self.rng.choice((1, 1, 2, 3))):
                done += self.make(cache, kill_after=self.rng.uniform(0.0, 1.2 * self.seconds)) is None
            wrong = self.make(cache) != self.root or not self.sound(cache)
            self.counts["kills_wrong"] += wrong
            if wrong:
                print(f"kills: {self.errors(cache)}", file=sys.stderr)
        self.counts["kills"] += done

    def deaths(self, count: int) -> None:
        """At each call that changes the disk, of the whole run that makes one missing unit."""
        for _ in range(count):
            calls = self._faulty(None, "count")
            for kind in ("death", "EIO", "ENOSPC"):
                for at in range(calls):
                    self._faulty(at, kind)
                    self.counts["deaths"] += 1
                    cache = self.folder / "faulty"
                    self.counts["deaths_wrong"] += self.make(cache) != self.root or not self.sound(cache)

    def _faulty(self, at: int | None, kind: str) -> int:
        """Make the one unit a copy of the cache lacks; call number `at` fails. Returns the number of calls."""
        cache = self.folder / "faulty"
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(self.folder / "cache", cache)
        record = cache / "commits" / "b00001" / "v0001.json"
        unit = cache / json.loads(record.read_text())["commit"]["files"][0]["path"]
        record.unlink()
        unit.unlink()

        def run() -> int:
            shim = FaultyOs(at, kind)
            for name, function in (("os", shim), ("open", shim.open_file)):
                setattr(cskd.store.commit, name, function)
            cache_teacher(self.config(cache), quiet=True)
            return shim.calls

        status, answer = in_child(run)
        failed = status != 0 or answer is None or "error" in answer
        if at is not None:
            self.counts["deaths_wrong"] += not failed  # a fault that nobody noticed
        return int(answer["value"]) if answer and "value" in answer else 0

    def flips(self, count: int) -> None:
        names = sorted(self.whole)
        for i in range(count):
            name = self.rng.choice(names)
            data = bytearray(self.whole[name])
            bit = self.rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << (bit % 8)
            self._found("flips", {name: bytes(data)}, repaired=i % REPAIRS == 0)

    def truncations(self, count: int) -> None:
        for _ in range(count):
            name = self.rng.choice(sorted(self.whole))
            self._found("truncations", {name: self.whole[name][: self.rng.randrange(len(self.whole[name]))]})

    def swaps(self, count: int) -> None:
        other, done = files(self.other), 0
        while done < count:
            kind = self.rng.choice(("units", "commits", "frame", "cache"))
            if kind == "cache":  # the same file of another cache; its units have other hashes in their names
                name = self.rng.choice([n for n in self.whole if not n.startswith("units")])
                damage = {name: other[name]}
            else:
                names = [n for n in sorted(self.whole) if n.split("/")[0] == kind or (kind == "frame" and "/" not in n)]
                a, b = self.rng.sample(names, 2)
                damage = {a: self.whole[b], b: self.whole[a]}
            if all(self.whole[n] == new for n, new in damage.items()):
                continue  # the two files are equal
            self._found("swaps", damage)
            done += 1

    def _found(self, part: str, damage: dict[str, bytes], repaired: bool = False) -> None:
        """Damage files of the cache; does `verify` say so, and name each unit? Then put them back, or repair them."""
        cache = self.folder / "cache"
        for name, data in damage.items():
            (cache / name).write_bytes(data)
        errors = self.errors(cache)
        self.counts[part] += 1
        named = [_named(name, errors) for name in damage]  # with a manifest that can't be read, nothing else is
        self.counts[f"{part}_missed"] += not (all(named) or (any(named) and len(errors) == 1))
        if repaired:
            in_child(lambda: repair(cache, quiet=True).rebuilt)
            self.counts["flips_repaired"] += 1
            self.counts["flips_repaired_wrong"] += files(cache) != self.whole
        for name in damage:
            (cache / name).write_bytes(self.whole[name])

    def images(self, count: int) -> None:
        inventory = open_inventory(self.folder / "data")
        for _ in range(count):
            i = self.rng.randrange(len(inventory))
            path, at = inventory.shard_path(int(inventory.shard[i])), self.rng.randrange(8 * int(inventory.size[i]))
            whole = path.read_bytes()
            data = bytearray(whole)
            data[int(inventory.offset[i]) + at // 8] ^= 1 << (at % 8)
            path.write_bytes(data)
            errors = self.errors(self.folder / "cache", images=True)
            path.write_bytes(whole)
            self.counts["images"] += 1
            self.counts["images_missed"] += not any(inventory.key(i) in e for e in errors)

    def races(self, count: int) -> None:
        for _ in range(count):
            cache = self.folder / "raced"
            shutil.rmtree(cache, ignore_errors=True)
            if self.rng.random() < 0.5:  # one unit is missing; else the whole cache is
                shutil.copytree(self.folder / "cache", cache)
                (cache / "commits" / "b00000" / "v0002.json").unlink()
            pids = []
            for _ in range(4):
                pid = os.fork()
                if pid == 0:
                    try:
                        cache_teacher(self.config(cache), quiet=True)
                    except BaseException as e:
                        print(f"race: {type(e).__name__}: {e}", file=sys.stderr)
                        os._exit(1)
                    os._exit(0)
                pids.append(pid)
            failed = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids)
            self.counts["races"] += 1
            self.counts["races_wrong"] += failed > 0 or not self.sound(cache)

    def training(self, count: int) -> None:
        done = 0
        while done < count:
            shutil.rmtree(self.folder / "cut", ignore_errors=True)
            for _ in range(self.rng.choice((1, 2))):
                done += self.student("cut", kill_after=self.rng.uniform(0.2, 1.0) * self.train_seconds) is None
            self.counts["training_wrong"] += self.student("cut") != self.weights
        self.counts["training"] += done

    def cli(self, count: int) -> None:
        """`cskd cache-teacher` with two workers, killed between 2 and 8 seconds after its start: importing takes most."""
        done = 0
        while done < count:
            cache = self.folder / "cli"
            shutil.rmtree(cache, ignore_errors=True)
            (self.folder / "c.yaml").write_text(to_yaml(self.config(cache, workers=2)))
            command = [sys.executable, str(ROOT / "cli.py"), "cache-teacher", str(self.folder / "c.yaml"), "--json"]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(self.rng.uniform(2.0, 8.0))
            process.kill()
            done += process.wait() == -signal.SIGKILL
            again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            root = json.loads(again.stdout)["content_root"] if again.returncode == 0 else None
            self.counts["cli_wrong"] += root != self.root or not self.sound(cache)
        self.counts["cli"] += done


class FaultyOs:
    """Stands for the module `os`, and for `open`, in `cskd.store.commit`: call number `at` that changes the disk fails."""

    def __init__(self, at: int | None, kind: str) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(real) if name in ("fsync", "replace", "link") else real

    def open_file(self, *args: Any) -> Any:
        file = open(*args)  # noqa: SIM115 (closed by Writer)
        write = self._counted(file.write)

        class Writer:
            """The file, whose writes are counted."""

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return write if name == "write" else getattr(file, name)

        return Writer()

    def _counted(self, real: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.at:
                if self.kind == "death":
                    os._exit(9)
                raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))
            return real(*args)

        return call


def files(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _named(name: str, errors: list[str]) -> bool:
    """Does one of the lines name the unit of that file, or the file?"""
    parts = name.split("/")
    if parts[0] not in ("units", "commits"):
        return any(parts[0] in e for e in errors)
    unit = f"block {int(parts[1][1:])}, view {int(parts[2][1:5])}:"
    return any(e.startswith(unit) for e in errors)


if __name__ == "__main__":
    sys.exit(main())
