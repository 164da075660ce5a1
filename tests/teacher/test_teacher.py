"""A loaded teacher gives the logits it says, under the name it says, on any view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from cskd.config import TeacherConfig
from cskd.errors import ConfigError, TeacherError
from cskd.teacher.fingerprint import compare_probe, probe_images
from cskd.teacher.model import Prepare, Preprocess, teacher_images
from tests.teachers import NAMES, load, pixels, tiny_teacher


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return tiny_teacher(tmp_path_factory.mktemp("tiny"))


def plain(config: TeacherConfig) -> Any:  # what its parts are is timm's
    model = timm.create_model("resnet18", **config.kwargs)
    model.load_state_dict(safetensors.torch.load_file(str(config.weights)))
    return model.eval()


def test_logits_are_those_of_the_plain_network_on_normalised_images(tiny: TeacherConfig) -> None:
    teacher, x = load(tiny), pixels()
    dense_BKhw, global_BK = teacher.forward_dense(x)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = plain(tiny)
    with torch.no_grad():
        expected = model((x / 255 - mean) / std)
        features = model.forward_features((x / 255 - mean) / std)
        cells = torch.einsum("bchw,kc->bkhw", features, model.fc.weight) + model.fc.bias[:, None, None]
    assert dense_BKhw.shape == (3, 5, 4, 4) and teacher.grid == (4, 4) and teacher.classes == 5
    assert dense_BKhw.dtype == global_BK.dtype == torch.float32
    torch.testing.assert_close(global_BK, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_BKhw, cells, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.forward_global(x), global_BK)


def test_outputs_may_stand_in_a_loss_that_is_differentiated(tiny: TeacherConfig) -> None:
    dense_BKhw, global_BK = load(tiny).forward_dense(pixels())
    assert not dense_BKhw.requires_grad and not global_BK.requires_grad
    student = torch.zeros(3, 5, requires_grad=True)
    (student * global_BK).sum().backward()
    assert student.grad is not None and torch.equal(student.grad, global_BK)


def test_every_image_is_counted(tiny: TeacherConfig) -> None:
    before = teacher_images()
    teacher = load(tiny)
    assert teacher_images() > before
    start = teacher_images()
    teacher.forward_dense(pixels())
    teacher.forward_global(pixels()[:1])
    teacher.probe()
    assert teacher_images() - start == 3 + 1 + 8


def test_in_batches_pads_every_forward_to_the_batch_and_returns_the_images_alone(tiny: TeacherConfig) -> None:
    teacher, images = load(tiny, batch=4), torch.cat([pixels(), pixels().flip(3)])
    start = teacher_images()
    found = teacher.in_batches(images)
    assert teacher_images() - start == 8
    padded = teacher.forward_dense(images[[4, 5, 4, 4]])
    for logits, first, last in zip(found, teacher.forward_dense(images[:4]), padded, strict=True):
        assert len(logits) == 6 and torch.equal(logits, torch.cat([first, last[:2]]))


def test_the_classifier_stays_in_float32_under_any_autocast(tiny: TeacherConfig) -> None:
    exact, half = load(tiny), load(tiny, precision="bf16")
    x = pixels()
    dense_BKhw, global_BK = half.forward_dense(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer_dense, outer_global = exact.forward_dense(x)
    assert torch.equal(outer_global, exact.forward_dense(x)[1])  # a caller's autocast does not reach the teacher
    assert torch.equal(outer_dense, exact.forward_dense(x)[0])
    for t in (dense_BKhw, global_BK):
        assert t.dtype == torch.float32
        assert not torch.equal(t, t.bfloat16().float())  # values that bf16 can't hold: made in float32
    assert not torch.equal(global_BK, exact.forward_global(x))
    torch.testing.assert_close(dense_BKhw.mean((2, 3)), global_BK, rtol=1e-4, atol=1e-4)


def test_views_of_another_size_are_resized_with_antialiasing(tiny: TeacherConfig) -> None:
    teacher = load(tiny, size=96, interpolation="bilinear")
    x = torch.from_numpy(probe_images(96)[5:7]).permute(0, 3, 1, 2).float()
    by_hand = np.stack(
        [np.asarray(Image.fromarray(i).resize((64, 64), Image.Resampling.BILINEAR)) for i in probe_images(96)[5:7]]
    )
    resized = torch.from_numpy(by_hand).permute(0, 3, 1, 2).float()
    assert teacher.grid == (4, 4)
    spread = teacher.forward_global(resized).std()
    assert (teacher.forward_global(x) - teacher.forward_global(resized)).abs().max() < 0.05 * spread


def test_the_model_s_own_input_size_is_used_where_none_is_given(tiny: TeacherConfig) -> None:
    assert load(tiny, input_size=None).preprocess.size == 224
    assert load(tiny, input_size=None).grid == (14, 14)


def test_a_coarser_grid_pools_the_dense_logits_and_leaves_the_global_ones(tiny: TeacherConfig) -> None:
    own, coarse, x = load(tiny), load(tiny, grid=[2, 2]), pixels()
    dense_BKhw, global_BK = own.forward_dense(x)
    pooled, same = coarse.forward_dense(x)
    assert coarse.grid == (2, 2)
    torch.testing.assert_close(pooled, dense_BKhw.reshape(3, 5, 2, 2, 2, 2).mean((3, 5)))
    torch.testing.assert_close(same, global_BK)
    with pytest.raises(TeacherError, match=r"\[8, 8\], finer than the teacher's own \[4, 4\]"):
        load(tiny, grid=[8, 8])


def test_a_class_map_reorders_and_subsets_both_outputs(tiny: TeacherConfig, tmp_path: Path) -> None:
    dense_BKhw, global_BK = load(tiny).forward_dense(pixels())
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    for classes, names in (([3, 0], ["x", "y"]), (str(tmp_path / "names.txt"), ["d", "a"])):
        teacher = load(tiny, names, classes=classes)
        dense, pooled = teacher.forward_dense(pixels())
        assert teacher.classes == 2 and dense.shape == (3, 2, 4, 4)
        torch.testing.assert_close(dense, dense_BKhw[:, [3, 0]])
        torch.testing.assert_close(pooled, global_BK[:, [3, 0]])
        torch.testing.assert_close(teacher.forward_global(pixels()), pooled)


def test_class_counts_that_disagree_are_refused_with_both(tiny: TeacherConfig) -> None:
    with pytest.raises(TeacherError, match="5 logits and the data set has 3 classes"):
        load(tiny, NAMES[:3])


def test_a_head_that_is_not_linear_needs_the_opt_in() -> None:
    config = TeacherConfig(model="convnext_atto", kwargs={"num_classes": 5}, input_size=64)
    with pytest.raises(TeacherError, match="not linear in the mean of the cells"):
        load(config)
    teacher = load(config, dense="per_cell")
    assert teacher.fingerprint.head == "per_cell"
    assert teacher.forward_dense(pixels())[0].shape == (3, 5, 2, 2)


OWN_DENSE = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 5)
    def forward_dense(self, x):
        f = self.body(x)
        dense = torch.einsum("bchw,kc->bkhw", f, self.fc.weight) + self.fc.bias[:, None, None]
        return dense, self.forward(x)
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Own()
"""


def test_an_own_forward_dense_is_pooled_mapped_and_never_autocast(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_DENSE)
    config = TeacherConfig(model=f"{tmp_path / 'own.py'}:build")
    teacher = load(config)
    dense_BKhw, global_BK = teacher.forward_dense(pixels())
    assert dense_BKhw.shape == (3, 5, 4, 4) and any("ImageNet" in note for note in teacher.notes)
    mapped = load(config, ["x", "y"], classes=[4, 1], grid=[2, 2])
    dense, pooled = mapped.forward_dense(pixels())
    torch.testing.assert_close(pooled, global_BK[:, [4, 1]])
    torch.testing.assert_close(dense, dense_BKhw[:, [4, 1]].reshape(3, 2, 2, 2, 2, 2).mean((3, 5)))
    with pytest.raises(TeacherError, match="forward_dense would run its classifier in bf16"):
        load(config, precision="bf16")


def test_a_grid_of_one_cell_is_noted(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_DENSE)
    config = TeacherConfig(model=f"{tmp_path / 'own.py'}:build")
    assert any("1x1" in note for note in load(config, size=16).notes)


def test_the_fingerprint_is_stable_plain_data(tiny: TeacherConfig) -> None:
    a, b = load(tiny).fingerprint.facts, load(tiny).fingerprint.facts
    assert a == b == json.loads(json.dumps(a))
    assert str(tiny.weights) not in json.dumps(a)  # a moved file is the same teacher


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0.5]}, "std"),
        ({"interpolation": "bilinear"}, "interpolation"),
        ({"input_size": 128}, "input_size"),
        ({"precision": "bf16"}, "autocast"),
        ({"channels_last": False}, "channels_last"),
        ({"batch": 32}, "batch"),
        ({"dense": "per_cell"}, "dense"),
        ({"grid": [2, 2]}, "grid"),
        ({"classes": [4, 3, 2, 1, 0]}, "class_map"),
        ({"weights": None}, "weights_sha256"),
    ],
)
def test_whatever_moves_the_outputs_moves_the_fingerprint(
    tiny: TeacherConfig, changes: dict[str, Any], field: str
) -> None:
    a, b = load(tiny).fingerprint.facts, load(tiny, **changes).fingerprint.facts
    assert field in {k for k in a if a[k] != b[k]}


def test_kwargs_that_can_t_be_recorded_are_refused(tiny: TeacherConfig) -> None:
    with pytest.raises(TeacherError, match="plain values"):
        load(tiny, kwargs={**tiny.kwargs, "act_layer": nn.ReLU})


@pytest.mark.parametrize("changes", [{"std": [0.5, 0.0, 0.5]}, {"input_size": 0}, {"crop_pct": 0.0}, {"crop_pct": 1.5}])
def test_impossible_preprocessing_is_refused(tiny: TeacherConfig, changes: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, TeacherError), match=rf"teacher\.{next(iter(changes))} is"):
        load(tiny, **changes)


@pytest.mark.parametrize(("has", "recorded"), [(False, "none"), (True, "bf16")])
def test_auto_autocast_is_on_where_the_processor_has_bf16_and_the_outcome_is_recorded(
    tiny: TeacherConfig, monkeypatch: pytest.MonkeyPatch, has: bool, recorded: str
) -> None:
    monkeypatch.setattr("cskd.machine.arithmetic.cpu_has_bf16", lambda: has)
    assert load(tiny, precision="auto").fingerprint.facts["autocast"] == recorded


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_teacher(tiny: TeacherConfig) -> None:
    a, b = load(tiny), load(tiny, compile=True)
    assert compare_probe(a.probe(), b.probe()) is None
    assert a.fingerprint != b.fingerprint


def test_a_backbone_that_does_not_compile_is_refused_in_one_line(
    tiny: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(function: Any, **_: Any) -> Any:
        def run(x: Any) -> Any:
            raise TorchDynamoException("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    teacher = load(tiny, compile=True)
    with pytest.raises(TeacherError, match=r"torch\.compile fails: .*No working C.*; set teacher\.compile: false$"):
        teacher.probe()


@torch.no_grad()
def test_both_memory_layouts_are_normalised_to_the_same_bits() -> None:
    preprocess = Preprocess(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 1.0)
    prepare = Prepare(preprocess, torch.device("cpu"), channels_last=True)
    x = pixels(32)
    assert torch.equal(prepare(x), prepare(x.contiguous(memory_format=torch.channels_last)))
