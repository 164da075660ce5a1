"""A batch is one buffer, whatever is in it: in the workers, on its way, and in the main process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from cskd.errors import CskdError
from cskd.loading.shared import SharedBatch
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


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_through_workers_in_order_and_in_shared_memory(workers: int) -> None:
    for task, batch in enumerate(Stream(Filler(), range(6), workers)):
        assert_filled(batch, task)
        assert batch.buffer.is_shared() == bool(workers)
        batch["label"] += 1  # what is delivered is the reader's to write on
    with pytest.raises(CskdError, match="nothing to fill"):
        list(Stream(Filler(), [0, 99], workers))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has pinned memory")
def test_a_pinned_batch_is_one_pinned_buffer() -> None:
    pinned = filled(3).pin_memory()
    assert_filled(pinned, 3)
    assert pinned.buffer.is_pinned() and all(t.is_pinned() for t in pinned.values())
