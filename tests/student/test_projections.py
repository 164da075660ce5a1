"""Projections of a student's tokens: what they compute, that orthogonal ones stay orthogonal, and how they are optimised."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cskd.config import LossConfig, StudentConfig, TrainConfig
from cskd.config.schema import LossTerm
from cskd.errors import StudentError
from cskd.method.features import MapShape
from cskd.method.losses import StudentOutput
from cskd.student import build_student
from cskd.student.model import Student
from cskd.student.optim import Optimisation
from cskd.student.projections import Projections, Taught, token_width

TINY: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def of(terms: list[LossTerm], width: int, channels: int, grid: tuple[int, int] = (2, 2), seed: int = 0) -> Projections:
    return Projections(LossConfig("none", terms=terms), width, {"": MapShape(channels, grid)}, seed)


def matrix(projections: Projections, i: int = 0) -> Tensor:
    return cast(nn.Linear, projections[i]).weight


def projected(output: StudentOutput, title: str) -> Tensor:
    assert output.projected is not None
    return output.projected[title]


ORTHOGONAL = LossTerm("tokens", "pooled", "smooth_l1", projection="orthogonal", standardise=True)


@pytest.mark.parametrize("channels", [24, 16, 10], ids=["wider", "square", "narrower"])
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "muon"])
def test_an_orthogonal_projection_stays_orthogonal_and_learns(channels: int, opt: str) -> None:
    projections = of([ORTHOGONAL], 16, channels)
    student = build_student(StudentConfig("vit_tiny_patch16_224", TINY), 5, 32)
    optimisation = Optimisation(
        student, TrainConfig(opt=opt, lr=0.05, warmup_epochs=0, weight_decay=0.5), 10, projections
    )
    before = matrix(projections).detach().clone()
    tokens, target = torch.randn(8, 4, 4, 16, generator=torch.Generator().manual_seed(2)), torch.ones(8, channels)
    for step in range(4):
        output = projections(StudentOutput(torch.zeros(8, 5), tokens=tokens))
        optimisation.update((projected(output, ORTHOGONAL.title) - target).square().mean(), step)
    projections(StudentOutput(torch.zeros(8, 5), tokens=tokens))
    after = matrix(projections).detach()
    gram = after.T @ after if channels >= 16 else after @ after.T
    assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_tokens_are_pooled_to_each_teachers_grid_then_projected() -> None:
    terms = [LossTerm("tokens", "features", "mse"), LossTerm("tokens", "pooled", "cosine", projection="orthogonal")]
    projections = of(terms, 16, 24, (2, 1)).double()
    tokens = torch.randn(3, 4, 4, 16, dtype=torch.float64)
    found = projections(StudentOutput(torch.zeros(3, 5), tokens=tokens))
    pooled = tokens.reshape(3, 2, 2, 1, 4, 16).mean((2, 4))
    expected = pooled @ matrix(projections).T + projections[0].get_parameter("bias")
    assert torch.allclose(projected(found, "tokens_features_mse"), expected.permute(0, 3, 1, 2), atol=1e-12)
    assert torch.allclose(
        projected(found, "tokens_pooled_cosine"), tokens.mean((1, 2)) @ matrix(projections, 1).T, atol=1e-12
    )


def test_first_weights_follow_from_the_seed_and_the_generator_is_left_as_it_was() -> None:
    terms = [ORTHOGONAL, LossTerm("tokens", "features", "mse")]
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    one, same, other = (of(terms, 16, 24, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "convnext_atto"])
def test_every_family_gives_its_tokens(name: str) -> None:
    kwargs = TINY if "vit" in name or "deit" in name else {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 20]}
    student = build_student(StudentConfig(name, kwargs), 5, 64)
    width = token_width(student)
    assert width == (16 if kwargs is TINY else 20) and student.training
    net = Taught(student, of([LossTerm("tokens", "features", "mse")], width, 24))
    output = net.eval()(torch.zeros(2, 3, 64, 64), None)
    assert projected(output, "tokens_features_mse").shape == (2, 24, 2, 2)
    assert output.tokens is not None and output.tokens.shape == (2, *student.patch_grid, width)
    with torch.autocast("cpu", torch.bfloat16):
        assert projected(net(torch.zeros(2, 3, 64, 64), None), "tokens_features_mse").dtype == torch.float32


def test_they_are_optimised_but_neither_averaged_nor_part_of_the_student() -> None:
    student: Student = build_student(StudentConfig("vit_tiny_patch16_224", TINY), 5, 32)
    projections = of([ORTHOGONAL, LossTerm("tokens", "features", "mse")], 16, 24)
    optimisation = Optimisation(student, TrainConfig(ema=0.9, weight_decay=0.05), 10, projections)
    decays = {id(p): g["weight_decay"] for g in optimisation.optimizer.param_groups for p in g["params"]}
    found = {name: decays[id(p)] for name, p in projections.named_parameters()}
    assert found == {"0.parametrizations.weight.original": 0.0, "1.weight": 0.05, "1.bias": 0.0}
    assert optimisation.averaged is not None
    assert optimisation.averaged.state_dict().keys() == student.state_dict().keys()
    assert not any("parametriz" in name for name in student.state_dict())


SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.mark.parametrize(
    ("name", "kwargs", "shapes"),
    [
        ("deit_tiny_distilled_patch16_224", TINY | {"depth": 2}, [(8, 8, 16), (8, 8, 16)]),
        ("vit_tiny_patch16_224", TINY | {"reg_tokens": 3}, [(8, 8, 16)]),
        ("swin_tiny_patch4_window7_224", SWIN, [(16, 16, 8), (8, 8, 16)]),
        (
            "convnext_atto",
            {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 20]},
            [(16, 16, 4), (8, 8, 8), (4, 4, 12), (2, 2, 20)],
        ),
    ],
)
def test_blocks_give_their_tokens_and_change_no_logit(name: str, kwargs: Any, shapes: list[tuple[int, ...]]) -> None:
    student = build_student(StudentConfig(name, kwargs), 5, 64).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert student.depth == len(shapes)
    found, plain = student(images, (2, 2), blocks=(*range(len(shapes)), -1)), student(images, (2, 2))
    assert found.blocks is not None and [tuple(found.blocks[i].shape[1:]) for i in range(len(shapes))] == shapes
    assert torch.equal(found.blocks[-1], found.blocks[len(shapes) - 1])
    assert torch.equal(found.cls_logits, plain.cls_logits) and torch.equal(found.patch_logits, plain.patch_logits)
    with pytest.raises(StudentError, match=f"head block:9, and student {name} has blocks 0 to {len(shapes) - 1}"):
        student.refuse_blocks((0, 9))
    student.__dict__["depth"] = 0  # as of a model without forward_intermediates
    with pytest.raises(StudentError, match="does not give the tokens of its blocks"):
        student.refuse_blocks((0,))
