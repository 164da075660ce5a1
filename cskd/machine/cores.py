"""How many CPUs this process may use: its affinity, and the CPU quota of every control group it is in. No torch in here.

A container or a batch system limits a process in one of two ways: it names the CPUs (affinity; Docker's --cpuset-cpus, SLURM,
taskset), or it gives CPU time per period (a quota; Docker's --cpus, a CPU limit of Kubernetes). `os.cpu_count` knows neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes a space, a tab, a backslash


@dataclass(frozen=True)
class Cores:
    """CPUs of this process. allowed: those it may run on; quota: CPU seconds per second it may use, None: no limit;
    source: who says how many are allowed."""

    allowed: int
    quota: float | None = None
    source: str = "affinity"

    @property
    def limited(self) -> bool:
        """Whether the quota gives less than the CPUs that the process may run on."""
        return self.quota is not None and self.quota < self.allowed

    @property
    def count(self) -> int:
        """Whole cores, at least 1. A quota is rounded down: threads that wait for each other all stand still once it is used
        up, and what is left over goes to the loader and to Python."""
        if self.quota is None:
            return self.allowed
        return max(1, min(self.allowed, int(self.quota + 1e-6)))

    def __str__(self) -> str:
        n = self.count
        limit = f"quota of {self.quota:g} CPUs" if self.limited else self.source
        return f"{n} core{'s' if n > 1 else ''} ({limit})"


def usable_cores(proc: Path = PROC) -> Cores:
    """The CPUs of this process: of affinity and the quotas of control groups the least. What can't be read limits nothing."""
    allowed = affinity()
    if allowed is None:
        return Cores(os.cpu_count() or 1, source="of the machine")
    return Cores(allowed, min(_quotas(proc), default=None))


def affinity(pid: int = 0) -> int | None:
    """On how many CPUs a process may run (0: this one); None where the system doesn't say."""
    try:
        return len(os.sched_getaffinity(pid)) or None
    except (AttributeError, OSError):  # AttributeError: macOS and Windows
        return None


def _quotas(proc: Path) -> Iterator[float]:
    """The quota of every control group from this process's own up to the root that can be seen, version 1 and 2; in CPUs."""
    try:
        groups = _groups((proc / "cgroup").read_text(errors="surrogateescape"))
        mounts = (proc / "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        if len(where := fields.split(" ")) < 5 or len(what := kind.split(" ")) < 3:
            continue
        root, point = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), name) for name in where[3:5])
        if what[0] == "cgroup2":
            group, read = groups.get(""), _quota_v2
        elif what[0] == "cgroup" and "cpu" in what[2].split(","):
            group, read = groups.get("cpu"), _quota_v1
        else:
            continue
        if group is None:
            continue
        for folder in _upwards(Path(point), root, group):
            try:
                quota = read(folder)
            except (OSError, ValueError):  # the root has none, a hybrid system has them in one version only
                continue
            if quota is not None and quota > 0:
                yield quota


def _groups(text: str) -> dict[str, str]:
    """Controller -> path of the group: '4:cpu,cpuacct:/a' and, of version 2, '0::/a', whose controller is ''."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _upwards(point: Path, root: str, group: str) -> Iterator[Path]:
    """The folder of a group and those above it, up to the mount point, whose folder is the group `root`.

    In a container a group may be named as the host sees it, or lie outside ('/..'): then the mount point is all there is.
    """
    below = Path(group)
    if below.is_relative_to(root):
        below = below.relative_to(root)
    parts = [part for part in below.parts if part != "/"]
    if ".." in parts:
        parts = []
    for n in range(len(parts), -1, -1):
        yield point.joinpath(*parts[:n])


def _quota_v2(folder: Path) -> float | None:
    """cpu.max: 'max 100000' or '150000 100000', microseconds per period."""
    quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
    return None if quota == "max" else _cpus(int(quota), int(period or 100_000))


def _quota_v1(folder: Path) -> float | None:
    """cpu.cfs_quota_us is -1 where there is no limit."""
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota < 0 else _cpus(quota, int((folder / "cpu.cfs_period_us").read_text()))


def _cpus(quota: int, period: int) -> float | None:
    return quota / period if period > 0 else None
