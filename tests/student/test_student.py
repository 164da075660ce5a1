"""The student's heads, patch logits and starting weights; its optimiser."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from cskd.config import LossConfig, StudentConfig, TrainConfig
from cskd.config.schema import Method
from cskd.errors import ConfigError, StudentError
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels
from cskd.student import StudentOutput, build_student, eval_heads
from cskd.student.model import Student
from cskd.student.optim import Optimisation, reseed_step, scaled_lr, schedule_notes

DEIT, PLAIN = "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "distilled": (DEIT, {}),
    "plain": (PLAIN, {}),
    "registers": (PLAIN, {"reg_tokens": 4, "no_embed_class": True}),
    "no class token": (PLAIN, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
}


def build(
    model: str = DEIT,
    classes: int = 7,
    size: int | tuple[int, int] = 32,
    drop_path: float = 0.0,
    init: Path | None = None,
    **kwargs: Any,
) -> Student:
    torch.manual_seed(0)
    config = StudentConfig(model, TINY | kwargs, drop_path=drop_path, init=None if init is None else str(init))
    student = build_student(config, classes, size)
    if init is None:  # timm starts heads near zero: make the logits tell something
        for name, p in student.backbone.named_parameters():
            if "head" in name:
                torch.nn.init.normal_(p, std=0.5)
    return student.eval()


def images(h: int = 32, w: int = 32, n: int = 3) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(1))


def patch_head(student: Student) -> Any:
    return student.backbone.head_dist if student.distilled else student.backbone.head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (2, 4), (1, 1), (3, 5)])
@torch.no_grad()
def test_patch_logits_are_the_pooled_logits_of_the_single_patches(kind: str, grid: tuple[int, int]) -> None:
    model, kwargs = KINDS[kind]
    student = build(model, **kwargs)
    tokens = student.backbone.forward_features(images())[:, student.backbone.num_prefix_tokens :]
    assert tokens.shape[1] == 64
    every = patch_head(student)(tokens).transpose(1, 2).reshape(3, 7, 8, 8)  # all 64 patches classified
    got = student(images(), grid).patch_logits
    assert got.shape == (3, 7, *grid)
    torch.testing.assert_close(got, torch.nn.functional.adaptive_avg_pool2d(every, grid), rtol=0, atol=1e-5)
    assert student.notes == []


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_class_and_distillation_logits_are_timms(kind: str) -> None:
    model, kwargs = KINDS[kind]
    student = build(model, **kwargs)
    output = student(images())
    assert output.patch_logits is None
    if student.distilled:
        vit: Any = student.backbone.train()
        vit.set_distilled_training(True)
        assert all(torch.equal(a, b) for a, b in zip(output[:2], vit(images()), strict=True))
        assert torch.equal(eval_heads(output)["class+distillation"], vit.eval()(images()))
    else:
        assert output.dist_logits is None
        assert torch.equal(output.cls_logits, student.backbone(images()))


@torch.no_grad()
def test_a_norm_before_the_head_is_applied_after_pooling_and_said() -> None:
    student = build(PLAIN, global_pool="avg")
    vit: Any = student.backbone
    torch.nn.init.normal_(vit.fc_norm.weight)
    [note] = student.notes
    assert "norm before its head" in note
    output = student(images(), (1, 1))
    torch.testing.assert_close(output.patch_logits[:, :, 0, 0], output.cls_logits)  # pool, norm, head, as timm does
    tokens = vit.forward_features(images())[:, 1:]
    assert not torch.allclose(vit.head(vit.fc_norm(tokens)).mean(1), output.cls_logits, atol=1e-3)  # the note is true


@torch.no_grad()
def test_rows_and_columns_of_a_grid_that_is_not_square_stay_apart() -> None:
    student = build(size=(32, 48))
    assert student.patch_grid == (8, 12)
    x = images(32, 48)
    tokens = student.backbone.forward_features(x)[:, 2:].reshape(3, 8, 12, 48)
    got = student(x, (4, 4)).patch_logits
    want = patch_head(student)(tokens[:, 2:4, 9:12].mean((1, 2)))  # cell (1, 3): rows 2-3, columns 9-11
    torch.testing.assert_close(got[:, :, 1, 3], want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_dynamic_model_takes_its_grid_from_the_image() -> None:
    student = build(dynamic_img_size=True)
    tokens = student.backbone.forward_features(images(24, 48))[:, 2:].reshape(3, 6, 12, 48)
    got = student(images(24, 48), (3, 4)).patch_logits
    want = patch_head(student)(tokens[:, :2, :3].mean((1, 2)))
    torch.testing.assert_close(got[:, :, 0, 0], want, rtol=0, atol=1e-5)


def test_a_teacher_grid_finer_than_the_patches_is_refused() -> None:
    student = build(patch_size=8)
    with pytest.raises(StudentError, match=r"4 x 4 patches, too few for the teacher's grid of 7 x 2.*grid: \[4, 2\]"):
        student.check_grid((7, 2))
    with pytest.raises(StudentError, match="too few"):
        student(images(), (4, 5))


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("deit_tiny_destilled_patch16_224", {}, "did you mean 'deit_tiny_distilled_patch16_224"),
        (DEIT, {"patch_drop_rate": 0.1}, "patch_drop_rate: 0.1, which removes patch tokens"),
        (DEIT, {"img_size": 64}, "img_size: 64, the views are 32 x 32"),
        (DEIT, {"num_classes": 5}, "number of classes of the cache"),
        (DEIT, {"drop_path_rate": 0.1}, "set student.drop_path"),
        (DEIT, {"no_embed_class": True}, "timm gives its tokens positions"),
        (DEIT, {"depht": 2}, "can't be built with .*depht"),
        (DEIT, {"embed_dim": 50}, "can't be built"),
    ],
)
def test_a_model_that_can_not_be_taught_is_refused_with_the_reason(
    model: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        build_student(StudentConfig(model, kwargs), 7, 32)


@torch.no_grad()
def test_logits_are_float32_under_bf16_autocast() -> None:
    student = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = student(images(), (4, 4))[:3]
    assert [v.dtype for v in output if v is not None] == [torch.float32] * 3
    full = student(images(), (4, 4))[:3]
    assert all(0 < (a - b).abs().max() < 0.2 for a, b in zip(output, full, strict=True))  # it did run in bf16


@torch.no_grad()
def test_attention_that_is_not_fused_gives_the_same_logits() -> None:
    student = build()
    outputs, calls = [], []
    kernel = F.scaled_dot_product_attention
    for _ in range(2):
        with patch.object(F, "scaled_dot_product_attention", wraps=kernel) as fused:
            outputs.append(student(images(), (4, 4)))
        calls.append(fused.call_count)
        student.unfuse_attention()
    assert calls == [TINY["depth"], 0]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_student_compiles_to_one_graph() -> None:
    student = build()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    for grid in (None, (4, 4)):
        for a, b in zip(compiled(images(), grid), student(images(), grid), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("model", [DEIT, PLAIN])
@pytest.mark.parametrize("method", ["none", "none of both heads", "deit-hard", "cskd-hard"])
def test_every_parameter_learns(model: str, method: str) -> None:
    """But those of the distillation head, where the class head is trained alone."""
    name, _, both = method.partition(" of ")
    student, loss = (
        build(model),
        DistillationLoss(LossConfig(cast(Method, name), baseline_head="mean" if both else "class")),
    )
    output = student.train()(images(), (4, 4) if loss.uses_patches else None)
    label = torch.tensor([0, 1, 2])
    targets = HardTargets(label, torch.randint(7, (3, 4, 4)))
    loss(output, MixedLabels(label, label, torch.ones(3)), targets)[0].backward()
    idle = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    alone = model == DEIT and name == "none" and not both
    assert idle == (["backbone.head_dist.weight", "backbone.head_dist.bias"] if alone else [])


def test_averages_are_of_logits_and_labelled() -> None:
    cls, dist, patch = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5, 3, 3)
    heads = eval_heads(StudentOutput(cls, dist, patch))
    mean = patch.mean((2, 3))
    assert set(heads) == {"class", "distillation", "patches", "class+distillation", "all"}
    assert torch.equal(heads["patches"], mean)
    torch.testing.assert_close(heads["all"], (cls + dist + mean) / 3)
    plain = eval_heads(StudentOutput(cls, None, patch))
    assert set(plain) == {"class", "patches", "all"}
    torch.testing.assert_close(plain["all"], (cls + mean) / 2)
    assert set(eval_heads(StudentOutput(cls, dist))) == {"class", "distillation", "class+distillation"}


@pytest.mark.parametrize(
    ("trained", "names"),
    [
        (("class",), ["class", "distillation.untrained", "patches.untrained"]),
        (("distillation",), ["class.untrained", "distillation", "patches.untrained"]),
        (("class", "distillation"), ["class", "distillation", "patches.untrained", "class+distillation"]),
        (("class", "patches"), ["class", "distillation.untrained", "patches", "class+patches"]),
        (("distillation", "patches"), ["class.untrained", "distillation", "patches", "distillation+patches"]),
        (("class", "distillation", "patches"), ["class", "distillation", "patches", "class+distillation", "all"]),
    ],
)
def test_no_average_holds_a_head_that_was_not_trained(trained: tuple[str, ...], names: list[str]) -> None:
    output = StudentOutput(torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5, 3, 3))
    heads, single = eval_heads(output, trained), eval_heads(output)
    assert list(heads) == names
    for name in names:
        parts = trained if name == "all" else name.removesuffix(".untrained").split("+")
        torch.testing.assert_close(heads[name], sum(single[part] for part in parts) / len(parts))


# --- student.init ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "bare.pth", "model.pth", "ema.pth"])
def test_a_checkpoint_of_the_same_model_is_taken_as_it_is(tmp_path: Path, kind: str, form: str) -> None:
    model, kwargs = KINDS[kind]
    source = build(model, **kwargs).backbone.state_dict()
    path = tmp_path / f"w.{form}"
    if form == "safetensors":
        save_file(source, path)
    else:
        junk = {k: v + 1 for k, v in source.items()}
        torch.save(
            {"bare.pth": source, "model.pth": {"model": source, "epoch": 3}}.get(
                form, {"state_dict": junk, "state_dict_ema": source}
            ),
            path,
        )
    student = build(model, init=path, **kwargs)
    taken = {"model.pth": ["'model'"], "ema.pth": ["'state_dict_ema'"]}.get(form, [])
    assert len(student.notes) == len(taken) and all(key in student.notes[0] for key in taken)
    assert all(torch.equal(v, source[k]) for k, v in student.backbone.state_dict().items())


def test_a_checkpoint_of_another_resolution_and_other_classes_is_adapted(tmp_path: Path) -> None:
    source = build(classes=9, size=64).backbone
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student = build(init=tmp_path / "w.safetensors")
    assert "resized from 16 x 16 to 8 x 8" in student.notes[0]
    assert "(9 classes) was dropped: the student has 7" in student.notes[1]
    got, state = student.backbone.state_dict(), source.state_dict()
    assert torch.equal(got["pos_embed"][:, :2], state["pos_embed"][:, :2])  # those of the tokens stay
    for name in got:
        same = got[name].shape == state[name].shape and torch.equal(got[name], state[name])
        assert same == (name != "pos_embed" and not name.startswith("head")), name


@pytest.mark.parametrize("classes", [7, 3])
@pytest.mark.parametrize(("theirs", "ours"), [(DEIT, PLAIN), (PLAIN, DEIT)])
def test_a_distillation_token_is_left_out_or_begun_as_the_student_needs_it(
    tmp_path: Path, theirs: str, ours: str, classes: int
) -> None:
    save_file(before := build(theirs).backbone.state_dict(), tmp_path / "w.safetensors")
    fresh = build_student(StudentConfig(ours, TINY), classes, 64)
    torch.manual_seed(0)
    student = build(ours, classes, size=64, init=tmp_path / "w.safetensors")
    said = " ".join(student.notes)
    assert ("distillation token of" in said and "left out" in said) if theirs == DEIT else "as first drawn" in said
    assert ("(7 classes) was dropped: the student has 3" in said) == (classes == 3)
    assert "8 x 8 to 16 x 16 patches" in said
    now = student.backbone.state_dict()
    assert torch.equal(now["cls_token"], before["cls_token"])
    assert torch.equal(now["blocks.1.norm1.bias"], before["blocks.1.norm1.bias"])
    assert torch.equal(now["head.weight"], before["head.weight"]) == (classes == 7)
    prefix = 2 if ours == DEIT else 1
    assert now["pos_embed"].shape == fresh.backbone.state_dict()["pos_embed"].shape == (1, 256 + prefix, 48)
    assert torch.equal(now["pos_embed"][:, :1], before["pos_embed"][:, :1])  # of the class token
    corner = before["pos_embed"][:, 3 - prefix]  # of the first patch, which a resize moves by little
    assert (now["pos_embed"][:, prefix] - corner).norm() < (now["pos_embed"][:, prefix + 40] - corner).norm()


def test_a_checkpoint_of_other_patches_says_that_its_patch_embedding_was_resampled(tmp_path: Path) -> None:
    source = build().backbone
    own = source.patch_embed.proj.weight.shape[-1]
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student = build(init=tmp_path / "w.safetensors", patch_size=2 * own)
    assert f"from {own} x {own} to {2 * own} x {2 * own} pixels" in student.notes[1]


def test_the_config_beside_a_checkpoint_tells_a_grid_that_is_not_square(tmp_path: Path) -> None:
    source = build(size=(16, 64)).backbone  # 4 x 16 patches: 64, as many as 8 x 8
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert build(init=tmp_path).notes == []  # taken for 8 x 8
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"img_size": [16, 64]}}))
    assert "from 4 x 16 to 8 x 8" in build(init=tmp_path).notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.norm1.bias"), "another model: lacks blocks.1.norm1.bias"),
        (lambda s: s.update({"blocks.2.norm1.bias": s["norm.bias"]}), "which the student has not"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"has norm.bias \[3\], the student \[48\]"),
        (lambda s: s.update({"norm.bias": torch.full((48,), torch.nan)}), "norm.bias that are not finite"),
        (lambda s: s.pop("dist_token"), "no dist_token, the student"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 20, 48)), "18 position embeddings, which are no square"),
        (lambda s: s.update(pos_embed=torch.zeros(66)), "no checkpoint of this model"),
        (lambda s: s.clear(), "no state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(build().backbone.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(StudentError, match=message):
        build(init=tmp_path / "w.pth")


@pytest.mark.parametrize("form", ["MAE", "DINO", "Lightning"])
def test_what_self_supervised_training_leaves_beside_the_vit_is_left_out(tmp_path: Path, form: str) -> None:
    source = build(PLAIN).backbone.state_dict()
    bare = {k: v for k, v in source.items() if not k.startswith("head")}
    other = {k: v + 1 for k, v in bare.items()}
    saved: dict[str, Any] = {
        "MAE": {"model": bare | {"mask_token": torch.ones(1, 1, 48), "decoder_embed.weight": torch.ones(8, 48)}},
        "DINO": {
            "student": {f"module.backbone.{k}": v for k, v in other.items()},
            "teacher": {f"backbone.{k}": v for k, v in bare.items()} | {"head.mlp.0.weight": torch.ones(8, 48)},
        },
        "Lightning": {"state_dict": {f"net.{k}": v for k, v in bare.items()}, "hyper_parameters": {}},
    }
    torch.save(saved[form], tmp_path / "w.ckpt")
    student = build(PLAIN, init=tmp_path / "w.ckpt")
    assert all(torch.equal(v, bare[k]) for k, v in student.backbone.state_dict().items() if k in bare)
    assert {"MAE": "2 tensors of w.ckpt were left out", "DINO": "left out there: 1", "Lightning": "'state_dict.net'"}[
        form
    ] in " ".join(student.notes)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("code of a checkpoint was run",)


def test_garbage_and_pickled_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    (tmp_path / "b.pth").write_bytes(b"garbage")
    torch.save({"model": Evil()}, tmp_path / "c.pth")
    (tmp_path / "d.npz").write_bytes(b"garbage")
    torch.save({"model": {"a": 1}}, tmp_path / "e.pth")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(StudentError, match=r"no checkpoint|no safetensors|no state dict"):
            build(init=path)
    with pytest.raises(StudentError, match=r"no file .*none\.pth"):
        build(init=tmp_path / "none.pth")
    assert capsys.readouterr().out == ""


# --- the optimiser ---


def test_learning_rates_that_go_the_other_way_are_said() -> None:
    assert schedule_notes(TrainConfig()) == schedule_notes(TrainConfig(lr=1e-5, warmup_lr=1e-5)) == []
    assert schedule_notes(TrainConfig(lr=1e-7, lr_batch=512, global_batch=1024, warmup_lr=0)) == [
        "train.min_lr is 1e-05 and the highest learning rate 2e-07: it rises after it; set a smaller train.min_lr"
    ]
    assert "it falls in the warm-up; set a smaller train.warmup_lr" in schedule_notes(TrainConfig(warmup_lr=1))[0]
    assert schedule_notes(TrainConfig(warmup_lr=1, warmup_epochs=0)) == []


RECIPE = TrainConfig(epochs=20, global_batch=64, warmup_epochs=2.5, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    optimisation = Optimisation(build(), RECIPE, steps_per_epoch=10)
    rates = [optimisation.set_lr(step) for step in range(200)]
    for step in (0, 7, 24):
        assert rates[step] == pytest.approx(1e-6 + step / 25 * (1e-3 - 1e-6))
    for step in (25, 100, 199):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 200, dtype=torch.float64)).item())
        assert rates[step] == pytest.approx(1e-5 + (1e-3 - 1e-5) * cosine)
    again = Optimisation(build(), RECIPE, steps_per_epoch=10)
    assert [again.set_lr(step) for step in (150, 3, 25)] == [rates[150], rates[3], rates[25]]


def test_a_learning_rate_per_epoch_is_what_deits_loop_leaves_it_at() -> None:
    """Its main.py calls `lr_scheduler.step(epoch)` after the epoch."""
    optimisation = Optimisation(
        build(), dataclasses.replace(RECIPE, lr_every="epoch", warmup_epochs=3), steps_per_epoch=10
    )
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    theirs = CosineLRScheduler(
        (plain := torch.optim.AdamW(parameters, lr=1e-3)), 20, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-6
    )
    for epoch in range(20):
        want = plain.param_groups[0]["lr"]
        assert [optimisation.set_lr(10 * epoch + i) for i in (0, 9)] == pytest.approx([want, want]), epoch
        theirs.step(epoch)
    assert optimisation.set_lr(150) != pytest.approx(optimisation.set_lr(140))


def test_the_learning_rate_scales_with_the_batch_where_asked() -> None:
    assert scaled_lr(RECIPE) == 1e-3
    assert scaled_lr(TrainConfig(lr=5e-4, lr_batch=512, global_batch=1024)) == 1e-3


def test_weight_decay_skips_biases_norms_tokens_and_positions() -> None:
    student = build()
    groups = Optimisation(student, RECIPE, 10).optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in student.parameters()}
    for name, p in student.backbone.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and name not in ("cls_token", "dist_token", "pos_embed")), name


@pytest.mark.parametrize("warmup", [True, False])
def test_averaged_weights_follow_the_live_ones(warmup: bool) -> None:
    student = build()
    optimisation = Optimisation(student, TrainConfig(ema=0.9, ema_warmup=warmup, warmup_epochs=0, lr=1e-2), 10)
    assert Optimisation(student, RECIPE, 10).averaged is None
    average: Tensor | None = None
    for step in range(4):
        optimisation.update(student(images()).cls_logits.square().mean(), step)
        live = student.backbone.get_parameter("head.weight").detach().clone()
        decay = min(0.9, 1 - (step + 1) ** (-2 / 3)) if warmup else 0.9
        assert optimisation.averaged is not None
        average = live if average is None else decay * average + (1 - decay) * live
        torch.testing.assert_close(optimisation.averaged.backbone.head.weight, average)
    assert average is not None and not torch.allclose(average, live, atol=1e-4)


def test_gradients_are_clipped_to_the_norm() -> None:
    student = build()
    optimisation = Optimisation(student, TrainConfig(clip_grad=0.5, opt="sgd", warmup_epochs=0), 10)
    taken: list[Tensor] = []
    optimisation.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.flatten() for p in student.parameters() if p.grad is not None)
    )
    norm = optimisation.update(100 * student(images()).cls_logits.square().mean(), 0)
    assert norm is not None and norm > 5
    assert torch.linalg.vector_norm(torch.cat(taken)).item() == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in student.parameters())  # the next forward has their memory


def test_a_step_of_a_rank_has_its_own_random_numbers() -> None:
    def draw(*where: int) -> float:
        reseed_step(*where)
        return torch.rand(()).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(s, t, r) for s in (0, 1) for t in (0, 1) for r in (0, 1)}) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opt": "adamwww"}, "train.opt is 'adamwww'"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs is 5, expected"),
    ],
)
def test_an_optimiser_or_warm_up_that_can_not_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Optimisation(build(), TrainConfig(**change), 10)


def test_drop_path_is_the_configs() -> None:
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in build(drop_path=0.2).backbone.blocks]
    assert rates == pytest.approx([0.0, 0.2])
    plain: Any = timm.create_model(DEIT, **TINY)
    assert plain.blocks[1].drop_path1.__class__.__name__ == "Identity"  # timm's default is 0
