"""An array of three on a SLURM on loopback; one task queued again by an operator, one by the signal before its time is over."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.launch.bench import NODES, UNITS, Bench, until
from cskd.pipeline.launch.launch import launch

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "cskd", "torchrun")  # the last two: of the scripts
NAME = "SLURM"


def missing() -> str:
    """Why it can't run here, or nothing."""
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if gone := [program for program in PROGRAMS if not shutil.which(program, path=where)]:
        return f"no {', '.join(gone)} on PATH or next to {sys.executable} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "the daemons need root"


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[None]:
    """SLURM's daemons, and SLURM_CONF for its programs."""
    script = Path(__file__).with_name("slurm_loopback.sh")
    with (folder / "loopback.log").open("w") as log:
        daemons = subprocess.Popen(
            ["bash", str(script), str(folder), str(NODES), "2"], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert daemons.stdout
        try:
            line = daemons.stdout.readline()
            if not line.startswith("export SLURM_CONF="):
                raise RuntimeError(f"SLURM did not start: {(folder / 'loopback.log').read_text()[-2000:]}")
            os.environ["SLURM_CONF"] = line.split("=", 1)[1].strip()
            yield
        finally:
            os.environ.pop("SLURM_CONF", None)
            daemons.send_signal(signal.SIGTERM)
            daemons.wait(60)
            daemons.stdout.close()


def jobs() -> list[dict[str, str]]:
    """Every job and task that SLURM knows, with its fields."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True).stdout
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in shown.splitlines() if line.startswith("JobId=")]


def run(bench: Bench, folder: Path) -> dict[str, Any]:
    """Both stages; what came of them."""
    folder = folder / "slurm"
    folder.mkdir()
    with contextlib.chdir(bench.folder), loopback(folder):
        return _run(bench)


def _run(bench: Bench) -> dict[str, Any]:
    launch("slurm", bench.config, bench.sets(NAME), None, bench.options(), submit=True)
    until(lambda: bench.units(NAME) >= 3, "the first units")

    def stage(number: int) -> list[dict[str, str]]:
        return [
            job for job in jobs() if job["JobName"].endswith(f"stage{number}") and "-" not in job.get("ArrayTaskId", "")
        ]

    (second,) = stage(2)
    waits = f"{second['JobState']} ({second['Reason']})"
    tasks = {job["ArrayTaskId"]: job for job in stage(1)}
    array = tasks["0"]["ArrayJobId"]
    running = sorted(number for number, job in tasks.items() if job["JobState"] == "RUNNING")
    at = bench.units(NAME)
    subprocess.run(["scontrol", "requeue", f"{array}_{running[0]}"], check=True)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_{running[1]}"], check=True)
    until(lambda: stage(2)[0]["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "stage 2")
    (second,), first = stage(2), stage(1)
    logs = "".join(path.read_text() for path in sorted((bench.folder / "launch/tiny/logs").glob("*.log")))
    return {
        "stage1": {job["ArrayTaskId"]: f"{job['JobState']}, requeued {job['Restarts']}" for job in first},
        "requeued_at_units": f"{at} of {UNITS}",
        "stage2_meanwhile": waits,
        "stage2": second["JobState"],
        "stage2_after_stage1": max(job["EndTime"] for job in first) <= second["StartTime"],
        "requeued": sum(int(job["Restarts"]) for job in first),
        "content_root": bench.sealed(NAME),
        "trained": bench.trained(NAME),
        "log": logs,
    }
