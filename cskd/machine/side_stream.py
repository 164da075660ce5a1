"""A second queue of a device's work: what is launched on it runs while the device is at the work of the main one.

On devices other than CUDA there is no second queue: the same calls, and everything is done when they return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a queue."""

    def synchronize(self) -> None:
        """Wait until all before it is done."""


class SideStream:
    """A stream of `device` next to the one that is current."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Inside, work is launched here: without gradients, and in the arithmetic of its tensors whatever is around."""
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), stream:
            yield

    def mark(self) -> Mark:
        """The place after all that was launched so far."""
        if self._stream is None:
            return _Reached()
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(self._stream)
        return mark


class _Reached:
    def synchronize(self) -> None:
        pass


def enter(mark: Mark, tensors: Iterable[Tensor]) -> None:
    """Use tensors of another stream on the current one of their device: it waits, on the device, for `mark`, and their memory
    is not given away before it is done with them."""
    for tensor in tensors:
        if tensor.device.type == "cuda" and isinstance(mark, torch.cuda.Event):
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(mark)
            tensor.record_stream(stream)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, copied on its current stream. Nobody waits for it: it goes by way of page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
