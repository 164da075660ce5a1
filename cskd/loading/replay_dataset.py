"""A cache as a PyTorch dataset, for training loops of your own: any model, any loss, any framework on top of DataLoader.

dataset = ReplayDataset("caches/mine")
plan = PlanSampler(dataset, global_batch=256)
loader = DataLoader(dataset, plan.batch_size, sampler=plan, num_workers=8)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from cskd.codecs import Codec, known_own
from cskd.config import RecipeConfig
from cskd.errors import ConfigError, PlanError
from cskd.loading.cached_views import UNIT_BYTES, CachedViews, Rows, find_sample
from cskd.loading.plan import PlanSpec, epoch_plan, rank_share
from cskd.loading.replay_batch import ReplayBatch, ReplaySample, SampleParameters, Targets
from cskd.loading.shares import even_grain, micro_batches
from cskd.method.losses import MixedLabels
from cskd.store.cache import Cache, open_cache
from cskd.store.replay_check import check_versions
from cskd.store.usable import refuse_other_code, usable_views
from cskd.views.mix_pixels import InputMaker
from cskd.views.mixing import CUTMIX, MODES, NONE, own_share
from cskd.views.recipe import ViewParams


class ReplayDataset(Dataset[ReplaySample]):
    """Every view of every image of a cache, replayed and checked: map-style, `dataset[i]` and `len(dataset)`.

    Item i is image i % n in view i // n, where n is `images`, the number of images that have targets. An item is finished:
    where the recipe mixes views in pairs, the partner's view is mixed in, so no collating function has to. A batch of items
    decodes each image once; where both of a pair are in it, as `PlanSampler` has it, no view is made twice.

    No further augmentation that moves pixels may follow: the targets are of the cells of this very image.

    It pickles, for workers of every start method. A random order over many images reads many units; `PlanSampler`'s order
    reads each once.

    Args:    cache, folder; data, folder of the image shards where they have moved; views, of the first so many only, 0 = all;
             codecs, of these only, default all, your own by its place (path/to/file.py:Class); mean, std of RGB in [0, 1], the default leaves pixels in [0, 1];
             verify_replay, compare each view with the digest in the cache; unit_bytes, memory for units, per process.
    Raises:  CacheError where there is no such cache, it lacks units, or this version makes other views; DataError where image
             shards are missing. Items raise ReplayError, DataError and CacheError, and IndexError past the end.
    """

    def __init__(
        self,
        cache: str | Path,
        *,
        data: str | Path | None = None,
        views: int = 0,
        codecs: Sequence[str] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        verify_replay: bool = True,
        unit_bytes: int = UNIT_BYTES,
    ) -> None:
        codecs = [known_own(text) for text in codecs] if codecs is not None else None
        opened = open_cache(cache, None if data is None else Path(data))
        opened.inventory.check_shards()
        refuse_other_code(opened)
        self.cache: Cache = opened
        self.views = usable_views(opened, views)
        self.notes = check_versions(opened) if verify_replay else []  # what a user should know
        self._rows = CachedViews(opened, codecs, unit_bytes)
        self._codecs: dict[str, Codec] = {name: opened.codecs[name] for name in self._rows.codecs}
        self._inputs, self._verify = InputMaker(mean, std, torch.device("cpu")), verify_replay
        self._good = np.flatnonzero(~opened.quarantined())

    @property
    def images(self) -> int:
        """How many images have targets."""
        return len(self._good)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of labels."""
        return self.cache.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> label."""
        return {name: i for i, name in enumerate(self.classes)}

    @property
    def grid(self) -> tuple[int, int]:
        """h, w of the teacher's cells."""
        return self.cache.grid

    @property
    def recipe(self) -> RecipeConfig:
        """How views are made; `recipe.size` is their side in pixels."""
        return self.cache.recipe

    def __len__(self) -> int:
        return self.views * self.images

    def __getitem__(self, i: int) -> ReplaySample:
        return self.__getitems__([i])[0]

    def __iter__(self) -> Iterator[ReplaySample]:
        """Every item once, in rising order; `PlanSampler` has the order of training."""
        return (self[i] for i in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> ReplayBatch:
        """Items as one batch: DataLoader calls this where it has a whole batch to ask for."""
        if texts := [i for i in indices if isinstance(i, str)]:
            raise TypeError(
                f"item {texts[0]!r} is a text, expected a number; by its key: dataset.sample({texts[0]!r}, view=0)"
            )
        if wrong := [i for i in indices if not -len(self) <= i < len(self)]:
            raise IndexError(
                f"item {wrong[0]} of {len(self)} ({self.views} views of {self.images} images), expected 0..{len(self) - 1}"
            )
        view, place = np.divmod(np.asarray(indices, np.int64) % len(self), self.images)
        return self._batch(self._rows.rows(self._good[place].tolist(), view.tolist()))

    def sample(self, sample: str | int, view: int = 0) -> ReplaySample:
        """One view of the image with that key, or number in the data set. Raises DataError where there is none."""
        return self._batch(self._rows.rows([find_sample(self.cache, sample)], [view]))[0]

    def index(self, sample: Sequence[int], view: Sequence[int]) -> list[int]:
        """Item numbers of views of images, by their numbers in the data set, which must not be quarantined."""
        place = np.searchsorted(self._good, np.asarray(sample, np.int64))
        return [int(i) for i in np.asarray(view, np.int64) * self.images + place]

    def _batch(self, rows: Rows) -> ReplayBatch:
        done = self._rows.replay(rows, self._inputs, self._verify)
        label = self.cache.inventory.label[rows.sample].astype(np.int64)
        share = own_share(rows.fields["mode"], rows.fields["lam"])
        row, mate = rows.row, rows.partner[rows.row]
        return ReplayBatch(
            done.images,
            MixedLabels(*(torch.from_numpy(a) for a in (label[row], label[mate], share[row]))),
            Targets.of(self._codecs, rows.targets),
            [self._parameters(rows, done.params, i, float(share[i])) for i in row.tolist()],
        )

    def _parameters(self, rows: Rows, params: list[ViewParams], i: int, share: float) -> SampleParameters:
        fields = {name: array[i] for name, array in rows.fields.items()}
        mode, sample, mate = int(fields["mode"]), int(rows.sample[i]), int(rows.partner[i])
        top, bottom, left, right = fields["box"].tolist()
        return SampleParameters(
            sample=sample,
            key=self.cache.inventory.key(sample),
            view=int(rows.view[i]),
            seed=int(fields["seed"]),
            augmentation=params[i],
            mode=MODES[mode],
            share=share,
            box=(top, bottom, left, right) if mode == CUTMIX else None,
            partner=int(rows.sample[mate]) if mode != NONE else None,
            partner_augmentation=params[mate] if mode != NONE else None,
        )


class PlanSampler(Sampler[int]):
    """Items of a dataset in the order in which `cskd train` feeds them, this rank's share: whole batches, pairs together.

    Use it as torch's DistributedSampler: call `set_epoch` before every epoch, since each feeds other views. Epoch e feeds view
    e of every image, with `repeats` R: R views of another 1/R of the images. A step of this rank has `batch_size` views: as many
    as one of any other, unless `micro_batch` is given.

    Args:    global_batch, views of a step over all ranks; seed, repeats, window: as the keys of `train` in a config; rank, ranks:
             default those of torch.distributed where it is initialised; micro_batch: ranks share the micro-batches of so many views
             that a global batch has, as `cskd train` with that key, which need not divide. Then multiply the loss of a step, a mean
             over views, by `weight`: DistributedDataParallel's mean over ranks is then that over the views of the global batch.
    Raises:  PlanError where batch, ranks, repeats and images do not fit together.
    """

    def __init__(
        self,
        dataset: ReplayDataset,
        global_batch: int,
        *,
        seed: int = 0,
        repeats: int = 1,
        window: int = 8,
        rank: int | None = None,
        ranks: int | None = None,
        micro_batch: int | None = None,
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if joined else 0
        self.ranks = ranks if ranks is not None else dist.get_world_size() if joined else 1
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank is {self.rank} of {self.ranks} ranks, expected 0..{self.ranks - 1}")
        if micro_batch is None:
            _refuse_uneven(global_batch, self.ranks)
        elif micro_batch < 2 or micro_batch % 2:
            raise PlanError(
                f"micro_batch is {micro_batch}, expected an even number: two views that are mixed stay together"
            )
        cache = dataset.cache
        self.dataset = dataset
        self.spec = PlanSpec(
            bounds=cache.inventory.blocks,
            bad=cache.quarantined(),
            inventory_id=cache.inventory.id,
            recipe=cache.recipe,
            views=dataset.views,
            repeats=repeats,
            seed=seed,
            global_batch=global_batch,
            window=window,
            ranks=self.ranks,
            micro=micro_batch or 0,
        )
        self._share = self.spec.share(self.rank)
        self.batch_size, self.weight = self._share.rows, self._share.weight
        if (parts := micro_batches(global_batch, self._share.micro)) < self.ranks:
            raise PlanError(
                f"{self.ranks} ranks share {parts} micro-batches of {self._share.micro} views of a batch of {global_batch}: one has "
                f"none; use micro_batch={even_grain(global_batch, self.ranks)}, or fewer ranks"
            )
        self.epoch, self.step = 0, 0

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """The epoch that is iterated next, from 0; step: of its steps so many are done already, where a run is resumed."""
        if epoch < 0 or not 0 <= step <= self.spec.steps:
            raise ConfigError(
                f"epoch {epoch}, step {step}: expected 0 or more, and 0..{self.spec.steps} steps of an epoch"
            )
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return (self.spec.steps - self.step) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        mine = rank_share(epoch_plan(self.spec, self.epoch), self._share)
        first = self.step * self.batch_size
        yield from self.dataset.index(mine.sample[first:].tolist(), mine.view[first:].tolist())


def _refuse_uneven(global_batch: int, ranks: int) -> None:
    """PlanError for a batch that ranks can't share evenly, where uneven shares weren't asked for: their losses need weights."""
    if global_batch < 2 * ranks or not global_batch % (2 * ranks):
        return  # the former is refused with all else that a plan wants
    near = round(global_batch / (2 * ranks)) * 2 * ranks
    uneven = (
        f", or micro_batch={even_grain(global_batch, ranks)} and plan.weight for uneven shares"
        if global_batch % 2 == 0
        else ""
    )
    raise PlanError(
        f"global_batch is {global_batch} on {ranks} rank(s): shares must be even numbers; use {near}{uneven}"
    )
