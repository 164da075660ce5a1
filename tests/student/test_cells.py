"""Students that are no plain ViT: where their cells are is measured, and each is classified by the model's own head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.student_families import MODELS, examine, take_step
from cskd.config import StudentConfig, from_dict
from cskd.errors import StudentError
from cskd.student import build_student
from cskd.student.cells import Layout, measure
from cskd.student.checkpoint import export, load_student
from cskd.student.model import MapStudent
from cskd.student.optim import Optimisation

ONES = [1, 1, 1, 1]
SMALL: dict[str, tuple[str, dict[str, Any], Layout]] = {
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 2},
        Layout("NHWC", (4, 4)),
    ),
    "ConvNeXt": ("convnext_atto", {"depths": ONES, "dims": [8, 8, 8, 8]}, Layout("NCHW", (2, 2))),
    "PVT": (
        "pvt_v2_b0",
        {"depths": ONES, "embed_dims": [8] * 4, "num_heads": ONES},
        Layout("NCHW", (2, 2)),
    ),
    "registers": (
        "vit_small_patch16_dinov3",
        {"embed_dim": 24, "depth": 1, "num_heads": 2},
        Layout("NLC", (4, 4), 5),
    ),
}


def config(family: str, **changes: Any) -> StudentConfig:
    name, kwargs, _ = SMALL[family]
    return StudentConfig(name, kwargs, **changes)


def build(family: str, classes: int = 5, **changes: Any) -> MapStudent:
    torch.manual_seed(0)
    student = build_student(config(family, **changes), classes, 64)
    assert isinstance(student, MapStudent)
    return student.eval()


@pytest.fixture(scope="module", params=SMALL)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def student(family: str) -> MapStudent:
    return build(family)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_layout_is_measured_and_the_head_is_the_models_own(family: str, student: MapStudent) -> None:
    layout = SMALL[family][2]
    assert student.layout == layout and student.patch_grid == layout.grid
    with torch.device("meta"):  # as `cskd check` builds it
        there = build_student(config(family), 5, 64)
    assert there.patch_grid == layout.grid and next(there.parameters()).is_meta
    rows, columns = layout.grid
    output = student(images(), layout.grid)
    assert torch.equal(output.cls_logits, student.backbone(images()))
    assert output.dist_logits is None and output.patch_logits.shape == (2, 5, rows, columns)
    if layout.prefix or any("not linear" in note for note in student.notes):
        assert family in ("registers", "ConvNeXt")
    else:
        torch.testing.assert_close(output.patch_logits.mean((2, 3)), output.cls_logits)
    one = student(images(), (1, 1)).patch_logits[..., 0, 0]
    if not layout.prefix:  # one cell that is the mean of all is what the model itself pools to, norm or not
        torch.testing.assert_close(one, output.cls_logits)


@torch.no_grad()
def test_a_corner_of_the_image_is_taught_by_its_own_cell(student: MapStudent) -> None:
    (rows, columns), x = student.patch_grid, images(1)
    other = x.clone()
    other[..., : 64 // rows, -(64 // columns) :] *= -3
    moved = (student(x, (rows, columns)).patch_logits - student(other, (rows, columns)).patch_logits).norm(dim=1)
    assert int(moved.argmax()) == columns - 1  # row 0, last column


def test_every_weight_learns_from_the_cells() -> None:
    for family in SMALL:
        student = build(family)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        assert take_step(student) == [], family
        still = [name for name, p in student.named_parameters() if torch.equal(p, before[name]) and p.numel() > 1]
        assert not [name for name in still if not name.endswith(("bias", "gamma"))], family


def test_the_export_is_timms_and_starts_others(family: str, tmp_path: Path) -> None:
    run = from_dict({"loss": {"method": "none"}, "train": {"output": str(tmp_path), "epochs": 1, "warmup_epochs": 0}})
    student = build(family)
    student.taught_by(run.loss)
    export(tmp_path, student, Optimisation(student, run.train, 1), run, list("abcde"))
    with torch.no_grad():
        want = student(images(), student.patch_grid)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(model(images()), want.cls_logits)
        again, facts = load_student(tmp_path)
        assert torch.equal(again(images(), again.patch_grid).patch_logits, want.patch_logits)
    assert facts["label_names"] == list("abcde")
    other = build(family, classes=3, init=str(tmp_path))
    assert any("(5 classes) was dropped: the student has 3" in note for note in other.notes)
    mine, theirs = other.backbone.state_dict(), student.backbone.state_dict()
    same = [name for name in mine if mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])]
    assert set(mine) - set(same) <= {"head.fc.weight", "head.fc.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pretrained_cfg": {"input_size": [3, 1024, 1024]}, "model_args": {"window_size": 256}}, "has [0-9]+ bytes"),
        (
            {
                "pretrained_cfg": {"input_size": [3, 16384, 16384]},
                "model_args": {"depths": [2, 1, 1], "window_size": 8},
            },
            "makes tables of [0-9]+ bytes",
        ),
        ({"model_args": {"depths": [257, 1, 1]}}, "beyond any"),
        ({"model_args": {"window_size": {"a": [65537]}}}, "beyond any"),
        ({"architecture": "crossvit_tiny_240"}, "list of 2 features|can't be built"),
    ],
)
def test_a_config_that_asks_for_more_than_its_weights_is_refused_before_it_takes_memory(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    run = from_dict({"loss": {"method": "none"}, "train": {"output": str(tmp_path), "epochs": 1, "warmup_epochs": 0}})
    student = build("Swin")
    export(tmp_path, student, Optimisation(student, run.train, 1), run, list("abcde"))
    facts = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        facts[key] = facts[key] | value if isinstance(value, dict) else value
    facts["model_args"].pop("img_size")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(StudentError, match=reason):
        load_student(tmp_path)


def test_batch_norms_are_said() -> None:
    with torch.device("meta"):
        student = build_student(StudentConfig("resnet18"), 5, 64)
    assert any("batch norms: their statistics are of the views that one rank" in note for note in student.notes)


def test_a_swin_starts_from_a_checkpoint_of_another_resolution(tmp_path: Path) -> None:
    name, kwargs, _ = SMALL["Swin"]
    wide = timm.create_model(name, num_classes=5, img_size=64, **(kwargs | {"window_size": 4}))
    save_file(wide.state_dict(), tmp_path / "w.safetensors")
    student = build("Swin", init=str(tmp_path / "w.safetensors"))
    assert any("relative_position_bias_table the first, were resized by timm" in note for note in student.notes)


# --- what is refused, with its reason ---


class Scrambled(nn.Module):
    """Tokens of patches in another order than that of the rows, or cells that the head can't read, or none."""

    num_classes, num_features, num_prefix_tokens = 5, 8, 0

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.stem = fault, nn.Conv2d(3, 8, 16, 16)
        self.head = nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        tokens: Tensor = self.stem(x).flatten(2).transpose(1, 2)
        if self.fault == "order":
            return tokens.reshape(-1, 4, 4, 8).transpose(1, 2).flatten(1, 2)
        if self.fault == "list":
            return [tokens, tokens]
        return {"count": tokens[:, :-1], "vector": tokens.mean(1), "size": tokens, "head": tokens}[self.fault]

    def forward_head(self, x: Tensor) -> Tensor:
        pooled = x.reshape(len(x), 2, 8, 8).mean((1, 2)) if self.fault == "head" else x.mean(1)
        return torch.nn.functional.linear(pooled, self.head.weight, self.head.bias)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("order", r"4 x 4 cells in another order: what changes in row 0, column 3 .* row 3, column 0"),
        ("list", "gives list of 2 features, expected one tensor"),
        ("count", "gives 15 tokens for 64 x 64 pixels, which are no grid"),
        ("vector", r"features of shape \[2, 8\], which have no grid of cells"),
        ("head", "its head can't classify a single cell"),
    ],
)
def test_features_without_cells_are_refused_with_the_reason(fault: str, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(StudentError, match=message) as e:
        measure("mine", Scrambled(fault), (64, 64))
    assert len(str(e.value)) <= 300


@pytest.mark.parametrize(
    ("model", "size", "change", "message"),
    [
        ("convnext_atto", 64, {"kwargs": {"dpeths": ONES}}, "can't be built with .*dpeths"),
        ("vgg11", 64, {"drop_path": 0.1}, "vgg11 has no drop path; set it to 0"),
        (
            "swin_tiny_patch4_window7_224",
            62,
            {"kwargs": SMALL["Swin"][1]},
            "does not see the last 2 rows and 2 columns",
        ),
    ],
)
def test_what_a_model_does_not_take_is_refused(model: str, size: int, change: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(StudentError, match=message):
        build_student(StudentConfig(model, **change), 5, size)


def test_cells_that_are_too_few_name_the_grid_that_fits() -> None:
    with pytest.raises(
        StudentError, match=r"has 2 x 2 cells, too few for the teacher's grid of 7 x 7; .*grid: \[2, 2\]"
    ):
        build("PVT").check_grid((7, 7))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_the_table_of_students_is_what_a_step_finds(family: str) -> None:
    row = examine(family, *MODELS[family])
    said = Path(__file__).parents[2].joinpath("docs", "STUDENTS.md").read_text(encoding="utf-8")
    cells = f"{row.cells[0]}x{row.cells[1]}" if row.cells else ""
    assert f"| `{row.model}` | {row.pixels} | {row.features} | {cells} | {'yes' if row.taught else 'no'} |" in said
