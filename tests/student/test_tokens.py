"""Distillation tokens by name: trained and resumed with the student, exported as a stock timm ViT and the heads beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cskd.config import Config, LossConfig, StudentConfig, TrainConfig, from_dict
from cskd.errors import ConfigError, StudentError
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels, StudentOutput
from cskd.student import build_student, eval_heads
from cskd.student.best import Best, BestWeights, score_names
from cskd.student.checkpoint import ResumeStates, TrainState, export, load_student
from cskd.student.model import Student
from cskd.student.optim import Optimisation, reseed_step

PLAIN, TINY = "deit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
TOKENS = ["conv", "involution"]
TERMS: list[dict[str, Any]] = [
    {"head": "class", "target": "label"},
    {"head": "token:conv", "target": "global"},
    {"head": "token:involution", "target": "global", "cache": "second", "weight": 0.5},
]
MEAN = "class+token:conv+token:involution"
Run = tuple[Student, Optimisation]


def loss(*terms: dict[str, Any]) -> LossConfig:
    return from_dict({"loss": {"method": "terms", "terms": list(terms or TERMS)}}).loss


def student(seed: int = 0, tokens: list[str] = TOKENS, model: str = PLAIN, classes: int = 7, **more: Any) -> Student:
    torch.manual_seed(seed)
    kwargs = TINY | more.pop("kwargs", {})
    return build_student(StudentConfig(model, kwargs, tokens=tokens, drop_path=0.3, **more), classes, 32)


def start(seed: int = 0) -> Run:
    made = student(seed)
    made.taught_by(loss())
    return made, Optimisation(made, TrainConfig(ema=0.9, epochs=3, warmup_epochs=1), 4)


@torch.enable_grad()
def advance(run: Run, first: int, stop: int) -> Run:
    """Train steps first .. stop-1 on data that depends on the step only."""
    for step in range(first, stop):
        data = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=data)
        label, one, two = torch.randint(7, (3, 4), generator=data)
        reseed_step(0, step, 0)
        total, _ = DistillationLoss(loss())(
            run[0].train()(images),
            MixedLabels(label, label, torch.ones(4)),
            {"": HardTargets(one), "second": HardTargets(two)},
        )
        run[1].update(total, step)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run's export, with its state and the best of its weights."""
    folder, run = tmp_path_factory.mktemp("run"), advance(start(), 0, 3)
    ResumeStates(folder / "resume").save(*run, TrainState(3))
    best = BestWeights(folder / "resume").put(Best(f"top1.{MEAN}", 50.0, 3), run[0])
    export(folder, *run, Config(train=TrainConfig(ema=0.9)), [f"n{i}" for i in range(7)], 3, best)
    return folder, run


@torch.no_grad()
def said(model: Student) -> StudentOutput:
    output: StudentOutput = model.eval()(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9)), (1, 1))
    return output


@pytest.mark.parametrize(("name", "which"), [("model", "ema"), ("model_last", "live"), ("model_best", "live")])
@torch.no_grad()
def test_timm_and_safetensors_alone_give_the_logits_of_training(
    trained: tuple[Path, Run], name: str, which: str
) -> None:
    folder, (live, optimisation) = trained
    facts = json.loads((folder / "config.json").read_text())
    model = timm.create_model(
        facts["architecture"],
        num_classes=7,
        checkpoint_path=str(folder / f"{name}.safetensors"),
        **facts["model_args"],
    ).eval()
    heads = load_file(folder / f"{name.replace('model', 'heads')}.safetensors")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    forward: Any = model
    features, about = forward.forward_features(images), facts["cskd"]["tokens"]
    logits = [model(images)]
    for i, token in enumerate(about["names"]):
        at = forward.fc_norm(features[:, about["first"] + i])
        logits.append(torch.nn.functional.linear(at, heads[f"{token}.weight"], heads[f"{token}.bias"]))
    own = live if which == "live" else optimisation.averaged
    assert own is not None and about["names"] == TOKENS and len(heads) == 4
    for output in (said(own), said(load_student(folder / f"{name}.safetensors")[0])):
        found = eval_heads(output, live.trained)
        expected = dict(zip(("class", "token:conv", "token:involution"), logits, strict=True))
        assert [*found] == [*expected, "patches.untrained", MEAN]
        for head, value in {**expected, MEAN: sum(logits[1:], logits[0]) / 3}.items():
            torch.testing.assert_close(found[head], value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


def test_a_resumed_run_continues_bit_for_bit(trained: tuple[Path, Run]) -> None:
    folder, run = trained
    resumed = start(seed=1)
    assert ResumeStates(folder / "resume").load(*resumed) is not None
    through = advance(start(), 0, 5)
    advance(resumed, 3, 5)
    for mine, other in zip(resumed[0].state_dict().items(), through[0].state_dict().items(), strict=True):
        assert mine[0] == other[0] and torch.equal(mine[1], other[1]), mine[0]
    assert resumed[1].averaged is not None and through[1].averaged is not None
    assert torch.equal(
        resumed[1].averaged.backbone.get_parameter("token_heads.1.weight"),
        through[1].averaged.backbone.get_parameter("token_heads.1.weight"),
    )
    before = run[0].backbone.get_parameter("reg_token")
    assert not torch.equal(before, resumed[0].backbone.get_parameter("reg_token"))


def test_heads_that_no_term_reads_ask_for_no_gradient_and_are_part_of_no_average() -> None:
    made = student()
    made.taught_by(loss(*TERMS[:2]))
    made.freeze_unused(loss(*TERMS[:2]))
    heads = [p.requires_grad for p in made.backbone.token_heads.parameters()]  # type: ignore[union-attr]
    assert heads == [True, True, False, False]
    label = torch.zeros(2, dtype=torch.int64)
    labels, targets = MixedLabels(label, label, torch.ones(2)), {"": HardTargets(label)}
    DistillationLoss(loss(*TERMS[:2]))(made(torch.randn(2, 3, 32, 32)), labels, targets)[0].backward()
    assert all((p.grad is not None) == p.requires_grad for p in made.parameters())  # ranks wait for all that ask
    assert [*eval_heads(said(made), made.trained)][2:] == [
        "token:involution.untrained",
        "patches.untrained",
        "class+token:conv",
    ]
    assert any("not token:involution and patches" in note for note in made.notes)
    assert f"top1.ema.{'class+token:conv'}" in score_names(made, averaged=True)


@pytest.mark.parametrize(
    ("model", "kwargs", "prefix"),
    [
        (PLAIN, {"dynamic_img_size": True}, 3),
        (PLAIN, {"class_token": False, "global_pool": "avg"}, 2),
        ("vit_small_patch14_reg4_dinov2", {}, 7),
    ],
    ids=str,
)
def test_plain_vits_of_every_kind_take_tokens(tmp_path: Path, model: str, kwargs: dict[str, Any], prefix: int) -> None:
    made = student(model=model, kwargs=kwargs)
    assert made.backbone.num_prefix_tokens == prefix
    export(tmp_path, made, Optimisation(made, TrainConfig(), 4), Config(), [f"n{i}" for i in range(7)])
    output, again = said(made), said(load_student(tmp_path)[0])
    tokens = output.token_logits, again.token_logits
    assert (
        tokens[0] is not None and tokens[1] is not None and all(torch.equal(tokens[0][n], tokens[1][n]) for n in TOKENS)
    )
    assert torch.equal(output.cls_logits, again.cls_logits)
    more = student(1, ["involution", "new"], model, kwargs=kwargs, init=str(tmp_path))
    one, other = said(more).token_logits, more.backbone.state_dict()
    assert one is not None and torch.equal(
        other["token_heads.0.weight"], made.backbone.state_dict()["token_heads.1.weight"]
    )
    assert torch.equal(other["reg_token"][:, -2], made.backbone.state_dict()["reg_token"][:, -1])
    assert [note.partition(": ")[0].rpartition(" ")[2] for note in more.notes[-2:]] == ["new", "conv"]


@pytest.mark.parametrize(
    ("theirs", "ours", "classes", "says"),
    [
        ([], TOKENS, 7, "has no 2 tokens conv, involution"),
        (TOKENS, TOKENS, 7, ""),
        (TOKENS, [], 7, "has 2 tokens conv, involution: left out"),
        (TOKENS, TOKENS, 5, "has no heads for the classes of 2 tokens"),
    ],
)
def test_a_start_takes_tokens_by_name(
    tmp_path: Path, theirs: list[str], ours: list[str], classes: int, says: str
) -> None:
    old = student(tokens=theirs)
    export(tmp_path, old, Optimisation(old, TrainConfig(), 4), Config(), [f"n{i}" for i in range(7)])
    new = student(1, ours, classes=classes, init=str(tmp_path))
    a, b = old.backbone.state_dict(), new.backbone.state_dict()
    same = {k for k in b if k in a and a[k].shape == b[k].shape and torch.equal(a[k], b[k])}
    assert torch.equal(a["pos_embed"][:, -16:], b["pos_embed"][:, -16:]) and torch.equal(
        a["pos_embed"][:, 0], b["pos_embed"][:, 0]
    )
    assert ("token_heads.1.weight" in same) == (theirs == ours and classes == 7)
    assert ("reg_token" in same) == (bool(theirs) and theirs == ours) and "blocks.1.mlp.fc1.weight" in same
    assert says in " ".join(new.notes) and bool(says) == any("token" in note for note in new.notes)


def test_a_distilled_checkpoint_gives_what_is_not_a_token(tmp_path: Path) -> None:
    old = student(tokens=[], model="deit_tiny_distilled_patch16_224").backbone.state_dict()
    save_file(old, tmp_path / "a.safetensors")
    new = student(1, init=str(tmp_path / "a.safetensors")).backbone.state_dict()
    assert torch.equal(new["pos_embed"][:, 0], old["pos_embed"][:, 0])
    assert torch.equal(new["pos_embed"][:, 3:], old["pos_embed"][:, 2:]) and torch.equal(
        new["head.weight"], old["head.weight"]
    )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("deit_tiny_distilled_patch16_224", "has a distillation token of its own"),
        ("resnet18", "no plain ViT"),
    ],
)
def test_other_students_are_refused(model: str, says: str) -> None:
    with pytest.raises(StudentError, match=says):
        build_student(StudentConfig(model, tokens=["a"]), 7, 224)


@pytest.mark.parametrize(
    ("tokens", "terms", "says"),
    [
        ([], TERMS, "token:conv, expected one and student.tokens is empty"),
        (["convs"], TERMS[:2], "token:conv, expected one of convs.*did you mean"),
        (TOKENS, TERMS[1:2], "class head"),
    ],
)
def test_terms_are_refused_that_do_not_fit_the_tokens(tokens: list[str], terms: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        student(tokens=tokens).taught_by(loss(*terms))


@pytest.mark.parametrize("tokens", [["a", "a"], ["A"], ["a.b"], [""], ["keys", "9"], [5], "a"])
def test_names_are_checked(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"student\.tokens"):
        from_dict({"student": {"tokens": tokens}})


@pytest.mark.parametrize("head", ["token:", "token:A", "token", "clas", 3])
def test_heads_are_checked(head: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms.*head"):
        loss({"head": head, "target": "label"})


@pytest.mark.parametrize("damage", ["absent", "cut", "other", "nan", "names"])
def test_damaged_heads_are_refused(trained: tuple[Path, Run], tmp_path: Path, damage: str) -> None:
    for name in ("model.safetensors", "heads.safetensors", "config.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    heads = tmp_path / "heads.safetensors"
    tensors = load_file(heads)
    if damage == "absent":
        heads.unlink()
    elif damage == "cut":
        heads.write_bytes(heads.read_bytes()[:-9])
    elif damage == "names":
        facts = json.loads((tmp_path / "config.json").read_text())
        facts["cskd"]["tokens"]["names"] = ["a", "b", "c"]
        (tmp_path / "config.json").write_text(json.dumps(facts))
    else:
        tensors["conv.bias"] = tensors["conv.bias"][:5] if damage == "other" else tensors["conv.bias"] * float("nan")
        save_file(tensors, heads)
    for use in (load_student, lambda path: student(init=str(path))):
        with pytest.raises(StudentError, match="config" if damage == "names" else "heads") as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value).replace(str(tmp_path), "")) <= 300
