"""Memory of a step: micro-batches, recomputed activations, and one line where memory ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cskd.config import Config, TrainConfig
from cskd.errors import ConfigError, OutOfMemoryError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.out_of_memory import explained, is_out_of_memory, memory_of
from cskd.pipeline.setup import even_divisors, micro_batch_of
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.pipeline.train_step import micro_batches
from cskd.student.model import Student
from cskd.student.optim import reseed_step
from cskd.teacher.model import Teacher
from tests.pipeline.test_pipeline import cached_data, config, run_settings

CPU = torch.device("cpu")
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("memory"))


def settings(base: Path, output: Path, drop_path: float = 0.1, method: Any = "cskd-hard", **changes: Any) -> Config:
    made = run_settings(base, output, **{"epochs": 2, "max_steps": 4, "autocast": "none", **changes})
    student = dataclasses.replace(made.student, drop_path=drop_path)
    return dataclasses.replace(made, student=student, loss=dataclasses.replace(made.loss, method=method))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def full_above(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, rows: int) -> list[int]:
    """Let a method that takes a batch raise what CUDA's allocator does above so many rows. Returns those it was asked for."""
    real: Callable[..., Any] = getattr(cls, method)
    asked: list[int] = []

    def limited(self: Any, images: Tensor, *rest: Any) -> Any:
        asked.append(len(images))
        if len(images) > rows:
            raise torch.OutOfMemoryError(FULL)
        return real(self, images, *rest)

    monkeypatch.setattr(cls, method, limited)
    return asked


# --- micro-batches ---


@pytest.mark.parametrize("method", ["none", "cskd-hard", "cskd-soft"])
def test_a_step_of_micro_batches_is_the_step_of_the_batch_up_to_rounding(
    cached: Path, tmp_path: Path, method: str
) -> None:
    rows = {}
    for micro in (None, 4, 2):
        run = tmp_path / str(micro)
        # plain SGD: Adam makes the least rounding of a small gradient as large as the learning rate
        train(settings(cached, run, 0.0, method, micro_batch=micro, opt="sgd", clip_grad=None), quiet=True)
        rows[micro] = read_metrics(run)[-1]
    assert ("agreement" in rows[None]) == (method != "none")
    for micro in (4, 2):
        assert furthest(weights(tmp_path / "None"), weights(tmp_path / str(micro))) < 2e-6
        for name in ("loss", "loss_label", *(["loss_patch", "agreement"] if method != "none" else [])):
            assert rows[micro][name] == pytest.approx(rows[None][name], rel=1e-5)


def test_the_whole_batch_as_one_micro_batch_is_the_same_bytes(cached: Path, tmp_path: Path) -> None:
    for micro in (None, 8):
        train(settings(cached, tmp_path / str(micro), micro_batch=micro), quiet=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("None", "8"))
    assert one.read_bytes() == other.read_bytes()


def test_the_draws_of_a_micro_batch_follow_from_its_number_alone(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[tuple[int, int]] = []

    def noted(seed: int, step: int, part: int) -> None:
        numbers.append((step, part))
        reseed_step(seed, step, part)

    monkeypatch.setattr("cskd.pipeline.train_step.reseed_step", noted)
    train(settings(cached, tmp_path / "run", micro_batch=2, max_steps=2), quiet=True)
    assert numbers == [(step, part) for step in (0, 1) for part in range(4)]


def test_a_run_of_micro_batches_resumes_to_the_same_bytes(cached: Path, tmp_path: Path) -> None:
    for name, stops in (("whole", [6]), ("cut", [3, 6])):
        for stop in stops:
            train(settings(cached, tmp_path / name, micro_batch=2, max_steps=stop), quiet=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


def test_a_resumed_run_may_take_another_micro_batch_and_says_so(cached: Path, tmp_path: Path) -> None:
    train(settings(cached, tmp_path / "run", max_steps=2), quiet=True)
    changed = settings(cached, tmp_path / "run", micro_batch=4, grad_checkpointing=True)
    notes = train(changed, quiet=True).notes
    assert (
        "train.micro_batch changed from 8 to 4 at step 2: sums round otherwise, and drop path draws otherwise" in notes
    )
    assert "train.grad_checkpointing changed from false to true at step 2: results may round otherwise" in notes


def test_a_mixed_pair_is_in_one_micro_batch_with_its_partners_row() -> None:
    row = torch.arange(8)
    batch = {"label": row, "partner": row ^ 1, "pixels": row[:, None], "seconds": torch.zeros(2)}
    parts = micro_batches(batch, 4)
    assert [part["label"].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for part in parts:
        assert part["pixels"][part["partner"]][:, 0].tolist() == (part["label"] ^ 1).tolist()
    assert micro_batches(batch, 8)[0] is batch


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "use"), [(8, 16, 1, 8), (8, 4, 3, 2), (64, 32, 3, 22), (64, 22, 5, 14)]
)
def test_every_rank_has_a_micro_batch(tmp_path: Path, batch: int, micro: int, ranks: int, use: int) -> None:
    asked = TrainConfig(global_batch=batch, micro_batch=micro)
    with pytest.raises(
        ConfigError, match=rf"micro_batch is {micro}: .* for {ranks} rank\(s\), .* use {use} or less, or"
    ):
        micro_batch_of(asked, ranks)
    assert micro_batch_of(dataclasses.replace(asked, micro_batch=use), ranks) == use
    assert micro_batch_of(dataclasses.replace(asked, micro_batch=None), ranks) == use


def test_a_micro_batch_is_even_and_so_is_a_batch(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.micro_batch is 3, expected"):
        settings(cached, tmp_path / "run", micro_batch=3)
    assert even_divisors(24) == [24, 12, 8, 6, 4, 2]


# --- activations that are computed again ---


def test_recomputed_activations_give_the_same_weights(cached: Path, tmp_path: Path) -> None:
    for on in (False, True):
        train(settings(cached, tmp_path / str(on), 0.1, grad_checkpointing=on, max_steps=2), quiet=True)
    assert furthest(weights(tmp_path / "False"), weights(tmp_path / "True")) == 0


def test_blocks_keep_their_inputs_alone(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return real(*arguments, **named)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    train(settings(cached, tmp_path / "run", grad_checkpointing=True, max_steps=1), quiet=True)
    assert sum(calls) == 2  # the blocks of the student, in the one step; an evaluation keeps nothing anyway


def test_a_model_without_it_is_one_line(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing")
    with pytest.raises(
        Exception, match="grad_checkpointing is on, and deit_tiny_distilled_patch16_224 does not offer it"
    ):
        train(settings(cached, tmp_path / "run", grad_checkpointing=True), quiet=True)


# --- where memory ends ---


@pytest.mark.parametrize(
    ("rows", "fits"), [(4, ", 4 fit; set train.micro_batch=4,"), (3, ", 2 fit; set"), (1, "; set a ")]
)
def test_stage_2_names_the_micro_batch_that_fits(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, fits: str
) -> None:
    asked = full_above(monkeypatch, Student, "forward", rows)
    with pytest.raises(OutOfMemoryError) as caught:
        train(settings(cached, tmp_path / "run"), quiet=True)
    said = str(caught.value)
    assert said.startswith(f"out of memory on cpu with 8 views at once{fits}") and len(said) <= 300
    assert "or train.grad_checkpointing=true, or a smaller train.global_batch" in said
    assert asked == [8, 4, 2][: len(asked)] and asked[-1] == (2 if rows < 4 else 4)
    if rows > 1:  # what it says helps
        micro = asked[-1]
        assert train(settings(cached, tmp_path / "run", micro_batch=micro), quiet=True).steps == 4


def test_memory_that_ends_in_the_backward_pass_is_tried_as_a_whole_step(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Tensor.backward
    heads: list[int] = []

    def limited(self: Tensor, *arguments: Any, **named: Any) -> None:
        if heads[-1] > 4:
            raise torch.OutOfMemoryError(FULL)
        real(self, *arguments, **named)

    seen = Student.forward

    def noted(self: Student, images: Tensor, *rest: Any) -> Any:
        heads.append(len(images))
        return seen(self, images, *rest)

    monkeypatch.setattr(Student, "forward", noted)
    monkeypatch.setattr(Tensor, "backward", limited)
    with pytest.raises(OutOfMemoryError, match="8 views at once, 4 fit"):
        train(settings(cached, tmp_path / "run"), quiet=True)


def test_stage_1_names_the_batch_that_fits_and_what_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: Path
) -> None:
    full_above(monkeypatch, Teacher, "outputs_of", 4)
    monkeypatch.setattr("cskd.pipeline.cache_teacher.clean_check", _Check)
    made = dataclasses.replace(
        config(cached), cache=dataclasses.replace(config(cached).cache, path=str(tmp_path / "c"))
    )
    monkeypatch.setattr(Teacher, "probe", lambda self: {"autocast": "none", "global": [], "dense": []})
    monkeypatch.setattr("cskd.pipeline.cache_teacher.compare_probe", lambda *_: "")
    with pytest.raises(OutOfMemoryError) as caught:
        cache_teacher(made, quiet=True)
    assert str(caught.value) == (
        "out of memory on cpu with teacher.batch 8, 4 fit; set teacher.batch=4, which is part of the fingerprint: the cache "
        "was begun with 8, another one needs another cache.path"
    )


class _Check:
    """What the clean-image check finds; it runs the teacher in a way that this file does not limit."""

    def __init__(self, *_: Any) -> None:
        self.top1, self.images, self.data = 1.0, 1, "val"
        self.notes: list[str] = []


def test_an_evaluation_names_the_batch_that_fits(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(cached, tmp_path / "run", max_steps=1), quiet=True)
    full_above(monkeypatch, Student, "forward", 3)
    with pytest.raises(OutOfMemoryError, match="cpu with 8 images at once; set --batch 2, which fit"):
        evaluate_checkpoint(tmp_path / "run", cached / "val", 8, 0, None, "cpu", True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(FULL),
        MemoryError("Unable to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_say_it_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(OutOfMemoryError, match="out of memory on cpu, and more"),
        explained(CPU, lambda _: ", and more"),
    ):
        raise error


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 2 GiB"), RuntimeError("can't allocate memory")])
def test_memory_of_the_machine_that_ends_is_not_said_to_be_the_gpus(error: Exception) -> None:
    """As in a loader worker: a smaller micro-batch would not help."""
    cuda = torch.device("cuda", 0)
    with (
        pytest.raises(OutOfMemoryError, match="on the machine, not on cuda:0; use fewer loader workers") as caught,
        explained(cuda, lambda _: "; set a smaller train.micro_batch"),
    ):
        raise error
    assert "micro_batch" not in str(caught.value)


def test_the_allocator_of_the_cpu_says_it_so_and_no_smaller_batch_is_tried() -> None:
    tried: list[int] = []
    with (
        pytest.raises(OutOfMemoryError, match="cpu None"),
        explained(CPU, lambda probe: f" {probe([1], tried.append)}"),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)
    assert not tried


def test_other_errors_stay_what_they_are() -> None:
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes differ"), explained(CPU, lambda _: ""):
        raise RuntimeError("shapes differ")


def test_tensors_of_the_failed_work_are_let_go_before_a_smaller_batch_is_tried() -> None:
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        activation = torch.zeros(4)
        held.append(weakref.ref(activation))
        raise torch.OutOfMemoryError(FULL)

    def attempt(rows: int) -> None:
        assert held[-1]() is None
        if rows > 1:
            work()

    with (
        pytest.raises(OutOfMemoryError, match="fits 1"),
        explained(CPU, lambda probe: f"fits {probe([4, 2, 1], attempt)}"),
    ):
        work()
    assert len(held) == 3


def test_a_cuda_device_says_how_much_it_has_and_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 << 30)
    said = memory_of(torch.device("cuda", 0))
    assert said == "cuda:0 (80.0 GiB, 9.0 of them held by others and the driver)"
