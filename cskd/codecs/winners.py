"""The hard target of every cell at all blends at once, whatever the codec: for pictures, counts, and other programs.

An `envelope` unit holds just that. Logits that another codec decodes are put through the same exact construction, so that
`Winners.at` is the codec's own `hard` at every blend, ties included.

Shapes: N samples, h w teacher grid, M segments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import BLEND_ONE, U16, Arrays, Codec, check_blend
from cskd.codecs.envelope import EnvelopeCodec, listed_classes


class Winners(NamedTuple):
    """Which class a cell is taught from which blend on.

    first: uint16 [N], the class at blend 0, the same for all cells of a sample. n_extra: int64 [N, h, w], how many classes follow
    in each cell. cls, start: uint16 [M], those classes, cell by cell, by rising start; one counts iff start < blend, with blend
    in 1/65536, up to the next.
    """

    first: U16
    n_extra: NDArray[np.int64]
    cls: U16
    start: U16

    def at(self, blend: int) -> U16:
        """Hard CKF targets at blend / 65536: uint16 [N, h, w]. Raises CodecError for a blend outside 0..65536."""
        check_blend(blend)
        count = self.n_extra.reshape(-1)
        begin = np.cumsum(count) - count
        before = np.concatenate([[0], np.cumsum(self.start < blend)])
        active = (
            before[begin + count] - before[begin]
        )  # starts rise: the first ones of a cell, of which the last counts
        classes: U16 = np.repeat(self.first, self.n_extra.shape[1] * self.n_extra.shape[2])
        cell = np.flatnonzero(active)
        classes[cell] = self.cls[(begin + active - 1)[cell]]
        return classes.reshape(self.n_extra.shape)

    @property
    def margin(self) -> NDArray[np.float64]:
        """Blend up to which each cell is taught the image's class: float64 [N, h, w] in [0, 1], 1 where it is at every one."""
        count = self.n_extra.reshape(-1)
        first_M = (np.cumsum(count) - count)[count > 0]
        margin = np.ones(len(count))
        margin[count > 0] = self.start[first_M] / BLEND_ONE
        return margin.reshape(self.n_extra.shape)


def winners(codec: Codec, arrays: Arrays) -> Winners:
    """The winners of all samples of a codec's arrays. Logits are decoded as a whole: take a few samples of such a codec."""
    if isinstance(codec, EnvelopeCodec):
        return _of_envelope(arrays)
    if not codec.cells:
        image, none = codec.global_class(arrays), np.zeros(0, np.uint16)
        return Winners(image, np.zeros((len(image), *codec.grid), np.int64), none, none)
    import torch

    dense_NKhw, global_NK = codec.logits(arrays)
    exact = EnvelopeCodec(codec.classes, codec.grid)
    found = _of_envelope(exact.encode(torch.from_numpy(dense_NKhw), torch.from_numpy(global_NK)))
    return _after_stored(found, codec.global_class(arrays))


def _of_envelope(arrays: Arrays) -> Winners:
    n_classes, count = arrays["n_classes"].astype(np.int64), arrays["n_extra"].astype(np.int64)
    sample_M = np.repeat(np.arange(len(count)), count.sum((1, 2)))
    cls = listed_classes(arrays)[(np.cumsum(n_classes) - n_classes)[sample_M] + arrays["extra"]]
    return Winners(arrays["global_class"], count, cls.astype(np.uint16), arrays["start"])


def _after_stored(found: Winners, stored: U16) -> Winners:
    """At blend 0 such a codec teaches the class that it stored, which its rounded logits may not have as their largest: then
    what they have largest begins at the next blend, unless a cell has another one from there on."""
    n_cells = found.n_extra.shape[1] * found.n_extra.shape[2]
    decoded_c, stored_c = np.repeat(found.first, n_cells), np.repeat(stored, n_cells)
    count = found.n_extra.reshape(-1)
    begin = np.cumsum(count) - count
    follows = np.append(found.start, 1)[begin] > 0
    cell = np.flatnonzero((decoded_c != stored_c) & (follows | (count == 0)))
    cls = np.insert(found.cls, begin[cell], decoded_c[cell])
    start = np.insert(found.start, begin[cell], 0)
    count = count + np.bincount(cell, minlength=len(count))
    # A class that follows itself is no other.
    again = (np.cumsum(count) - count)[count > 0]
    again = again[cls[again] == stored_c[count > 0]]
    count = count - np.bincount(np.searchsorted(np.cumsum(count), again, side="right"), minlength=len(count))
    return Winners(stored, count.reshape(found.n_extra.shape), np.delete(cls, again), np.delete(start, again))
