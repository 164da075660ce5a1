"""One folder of scratch for all ranks of a machine, named by the first of them."""

from __future__ import annotations

from pathlib import Path

import torch

from cskd.files.scratch import new_scratch, scratch_above
from cskd.files.shared_folder import SharedFolder
from cskd.machine.launch import Launch, launched
from cskd.machine.ranks import Ranks

_LONGEST = 64  # bytes of the name of a scratch folder


def node_scratch(
    output: Path, where: str, ranks: Ranks, device: torch.device, launch: Launch | None = None
) -> SharedFolder:
    """A new folder in `train.scratch`, `where`, of the run in `output`. All ranks call it together.

    Raises:  CacheError where it can't be made, or the ranks of a machine don't all see it.
    """
    launch = launch or launched()
    if ranks.count == 1:
        return SharedFolder(new_scratch(output, 0, where)).enter()
    first = ranks.rank - launch.local
    name = torch.zeros((1, _LONGEST), dtype=torch.int64, device=device)
    if launch.local == 0:
        made = new_scratch(output, ranks.rank, where)
        name[0, : len(made.name)] = torch.tensor(list(made.name.encode()), device=device)
    named = bytes(i for i in ranks.joined(name)[first].tolist() if i).decode()
    folder = SharedFolder(scratch_above(where) / named, launch.local, launch.local_count).enter()
    ranks.barrier()  # from here on, a rank that is not in the folder is gone
    return folder
