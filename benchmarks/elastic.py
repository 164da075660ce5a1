"""Does a run whose machine is lost go on by itself, with no sample twice and none lost?

    python -m benchmarks.elastic [--lose first | second] [--return]

Two agents of torchrun on this machine, with one rank each, train a tiny student together; the store in which they find each other
is this process's, as that of a cluster is on a machine that stays. In the middle of an epoch one agent and its worker are killed
with SIGKILL: `--lose first` (the default) is the one with rank 0, which writes the states. The other agent forms the group again
with one rank and goes on from the newest state. `--return`: a third agent joins later, and the two ranks finish the run.

Prints the steps of each stretch with what was done again, and whether the steps that led to the weights fed what one process feeds
that nothing stops. Prints one JSON line last. Exits 1 where a sample was lost or fed twice, or no run came to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # in its documentation, not in its __all__

from benchmarks.tiny_teacher import TINY_TEACHER
from cskd import cli
from cskd.config import Config, from_dict, to_yaml
from cskd.machine import stops
from cskd.machine.launch import OWN_STORES
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.pipeline.train_step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
IMAGES, BATCH, MICRO, EPOCHS, SAVE = 96, 8, 2, 2, 3
EPOCH = IMAGES // BATCH  # steps
KILL = EPOCH + 5  # steps that are done when the agent is killed: in the second epoch, two after a state
PAUSE = 0.3  # seconds that a step takes at least, so that something happens while the run is on
HOLD = (
    "hold"  # a file in the record: one rank alone waits after each step till it is asked to stop, or the file is gone
)
PATIENCE = 900.0  # seconds for anything that is waited for
RENDEZVOUS = "is_host=0,last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=5"  # quick, for a machine with much to do


@dataclass(frozen=True)
class Fed:
    """What one rank was fed in one step. rows: (sample, view)."""

    stretch: tuple[
        int, int
    ]  # between two losses: the step of the state that it went on from, 0 for none, and its ranks
    at: float
    agent: int  # process
    rank: int
    step: int
    rows: list[tuple[int, int]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lose", choices=("first", "second"), default="first", help="the agent with rank 0, or the other"
    )
    parser.add_argument("--return", dest="back", action="store_true", help="another agent joins later")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), 0 if asked.lose == "first" else 1, asked.back)
    print(json.dumps(result))
    return 0 if result["ended"] and not result["twice"] and not result["lost"] and not result["other"] else 1


def config(folder: Path, run: str) -> Config:
    return from_dict(
        {
            "data": {"train": str(folder / "data")},
            "teacher": {"model": TINY_TEACHER, "batch": 8, "min_top1": 0.0, "check_images": 8},
            "recipe": {"size": 32},
            "cache": {"path": str(folder / "cache"), "views": EPOCHS, "workers": 0, "device": "cpu"},
            "student": {
                "model": "deit_tiny_distilled_patch16_224",
                "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.1},
                "drop_path": 0.1,
            },
            "train": {
                "output": str(folder / run),
                "epochs": EPOCHS,
                "global_batch": BATCH,
                "micro_batch": MICRO,
                "warmup_epochs": 1,
                "save_every": SAVE,
                "workers": 0,
                "device": "cpu",
                "autocast": "none",
                "opt": "sgd",
            },
        }
    )


def measured(folder: Path, lose: int, back: bool) -> dict[str, Any]:
    """Make the data and the cache, train undisturbed and with a loss, and compare."""
    noise = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / "images" / "abcd"[i % 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    pack_data(folder / "images", folder / "data", shard_size=24, block=48, quiet=True)
    cache_teacher(config(folder, "whole"), quiet=True)
    with recording(folder / "record whole", 0.0):
        train(config(folder, "whole"), quiet=True)
    (folder / "c.yaml").write_text(to_yaml(config(folder, "run")))
    ended, said = with_a_loss(folder, lose, back)
    for log in [] if ended else sorted(folder.glob("agent*.log")):
        print(
            f"--- {log.stem}, of a run that did not end", *log.read_text(errors="replace").splitlines()[-40:], sep="\n"
        )
    whole, run = fed(folder / "record whole"), fed(folder / "record")
    led, lines = sequence(run)
    print(*lines, sep="\n")
    alone = {one.step: one.rows for one in whole}
    other = [step for step in alone if sorted(led.get(step, [])) != sorted(alone[step])]
    counted = [
        Counter(row for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for row in led.get(step, []))
        for epoch in range(EPOCHS)
    ]
    result: dict[str, Any] = {
        "ended": ended,
        "steps": len(led),
        "twice": sum(n - 1 for epoch in counted for n in epoch.values()),
        "lost": EPOCHS * IMAGES - sum(len(epoch) for epoch in counted),
        "other": len(other),
        "stretches": len(lines),
        "warnings": sum(line.startswith("ranks changed") for line in said),
        "weights_differ_by": None,
    }
    if ended:
        one, two = (load_file(folder / name / "model.safetensors") for name in ("whole", "run"))
        result["weights_differ_by"] = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(
        f"{len(led)} steps led to the weights: {result['twice']} samples fed twice in an epoch, {result['lost']} lost, "
        f"{len(other)} steps fed anything else than one process does"
    )
    return result


def with_a_loss(folder: Path, lose: int, back: bool) -> tuple[bool, list[str]]:
    """Two agents, one of which is killed after KILL steps. Returns: whether the run came to its end; what changed, by its card."""
    if back:  # how long an agent takes to join, a machine that has much to do decides
        (folder / "record").mkdir()
        (folder / "record" / HOLD).touch()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    agents = [agent(folder, store.port, number) for number in range(2)]
    try:
        wait_for(lambda: done(folder) >= KILL, agents, "a step in the second epoch")
        (gone,) = {one.agent for one in fed(folder / "record") if one.rank == lose}
        for child in children(gone):
            os.kill(child, signal.SIGKILL)
        os.kill(gone, signal.SIGKILL)
        next(one for one in agents if one.pid == gone).wait()
        agents = [one for one in agents if one.pid != gone]
        print(f"killed the agent of rank {lose} and its worker after step {done(folder)}", flush=True)
        if back:
            wait_for(lambda: any(one.stretch[1] == 1 for one in fed(folder / "record")), agents, "the one that is left")
            agents.append(agent(folder, store.port, 2))
        for one in agents:
            one.wait(PATIENCE)
    finally:
        for one in agents:
            one.kill()
            one.wait()
    about = folder / "run" / "config.json"
    changed = json.loads(about.read_text())["cskd"].get("changed", []) if about.exists() else []
    return (folder / "run" / "model.safetensors").exists() and not any(one.returncode for one in agents), changed


def agent(folder: Path, port: int, number: int) -> subprocess.Popen[bytes]:
    """torchrun, as a machine of one or two would start it."""
    run = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "elastic"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", RENDEZVOUS]
    what = ["-m", "benchmarks.elastic", "worker", "train", str(folder / "c.yaml")]
    env = {**os.environ, OWN_STORES: "1", "OMP_NUM_THREADS": "1", "CSKD_RECORD": str(folder / "record")}
    with (folder / f"agent{number}.log").open("wb") as log:
        command = [sys.executable, "-m", "torch.distributed.run", *run, *meet, *what]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


def worker(arguments: Sequence[str]) -> None:
    """In a rank: `cskd` with these arguments, which writes down what each step is fed."""
    sys.argv = ["cskd", *arguments]
    with recording(Path(os.environ["CSKD_RECORD"]), PAUSE):
        cli.main()


@contextmanager
def recording(folder: Path, pause: float) -> Iterator[None]:
    """Write down each step of this process, once it is done."""
    folder.mkdir(exist_ok=True)
    real: Callable[..., Any] = TrainStep.__call__

    def recorded(self: TrainStep, batch: dict[str, Tensor], epoch: int, step: int, seconds: Any) -> Any:
        rows = list(zip(batch["sample"].tolist(), batch["view"].tolist(), strict=True))
        time.sleep(pause)
        result = real(self, batch, epoch, step, seconds)
        with (folder / f"{os.getpid()}.jsonl").open("a") as out:
            stretch = [self.run.state.resumed or 0, self.run.ranks.count]
            print(json.dumps([stretch, time.time(), os.getppid(), self.run.ranks.rank, step, rows]), file=out)
        while self.run.ranks.count == 1 and (folder / HOLD).exists() and not stops.asked():
            time.sleep(0.05)
        return result

    with mock.patch.object(TrainStep, "__call__", recorded):
        yield


def fed(folder: Path) -> list[Fed]:
    """All that was written down so far."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        Fed((s[0], s[1]), at, agent, rank, step, [(a, b) for a, b in rows]) for s, at, agent, rank, step, rows in found
    ]


def done(folder: Path) -> int:
    """Steps that every rank of the newest stretch has done."""
    return max((one.step + 1 for one in fed(folder / "record")), default=0)


def sequence(run: list[Fed]) -> tuple[dict[int, list[tuple[int, int]]], list[str]]:
    """The rows of each step that led to the weights, the last time that it was done; and a line for each stretch of the run."""
    begun: dict[tuple[int, int], float] = {}
    for one in run:
        begun[one.stretch] = min(begun.get(one.stretch, one.at), one.at)
    led: dict[int, list[tuple[int, int]]] = {}
    lines = []
    for stretch in sorted(begun, key=lambda s: begun[s]):
        steps: dict[int, list[Fed]] = {}
        for one in run:
            if one.stretch == stretch:
                steps.setdefault(one.step, []).append(one)
        whole = {step: parts for step, parts in steps.items() if len(parts) == stretch[1]}
        again = sorted(set(led) & set(whole))
        led |= {step: [row for part in parts for row in part.rows] for step, parts in whole.items()}
        ranks = f"{stretch[1]} rank{'s' if stretch[1] != 1 else ''}"
        did = f"{again[0]} .. {again[-1]} again, whose weights were lost; " if again else ""
        lines.append(f"{ranks}: steps {min(whole)} .. {max(whole)} ({did}{BATCH} views each)")
    return led, lines


def children(process: int) -> list[int]:
    """Of a process, by /proc."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(there: Callable[[], bool], agents: Sequence[subprocess.Popen[bytes]], what: str) -> None:
    """RuntimeError where it does not come, or all agents end before."""
    end = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > end or all(one.poll() is not None for one in agents):
            raise RuntimeError(f"{what} did not come")
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main())
