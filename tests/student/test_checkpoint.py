"""What a run leaves on disk: states that continue bit for bit, and checkpoints that timm loads."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cskd.config import Config, LossConfig, StudentConfig, TrainConfig
from cskd.errors import StudentError
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels
from cskd.method.terms import HEADS
from cskd.student import build_student, eval_heads
from cskd.student.checkpoint import ResumeStates, TrainState, export, load_student
from cskd.student.model import Student
from cskd.student.optim import Optimisation, reseed_step

DEIT, PLAIN = "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
Run = tuple[Student, Optimisation]
NAMES = [f"n{i}" for i in range(7)]


def start(
    seed: int = 0,
    model: str = DEIT,
    kwargs: dict[str, Any] = TINY,
    size: int | tuple[int, int] = 32,
    **train: Any,
) -> Run:
    """A fresh run: student and optimisation. Weights differ with the seed."""
    torch.manual_seed(seed)
    student = build_student(StudentConfig(model, kwargs, drop_path=0.5), 7, size)
    return student, Optimisation(student, TrainConfig(**{"ema": 0.9, "epochs": 3, "warmup_epochs": 1, **train}), 4)


@torch.enable_grad()
def advance(run: Run, first: int, stop: int) -> Run:
    """Train steps first .. stop-1 on data that depends on the step only."""
    student, optimisation = run
    loss = DistillationLoss(LossConfig("cskd-hard"))
    for step in range(first, stop):
        data = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, *student.image_size, generator=data)
        label, cells = torch.randint(7, (4,), generator=data), torch.randint(7, (4, 2, 2), generator=data)
        reseed_step(0, step, 0)
        output = student.train()(images, (2, 2))
        total, _ = loss(output, MixedLabels(label, label, torch.ones(4)), HardTargets(label, cells))
        optimisation.update(total, step)
    return run


def everything(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All tensors and numbers a run consists of."""
    student, optimisation = run
    found: dict[str, Any] = {f"model/{k}": v for k, v in student.state_dict().items()}
    if optimisation.averaged is not None:
        found |= {f"ema/{k}": v for k, v in optimisation.averaged.state_dict().items()}
    state = optimisation.optimizer.state_dict()
    found |= {f"{i}/{k}": v for i, s in state["state"].items() for k, v in s.items()}
    return found, [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]


def average_of(optimisation: Optimisation) -> Student:
    assert optimisation.averaged is not None
    return optimisation.averaged


def head_of(student: Student) -> Tensor:
    return student.backbone.get_parameter("head.weight")


def loaded_by(states: ResumeStates, run: Run) -> TrainState:
    state = states.load(*run)
    assert state is not None
    return state


def assert_same(a: Run, b: Run) -> None:
    (tensors_a, groups_a), (tensors_b, groups_b) = everything(a), everything(b)
    assert groups_a == groups_b
    assert tensors_a.keys() == tensors_b.keys()
    for name, value in tensors_a.items():
        other = tensors_b[name]
        same = torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
        assert same, name


@pytest.mark.parametrize(
    "train",
    [{}, {"ema": None}, {"opt": "lamb"}, {"opt": "nadamw"}, {"opt": "sgd", "clip_grad": 0.1}, {"opt": "adopt"}],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, train: dict[str, Any]) -> None:
    through = advance(start(**train), 0, 6)
    half = advance(start(**train), 0, 3)
    states = ResumeStates(tmp_path)
    states.save(*half, TrainState(3, {"epoch": 0, "best": 0.125}))
    resumed = start(seed=1, **train)
    state = loaded_by(states, resumed)
    assert (state.step, state.info, state.warnings) == (3, {"epoch": 0, "best": 0.125}, [])
    assert_same(resumed, half)
    assert_same(advance(resumed, 3, 6), through)
    assert not torch.equal(head_of(half[0]), head_of(through[0]))


def test_drop_path_makes_the_step_random_so_that_its_seed_matters(tmp_path: Path) -> None:
    """The test above would pass without `reseed_step` if nothing were random."""
    student, _ = start()
    images = torch.randn(4, 3, 32, 32)
    outputs = []
    for step in (0, 0, 1):
        reseed_step(0, step, 0)
        outputs.append(student.train()(images).cls_logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_without_a_state_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert ResumeStates(tmp_path / "none").load(*start()) is None


def test_the_newest_states_are_kept(tmp_path: Path) -> None:
    states, run = ResumeStates(tmp_path, keep=2), start()
    for step in (1, 2, 30):
        (tmp_path / ".step-00000009.safetensors.1.tmp").write_bytes(b"of a killed run")
        states.save(*run, TrainState(step))
    assert sorted(os.listdir(tmp_path)) == ["step-00000002.safetensors", "step-00000030.safetensors"]
    assert loaded_by(states, run).step == 30


def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    states, run = ResumeStates(tmp_path, keep=3), advance(start(), 0, 2)
    paths = [states.save(*run, TrainState(step)) for step in (1, 2, 3)]
    whole = paths[2].read_bytes()
    damaged = [whole[:-1], whole[: len(whole) // 2], b"", *(flip(whole, at) for at in range(0, len(whole), 80_011))]
    for data in damaged:
        paths[2].write_bytes(data)
        state = loaded_by(states, start(seed=1))
        assert state.step == 2
        assert len(state.warnings) == 1
        assert f"{paths[2]} is damaged" in state.warnings[0]
    paths[1].write_bytes(b"")
    assert (state := loaded_by(states, run)).step == 1
    assert len(state.warnings) == 2
    states.keep = 1
    states.save(*run, TrainState(2))  # what lies beyond was of no use: it must not crowd out this one
    assert os.listdir(tmp_path) == [paths[1].name]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_nothing_is_started_anew_when_every_state_is_damaged(tmp_path: Path) -> None:
    states, run = ResumeStates(tmp_path), start()
    states.save(*run, TrainState(1)).write_bytes(b"")
    with pytest.raises(StudentError, match=r"every state in .* is damaged"):
        states.load(*run)


def test_a_failed_write_leaves_the_states_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, run = ResumeStates(tmp_path), start()
    states.save(*run, TrainState(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudentError, match="No space left"):
        states.save(*run, TrainState(2))
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]
    assert loaded_by(states, run).step == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kwargs": TINY | {"embed_dim": 60}}, r"another config \(model blocks.0.attn.proj.bias: 48 there, 60 here"),
        ({"kwargs": TINY | {"depth": 3}}, "another config"),
        ({"ema": None}, "another config .*train.ema"),
        ({"opt": "lamb"}, "state of AdamW, train.opt makes Lamb"),
        ({"weight_decay": 0.0}, "groups parameters otherwise"),
    ],
)
def test_a_state_of_another_config_is_refused_and_changes_nothing(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    states = ResumeStates(tmp_path)
    states.save(*advance(start(), 0, 1), TrainState(1))
    run, same = start(seed=1, **other), start(seed=1, **other)
    with pytest.raises(StudentError, match=message):
        states.load(*run)
    assert_same(run, same)


def test_a_state_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, run = ResumeStates(tmp_path), start()
    monkeypatch.setattr("cskd.student.resume.STATE_FORMAT", 2)
    states.save(*run, TrainState(1))
    monkeypatch.undo()
    with pytest.raises(StudentError, match="has format 2, expected 1; update cskd"):
        states.load(*run)


def test_an_optimiser_whose_state_is_no_numbers_is_refused(tmp_path: Path) -> None:
    run = advance(start(), 0, 1)
    optimizer = run[1].optimizer
    optimizer.state[optimizer.param_groups[0]["params"][0]]["odd"] = object()
    with pytest.raises(StudentError, match="AdamW can't be resumed"):
        ResumeStates(tmp_path).save(*run, TrainState(1))


# --- the checkpoint ---

# Losses that leave a head of a distilled student untrained: what timm's forward must give all the same.
PARTLY = {
    "baseline": (LossConfig("none"), "class"),
    "labels and cells": (LossConfig("cskd-hard", alpha=0.0), "class"),
    "teacher alone": (LossConfig("deit-hard", alpha=1.0), "distillation"),
    "labels alone": (LossConfig("deit-hard", alpha=0.0), "class"),
    "both heads": (LossConfig("none", baseline_head="mean"), "class+distillation"),
}

KINDS: dict[str, tuple[str, dict[str, Any], int | tuple[int, int]]] = {
    "distilled": (DEIT, TINY, 32),
    "plain": (PLAIN, TINY, 32),
    "average pool": (PLAIN, TINY | {"global_pool": "avg"}, 32),
    "registers": (PLAIN, TINY | {"reg_tokens": 4, "no_embed_class": True}, 32),
    "not square": (DEIT, TINY, (32, 48)),
    "dynamic": (DEIT, TINY | {"dynamic_img_size": True}, 32),
}


def exported(tmp_path: Path, kind: str = "distilled", ema: float | None = 0.9) -> tuple[Path, Student, Optimisation]:
    model, kwargs, size = KINDS[kind]
    run = advance(start(model=model, kwargs=kwargs, size=size, ema=ema), 0, 2)
    config = Config(student=StudentConfig(model, kwargs, drop_path=0.5), train=TrainConfig(ema=ema))
    export(tmp_path / "run", *run, config, NAMES, step=2)
    return tmp_path / "run", *run


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_loads_the_checkpoint_by_folder_and_by_file(tmp_path: Path, kind: str) -> None:
    folder, student, optimisation = exported(tmp_path, kind)
    model, kwargs, size = KINDS[kind]
    images = torch.randn(2, 3, *student.image_size)
    want = average_of(optimisation).backbone(images)
    by_folder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(by_folder(images), want)
    by_file = timm.create_model(
        model, checkpoint_path=str(folder / "model.safetensors"), num_classes=7, **({"img_size": size} | kwargs)
    )
    assert torch.equal(by_file.eval()(images), want)
    assert list(by_folder.pretrained_cfg["label_names"]) == NAMES
    data = timm.data.resolve_model_data_config(by_folder)
    assert tuple(data["input_size"]) == (3, *student.image_size)
    assert (list(data["mean"]), list(data["std"]), data["crop_pct"]) == (student.mean, student.std, 0.875)


@torch.no_grad()
def test_averaged_weights_are_the_model_and_live_ones_lie_beside(tmp_path: Path) -> None:
    folder, student, optimisation = exported(tmp_path)
    head = "head.weight"
    assert torch.equal(load_file(folder / "model.safetensors")[head], head_of(average_of(optimisation)))
    assert torch.equal(load_file(folder / "model_last.safetensors")[head], head_of(student))
    assert json.loads((folder / "config.json").read_text())["cskd"]["weights"] == "ema: decay 0.9 with warm-up"
    folder, student, _ = exported(tmp_path, ema=None)  # over the one before
    assert torch.equal(load_file(folder / "model.safetensors")[head], head_of(student))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_student_is_loaded_with_its_patch_logits(tmp_path: Path, kind: str) -> None:
    folder, student, optimisation = exported(tmp_path, kind)
    images = torch.randn(2, 3, *student.image_size)
    for path, original in ((folder, average_of(optimisation)), (folder / "model_last.safetensors", student.eval())):
        loaded, facts = load_student(path)
        assert not loaded.training
        assert (loaded.image_size, loaded.mean, facts["label_names"]) == (student.image_size, student.mean, NAMES)
        for a, b in zip(loaded(images, (2, 4)), original(images, (2, 4)), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def exported_by(tmp_path: Path, loss: LossConfig) -> tuple[Path, Student, Student]:
    student, optimisation = start(ema=0.9)
    averaged = average_of(optimisation)
    for one in (student, averaged):
        one.taught_by(loss)
    advance((student, optimisation), 0, 2)
    config = Config(student=StudentConfig(DEIT, TINY, drop_path=0.5), loss=loss, train=TrainConfig(ema=0.9))
    export(tmp_path / "run", student, optimisation, config, NAMES, step=2)
    return tmp_path / "run", student.eval(), averaged


@pytest.mark.parametrize("kind", PARTLY)
@torch.no_grad()
def test_timm_computes_the_heads_that_were_trained_and_no_other(tmp_path: Path, kind: str) -> None:
    loss, score = PARTLY[kind]
    folder, student, averaged = exported_by(tmp_path, loss)
    facts = json.loads((folder / "config.json").read_text())["cskd"]["heads"]
    assert (facts["score"], facts["trained"]) == (score, list(student.trained))
    images = torch.randn(2, 3, *student.image_size)
    kwargs: dict[str, Any] = {"num_classes": 7, "img_size": 32, **TINY}
    for name, original in (("model", averaged), ("model_last", student)):
        want = eval_heads(original(images, (1, 1)), original.trained)[score]
        vit = timm.create_model(DEIT, checkpoint_path=str(folder / f"{name}.safetensors"), **kwargs)
        assert torch.equal(vit.eval()(images), want)
        loaded, _ = load_student(folder / f"{name}.safetensors")
        assert loaded.trained == student.trained
        for own, other in zip(loaded(images, (2, 2))[:3], original(images, (2, 2))[:3], strict=True):
            assert torch.equal(own, other)
    by_folder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(by_folder(images), eval_heads(averaged(images, (1, 1)), averaged.trained)[score])
    warm = build_student(StudentConfig(DEIT, TINY, init=str(folder)), 7, 32).eval()
    only = [
        note for note in warm.notes if note.endswith(f"only the heads {' and '.join(student.trained)} were trained")
    ]
    assert len(only) == ("+" not in score)
    for own, other in zip(warm(images, (2, 2))[:3], averaged(images, (2, 2))[:3], strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("heads", [{"times": {"head": 3.0}}, {"times": []}, {"trained": ["nose"]}, {"trained": []}, []])
def test_heads_that_no_run_records_are_refused(tmp_path: Path, heads: Any) -> None:
    folder, *_ = exported_by(tmp_path, LossConfig("none"))
    facts = json.loads((folder / "config.json").read_text())
    facts["cskd"]["heads"] = facts["cskd"]["heads"] | heads if heads else heads
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(StudentError, match=r"config\.json") as refusal:
        load_student(folder)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("none", ("class", "distillation")),
        ("deit-hard", ("class", "distillation")),
        (None, HEADS),
        ("cskd-soft", HEADS),
    ],
)
def test_a_run_of_an_earlier_version_is_read_as_it_was_trained(
    tmp_path: Path, method: str | None, trained: tuple[str, ...]
) -> None:
    folder, student, _ = exported(tmp_path)
    facts = json.loads((folder / "config.json").read_text())
    facts["cskd"] = {"method": method} if method else {}
    (folder / "config.json").write_text(json.dumps(facts))
    loaded, _ = load_student(folder / "model_last.safetensors")
    assert loaded.trained == trained
    assert torch.equal(head_of(loaded), head_of(student))


def test_a_checkpoint_starts_another_student_at_another_resolution(tmp_path: Path) -> None:
    folder, *_ = exported(tmp_path, "not square")
    student = build_student(StudentConfig(DEIT, TINY, init=str(folder)), 7, 64)
    assert [n.partition(" of ")[0] for n in student.notes] == ["position embeddings"]
    assert "from 8 x 12 to 16 x 16" in student.notes[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"no file .*model.safetensors; give the folder of a run"):
        load_student(tmp_path)
    folder, *_ = exported(tmp_path)
    (folder / "model_last.safetensors").write_bytes(b"garbage")
    with pytest.raises(StudentError, match="does not fit"):
        load_student(folder / "model_last.safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(StudentError, match="not a run's config"):
        load_student(folder)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_files_have_the_modes_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder, student, optimisation = exported(tmp_path)
        state = ResumeStates(folder / "resume").save(student, optimisation, TrainState(2))
    finally:
        os.umask(before)
    for path in (folder / "model.safetensors", folder / "config.json", state):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_state_is_tensors_and_json(tmp_path: Path) -> None:
    path = ResumeStates(tmp_path).save(*advance(start(), 0, 1), TrainState(1))
    with safe_open(path, framework="pt") as f:
        body = json.loads(f.metadata()["cskd"])
        names = set(f.keys())
    assert {"model/head.weight", "ema/head.weight", "optimizer/head.weight/exp_avg"} <= names
    assert (body["format"], body["step"], body["optimizer"]) == (1, 1, "AdamW")
