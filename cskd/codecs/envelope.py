"""The `envelope` codec: exact hard targets for every blend, from the upper envelope of each cell's K lines.

For one cell, a * D_c + (1 - a) * g_c is a line in the blend a, so the winner over a in [0, 1] is a short run of
classes, the first of them argmax g for every cell. A unit stores

    global_class  uint16 [N]        the class that wins at blend 0
    n_extra       uint8 [N, h, w]   how many more win somewhere
    n_classes     uint8 [N]         how many different classes those are, over all cells of the sample
    class_step    uint16 [T]        each sample's classes, rising: the first, then differences to the one before
    extra         uint8 [M]         cell by cell, in order of rising blend: places in the sample's list of classes
    start         uint16 [M]        the last blend, in 2^-16, at which that class does not win yet

(uint8 becomes uint16 in a unit that needs it.) A class is active iff start < blend. Blends are whole numbers of 2^-16,
so a start is known exactly: a crossing in float64 is good to 3e-11 of such a step, and where it comes closer than 1e-6
to a whole number both classes are compared there in exact arithmetic. A class that wins only between two such blends is
not stored. Offsets of the samples are not stored either: they are running sums of the counts, and a second copy could
only cost bytes or disagree. With class ids in place of places in a list a view takes 5 % more after zstd: 213.6 bytes
against 202.7 (3,000 views of 500 ImageNet images, DeiT's augmentation and mixing, MobileNetV2, 2.3 segments per cell).

Shapes: N samples, B batch, K classes, h w teacher grid, n its cells (h * w), M extra segments, T listed classes,
m candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import BLEND_ONE, U16, Arrays, Codec, Field, check_blend
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

CACHE_FLOATS = 1 << 19  # logits screened at a time on a CPU: ten 7x7x1000 maps; more leave its caches, fewer cost calls
SLACK = 2.0**-19  # share of a cell's largest terms by which float32 screening may be off; the true bound is 2^-21
PIECE = 1024  # samples of a unit looked up or checked at a time
NEAR = 2.0**-20  # a crossing this close to a whole number is decided in exact arithmetic; the true bound is 2^-34


class EnvelopeCodec(Codec):
    """Exact hard targets at every blend; no soft ones."""

    exact_hard, soft = True, False
    error = "none: hard targets are those of direct_hard at every multiple of 2^-16"

    def __init__(self, classes: int, grid: tuple[int, int]) -> None:
        super().__init__("envelope", classes, grid)
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            "n_extra": Field(("uint8", "uint16"), ("sample", "row", "col")),
            "n_classes": Field(("uint8", "uint16"), ("sample",)),
            "class_step": Field(("uint16",), ("listed",)),
            "extra": Field(("uint8", "uint16"), ("segment",)),
            "start": Field(("uint16",), ("segment",)),
        }

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Float32 logits [B, K, h, w] and [B, K], on any device, as arrays; fastest where K is innermost in memory.

        Raises:  CodecError for logits that are not finite float32 of the codec's shape.
        """
        dense_BKhw, global_BK = dense_BKhw.detach(), global_BK.detach().contiguous()
        self.validate_logits(dense_BKhw, global_BK)
        if dense_BKhw.device.type == "mps":  # has no float64
            dense_BKhw, global_BK = dense_BKhw.cpu(), global_BK.cpu()
        B, n_cells = len(dense_BKhw), self.grid[0] * self.grid[1]
        cell_M, class_M, start_M = _walk(_screen(dense_BKhw.flatten(2), global_BK))
        sample_M = cell_M // n_cells
        listed_T, place_M = np.unique(sample_M * self.classes + class_M, return_inverse=True)
        n_classes = np.bincount(listed_T // self.classes, minlength=B)
        first_T = np.diff(listed_T // self.classes, prepend=-1) > 0
        class_T = listed_T % self.classes
        return {
            "global_class": _argmax(global_BK).cpu().numpy().astype(np.uint16),
            "n_extra": _narrow(np.bincount(cell_M, minlength=B * n_cells).reshape(B, *self.grid)),
            "n_classes": _narrow(n_classes),
            "class_step": np.where(first_T, class_T, np.diff(class_T, prepend=0)).astype(np.uint16),
            "extra": _narrow(place_M - _begin(n_classes)[sample_M]),
            "start": start_M.astype(np.uint16),
        }

    def hard(self, arrays: Arrays, blend: int) -> U16:
        """Hard CKF targets at blend / 65536, those of `direct_hard`: uint16 [N, h, w].

        Raises:  CodecError for a blend outside 0..65536.
        """
        check_blend(blend)
        n_cells = self.grid[0] * self.grid[1]
        out: U16 = np.repeat(arrays["global_class"], n_cells)
        begin_N, class_T = _begin(arrays["n_classes"]), listed_classes(arrays).astype(np.uint16)
        for rows, part in self._pieces(arrays):
            # Starts rise, so a cell's active segments are its first ones, and the last of them counts.
            active_M = np.cumsum(np.append(False, part["start"] < blend), dtype=np.int64)
            count_c = part["n_extra"].reshape(-1)
            segment_c = np.cumsum(count_c, dtype=np.int64)
            won_c = np.diff(active_M.take(segment_c), prepend=0)
            segment_c += won_c - count_c - 1
            cell = np.flatnonzero(won_c != 0)
            place = begin_N[rows].take(cell // n_cells) + part["extra"].take(segment_c.take(cell))
            out[rows.start * n_cells : rows.stop * n_cells][cell] = class_T.take(place)
        return out.reshape(-1, *self.grid)

    def hard_at(self, arrays: Arrays, index: NDArray[np.integer[Any]], blend: int) -> U16:
        """`hard` of the samples at `index`: all are looked up, which costs less than taking ragged rows apart."""
        return self.hard(arrays, blend).take(index, 0)

    def segments(self, arrays: Arrays, sample: int, row: int, col: int) -> list[tuple[int, int]]:
        """The upper envelope of one cell: (class, blend in 2^-16 from which it wins), the first from 0, blends rising."""
        one = self.take(arrays, np.array([sample]))
        listed = listed_classes(one)
        of_cell = slice(
            *np.cumsum(np.append(0, one["n_extra"].reshape(-1)))[[row * self.grid[1] + col + i for i in (0, 1)]]
        )
        won = zip(listed[one["extra"][of_cell]].tolist(), one["start"][of_cell].tolist(), strict=True)
        return [(int(one["global_class"][0]), 0), *((cls, start + 1) for cls, start in won)]

    def _pieces(self, arrays: Arrays) -> Iterator[tuple[slice, Arrays]]:
        """Runs of samples, and their counts and segments: small enough to stay in a core's cache, and for their
        temporaries to be memory used before, since that of a whole unit comes from the system, page by page, each time."""
        n_extra, N = arrays["n_extra"], len(arrays["n_extra"])
        end_N = np.cumsum(n_extra.sum((1, 2), dtype=np.int64))
        before = 0
        for first in range(0, N, PIECE):
            rows = slice(first, min(first + PIECE, N))
            segments = slice(before, before := int(end_N[rows.stop - 1]))
            part = {"n_extra": n_extra[rows], "start": arrays["start"][segments], "extra": arrays["extra"][segments]}
            yield rows, part

    def concat(self, parts: Sequence[Arrays]) -> Arrays:
        """The samples of all parts, in order."""
        return _narrowed(super().concat(parts))

    def take(self, arrays: Arrays, index: NDArray[np.integer[Any]]) -> Arrays:
        """The samples at `index`, in its order, each with its segments; a sample may be taken more than once."""
        n_extra, n_classes = arrays["n_extra"], arrays["n_classes"]
        segments = _spans(n_extra.sum((1, 2), dtype=np.int64), index)
        return _narrowed(
            {
                "global_class": arrays["global_class"][index],
                "n_extra": n_extra[index],
                "n_classes": n_classes[index],
                "class_step": arrays["class_step"][_spans(n_classes, index)],
                "extra": arrays["extra"][segments],
                "start": arrays["start"][segments],
            }
        )

    def check(self, arrays: Arrays, n: int, classes: int) -> None:
        """Raises CodecError unless these are n samples of this codec: counts add up, classes exist, starts rise."""
        super().check(arrays, n, classes)
        n_classes, extra, start = arrays["n_classes"], arrays["extra"], arrays["start"]
        for count, names in (("n_extra", ("extra", "start")), ("n_classes", ("class_step",))):
            for name in names:
                if len(arrays[name]) != (total := int(arrays[count].sum(dtype=np.int64))):
                    found = f"envelope/{count} counts {total}, envelope/{name} has {len(arrays[name])}"
                    raise CodecError(f"{found}; run cskd verify")
        checks = [
            (
                "class list that does not rise",
                n_classes,
                _inner(n_classes, arrays["class_step"]) & (arrays["class_step"] == 0),
            ),
            (f"class beyond {classes - 1}", n_classes, listed_classes(arrays) >= classes),
        ]
        _refuse(0, checks)
        for rows, part in self._pieces(arrays):
            extra, start = part["extra"], part["start"]
            per_sample = part["n_extra"].sum((1, 2), dtype=np.int64)
            inner = _inner(part["n_extra"].reshape(-1), start)
            checks = [
                ("segment beyond its list of classes", per_sample, extra >= np.repeat(n_classes[rows], per_sample)),
                ("start that does not rise", per_sample, inner & _pairs(np.less_equal, start)),
                ("segment of the class before it", per_sample, inner & _pairs(np.equal, extra)),
            ]
            _refuse(rows.start, checks)


def _refuse(first: int, checks: list[tuple[str, NDArray[Any], NDArray[np.bool_]]]) -> None:
    """CodecError for the first check with a wrong entry; `first` sample, and what is wrong, entries a sample, wrong ones."""
    for what, counts, wrong in checks:
        if wrong.any():
            sample = first + int(np.searchsorted(np.cumsum(counts, dtype=np.int64), int(wrong.argmax()), side="right"))
            raise CodecError(f"envelope: sample {sample} of the unit has a {what}; run cskd verify")


def _inner(count: NDArray[Any], entries: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries of a ragged array are not the first of their owner."""
    inner = np.ones(len(entries) + 1, bool)
    inner[_begin(count)] = False  # an owner of nothing marks the next one's first entry, or the end
    return inner[:-1]


def _pairs(compare: np.ufunc, x: NDArray[Any]) -> NDArray[np.bool_]:
    """compare(entry, the one before it), false for the first."""
    result = np.zeros(len(x), bool)
    compare(x[1:], x[:-1], out=result[1:])
    return result


def _begin(count_N: NDArray[Any]) -> I64:
    """Where each sample's entries begin in a ragged array, int64 [N]."""
    begin: I64 = np.cumsum(count_N, dtype=np.int64) - count_N
    return begin


def _spans(count_N: NDArray[Any], index: NDArray[np.integer[Any]]) -> I64:
    """Positions in a ragged array of the entries of the samples at `index`, in its order."""
    count, begin = count_N[index].astype(np.int64), _begin(count_N)[index]
    spans: I64 = np.repeat(begin - _begin(count), count) + np.arange(count.sum())
    return spans


def listed_classes(arrays: Arrays) -> I64:
    """Class ids of all samples' lists, int64 [T]."""
    total = np.cumsum(arrays["class_step"], dtype=np.int64)
    before = np.concatenate([[0], total])[_begin(arrays["n_classes"])]
    listed: I64 = total - np.repeat(before, arrays["n_classes"])
    return listed


def _narrowed(arrays: Arrays) -> Arrays:
    return arrays | {name: _narrow(arrays[name]) for name in ("n_extra", "n_classes", "extra")}


def _narrow(counts: NDArray[Any]) -> NDArray[Any]:
    """The narrowest dtype that holds the counts, so that equal contents are equal bytes."""
    return counts.astype(np.uint8 if counts.max(initial=0) <= 255 else np.uint16)


class _Candidates(NamedTuple):
    """The classes that may win in cells where more than one does, in order of (cell, class)."""

    cell: I64  # counted through the batch
    cls: I64
    local: F64  # D
    whole: F64  # g
    first: NDArray[np.bool_]  # the winner at blend 0: one a cell


def _screen(dense_BKn: Tensor, global_BK: Tensor) -> _Candidates:
    """The few classes (measured: 3.3 in the cells that need any) that can win at some blend; none is missed.

    Let c0 win at blend 0 and c1 at 1. No line lies above c0's at 0 or above c1's at 1, so one that reaches the larger
    of the two anywhere does so where they cross, and reaches the smaller of the two at any blend. Hence one pass at one
    blend for each cell, in float32, with the smaller as threshold, less a bound of the rounding error. Where c0 is c1,
    it wins everywhere.
    """
    import torch

    B, K, n = dense_BKn.shape
    step = max(1, min(B, CACHE_FLOATS // (K * n) if _on_cpu(dense_BKn) else B))
    rows_bnK, mixed_bnK = (dense_BKn.new_empty(step, n, K) for _ in range(2))
    hits, locals_ = [], []
    for b in range(0, B, step):
        global_bK = global_BK[b : b + step]
        rows = dense_BKn[b : b + step].transpose(1, 2)
        if not rows.is_contiguous():
            for to, sample_Kn in zip(rows_bnK, dense_BKn[b : b + step], strict=False):
                to.copy_(sample_Kn.t())  # a 2-d transpose takes torch half the time of a 3-d one
            rows = rows_bnK[: len(global_bK)]
        mixed = mixed_bnK[: len(global_bK)]

        first_b1, last_bn = _argmax(global_bK)[:, None], _argmax(rows)
        global_first, global_last = global_bK.gather(1, first_b1).double(), global_bK.gather(1, last_bn).double()
        local_first = rows.gather(2, first_b1[:, None].expand(-1, n, 1))[..., 0].double()
        local_last = rows.gather(2, last_bn[..., None])[..., 0].double()
        fall = global_first - global_last
        x32 = (fall / (fall + (local_last - local_first))).float()  # the crossing; anything in [0, 1] would be right
        x = x32.double()
        at_first = x * local_first + (1 - x) * global_first
        at_last = x * local_last + (1 - x) * global_last
        low = at_first.minimum(at_last)
        largest = low.abs() + x * local_last.abs() + (1 - x) * global_first.abs()
        floor = (low - SLACK * largest - 2.0**-120).masked_fill_(first_b1 == last_bn, torch.inf).float()[..., None]

        torch.mul((1 - x32)[..., None], global_bK[:, None], out=mixed)
        mixed.addcmul_(x32[..., None], rows)
        hit_m = _flat_at_least(mixed, floor)
        hits.append(hit_m + b * n * K)
        locals_.append(rows.reshape(-1)[hit_m])
    if not hits:
        return _Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0, bool))
    hit, local = torch.cat(hits), torch.cat(locals_)
    cell = hit // K
    cls, sample = hit - cell * K, cell // n
    first = cls == _argmax(global_BK)[sample]
    columns = [x.cpu().numpy() for x in (cell, cls, local.double(), global_BK[sample, cls].double(), first)]
    return _Candidates(*columns)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _argmax(x: Tensor) -> Tensor:
    """argmax of the last axis, the lowest on ties; on a CPU NumPy's, which takes a tenth of the time of torch's."""
    if not _on_cpu(x):
        return x.argmax(-1)
    import torch

    return torch.from_numpy(x.numpy().argmax(-1))


def _flat_at_least(x: Tensor, floor: Tensor) -> Tensor:
    """Flat indices, rising, at which x >= floor; on a CPU by NumPy, which takes a fifth of the time of torch."""
    if not _on_cpu(x):
        return (x >= floor).flatten().nonzero()[:, 0]
    import torch

    return torch.from_numpy(np.flatnonzero(x.numpy() >= floor.numpy()))


def _walk(c: _Candidates) -> tuple[I64, I64, I64]:
    """From each cell's winner at blend 0 to the next and the next, all cells at once, until none has another.

    Returns: cell, class and start of every extra segment, in order of (cell, start); int64 [M] each.
    """
    steps: list[tuple[I64, I64, I64]] = []
    current = np.flatnonzero(c.first)  # the winner so far, one a cell
    while len(c.cell):
        begin = np.flatnonzero(np.diff(c.cell, prepend=-1))
        count = np.diff(begin, append=len(c.cell))
        until_m = _first_win(c, np.repeat(current, count))
        next_m = np.repeat(np.minimum.reduceat(until_m, begin), count)
        winner = _best(c, np.flatnonzero((until_m == next_m) & (next_m <= BLEND_ONE)), next_m)
        steps.append((c.cell[winner], c.cls[winner], next_m[winner].astype(np.int64) - 1))
        # Who can't overtake this winner can't overtake a later one, for that rises faster still.
        going = until_m < np.inf
        going &= next_m <= BLEND_ONE
        position = np.cumsum(going) - 1
        current = position[winner]
        c = _Candidates(c.cell[going], c.cls[going], c.local[going], c.whole[going], c.first[going])
    if not steps:
        return c.cell, c.cls, c.cell
    cell, cls, start = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(cell, kind="stable")
    return cell[order], cls[order], start[order]


def _first_win(c: _Candidates, rival: I64) -> F64:
    """The first blend, in 2^-16, at which each candidate beats its rival, which wins now: whole numbers, float64 [m].

    65537 where the two only meet at blend 1 and the rival keeps it; infinity where the rival stays above.
    """
    fall, rise = c.whole[rival] - c.whole, c.local - c.local[rival]
    never = (fall < 0) | (rise < 0) | (fall + rise == 0)
    # Both terms have one sign, so nothing cancels: three roundings, an error of 3e-11 at most.
    crossing = BLEND_ONE * (fall / np.where(never, 1.0, fall + rise))
    nearest = np.rint(crossing)
    first = np.floor(crossing) + 1
    near = np.flatnonzero(np.abs(crossing - nearest) < NEAR)
    if len(near):
        wins = _beats(c, near, rival[near], nearest[near])
        first[near] = np.where(wins, nearest[near], nearest[near] + 1)
    first[never] = np.inf
    return first


def _beats(c: _Candidates, i: I64, j: I64, blend: F64) -> NDArray[np.bool_]:
    """Does candidate i win over j at the blend, exactly, the lower class on ties?"""
    total_i, error_i = _exact(c.local[i], c.whole[i], blend)
    total_j, error_j = _exact(c.local[j], c.whole[j], blend)
    tie = (error_i == error_j) & (c.cls[i] < c.cls[j])
    result: NDArray[np.bool_] = (total_i > total_j) | ((total_i == total_j) & ((error_i > error_j) | tie))
    return result


def _best(c: _Candidates, hopeful: I64, blend_m: F64) -> I64:
    """Of the hopeful candidates of each cell the one that wins at the cell's blend; mostly there is just one."""
    while len(hopeful):
        same = np.flatnonzero(c.cell[hopeful[1:]] == c.cell[hopeful[:-1]])
        if not len(same):
            break
        same = same[np.diff(same, prepend=-2) > 1]  # disjoint pairs of neighbours: the loser of each leaves
        left, right = hopeful[same], hopeful[same + 1]
        hopeful = np.delete(hopeful, same + _beats(c, left, right, blend_m[left]))
    return hopeful


def _exact(local: F64, whole: F64, blend: F64) -> tuple[F64, F64]:
    """blend * D + (65536 - blend) * g as a float64 sum and its rounding error, together exact (see `direct_hard`)."""
    x, y = local * blend, whole * (BLEND_ONE - blend)
    total = x + y
    v = total - x
    return total, (x - (total - v)) + (y - v)
