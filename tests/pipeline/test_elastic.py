"""A run goes on with any number of ranks, and states are saved when the clock or a signal asks for them."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cskd.pipeline.train
from cskd.config import Config
from cskd.config.every import Every, every
from cskd.errors import ConfigError
from cskd.loading.sources import Batch
from cskd.machine import ending, stops
from cskd.machine.ranks import Ranks
from cskd.machine.threads import choose_threads
from cskd.pipeline.conflicts import micro_batch_begun, run_identity
from cskd.pipeline.saving import LOOK, Pace
from cskd.pipeline.setup import micro_batch_of
from cskd.pipeline.train import train
from cskd.pipeline.train_step import TrainStep
from cskd.pipeline.training_run import TrainingRun, open_run
from tests.pipeline.test_pipeline import cached_data, run_settings

CPU = torch.device("cpu")
DROPOUT = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.1}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("elastic"))


def settings(base: Path, output: Path, **changes: Any) -> Config:
    made = run_settings(base, output, **{"epochs": 2, "autocast": "none", "opt": "sgd", **changes})
    student = dataclasses.replace(made.student, kwargs={**made.student.kwargs, **DROPOUT})
    return dataclasses.replace(made, student=student)


# --- the sum of a step ---


def gradients(run: TrainingRun, batch: Batch, ranks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """What ranks that each have their share of a batch get as the mean of their gradients, and of their losses."""
    found, losses = [], []
    for rank in range(ranks):
        plan = dataclasses.replace(run.plan, ranks=ranks)
        mine = dataclasses.replace(run, ranks=Ranks(rank, ranks), plan=plan)
        share = plan.share(rank)
        rows = {name: t[share.start : share.start + share.rows] for name, t in batch.items()}
        rows["partner"] = rows["partner"] - share.start
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "averaging", lambda one, net: net)
            patch.setattr(run.optimisation, "update", lambda loss, step: run.optimisation.accumulate(loss))
            loss, terms = TrainStep(mine)(rows, 1, 3, {"teacher": 0.0, "student": 0.0})
        found.append(torch.cat([p.grad.flatten() for p in run.student.parameters() if p.grad is not None]))
        losses.append(torch.stack([loss, *terms.values()]))
        run.optimisation.optimizer.zero_grad(set_to_none=True)
    return torch.stack(found).mean(0), torch.stack(losses).mean(0)


@pytest.mark.parametrize("micro", [2, 6])
def test_any_number_of_ranks_sums_the_same_gradients(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """With dropout and drop path; 16 views in micro-batches of 6, of which the last has 4, are uneven on 2 ranks and even on 3."""
    made = settings(cached, tmp_path / "run", micro_batch=micro, global_batch=16)
    threads = choose_threads(1, "train.threads", 0, gpu=False)
    run = open_run(made, Ranks(), CPU, False, False, True, threads, None)
    tasks, batches = run.batches()
    with tasks:
        batch = dict(next(batches))
    alone = gradients(run, batch, 1, monkeypatch)
    assert torch.equal(alone[0], gradients(run, batch, 1, monkeypatch)[0])
    for ranks in (2, 3):
        for mine, whole in zip(gradients(run, batch, ranks, monkeypatch), alone, strict=True):
            torch.testing.assert_close(mine, whole, rtol=2e-4, atol=2e-6)


# --- another number of ranks ---


@pytest.mark.parametrize(
    ("record", "ranks", "grain"),
    [
        ({"micro_batch": 16}, 1, 16),
        ({"micro_batch": 16}, 3, 16),
        ({"micro_batch": 16}, 5, 14),  # one would go without: as many as they need
        ({"micro_batch": None}, 1, 32),  # of an earlier version, where two ranks had one each
        ({"micro_batch": None}, 4, 16),
        ({"micro_batch": "x"}, 1, 64),
        (None, 2, 32),
    ],
)
def test_null_is_the_micro_batch_that_a_run_was_begun_with(record: Any, ranks: int, grain: int) -> None:
    begun = None if record is None else {"ranks": 2, "train": {"global_batch": 64, **record}}
    asked = settings(Path("base"), Path("run"), global_batch=64).train
    assert micro_batch_of(asked, ranks, micro_batch_begun(begun)) == grain


def test_a_run_that_was_begun_with_two_ranks_goes_on_alone_with_one_warning(cached: Path, tmp_path: Path) -> None:
    """Its state says two; here one rank made it, of the same micro-batches."""
    train(settings(cached, tmp_path / "whole", micro_batch=4, max_steps=6), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cskd.pipeline.training_run.run_identity", lambda *a, **k: run_identity(*a, **k) | {"ranks": 2})
        train(settings(cached, tmp_path / "run", micro_batch=4, max_steps=3), quiet=True)
    notes = train(settings(cached, tmp_path / "run", max_steps=6), quiet=True).notes
    (note,) = [note for note in notes if "at step 3" in note]
    assert note.startswith("ranks changed from 2 to 1 at step 3: the same views are fed, and drop path draws the same")
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


# --- when a state is saved ---


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Asks for a stop, as a signal does."""
    monkeypatch.setattr(stops, "_asked", False)
    yield lambda: monkeypatch.setattr(stops, "_asked", True)


@pytest.mark.parametrize(
    ("value", "means"),
    [(0, Every()), (500, Every(steps=500)), ("15min", Every(seconds=900)), ("1.5 h", Every(seconds=5400)), ("90s", Every(seconds=90))],
)  # fmt: skip
def test_how_often_is_steps_or_a_time(value: Any, means: Every) -> None:
    assert every(value) == means


@pytest.mark.parametrize("value", ["15", "15m", "0min", "-1s", "", "soon", -1, "1e3s", "1 day"])
def test_what_is_neither_is_refused_with_an_example(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"train.save_every is .*, expected .*15min"):
        run_settings(Path("base"), Path("run"), save_every=value)


def test_a_state_is_saved_by_the_clock_and_after_each_stretch_of_it_again() -> None:
    clock = Clock()
    pace = Pace(Every(seconds=60), Ranks(), CPU, clock=clock)
    due = []
    for step in range(1, 13):
        clock.now += 25
        if pace.due(step):
            due.append(step)
            pace.saved()
    assert due == [3, 6, 9, 12] and not pace.stop
    assert [s for s in range(1, 10) if Pace(Every(steps=4), Ranks(), CPU, clock=clock).due(s)] == [4, 8]


class Together:
    """Ranks in threads, with a sum over them; it counts the sums."""

    def __init__(self, count: int) -> None:
        self.given: list[list[float]] = [[] for _ in range(count)]
        self.sums, self.met = 0, threading.Barrier(count)

    def rank(self, number: int) -> Ranks:
        outer = self

        class One(Ranks):
            def sum(self, x: Tensor) -> Tensor:
                outer.given[number] = x.tolist()
                outer.met.wait(10)
                total = torch.tensor(outer.given).sum(0)
                outer.met.wait(10)
                outer.sums += number == 0
                return total

        return One(number, len(self.given))

    def steps(self, count: int, seconds: float, every: Every) -> list[list[int]]:
        """Steps that each rank saves at, of so many: of so many seconds each on the first, less on the others; to the stop."""

        def run(number: int) -> list[int]:
            clock, due = Clock(), []
            pace = Pace(every, self.rank(number), CPU, clock=clock)
            for step in range(1, count + 1):
                clock.now += seconds / (number + 1)
                here.rank, here.step = number, step
                if pace.due(step):
                    due.append(step)
                    pace.saved()
                if pace.stop:
                    break
            return due

        with ThreadPoolExecutor(len(self.given)) as pool:
            return list(pool.map(run, range(len(self.given))))


here = threading.local()


def test_ranks_save_by_the_first_ones_clock_and_seldom_ask_each_other() -> None:
    together = Together(3)
    first, *others = together.steps(600, 0.25, Every(seconds=60))
    assert others == [first, first]
    assert len(first) == 2 and 240 <= first[0] <= 240 + 2 * LOOK / 0.25, first
    assert together.sums < 600 * 0.25 / LOOK
    first, *others = Together(2).steps(30, 0.25, Every(steps=7))
    assert first == others[0] == [7, 14, 21, 28]


@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_that_is_asked_stops_all_of_them_at_one_step(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    monkeypatch.setattr(stops, "asked", lambda: here.rank == asked and here.step >= 70)
    first, other = Together(2).steps(200, 0.1, Every())
    assert first == other and len(first) == 1 and 70 <= first[0] <= 70 + 2 * LOOK / 0.1


def test_a_run_saves_states_by_the_clock(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def ticking() -> float:
        clock.now += 60  # looked at once when it is made, once a step, and once when a state was saved
        return clock.now

    monkeypatch.setattr(cskd.pipeline.train, "Pace", functools.partial(Pace, clock=ticking))
    train(settings(cached, tmp_path / "run", save_every="2min", keep=10, max_steps=4), quiet=True)
    assert [int(p.stem[-8:]) for p in sorted((tmp_path / "run" / "resume").iterdir())] == [2, 4]


# --- a signal ---


@pytest.mark.parametrize("kind", stops.ASKS)
def test_a_signal_saves_a_state_at_the_next_step_and_the_same_command_goes_on(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: signal.Signals, asks: object
) -> None:
    """Twice, as where a batch system signals every process and torchrun passes its own on."""
    made, real, at = settings(cached, tmp_path / "run", max_steps=4), TrainStep.__call__, 2
    train(settings(cached, tmp_path / "whole", max_steps=4), quiet=True)

    def signalled(self: TrainStep, batch: Batch, epoch: int, step: int, seconds: Any) -> Any:
        for _ in range(2 if step + 1 == at else 0):
            os.kill(os.getpid(), kind)
        return real(self, batch, epoch, step, seconds)

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, *stops.ASKS)}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(TrainStep, "__call__", signalled)
        ending.ended(lambda: train(made, quiet=True))
    for one, handler in before.items():
        signal.signal(one, handler)
    assert left.value.code == 143 and "interrupted; go on with: " in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "resume").glob("step-*")] == [f"step-{at:08d}.safetensors"]
    monkeypatch.setattr(stops, "_asked", False)
    assert train(made, quiet=True).steps == 4 - at
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_evaluation(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: Callable[[], None]
) -> None:
    """The epoch is finished and written down, then the run ends; it would be 5 steps an epoch."""

    def export(run: TrainingRun, step: int) -> str:  # as the loop does once it has evaluated
        asks()
        return ""

    monkeypatch.setattr(TrainingRun, "export", export)
    with pytest.raises(SystemExit) as left:
        train(settings(cached, tmp_path / "run"), quiet=True)
    assert left.value.code == stops.EXIT
    (state,) = (tmp_path / "run" / "resume").glob("step-*")
    assert state.name == "step-00000005.safetensors"


def test_where_nobody_looks_a_signal_unwinds_at_once(asks: object) -> None:
    assert not stops.ask() and not stops.asked()
    with stops.heeded():
        assert stops.ask() and stops.asked()
    assert stops.ask()  # again, on the way out
