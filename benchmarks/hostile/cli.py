"""Hostile inputs through the real command line: exit code 1, one line that a terminal can show, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile import base as b
from benchmarks.hostile.base import Base, Case, picture, tar, write
from benchmarks.hostile.curated_inventory import HEADER
from cskd.config import to_yaml
from cskd.errors import CskdError

SECONDS, WALL = 10, 90  # of the processor, most of it imports; on the clock of a busy machine
ROOT = Path(__file__).resolve().parent.parent.parent


def command(*arguments: str | Path) -> Callable[[Path], None]:
    """Run `cskd` with these arguments, WORK in them replaced by the folder. CskdError where it refuses as it should."""

    def run(work: Path) -> None:
        before = os.times()
        words = [str(a).replace("WORK", str(work)) for a in arguments]
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *words],
            cwd=ROOT,
            capture_output=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        if seconds > SECONDS:
            raise AssertionError(f"{words} took {seconds:.1f} s of the processor")
        shown = done.stdout + done.stderr
        if b"Traceback" in shown or any(byte < 32 and byte not in b"\n" for byte in shown) or b"unexpected" in shown:
            raise AssertionError(f"{words} printed {shown[-1000:]!r}")
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.decode().splitlines() if line.startswith("cskd: ")]
        if done.returncode != 1 or (len(lines) != 1 and words[0] != "verify"):
            raise AssertionError(f"{words} ended with {done.returncode}: {shown[-1000:]!r}")
        raise CskdError(lines[0] if lines else "unsound")

    return run


def counted(run: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run, then compare what the cache holds with its inventory."""

    def read(work: Path) -> None:
        run(work)
        b.read_cache(work / "out" / "cache")

    return read


def cli_cases(base: Base) -> list[Case]:
    one = picture("PNG")
    good = tar({f"{c}/{i}.png": one for c in "ab" for i in range(3)})

    def sealed(work: Path, change: Callable[[dict[str, Any]], object]) -> None:
        header = json.loads((base.data / HEADER).read_bytes())
        change(header)
        b.copy_with(base.data, work / "d", HEADER, b.seal_inventory(header))

    def elsewhere(work: Path) -> None:
        sealed(work, lambda header: header["shards"][0].update(name="../../canary"))
        write(work / "c.yaml", to_yaml(base.config(work / "out" / "c", work / "out" / "r", work / "d")))

    def unit(work: Path) -> None:
        members = b.unit_members(base.cache)
        members["seed/c/0"] = b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little")
        b.put_unit(b.copy_cache(base, work / "c"), b.zipped(members))

    def manifest(work: Path) -> None:
        facts = json.loads((base.cache / "manifest.json").read_bytes())
        b.put_manifest(b.copy_cache(base, work / "c"), {**facts, "views": 10**12})

    def bad_images(work: Path) -> None:
        members = {f"{c}/{i}.png": one for c in "ab" for i in range(6)}
        b.read_pack(
            write(work / "src.tar", tar({**members, "b/bad.png": b"\x1b]0;x\x07 no image"})), work / "out" / "data"
        )
        config = base.config(
            work / "out" / "cache", work / "out" / "run", work / "out" / "data", cache={"max_quarantine": 0.5}
        )
        write(work / "c.yaml", to_yaml(config))

    def config(text: str) -> Callable[[Path], object]:
        return lambda work: write(work / "c.yaml", text)

    def run_of(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def make(work: Path) -> None:
            facts = json.loads((base.run / "config.json").read_bytes())
            change(facts)
            b.copy_with(base.run, work / "run", "config.json", json.dumps(facts).encode())

        return make

    link = b"a/../../canary.png"
    makes: list[tuple[str, Callable[[Path], object], Callable[[Path], None], str]] = [
        ("pack of a tar with ..", lambda w: write(w / "s.tar", tar({link.decode(): one})), command("pack", "WORK/s.tar", "WORK/out"), "refused"),
        ("pack of a pipe", lambda w: os.mkfifo(w / "s"), command("pack", "WORK/s", "WORK/out"), "refused"),
        ("pack of names with markup", lambda w: write(w / "[bold]s[/x].tar", good), command("pack", "WORK/[bold]s[/x].tar", "WORK/out[red]"), "read"),
        ("pack of a name that clears the screen", lambda w: write(w / "s" / "\x1b[2J\n" / "a.png", one), command("pack", "WORK/s", "WORK/out"), "refused"),
        ("pack of a source that clears the screen", lambda w: write(w / "\x1b[2J\n.tar", good), command("pack", "WORK/\x1b[2J\n.tar", "WORK/out"), "read"),
        ("pack of a bomb", lambda w: write(w / "s.tar", b.bomb("gz")), command("pack", "WORK/s.tar", "WORK/out"), "refused"),
        ("pack of an image that is none, re-encoded", lambda w: write(w / "s.tar", tar({"a/0.png": one, "b/1.png": b"none"})), command("pack", "WORK/s.tar", "WORK/out", "--short-side", "8"), "read"),
        ("index of pipe:", lambda w: None, command("index", "pipe:touch canary"), "refused"),
        ("cache-teacher with a YAML bomb", config("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n"), command("cache-teacher", "WORK/c.yaml"), "refused"),
        ("cache-teacher with a python object", config("data: !!python/object/apply:os.system [touch canary]\n"), command("cache-teacher", "WORK/c.yaml"), "refused"),
        ("cache-teacher with shards elsewhere", elsewhere, command("cache-teacher", "WORK/c.yaml"), "refused"),
        ("cache-teacher with an unreadable image", bad_images, counted(command("cache-teacher", "WORK/c.yaml")), "read"),
        ("train with 10^18 epochs", config("train: {epochs: 1000000000000000000, output: x}\n"), command("train", "WORK/c.yaml"), "refused"),
        ("verify of a unit that blows up", unit, command("verify", "WORK/c"), "refused"),
        ("verify of 10^12 views", manifest, command("verify", "WORK/c"), "refused"),
        ("inspect of 10^12 views", manifest, command("inspect", "WORK/c"), "refused"),
        ("inspect of no cache", lambda w: os.mkfifo(w / "c"), command("inspect", "WORK/c"), "refused"),
        ("eval of a run that names a checkpoint", run_of(lambda f: f["model_args"].update(checkpoint_path="canary")), command("eval", "WORK/run", base.data), "refused"),
        ("eval of 60,000 features", run_of(lambda f: f["model_args"].update(embed_dim=60_000)), command("eval", "WORK/run", base.data), "refused"),
    ]  # fmt: skip
    return [Case(f"cli: {name}", make, read, how, ("out", "c/.", "linear.py"), WALL) for name, make, read, how in makes]
