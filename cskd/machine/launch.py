"""Who started this process, and as which of how many: torchrun, srun, or nobody. No torch is loaded by importing it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

DEVICE_OF = "CSKD_DEVICE_OF"  # '1/4' in the second of four processes of `cskd cache-teacher --devices`
WORKER = "CSKD_WORKER"  # the number of a process that shares stage 1, where its launcher has no variable for it
WORKERS = "CSKD_WORKERS"  # how many of them there are
OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # 1: torchrun's agents keep their store to themselves


@dataclass(frozen=True)
class _Array:
    """Names of the variables by which a scheduler tells a process its index, and how many there are or the last index. begins: the
    first index, or the name of its variable."""

    index: str
    count: str = ""
    begins: str | int = 0
    step: str = ""
    last: str = ""


_OWN = _Array(WORKER)
_MPI = (_Array("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), _Array("PMI_RANK", "PMI_SIZE"))  # of mpirun, mpiexec
_ARRAYS = (
    _Array("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
    _Array("JOB_COMPLETION_INDEX"),  # of Kubernetes
    _Array("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    _Array("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),  # of Google, as the next one
    _Array("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
    _Array("PBS_ARRAY_INDEX"),
    _Array("SGE_TASK_ID", "", "SGE_TASK_FIRST", "SGE_TASK_STEPSIZE", "SGE_TASK_LAST"),
    _Array("LSB_JOBINDEX", "LSB_JOBINDEX_END", 1),  # of LSF; 0 outside arrays
)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", DEVICE_OF)
_AGENT_PORT = 29400  # torchrun's own default of --rdzv-endpoint


@dataclass(frozen=True)
class Launch:
    """rank of count processes; local: its number among the local_count on this machine; by: torchrun, srun, --devices,
    or '' (alone)."""

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    by: str = ""

    @property
    def speaks(self) -> bool:
        """Whether this process reports: of the ranks of torchrun and --devices the first one. Tasks of srun may each do
        something else."""
        return self.rank == 0 or self.by not in ("torchrun", "--devices")


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says. torchrun inside a step of srun counts as torchrun.

    Only a step's own variables tell srun: a batch script that asked for several tasks is itself one process.
    """

    def number(name: str, default: int) -> int:
        value = environ.get(name, "")
        return int(value) if value.isascii() and value.isdigit() else default

    if part := re.fullmatch(r"(\d+)/(\d+)", environ.get(DEVICE_OF, "")):
        return Launch(int(part[1]), int(part[2]), int(part[1]), int(part[2]), "--devices")
    if "WORLD_SIZE" in environ or "LOCAL_WORLD_SIZE" in environ:
        count = max(1, number("WORLD_SIZE", 1))
        local_count = max(1, number("LOCAL_WORLD_SIZE", 1))
        return Launch(number("RANK", 0), count, number("LOCAL_RANK", 0), local_count, "torchrun")
    if (count := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        here = re.sub(r"\(x\d+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")  # '4(x2),3'
        local_count = max(int(n) if n.isascii() and n.isdigit() else 1 for n in here)
        return Launch(number("SLURM_PROCID", 0), count, number("SLURM_LOCALID", 0), local_count, "srun")
    return Launch()


@dataclass(frozen=True)
class Worker:
    """A process that shares some work: `number` of `count`, 0 where nobody says how many there are."""

    number: int = 0
    count: int = 0


def worker(environ: Mapping[str, str] = os.environ) -> Worker:
    """Which of the processes that share some work this one is, as whoever started them says. Number 0 where nobody says; several may
    then have the same one.

    torchrun on several machines says all of it. Else each task of an array of a scheduler may start several by mpirun or srun, and each
    of these several by torchrun or --devices; CSKD_WORKER says it in place of the array, mpirun and srun. An array that does not say how
    many its tasks are, such as an indexed job of Kubernetes, is told so by CSKD_WORKERS; `cskd launch` sets it.
    """
    launch = launched(environ)
    inner = [Worker(launch.rank, launch.count)] if launch.by in ("torchrun", "--devices") else []
    outer = []
    if launch.count <= launch.local_count or not inner:
        step = launched({name: value for name, value in environ.items() if name not in _TORCHRUN})
        tasks = _first(_MPI, environ) or ([Worker(step.rank, step.count)] if step.by else [])
        outer = _first([_OWN], environ) or [*_first(_ARRAYS, environ), *tasks]
    number, count = 0, 1
    for part in [*outer, *inner]:
        number, count = number * part.count + part.number, count * part.count
    return Worker(number, count) if outer or inner else Worker()


def _first(arrays: Sequence[_Array], environ: Mapping[str, str]) -> list[Worker]:
    """What the first of these that this process is part of says of it; none where it is part of none."""

    def number(name: str | int, default: int = -1) -> int:
        value = environ.get(name, "") if isinstance(name, str) else str(name)
        return int(value) if value.isascii() and value.isdigit() else default

    for array in arrays:
        found, begins, step = number(array.index), number(array.begins, 0), max(1, number(array.step, 1))
        if found < begins or found < 0:
            continue
        tasks = number(array.count, (number(array.last) - begins) // step + 1 if number(array.last) >= begins else 0)
        place, rest = divmod(found - begins, step)
        if place < tasks and not rest:  # else a list with gaps
            return [Worker(place, tasks)]
        count = number(WORKERS, 0)
        return [Worker(found, count if found < count else 0)]
    return []


def restart_notes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where torchrun may start the ranks of several machines again: what its agents need for machines that come and go.

    In torch 2.14 an agent that shares its store with the ranks keeps the address of the first round: one that joins later waits
    in vain for it to be written, and one that had it from an agent that is gone starts its ranks with it.
    """
    several = environ.get("GROUP_WORLD_SIZE", "1") != "1" and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not several or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    return [
        "torchrun starts these ranks again where one ends, but not with a machine that comes later: for that, start every torchrun "
        f"with {OWN_STORES}=1 in its environment"
    ]


def without_launch(environ: MutableMapping[str, str]) -> None:
    """Forget whoever started this process: it is part of something else, such as a Ray cluster that srun started."""
    names = {WORKERS, *(array.index for array in (_OWN, *_MPI, *_ARRAYS))}
    for name in [*environ]:
        if name in _TORCHRUN or name.startswith("SLURM_STEP_") or name in names:
            del environ[name]


def command_line(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The line that starts `cskd ARGUMENTS` again as it was started: under torchrun with as many ranks."""
    command, launch = ["cskd", *arguments], launched(environ)
    if launch.by != "torchrun":
        return shlex.join(command)
    run = ["torchrun", "--nproc-per-node", str(launch.local_count), "--no-python"]
    if (machines := environ.get("GROUP_WORLD_SIZE", "1")) == "1":
        return shlex.join([*run, *command])
    where = f"{environ.get('MASTER_ADDR', 'HOST')}:{_AGENT_PORT}"
    run[1:1] = ["--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-endpoint", where]
    if (restarts := environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == "0":
        return f"{shlex.join([*run, *command])} (on each of the {machines} machines)"
    # How many machines there may be, and where they meet, no rank is told.
    run[1:1] = ["--max-restarts", restarts, "--rdzv-id", environ.get("TORCHELASTIC_RUN_ID", "none")]
    return f"{shlex.join([*run, *command])} (on each machine, with the --nnodes and --rdzv-endpoint that it had)"
