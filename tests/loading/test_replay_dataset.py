"""A cache as a dataset: the bits that training sees, in its order, finished views in any order, targets at any blend."""

from __future__ import annotations

import dataclasses
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cskd import PlanSampler, ReplayBatch, ReplayDataset, ReplaySample, blend_schedule
from cskd.codecs.base import BLEND_ONE
from cskd.config import LossConfig, TrainConfig
from cskd.errors import CacheError, CodecError, ConfigError, CskdError, DataError, PlanError, ReplayError
from cskd.loading.plan import PlanSpec
from cskd.loading.stage2 import BatchMaker
from cskd.loading.targets import CachedTargets, mixed_labels
from cskd.loading.tasks import RunTasks
from cskd.method.losses import DistillationLoss, HardTargets, StudentOutput
from cskd.store.cache import Cache, open_cache
from cskd.store.format import Unit
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker
from cskd.views.recipe import sample_params
from tests.caches import make_tiny_cache, random_logits

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three views of 23 images in blocks of 5; two images can't be decoded. Both kinds of targets."""
    folder = tmp_path_factory.mktemp("replay")
    return make_tiny_cache(folder, ["envelope", "int8"], n=23, quarantine=(4, 11)).root


@pytest.fixture(scope="module")
def cache(root: Path) -> Cache:
    return open_cache(root)


@pytest.fixture(scope="module")
def dataset(root: Path) -> ReplayDataset:
    return ReplayDataset(root, mean=MEAN, std=STD)


def loader(dataset: ReplayDataset, plan: PlanSampler, **settings: Any) -> DataLoader[ReplaySample]:
    return DataLoader(dataset, plan.batch_size, sampler=plan, **settings)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_a_loop_of_ones_own_sees_the_bits_that_cskd_train_sees_in_its_order(
    cache: Cache, dataset: ReplayDataset, tmp_path: Path, rank: int, ranks: int, repeats: int
) -> None:
    epochs = 3
    settings = TrainConfig(global_batch=8, epochs=epochs, seed=5, window=2, repeats=repeats)
    spec, targets = PlanSpec.over(cache, settings, ranks), CachedTargets(cache, LossConfig(), epochs)
    maker = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0, cache.recorded())
    plan = PlanSampler(dataset, 8, seed=5, window=2, repeats=repeats, rank=rank, ranks=ranks)
    batches = loader(dataset, plan)
    with RunTasks(cache, spec, targets.spec, lambda _: [], tmp_path / "tables", 0, epochs * spec.steps, rank) as tasks:
        expected = iter(map(maker, tasks))
        for epoch in range(epochs):
            plan.set_epoch(epoch)
            assert len(batches) == spec.steps and len(plan) == spec.steps * 8 // ranks
            found = list(batches)
            assert len(found) == spec.steps
            for batch in found:
                theirs = next(expected)
                assert [p.sample for p in batch.parameters] == theirs["sample"].tolist()
                assert [p.view for p in batch.parameters] == theirs["view"].tolist()
                assert torch.equal(batch.images, InputMaker(MEAN, STD, CPU).mixed(theirs))
                labels = mixed_labels(theirs, CPU)
                assert torch.equal(batch.labels.label, labels.label) and torch.equal(batch.labels.lam, labels.lam)
                assert torch.equal(batch.labels.partner, labels.partner)
                hard = targets.of(theirs, epoch, CPU)
                assert isinstance(hard, HardTargets) and hard.cell_class is not None
                own = batch.targets.hard(blend_schedule(epoch, epochs, "linear"))
                assert own.cell_class is not None and torch.equal(own.cell_class, hard.cell_class)
                assert torch.equal(own.global_class, hard.global_class)
        assert next(expected, None) is None


def test_an_item_is_the_same_finished_view_alone_in_any_batch_and_after_pickling(dataset: ReplayDataset) -> None:
    assert len(dataset) == 3 * 21 and dataset.images == 21
    mixed = {mode: 0 for mode in ("unmixed", "mixup", "cutmix")}
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1)).tolist()
    batch = next(iter(DataLoader(dataset, len(dataset) + 1, sampler=[*order, order[0]])))
    sent = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    for place, i in enumerate(order):
        alone, other, there = dataset[i], batch[place], sent[i - len(dataset)]
        by_key = dataset.sample(alone.parameters.key, alone.parameters.view)
        for same in (other, there, by_key):
            assert torch.equal(same.image, alone.image) and same.parameters == alone.parameters
            assert (same.label, same.partner_label, same.share) == (alone.label, alone.partner_label, alone.share)
            assert torch.equal(same.targets.at(0.3), alone.targets.at(0.3))
        mixed[alone.parameters.mode] += 1
    assert all(mixed.values())
    assert torch.equal(batch.images[-1], batch.images[0])


def test_parameters_say_how_the_view_was_made_and_what_it_was_mixed_with(cache: Cache, dataset: ReplayDataset) -> None:
    maker = ViewMaker(cache.inventory, cache.recipe)
    for sample in dataset:
        p = sample.parameters
        height, width = maker.image(p.sample).shape[:2]
        assert p.augmentation == sample_params(p.seed, height, width, cache.recipe)
        assert sample.label == cache.inventory.label[p.sample] and p.key == cache.inventory.key(p.sample)
        unmixed = p.mode == "unmixed"
        assert (p.partner is None) == (p.partner_augmentation is None) == unmixed == (p.share == 1)
        assert (p.box is None) == (p.mode != "cutmix") and p.share == sample.share
        assert sample.partner_label == cache.inventory.label[p.sample if p.partner is None else p.partner]
        assert p.key in str(p) and (unmixed or f"with sample {p.partner}" in str(p))


def test_targets_at_any_blend_are_those_of_the_logits(cache: Cache, dataset: ReplayDataset) -> None:
    dense, image = random_logits(
        4, len(cache.classes), cache.grid, seed=2002
    )  # block 2, view 2; its second image is bad
    batch = dataset.__getitems__(dataset.index([10, 12, 13, 14], [2] * 4))
    for blend in (0, 0.25, 0.7, 1.0):
        logits = blend * dense + (1 - blend) * image[:, :, None, None]
        assert torch.equal(batch.targets.at(blend), logits.argmax(1))
        assert torch.equal(batch[2].targets.at(blend), logits[2].argmax(0))
        assert (batch.targets.logits_at(blend) - logits).abs().max() < 0.1
        assert torch.equal(batch.targets.logits_at(blend)[2], batch[2].targets.logits_at(blend))
    assert torch.equal(batch.targets.image_class, image.argmax(1)) and batch[0].targets.image_class.shape == ()
    assert (batch.targets.image_logits - image).abs().max() < 0.1 and batch[0].targets.image_logits.shape == (5,)
    for row, col in ((0, 0), (2, 1)):
        pieces = batch[1].targets.segments(row, col)
        assert pieces[0] == (int(image[1].argmax()), 0) and [at for _, at in pieces] == sorted(at for _, at in pieces)
        for (cls, start), (_, stop) in zip(pieces, [*pieces[1:], (0, 1 + 1 / BLEND_ONE)], strict=True):
            assert batch[1].targets.at(start)[row, col] == batch[1].targets.at(stop - 1 / BLEND_ONE)[row, col] == cls


@pytest.mark.parametrize("codec", ["envelope", "int8", "topk3"])
def test_what_a_cache_holds_decides_which_targets_can_be_asked_for(tmp_path: Path, codec: str) -> None:
    dataset = ReplayDataset(make_tiny_cache(tmp_path, [codec], n=5, views=1).root)
    targets = dataset[0].targets
    assert targets.at(0.5).shape == (3, 3) and targets.at(0.5).dtype == torch.int64
    assert torch.equal(targets.at(0), targets.image_class.expand(3, 3))
    if codec == "envelope":
        for ask in (lambda: targets.logits_at(0.5), lambda: targets.image_logits, lambda: targets.soft(0.5)):
            with pytest.raises(CodecError, match="int8"):
                ask()
        return
    assert torch.equal(targets.logits_at(0.5).argmax(0), targets.at(0.5))
    with pytest.raises(CodecError, match="envelope"):
        targets.segments(0, 0)


@pytest.mark.parametrize("method", ["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft"])
def test_the_losses_of_the_package_read_a_batch(dataset: ReplayDataset, method: Any) -> None:
    batch = dataset.__getitems__(range(6))
    output = StudentOutput(torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6, 5, 3, 3))
    targets = batch.targets.soft(0.5) if method.endswith("soft") else batch.targets.hard(0.5)
    loss, _ = DistillationLoss(LossConfig(method=method))(output, batch.labels, targets)
    assert loss.isfinite() and (
        method.endswith("soft") or loss.item() == pytest.approx(np.log(5) * (1 + ("cskd" in method)))
    )


def test_soft_labels_are_those_of_timm(dataset: ReplayDataset) -> None:
    batch = dataset.__getitems__(range(12))
    own, partner = (torch.nn.functional.one_hot(t, 5) for t in (batch.labels.label, batch.labels.partner))
    lam = batch.labels.lam[:, None]
    off, on = 0.1 / 5, 1 - 0.1 + 0.1 / 5
    expected = (own * on + (1 - own) * off) * lam + (partner * on + (1 - partner) * off) * (1 - lam)
    assert torch.allclose(batch.soft_labels(0.1), expected, atol=1e-6)
    assert torch.allclose(batch.soft_labels().sum(1), torch.ones(12))


def test_pixels_are_in_0_to_1_where_no_mean_and_std_are_given(root: Path, dataset: ReplayDataset) -> None:
    plain = ReplayDataset(root, codecs=["envelope"])[3].image
    assert 0 <= plain.min() < plain.max() <= 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose((plain - mean) / std, dataset[3].image, atol=1e-5)


def test_a_key_in_place_of_a_number_is_told_where_keys_go(dataset: ReplayDataset) -> None:
    with pytest.raises(
        TypeError, match=r"item 'a/b' is a text, expected a number; by its key: dataset\.sample\('a/b', view=0\)"
    ):
        dataset["a/b"]  # type: ignore[index]


@pytest.mark.parametrize("item", [63, -64, 10**9])
def test_an_item_that_is_not_there_ends_iteration_as_python_expects(dataset: ReplayDataset, item: int) -> None:
    with pytest.raises(IndexError, match="3 views of 21 images"):
        dataset[item]
    assert dataset[-1].parameters == dataset[62].parameters


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"views": 4}, ConfigError, "has 3"),
        ({"codecs": ["topk5"]}, CacheError, "envelope"),
        ({"data": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_a_dataset_that_can_not_be_is_refused(
    root: Path, arguments: dict[str, Any], error: type[CskdError], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        ReplayDataset(root, **arguments)
    assert len(str(caught.value)) <= 300
    with pytest.raises(CacheError, match="missing"):
        ReplayDataset(root / "missing")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"global_batch": 7}, PlanError),
        ({"global_batch": 100}, PlanError),
        ({"global_batch": 8, "repeats": 2}, PlanError),
        ({"global_batch": 8, "rank": 2, "ranks": 2}, ConfigError),
    ],
)
def test_a_plan_that_can_not_be_is_refused(
    dataset: ReplayDataset, arguments: dict[str, Any], error: type[CskdError]
) -> None:
    with pytest.raises(error):
        PlanSampler(dataset, **arguments)


@pytest.mark.parametrize(("batch", "micro", "rows"), [(8, 2, [2, 2, 4]), (10, 4, [4, 4, 2]), (6, 2, [2, 2, 2])])
def test_ranks_may_have_uneven_shares_whose_losses_count_by_their_weights(
    dataset: ReplayDataset, batch: int, micro: int, rows: list[int]
) -> None:
    """Together they feed what one rank does; an epoch goes on at a step."""
    plans = [PlanSampler(dataset, batch, seed=5, micro_batch=micro, rank=rank, ranks=3) for rank in range(3)]
    assert [plan.batch_size for plan in plans] == rows
    parts = []
    for plan in plans:
        plan.set_epoch(1, 1)
        parts.append(torch.tensor(list(plan)).reshape(-1, plan.batch_size))
        assert len(plan) == parts[-1].numel()
    alone = PlanSampler(dataset, batch, seed=5)
    alone.set_epoch(1, 1)
    together = torch.cat(parts, 1)
    assert together.flatten().tolist() == list(alone)
    weighted = [plan.weight * part.double().mean(1) for plan, part in zip(plans, parts, strict=True)]
    assert torch.allclose(torch.stack(weighted).mean(0), together.double().mean(1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"global_batch": 8, "ranks": 3}, "global_batch is 8 on 3 .*; use 6, or micro_batch=2 and plan.weight"),
        ({"global_batch": 10, "ranks": 3}, "; use 12, or micro_batch=4"),
        ({"global_batch": 7, "ranks": 2}, "; use 8$"),
        ({"global_batch": 8, "ranks": 3, "micro_batch": 3}, "micro_batch is 3, expected an even number"),
        ({"global_batch": 8, "ranks": 3, "micro_batch": 4}, "3 ranks share 2 micro-batches .*use micro_batch=2"),
        ({"global_batch": 4, "ranks": 3, "micro_batch": 2}, "use 6"),
    ],
)
def test_shares_that_can_not_be_are_refused_with_those_that_can(
    dataset: ReplayDataset, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(PlanError, match=match) as caught:
        PlanSampler(dataset, rank=0, **arguments)
    assert len(str(caught.value)) <= 300


def test_an_epoch_goes_on_at_a_step_and_differs_from_the_others(dataset: ReplayDataset) -> None:
    plan = PlanSampler(dataset, 4)
    first = list(plan)
    plan.set_epoch(0, step=2)
    assert list(plan) == first[8:] and len(plan) == len(first) - 8
    plan.set_epoch(1)
    assert {i // dataset.images for i in first} == {0} and {i // dataset.images for i in plan} == {1}
    with pytest.raises(ConfigError, match="0 or more"):
        plan.set_epoch(0, step=6)


def test_a_view_that_does_not_replay_is_refused_unless_asked_not_to(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, unchecked = ReplayDataset(root), ReplayDataset(root, verify_replay=False)
    made = ViewMaker.made

    def other(maker: ViewMaker, image: Any, seed: int) -> Any:
        params, pixels = made(maker, image, seed)
        return dataclasses.replace(params), pixels ^ 1

    monkeypatch.setattr(ViewMaker, "made", other)
    with pytest.raises(ReplayError, match="replays as digest"):
        checked[0]
    assert not torch.equal(unchecked[0].image, torch.zeros(3, 32, 32))


def test_units_that_were_read_are_kept_up_to_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = Cache.read

    def counted(cache: Cache, block: int, view: int, codec: str) -> Unit:
        reads.append((block, view))
        return read(cache, block, view, codec)

    monkeypatch.setattr(Cache, "read", counted)
    keeps, drops = (ReplayDataset(root, codecs=["envelope"], unit_bytes=n) for n in (1 << 20, 1))
    for dataset, expected in ((keeps, 2), (drops, 4)):
        reads.clear()
        for i in (0, 10, 1, 11, 12):
            dataset[i]
        assert len(reads) == expected


@pytest.mark.slow
def test_workers_started_anew_give_the_same_batches(dataset: ReplayDataset) -> None:
    plan = PlanSampler(dataset, 8)
    here = list(loader(dataset, plan))
    there: list[ReplayBatch] = list(loader(dataset, plan, num_workers=1, multiprocessing_context="spawn"))
    assert len(here) == len(there) == 2
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images) and a.parameters == b.parameters
        assert torch.equal(a.targets.at(0.5), b.targets.at(0.5))
        assert torch.equal(a.targets.logits_at(0.5), b.targets.logits_at(0.5))
