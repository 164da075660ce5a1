"""One view of a chunk of images: mixed, through the teacher, encoded. Runs in a lane."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec, Outputs
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.measured import AnyMeasured, measure
from cskd.codecs.stages import StageCodec, stages_of
from cskd.loading.feed import DeviceBatch
from cskd.loading.stage1 import ChunkViews
from cskd.machine.side_stream import to_device
from cskd.teacher.lanes import Lanes
from cskd.teacher.model import Teacher
from cskd.teacher.stages import taken
from cskd.views.mix_pixels import mix_pixels


class Encoded(NamedTuple):
    """Arrays by codec, the errors that were measured, and how long teacher and encoding took."""

    targets: dict[str, Arrays]
    errors: dict[str, AnyMeasured]
    teacher_seconds: float
    encode_seconds: float


def encoded_view(
    teacher: Teacher,
    codecs: Mapping[str, Codec],
    lanes: Lanes,
    chunk: ChunkViews,
    view: int,
    mixing: tuple[torch.Tensor, ...],
    good: NDArray[np.int64],
    labels_B2: torch.Tensor,
) -> Encoded:
    """Mix a view of a chunk as the student's input is mixed, run the teacher on it, padded to a fixed size, and encode the rows
    `good`, whose labels and their partners' are `labels_B2`."""
    begun, device = time.perf_counter(), teacher.device
    if len(good) == 0:
        outputs = _no_outputs(teacher, codecs)
    else:
        if isinstance(chunk.batch, DeviceBatch):
            chunk.batch.enter()
        inputs = [to_device(t, device) for t in (chunk.pixels[view], *mixing)]
        keep = to_device(torch.from_numpy(good), device)
        with lanes.launching():
            pixels = mix_pixels(*inputs)
            outputs = teacher.outputs_of(pixels, stages_of(codecs))
            if len(good) < len(pixels):
                outputs = taken(outputs, keep)
        outputs = outputs._replace(labels=labels_B2)
    middle = time.perf_counter()
    targets = {name: codec.encode_outputs(outputs) for name, codec in codecs.items()}
    # What is decoded for this is multiplied in float32, and TF32 is a setting of the whole process.
    with lanes.launching() if teacher.precision == "tf32" else contextlib.nullcontext():
        errors = {name: measure(codec, targets[name], outputs) for name, codec in codecs.items()}
    known = {name: error for name, error in errors.items() if error is not None}
    return Encoded(targets, known, middle - begun, time.perf_counter() - middle)


def _no_outputs(teacher: Teacher, codecs: Mapping[str, Codec]) -> Outputs:
    """Of a batch without a readable image."""
    K, grid = teacher.classes, teacher.grid
    channels = [codec.channels for codec in codecs.values() if isinstance(codec, FeaturesCodec)]
    maps = torch.zeros(0, channels[0], *grid) if channels else None
    stages = {
        codec.stage: torch.zeros(0, codec.channels, *codec.map_grid)
        for codec in codecs.values()
        if isinstance(codec, StageCodec)
    }
    return Outputs(torch.zeros(0, K, *grid), torch.zeros(0, K), torch.zeros(0, 2, dtype=torch.int64), maps, stages)
