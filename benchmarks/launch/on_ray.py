"""A pool of three actors on a Ray of this machine; two of them are killed in the middle."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.launch.bench import UNITS, WORKERS, Bench, until
from cskd.pipeline.launch.launch import launch
from cskd.pipeline.launch.options import Options

NAME = "Ray"


# For a machine that is busy: seconds that Ray waits for its processes, and no killing of them when memory is short
_PATIENT = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",  # its default of 15 leaves them nothing next to other work
}


def missing() -> str:
    """Why it can't run here, or nothing."""
    return "" if importlib.util.find_spec("ray") else "ray is not installed (pip install 'cskd[ray]')"


def actors(folder: Path) -> list[int]:
    """The processes of actors that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (process / "cmdline").read_bytes().startswith(b"ray::_Worker") and (
                process / "cwd"
            ).resolve() == folder
        except OSError:
            continue
        found += [int(process.name)] if ours else []
    return sorted(found)


def run(bench: Bench, folder: Path) -> dict[str, Any]:
    """Stage 1 with two kills, then stage 2 with torchrun on one machine, since there is one."""
    os.environ.update(_PATIENT)
    import ray

    address = _started(ray)
    try:
        with contextlib.chdir(bench.folder):
            return _run(bench, folder, address)
    finally:
        ray.shutdown()


def _started(ray: Any, tries: int = 10) -> str:
    """The address of a Ray on this machine. It gives up by itself after half a minute, which a busy machine may need."""
    for _ in range(tries - 1):
        try:
            return _init(ray)
        except Exception as e:
            if "timed out during startup" not in str(e):
                raise
            ray.shutdown()
    return _init(ray)


def _init(ray: Any) -> str:
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    return str(ray.init(address="local", num_cpus=WORKERS, **quiet).address_info["address"])


def _run(bench: Bench, folder: Path, address: str) -> dict[str, Any]:
    options = {**bench.options(address).__dict__, "nodes": 1}
    report = launch("ray", bench.config, bench.sets(NAME), Path("launch/ray"), Options(**options))
    with (folder / "ray.log").open("w+") as log:
        driver = subprocess.Popen(["bash", "-c", report.run], stdout=log, stderr=log)
        killed = []
        for share in (0.2, 0.5):
            until(lambda share=share: bench.units(NAME) >= share * UNITS or driver.poll() is not None, "units")  # type: ignore[misc]
            if working := [pid for pid in actors(bench.folder) if pid not in killed]:
                os.kill(working[0], signal.SIGKILL)
                killed.append(working[0])
        code = driver.wait(1800)
        log.seek(0)
        text = log.read()
    return {
        "killed": len(killed),
        "exit_code": code,
        "content_root": bench.sealed(NAME),
        "trained": bench.trained(NAME),
        "log": text,
    }
