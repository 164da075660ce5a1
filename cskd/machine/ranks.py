"""One process or many: the few facts of torch.distributed that training needs, and nothing where it is off."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cskd.errors import StudentError


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


def start_ranks(device: str) -> Ranks:
    """The ranks torchrun started (nccl on CUDA, gloo elsewhere), or the one of a plain process."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # Rank 0 may look at every image while the others wait; a rank that dies ends them all, by torchrun.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    return Ranks(dist.get_rank(), count, local)


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
