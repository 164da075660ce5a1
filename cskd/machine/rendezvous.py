"""A store that only the ranks of this start read and write, inside one that may have served earlier starts.

torchrun's agents keep one TCPStore for all of their restarts (of torch 2.11 to 2.14 at least), and no variable that they set tells
the starts apart for all ranks: TORCHELASTIC_RESTART_COUNT is each agent's own, and a machine that joins or leaves does not count.
gloo and NCCL would read there where a rank of an earlier start listened, if that of this one has not written it yet, and wait for it.
"""

from __future__ import annotations

import time
import uuid

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]  # documented, not in its __all__

_LOOK = 0.02  # seconds between two looks of the first rank at whether another has come


def store_of_this_start(store: Store, rank: int, count: int) -> Store:
    """The part of `store` whose name rank 0 draws. Returns once all `count` ranks know it.

    Each rank writes a name that it drew, and takes the answer to that name alone: no rank of an earlier start can have given one. Rank 0
    answers whatever name stands there, again and again until that rank has said that it knows: it may have read a dead one's.

    Raises:  DistStoreError where one of them does not come in the store's own time.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"cskd/rank/{rank}", mine)
        start = store.get(f"cskd/start/{mine}").decode()
        store.set(f"cskd/{start}/rank/{rank}", "")
        return PrefixStore(f"cskd/{start}", store)
    most = store.timeout  # type: ignore[attr-defined]  # in its documentation, not in its stubs
    end = time.monotonic() + most.total_seconds()
    for other in range(1, count):
        while not store.check([f"cskd/{mine}/rank/{other}"]):
            if store.check([f"cskd/rank/{other}"]):
                store.set(f"cskd/start/{store.get(f'cskd/rank/{other}').decode()}", mine)
            if time.monotonic() > end:
                raise DistStoreError(f"rank {other} did not come in {most}")
            time.sleep(_LOOK)
    return PrefixStore(f"cskd/{mine}", store)
