"""Steps per second of a small network: what a number of threads, and their way of waiting, gain or cost on this machine now.

Also a script, `python speed.py THREADS SECONDS`, for a process whose OpenMP has other settings: torch reads them once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TOKENS, WIDTH, BLOCKS = 1024, 96, 2  # of the size of a small student's, whose parallel loops take some 10 us


def steps_per_second(threads: int, seconds: float) -> float:
    """Forwards and backwards of two blocks of an MLP, with so many threads, for about so long; this process's threads are as
    many as before after it."""
    import torch
    from torch import nn

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        net = nn.Sequential(*(layer for _ in range(BLOCKS) for layer in block))
        x = torch.linspace(-1.0, 1.0, TOKENS * WIDTH).view(TOKENS, WIDTH)
        net(x).square().mean().backward()  # the first one also starts the threads
        steps, clock = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - clock < seconds:
            net(x).square().mean().backward()
            steps += 1
        return steps / (time.perf_counter() - clock)
    finally:
        torch.set_num_threads(before)


def steps_elsewhere(
    threads: int, seconds: float, settings: dict[str, str], without: tuple[str, ...] = ()
) -> float | None:
    """The same in a process of its own, with other environment variables; None where that fails."""
    env = {name: value for name, value in os.environ.items() if name not in without} | settings
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(threads), str(seconds)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 + seconds)
        return float(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    print(steps_per_second(int(sys.argv[1]), float(sys.argv[2])))
