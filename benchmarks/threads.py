"""Training steps per second by number of threads and way of waiting, on a quiet machine and next to other work.

    python -m benchmarks.threads [--rounds R] [--seconds S] [--busy N] [--spins N ...] [--bf16]

The demo's student (DeiT of width 96, depth 4, 32 pixels, batch 64) with AdamW in float32 on the CPU, with --bf16 under bf16
autocast with attention that is not fused, as `cskd train` does it where the CPU computes in bf16. Each side is a process of
its own, since OpenMP reads its settings once, and computes when it is its turn; sides take turns within a round, so that other
work on the machine slows all of them.

    one         one thread
    default     torch's own: a thread per core, which spin at barriers
    asleep      a thread per core, which sleep at once (OMP_WAIT_POLICY=passive)
    cskd        what cskd chooses without loader workers: a thread per core, which look 2,000 times and then sleep
    cskd left   the same with one core less, left to loader workers
    spin N      as cskd, with GOMP_SPINCOUNT=N, for each of --spins

    quiet       nothing else runs (see that it is so: the load average is printed)
    loaders     two processes that work 3 of every 10 ms, as a loader's do that is ahead of the student
    busy        N processes that never sleep (default: as many as cores)

Prints the machine, a table of steps/s (median over rounds) and one JSON line last: steps/s by load and side, and the ratios of
`cskd` to the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from cskd.machine.threads import COUNTS, WAITING, choose_threads

BUSY = "while True: pass"
LOADER = """
import time
while True:
    end = time.perf_counter() + 0.003
    while time.perf_counter() < end:
        pass
    time.sleep(0.007)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one side's turn")
    parser.add_argument("--busy", type=int, default=None, help="processes that never sleep; default: as many as cores")
    parser.add_argument("--spins", type=int, nargs="*", default=[], metavar="N", help="more sides: other spin counts")
    parser.add_argument("--bf16", action="store_true", help="steps under bf16 autocast")
    parser.add_argument("--side", type=int, default=None, help=argparse.SUPPRESS)  # threads; used by the command itself
    options = parser.parse_args()
    if options.side is not None:
        take_turns(options.side, options.bf16)
        return
    for name in (*COUNTS, *WAITING):
        os.environ.pop(name, None)
    threads = choose_threads()
    cores = threads.cores.count
    busy = cores if options.busy is None else options.busy
    sides = {
        "one": (1, {}),
        "default": (cores, {}),
        "asleep": (cores, {"OMP_WAIT_POLICY": "passive"}),
        "cskd": (threads.count, WAITING),
        "cskd left": (max(1, threads.count - 1), WAITING),
    }
    sides |= {f"spin {n}": (threads.count, {**WAITING, "GOMP_SPINCOUNT": str(n)}) for n in options.spins}
    loads = {"quiet": [], "loaders": [LOADER] * 2, "busy": [BUSY] * busy}
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{threads.cores}, {os.cpu_count()} in the machine, {busy} busy processes, load average before {load}",
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(side(count, env, options.bf16)) for name, (count, env) in sides.items()}
        found = {name: measured(processes, scripts, options) for name, scripts in loads.items()}
    print(f"{'steps/s':10}" + "".join(f"{name:>11}" for name in sides))
    for name, speeds in found.items():
        print(f"{name:10}" + "".join(f"{speed:11.1f}" for speed in speeds.values()))
    ratios = {
        f"{load}: cskd / {other}": round(speeds["cskd"] / speeds[other], 2)
        for load, speeds in found.items()
        for other in ("one", "default")
    }
    facts = {"benchmark": "threads", "bf16": options.bf16, "cores": cores, "busy": busy}
    print(json.dumps({**facts, "steps_per_second": found, **ratios}))


def measured(processes: dict[str, Any], scripts: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Median steps/s of each side over the rounds, while `scripts` run."""
    speeds: dict[str, list[float]] = {name: [] for name in processes}
    with contextlib.ExitStack() as stack:
        for script in scripts:
            stack.enter_context(running([sys.executable, "-c", script]))
        for _ in range(options.rounds):
            for name, process in processes.items():
                process.stdin.write(f"{options.seconds}\n")
                process.stdin.flush()
                speeds[name].append(float(process.stdout.readline()))
    return {name: round(statistics.median(values), 3) for name, values in speeds.items()}


@contextlib.contextmanager
def running(command: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **more)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def side(threads: int, env: dict[str, str], bf16: bool) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to train, and waits for its turn."""
    command = [sys.executable, "-m", "benchmarks.threads", "--side", str(threads), *(["--bf16"] if bf16 else [])]
    pipe = subprocess.PIPE
    with running(command, env={**os.environ, **env}, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"the side with {threads} threads ended before it began")
        yield process


def take_turns(threads: int, bf16: bool) -> None:
    """In a side: for each number of seconds on stdin, train for so long and print steps per second."""
    import torch
    import torch.nn.functional as F

    from cskd.config import StudentConfig
    from cskd.machine.arithmetic import autocast
    from cskd.student import build_student

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    student = build_student(StudentConfig("deit_tiny_distilled_patch16_224", kwargs), 10, 32).train()
    if bf16:
        student.unfuse_attention()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    pixels, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10

    def step() -> None:
        with autocast("bf16" if bf16 else "none", torch.device("cpu")):
            out = student(pixels, (4, 4))
        loss = F.cross_entropy(out.cls_logits, labels) + F.cross_entropy(out.dist_logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        steps, clock = 0, time.perf_counter()
        while time.perf_counter() - clock < float(line):
            step()
            steps += 1
        print(steps / (time.perf_counter() - clock), flush=True)


if __name__ == "__main__":
    main()
