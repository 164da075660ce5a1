"""One process or many: the few facts of torch.distributed that training needs, and nothing where it is off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # in its documentation, not in its __all__
from torch.distributed.rendezvous import rendezvous

from cskd.errors import ConfigError, CskdError, RankError, StudentError, fitted, one_line, shortened
from cskd.machine.launch import launched
from cskd.machine.rendezvous import store_of_this_start

LOOK = 1.0  # seconds between two looks at whether another rank has failed
BY_ITSELF = 5.0  # seconds that this one then has to end by itself
LINGER = 2.0  # seconds for the others to read why
WAIT = timedelta(hours=12)  # for another rank: the first may look at every image
ANSWERS = 3.0  # seconds for the store to answer, or for a rank that is gone to have said why
INTERRUPTED = 143
SIGNALLED = (130, INTERRUPTED)  # exit codes of a rank that was interrupted


@dataclass(frozen=True)
class Ranks:
    """rank of count processes; `local` is the rank on this machine, which picks the GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def total(self, count: int, device: torch.device) -> int:
        """Sum of a whole number over all ranks."""
        return int(self.sum(torch.tensor(count, dtype=torch.int64, device=device)))

    def joined(self, x: Tensor) -> Tensor:
        """The rows of all ranks in the order of the ranks, int64 or float [n, ...] of each, whose n may differ."""
        if self.count == 1:
            return x
        sizes = torch.zeros(self.count, dtype=torch.int64, device=x.device)
        sizes[self.rank] = len(x)
        each = self.sum(sizes).tolist()
        whole = x.new_zeros((sum(each), *x.shape[1:]))
        start = sum(each[: self.rank])
        whole[start : start + len(x)] = x
        return self.sum(whole)

    def refuse_differing(self, step: int, device: torch.device) -> None:
        """StudentError on every rank when they would resume from different steps, as where one can't read the newest state."""
        steps = self.sum(torch.tensor([step, step * step], dtype=torch.int64, device=device)).tolist()
        # They are equal where the mean of squares is the square of the mean.
        if self.count * steps[1] != steps[0] ** 2:
            raise StudentError(
                f"rank {self.rank} resumes from step {step}, others from another one; all must read the same newest state: "
                "see that train.output is one folder for all of them, and remove states that are damaged"
            )

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def running_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks torchrun started, joined (nccl on CUDA, gloo elsewhere); or the one of a plain process.

    Where one fails, the others end too, and say which one it was and why. Its group is left as it is, since leaving it in good
    order waits for the others, which wait for this rank: the process has to end, by `leave`.

    Raises:  ConfigError for processes that are no ranks of one run, RankError where another rank failed or did not come.
    """
    launch = launched()
    if launch.by == "srun":
        raise ConfigError(
            f"srun started {launch.count} processes of cskd train, expected one torchrun per machine: srun --ntasks-per-node 1 "
            f"torchrun --nnodes $SLURM_NNODES --nproc-per-node {launch.local_count} --rdzv-backend c10d --rdzv-endpoint "
            "HOST:29400 --rdzv-id $SLURM_JOB_ID --no-python cskd train CONFIG (HOST: the first)"
        )
    if launch.count == 1:
        yield Ranks()
        return
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device {device} can't join {launch.count} ranks; expected cuda or cpu")
    if not dist.is_initialized():
        # A rank that dies ends them all, by torchrun.
        cuda = device.type == "cuda"
        try:
            met, rank, count = next(rendezvous("env://", timeout=WAIT))
            met.set_timeout(WAIT)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=WAIT,
                store=store_of_this_start(met, rank, count),
                rank=rank,
                world_size=count,
                device_id=device if cuda else None,
            )
        except dist.DistBackendError as e:
            if "Duplicate GPU" not in str(e):
                raise
            raise ConfigError(
                f"rank {launch.rank} was given the GPU {device}, which another rank has, too; expected one for each of the "
                f"{launch.local_count} ranks started here: see CUDA_VISIBLE_DEVICES, and start fewer (--nproc-per-node)"
            ) from None
        except dist.DistError as e:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RankError(
                f"rank {launch.rank} did not meet all {launch.count} at {address} ({shortened(one_line(e), 120)}); see that each machine "
                "runs torchrun and reaches that address, and start it again"
            ) from e
    ranks = Ranks(dist.get_rank(), launch.count, launch.local)
    # The store may outlive this group, as an elastic run's does, and hold the words of the ranks of an earlier one.
    words = _Words(ranks.rank, ranks.total(time.time_ns() if ranks.first else 0, device))
    words.watch()
    try:
        try:
            yield ranks
            dist.destroy_process_group()  # on CUDA it may wait for the others
        except Exception as e:
            if _of_a_peer(e):
                raise words.why_gone(e) from e
            words.say(str(e) if isinstance(e, CskdError) else one_line(e))
            raise
    except (KeyboardInterrupt, SystemExit):  # also while it asks why another is gone
        if (heard := words.heard(0.0)) is not None and heard.code not in SIGNALLED:
            raise RankError(words.line(heard)) from None  # torchrun interrupts the others where one has failed
        words.say("interrupted", INTERRUPTED)
        raise
    finally:
        words.ended.set()


def leave(code: int) -> None:
    """End the process now where it is still in a group, as after an error; return where it is in none.

    Without this the end of the interpreter would take the group down, and wait for ranks that wait for this one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(LINGER)  # the store in which the others read why is this process's
    os._exit(code)


def _of_a_peer(error: Exception) -> bool:
    """Whether a library says that another rank went away, in whatever words."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class _Heard(NamedTuple):
    """Which rank ended first, with which exit code, and why."""

    rank: int
    code: int
    why: str


class _Words:
    """Why a rank ends, written where the others read it: in the store by which the ranks found each other.

    Each has a connection of its own, since torch may wait in the group's for hours.
    """

    def __init__(self, rank: int, group: int) -> None:
        """group: a number that no other group of the store has."""
        self.rank, self.ended = rank, threading.Event()
        self._key = f"cskd/ended/{group}"
        host, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=60)
        self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        self._store.set_timeout(timedelta(seconds=ANSWERS))

    def say(self, why: str, code: int = 1) -> None:
        """Write it down, if no other rank was first."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._key, "", json.dumps([self.rank, code, why]))

    def heard(self, seconds: float) -> _Heard | None:
        """Of another rank; None where none says so in that time, or the store is gone."""
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while not self._store.check([self._key]):
                if time.monotonic() >= end:
                    return None
                time.sleep(0.05)
            heard = _Heard(*json.loads(self._store.get(self._key)))
            return heard if heard.rank != self.rank else None
        return None

    def why_gone(self, error: Exception) -> RankError | SystemExit:
        """What ends this rank where torch says that another is gone."""
        heard = self.heard(ANSWERS)
        if heard is None:
            return RankError(
                f"rank {self.rank} stops because another rank is gone, which left no word ({one_line(error)}); torchrun's "
                "lines name it: where it got signal 9, memory may have run out; run the same command again"
            )
        return SystemExit(heard.code) if heard.code in SIGNALLED else RankError(self.line(heard))

    def line(self, heard: _Heard) -> str:
        """That another failed, for people."""
        return f"rank {self.rank} stops because rank {heard.rank} failed: {heard.why}"

    def watch(self) -> None:
        """From now on, see to it that this rank ends a few seconds after another did: it may hang in a kernel of NCCL, where no
        error reaches it."""
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(LOOK):
            heard = self.heard(0.0)
            if heard is None:
                continue
            if self.ended.wait(BY_ITSELF):
                return
            if heard.code in SIGNALLED:
                os.kill(os.getpid(), signal.SIGTERM)  # whoever handles it says how to go on
                return
            print(fitted(f"cskd: {self.line(heard)}"), file=sys.stderr, flush=True)
            os._exit(heard.code)
