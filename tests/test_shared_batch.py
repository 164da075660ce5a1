"""A batch is one buffer, whatever is in it: in the workers, on its way, and in the main process."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch

from cskd.errors import CskdError
from cskd.loading.shared import SharedBatch, _Slots
from cskd.loading.stream import Stream

SPECS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "pixels": (np.uint8, (3, 5, 5, 3)),
    "label": (np.int64, (3,)),
    "none": (np.float32, (0, 4)),
    "box": (np.int64, (3, 4)),
    "share": (np.float32, (3,)),
}


def filled(start: int = 0) -> SharedBatch:
    batch = SharedBatch.empty(SPECS)
    for name, (dtype, shape) in SPECS.items():
        batch[name].numpy()[...] = (np.arange(np.prod(shape)) + start).reshape(shape).astype(dtype)
    return batch


def assert_filled(batch: dict[str, torch.Tensor], start: int = 0) -> None:
    assert list(batch) == list(SPECS)
    for name, (dtype, shape) in SPECS.items():
        expected = (np.arange(np.prod(shape)) + start).reshape(shape).astype(dtype)
        assert batch[name].numpy().dtype == dtype
        assert np.array_equal(batch[name].numpy(), expected)


class Filler:
    """A worker that fills a batch, or fails as workers do."""

    def __call__(self, task: int) -> SharedBatch:
        if task == 99:
            raise CskdError("nothing to fill")
        return filled(task)


def test_tensors_do_not_overlap_and_share_one_buffer() -> None:
    batch = filled()
    assert_filled(batch)
    assert {t.untyped_storage().data_ptr() for t in batch.values()} == {batch.buffer.data_ptr()}


def test_a_copy_of_a_batch_is_one_buffer_with_the_same_tensors() -> None:
    copied = copy.deepcopy(filled(7))
    assert_filled(copied, 7)
    assert copied["label"].untyped_storage().data_ptr() == copied.buffer.data_ptr() != filled(7).buffer.data_ptr()


@pytest.mark.parametrize(("workers", "prefetch", "tasks"), [(0, 4, 5), (1, 1, 40), (2, 1, 60), (2, 4, 90)])
def test_a_delivered_batch_is_the_readers_own(workers: int, prefetch: int, tasks: int) -> None:
    """Workers write their buffers over and over, as far ahead as they may; what has been delivered stays as it was."""
    kept = []
    for batch in Stream(Filler(), range(tasks), workers, prefetch):
        kept.append(batch)
        if len(kept) % 10 == 0:
            time.sleep(0.05)  # the workers get ahead
    for task, batch in enumerate(kept):
        assert_filled(batch, task)
        batch["label"] += 1  # and it may be written on
    with pytest.raises(CskdError, match="nothing to fill"):
        list(Stream(Filler(), [0, 99], workers, prefetch))


def test_buffers_are_used_in_turn_and_grow() -> None:
    slots = _Slots(3)
    taken = [slots.take(size) for size in (100, 50, 10, 60, 51, 10)]
    assert [len(t) for t in taken] == [100, 50, 10, 60, 51, 10] and all(t.is_shared() for t in taken)
    places = [t.data_ptr() for t in taken]
    assert places[0] == places[3] and places[2] == places[5]  # used again
    assert len({*places[:3], places[4]}) == 4  # 51 bytes do not fit where 50 were


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has pinned memory")
def test_a_pinned_batch_is_one_pinned_buffer() -> None:
    pinned = filled(3).pin_memory()
    assert_filled(pinned, 3)
    assert pinned.buffer.is_pinned() and all(t.is_pinned() for t in pinned.values())
