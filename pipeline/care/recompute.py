"""Views of a cache made again, and the teacher run on them again: does this machine still give what is stored?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.codecs.base import BLEND_ONE, Outputs, direct_hard
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.stages import StageCodec, stages_of
from cskd.machine.arithmetic import full_precision
from cskd.machine.devices import pick_device
from cskd.machine.threads import begun_with, choose_threads, computing_with
from cskd.pipeline.recorded_teacher import recorded_teacher
from cskd.pipeline.show.progress import Progress
from cskd.store.cache import Cache
from cskd.store.format import Unit
from cskd.store.replay_check import golden_rows, replay_golden
from cskd.teacher.fingerprint import compare_probe
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.model import Teacher
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import NONE

TIE, ROUNDING = 1.25, 1e-5  # by how much of its own error, and of the largest number, a map may be further off
LOOKED_UP_BLENDS = tuple(range(0, BLEND_ONE + 1, BLEND_ONE // 16))


@dataclass(frozen=True)
class StageAgain:
    """A stage's maps as a codec stores them, against those that the teacher gives now. beyond: cells, of so many, that are further off
    than the codec itself is on today's map; largest_difference: of a number, the codec's error in it."""

    cells: int
    beyond: int
    largest_difference: float

    def __add__(self, other: StageAgain) -> StageAgain:
        largest = max(self.largest_difference, other.largest_difference)
        return StageAgain(self.cells + other.cells, self.beyond + other.beyond, largest)


@dataclass(frozen=True)
class Recomputed:
    """What came of running the teacher again. Lookups are hard targets: one a cell and blend, at 17 blends; at blend 0 alone
    where the cache has no cells."""

    views: int
    lookups: int
    differing: int
    agreement: float
    largest_margin: float  # of the differing ones: the logit of today's winner above that of the stored class
    largest_logit_difference: float | None  # None: the cache has no codec of logits; int8's own error is in it
    largest_feature_difference: (
        float | None
    )  # of a teacher without logits of cells, whose features are kept; the codec's error is in it
    stages: dict[str, StageAgain]  # by codec
    probe: str | None  # how the teacher's outputs on the probe images differ from the cache's; None: they don't


def made_views(cache: Cache) -> int:
    """How many views of a cache have targets."""
    sizes = np.add.reduceat((~cache.quarantined()).astype(np.int64), cache.inventory.blocks[:-1])
    return cache.views * int(sizes.sum()) - sum(int(sizes[block]) for block, _ in cache.missing())


def replay_again(cache: Cache, count: int, quiet: bool) -> tuple[int, list[str]]:
    """Make about `count` views again: how many, and one line for each that differs."""
    errors, done = [], 0
    with Progress("replay", min(count, made_views(cache)), "views", quiet=quiet) as progress:
        for reason in replay_golden(cache, count):
            done += 1
            errors += [reason] if reason else []
            progress.update(min(done, progress.total))
    return done, errors


def recompute(cache: Cache, count: int, device: str, quiet: bool) -> Recomputed:
    """Run the teacher on about `count` of a cache's views and compare with what is stored.

    Raises:  TeacherError where it can't be built; CacheError where it is not the cache's, naming the field.
    """
    # On another kind of device it is the same teacher up to rounding: how far that goes is what is measured here.
    teacher = recorded_teacher(cache, pick_device(device))
    soft = next((name for name, codec in cache.codecs.items() if codec.soft), None)
    features = next((n for n, codec in cache.codecs.items() if codec.reads_features and not codec.soft), None)
    hard, stages = cache.hard_codec, {n: c for n, c in cache.codecs.items() if isinstance(c, StageCodec)}
    blends: tuple[int, ...] = LOOKED_UP_BLENDS if cache.codecs[hard].cells else (0,)
    blends = blends if cache.codecs[hard].has_classes else ()
    maker = ViewMaker(cache.inventory, cache.recipe)
    views = lookups = differing = 0
    margin, largest, largest_feature = 0.0, 0.0, 0.0
    maps = dict.fromkeys(stages, StageAgain(0, 0, 0.0))
    threads = choose_threads()
    if not teacher.reentrant:
        threads, _ = begun_with(cache.manifest.threads, threads, asked=False)
    total = min(count, made_views(cache))
    with (
        computing_with(threads.count),
        full_precision(teacher.device),  # what is decoded, not the teacher, which sets its own
        Progress("recompute", total, "views", quiet=quiet) as progress,
    ):
        for block, view, unit, rows in golden_rows(cache, count):
            read = {hard, soft or hard, features or hard, *stages}
            targets = {name: cache.read(block, view, name).targets for name in read}
            for part in np.array_split(rows, -(-len(rows) // teacher.batch)):
                made = outputs_again(
                    maker, teacher, unit, cache.inventory.block_range(block)[0], part, stages_of(cache.codecs)
                )
                dense_BKhw, global_BK = made.dense, made.image
                stored = cache.codecs[hard].take(targets[hard], part)
                for blend in blends:
                    wrong, by = _differing(dense_BKhw, global_BK, blend, cache.codecs[hard].hard(stored, blend))
                    lookups, differing, margin = lookups + dense_BKhw[:, 0].numel(), differing + wrong, max(margin, by)
                if soft:
                    arrays = _tensors(cache.codecs[soft].take(targets[soft], part))
                    found = [cache.codecs[soft].global_logits_torch(arrays)]
                    if cache.codecs[soft].cells:
                        found.append(cache.codecs[soft].logits_torch(arrays)[0])
                    for kept, now in zip(found, (global_BK, dense_BKhw), strict=False):
                        largest = max(largest, float((kept - now).abs().max()))
                if features:
                    codec = cache.codecs[features]
                    assert isinstance(codec, FeaturesCodec) and made.features is not None
                    kept = codec.features_torch(_tensors(codec.take(targets[features], part)))
                    largest_feature = max(largest_feature, float((kept - made.features).abs().max()))
                for name, stage in stages.items():
                    maps[name] += _stage_again(stage, stage.take(targets[name], part), made)
                views += len(part)
                progress.update(min(views, total))
    return Recomputed(
        views=views,
        lookups=lookups,
        differing=differing,
        agreement=1.0 - differing / max(1, lookups),
        largest_margin=margin,
        largest_logit_difference=largest if soft else None,
        largest_feature_difference=largest_feature if features else None,
        stages=maps,
        probe=compare_probe(cache.manifest.probe or {}, teacher.probe()),
    )


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def outputs_again(
    maker: ViewMaker,
    teacher: Teacher,
    unit: Unit,
    first: int,
    rows: NDArray[np.int64],
    stages: Sequence[str] = (),
) -> Outputs:
    """What the teacher makes of some rows of a unit, each mixed with its partner as in stage 1, on the CPU; stages: with their maps."""
    pixels = []
    for row in rows.tolist():
        mate = row
        if unit.fields["mode"][row] != NONE:
            mate = int(np.searchsorted(unit.position, unit.fields["partner"][row]))
        for i in (row, mate):
            image = maker.image(first + int(unit.position[i]))
            pixels.append(maker.view(image, int(unit.fields["seed"][i])))
    pairs = torch.from_numpy(np.stack(pixels)).to(teacher.device)
    fields = (torch.from_numpy(np.repeat(unit.fields[n][rows].astype(np.int64), 2, 0)) for n in ("mode", "lam", "box"))
    partner = torch.arange(len(pixels)) ^ 1
    mixed = mix_pixels(pairs, *(f.to(teacher.device) for f in (partner, *fields)))[::2]
    with threads_of_a_lane(teacher.device, teacher.reentrant):
        made = teacher.outputs_of(mixed, stages)
    assert made.features is not None
    maps = {name: x.cpu() for name, x in made.stages.items()}
    return Outputs(made.dense.cpu(), made.image.cpu(), features=made.features.cpu(), stages=maps)


def _stage_again(codec: StageCodec, stored: Arrays, made: Outputs) -> StageAgain:
    """Of some rows. The codec's own error is that of encoding today's map; a number at a tie may be rounded the other way."""
    now = made.stages[codec.stage]
    off = (codec.map_torch(_tensors(stored)) - now).abs().amax(1)
    own = (codec.map_torch(_tensors(codec.encode_outputs(made))) - now).abs().amax(1)
    beyond = off > TIE * own + ROUNDING * now.abs().max()
    return StageAgain(off.numel(), int(beyond.sum()), float(off.max()))


def _differing(
    dense_BKhw: torch.Tensor, global_BK: torch.Tensor, blend: int, stored: NDArray[np.uint16]
) -> tuple[int, float]:
    """Cells whose hard target is not the stored one, and by how much the largest of them is."""
    now = direct_hard(dense_BKhw, global_BK, blend)
    was = torch.from_numpy(stored.astype(np.int64))
    wrong = now != was
    if not bool(wrong.any()):
        return 0, 0.0
    a = blend / BLEND_ONE
    mixed = a * dense_BKhw.double() + (1 - a) * global_BK.double()[:, :, None, None]
    gap = mixed.gather(1, now[:, None]) - mixed.gather(1, was[:, None])
    return int(wrong.sum()), float(gap[:, 0][wrong].max())
