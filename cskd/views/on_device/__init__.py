"""Views of a batch made where they are used: `ops.apply` by torch operations, the same bytes on every device.

    plan = plan_views(params, shapes)             on the host, in a worker: decides everything
    views = make_views(images, plan.to(device))   uint8 [B, S, S, 3]
    crcs = pixel_crcs(views)                      `digest.pixel_crc` of each

Views with the same kind of operation are done together, kind after kind, so that a batch takes a few hundred kernels
whatever its size. Nothing waits for the device. Why each result is the CPU's, on CUDA as well:

    torch operations                                why they give the same bytes
    index_select, gather, index_copy_, cat, stack,  move values; rows that are written are all different
      where, arange, (new_)zeros, repeat_interleave
    floats to uint8, to int32                       truncation of values in range, or of whole numbers
    + - * // % << >> & ^ | of uint8, int16, int32,  whole numbers in range; in the noise they wrap around as uint64 does
      int64
    sum, cumsum, scatter_add_ of int64; amin, amax  exact in any order, so that atomic additions do no harm
    scatter_add_ of floats                          one number a place, and zeros
    bmm of float32, float64                         fewer than 2^24, 2^53 of one unit: exact in any order, fused or not;
                                                    TF32 is off meanwhile; float64 where it is not (`resizing`)
    + - * of float32, float64, also by whole        a kernel each, so one correctly rounded IEEE operation that nothing
      numbers                                       fuses: not to be compiled; no add with alpha, addcmul, lerp
    div of two float64 tensors                      correctly rounded; with a number on either side torch would multiply
                                                    by a reciprocal
    floor, ceil, clamp_, comparisons                exact

Two results hang on how other libraries are compiled. The weights of the resizing are reckoned here as torch reckons
them inside; none comes nearer than 1e-9 to where it would be rounded otherwise (lengths to 3,000), so that operations
that are fused in there change nothing. Rotation is that of a Pillow without fused multiply-add, as its wheels for
x86-64 are; another one's pixels may differ by one level, from these as from an x86-64's. Digests tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cskd.machine.arithmetic import float32_products
from cskd.views.geometry import Fill
from cskd.views.on_device.buffer import Writer
from cskd.views.on_device.checksum import pixel_crcs
from cskd.views.on_device.moving import SLIDES, TURNS, Slides, Turns
from cskd.views.on_device.noise import Erasures
from cskd.views.on_device.pointwise import BLENDS, TABLES, Blends, Tables
from cskd.views.on_device.resizing import Bucket, Source, buckets
from cskd.views.ops import fill_colour
from cskd.views.randaugment import Op
from cskd.views.recipe import ViewParams

__all__ = ["OPERATIONS", "Bucket", "Plan", "Step", "make_views", "pixel_crcs", "plan_views"]

OPERATIONS = frozenset((*TABLES, *BLENDS, *SLIDES, *TURNS))  # what can be made here


class Step(Protocol):
    """One kind of operation on some views of a batch."""

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]; words, the plan's buffer, on the same device."""


@dataclass(frozen=True)
class Plan:
    """What is done to a batch of images. words: int64 [n], all that steps read; the rest is shapes and places in it.

    Plain data, a few KB a view: it can be made in another process.
    """

    shape: tuple[int, int]  # B, S
    buckets: tuple[Bucket, ...]
    steps: tuple[Step, ...]
    words: Tensor

    def to(self, device: torch.device | str) -> Plan:
        """The plan with its buffer on a device; the copy of pinned memory runs while the host goes on."""
        return replace(self, words=self.words.to(device, non_blocking=True))


def plan_views(
    params: Sequence[ViewParams], shapes: Sequence[tuple[int, int]], image: Sequence[int] | None = None
) -> Plan:
    """Decide how a batch of views is made.

    Args:    params of B views of one size; shapes (height, width) of the decoded images; image [B], the image of each
             view, None where each view has its own, in order.
    Returns: Plan, on the CPU.
    Raises:  ValueError for views of different sizes, operations that are not known or have no argument, and padded
             crops of another size than the view's.
    """
    image = range(len(params)) if image is None else image
    sizes = {p.size for p in params}
    if len(sizes) != 1 or len(image) != len(params):
        raise ValueError(
            f"views have sizes {sorted(sizes)} and {len(image)} images, expected one size and {len(params)}"
        )
    size, writer, first = sizes.pop(), Writer(), [0]
    for height, width in shapes:
        first.append(first[-1] + height * width)
    sources = [Source.of(p, first[i], *shapes[i]) for p, i in zip(params, image, strict=True)]
    parts = tuple(Bucket.put(writer, rows, sources) for rows in buckets(sources))
    fills = [fill_colour(p.mean) for p in params]
    steps: list[Step] = []
    for layer in range(max(len(p.ops) for p in params)):
        steps += _operations(
            writer, [(row, p.ops[layer]) for row, p in enumerate(params) if len(p.ops) > layer], fills, size
        )
    for layer in range(max(len(p.erasures) for p in params)):
        erased = [(row, p.erasures[layer], p.mean, p.std) for row, p in enumerate(params) if len(p.erasures) > layer]
        erased = [e for e in erased if e[1].height and e[1].width]
        steps += [Erasures.put(writer, erased)] if erased else []
    return Plan((len(params), size), parts, tuple(steps), writer.words())


def _operations(writer: Writer, ops: list[tuple[int, Op]], fills: Sequence[Fill], size: int) -> list[Step]:
    """The steps of one operation, or none, of each view."""
    makers: list[tuple[tuple[str, ...], Callable[..., Step], tuple[Any, ...]]] = [
        (TABLES, Tables.put, ()),
        (BLENDS, Blends.put, ()),
        (SLIDES, Slides.put, (fills, size)),
        (TURNS, Turns.put, (fills, size)),
    ]
    for _, op in ops:
        if op.name not in OPERATIONS:
            raise ValueError(f"operation '{op.name}' is not known, expected one of randaugment.TIMM_OPERATIONS")
        if op.argument is None and op.name not in ("AutoContrast", "Equalize", "Invert"):
            raise ValueError(f"operation {op.name} has no argument, expected a number")
    groups = [(put, [pair for pair in ops if pair[1].name in names], more) for names, put, more in makers]
    return [put(writer, group, *more) for put, group, more in groups if group]


def make_views(images: Sequence[Tensor] | Tensor, plan: Plan) -> Tensor:
    """The pixels of a batch of views.

    Args:    images uint8 [H, W, 3] each, in the order of the plan's shapes, on the plan's device; or the pixels of all
             of them, one image after the other: uint8 [P, 3].
    Returns: uint8 [B, S, S, 3] on the device, contiguous; the bytes of `ops.apply`.
    """
    pixels = images if isinstance(images, Tensor) else torch.cat([image.reshape(-1, 3) for image in images])
    count, size = plan.shape
    views = torch.empty((count, size, size, 3), dtype=torch.uint8, device=pixels.device)
    with float32_products(tf32=False, device=pixels.device):
        for bucket in plan.buckets:
            views.index_copy_(0, bucket.rows.of(plan.words), bucket.run(pixels, plan.words))
    for step in plan.steps:
        step.run(views, plan.words)
    return views
