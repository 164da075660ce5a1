"""What the teacher's arithmetic changes, measured at the start on views that stage 1 will make."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cskd.config import TeacherConfig
from cskd.dataset.inventory import evenly
from cskd.loading.stage1 import Chunk, ChunkMaker
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.arithmetic import Precision, unchanged
from cskd.teacher.model import Teacher, load_teacher
from cskd.teacher.precision import is_reference, measure
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import quads

VIEWS = 64  # that are compared: 3,136 cells of a 7 x 7 grid
BLOCKS = 4  # that they come from


def measure_precision(teacher: Teacher, maker: ViewMaker, config: TeacherConfig) -> Precision:
    """The share of hard targets that are others than in float32; without a forward where the teacher runs in that, and unknown
    where it gives none.

    config: the teacher's; it is loaded once more, as it was built.
    """
    if is_reference(teacher):
        return unchanged()
    if not teacher.has_classes:
        return measure(teacher, None, torch.empty(0))
    as_built = replace(config, precision="float32", fold=False, compile=False)
    plain = load_teacher(as_built, maker.inventory.classes, teacher.device, maker.recipe.size)
    same = plain.fingerprint.weights_sha256 == teacher.fingerprint.weights_sha256  # not where they are random
    return measure(teacher, plain if same else None, first_views(maker, VIEWS, BLOCKS))


def first_views(maker: ViewMaker, count: int, blocks: int) -> Tensor:
    """About `count` views as the teacher sees them, the first quads of some blocks: float32 [n, 3, H, W], RGB in 0..255."""
    inventory, recipe, parts = maker.inventory, maker.recipe, []
    chosen = evenly(len(inventory.blocks) - 1, blocks).tolist()
    for block in chosen:
        first, stop = inventory.block_range(block)
        order = quads(stop - first, recipe, inventory.id, block, 0)
        unit = UnitBuilder(inventory, recipe, {}, 0, first, order)
        position = order[: -(-count // (4 * len(chosen))) * 4]
        chunk = ChunkMaker(maker, inventory.id)(Chunk(block, (0,), first, position))
        unit.drop(position[list(chunk.bad)])
        mixing = (torch.from_numpy(field) for field in unit.mixing_rows(position))
        good = [row for row in range(len(position)) if row not in chunk.bad]
        parts.append(mix_pixels(chunk.pixels[0], *mixing)[good])
    return torch.cat(parts)
