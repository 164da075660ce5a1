"""The analysis of runs and the report of teachers: definitions on cases known by hand, and both scripts on a tiny data set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.results import analysis, teacher_report
from benchmarks.results.agreement import Cells, agreement, agreement_map, teacher_cells, teacher_facts
from benchmarks.results.analysis_figures import WIDTH, draw
from benchmarks.results.attention import attention_weights, distances_by_layer, mean_distance, patch_distances
from benchmarks.results.receptive_field import centred_side, receptive_field
from benchmarks.results.runs import open_run
from cskd.config import StudentConfig, to_yaml
from cskd.errors import StudentError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.train import train
from cskd.student import Student, build_student
from cskd.student.checkpoint import load_student
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, cached_data, config, run_settings
from tests.teachers import load, pixels, tiny_teacher

FIGURES = {"agreement.png", "agreement_cells.png", "attention_distance.png", "accuracy.png"}


def small_student(**kwargs: Any) -> Student:
    torch.manual_seed(0)
    settings = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | kwargs
    return build_student(StudentConfig("vit_tiny_patch16_224", settings), 5, 32).eval()


# --- attention ---------------------------------------------------------------------------------------------------------


def test_uniform_attention_looks_as_far_as_the_mean_of_all_distances() -> None:
    distance = patch_distances((2, 2), (8, 6))
    by_hand = (0 + 8 + 6 + 10) / 4  # of each patch to itself, below, beside, across
    weights = torch.full((3, 2, 5, 5), 0.2)
    weights[..., 0] = 0.6  # the class token, as key: left out, and the rest renormalised
    weights[:, :, 0] = torch.rand(5)  # and as query
    assert mean_distance(weights, distance).tolist() == pytest.approx([by_hand, by_hand])


def test_attention_to_oneself_has_no_distance_and_to_the_neighbour_one_patch() -> None:
    distance = patch_distances((1, 4), (16, 16))
    both = torch.stack([torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]])[None]  # two heads
    assert mean_distance(both, distance).tolist() == [0.0, 16.0]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_weights_of_a_layer_are_those_of_its_queries_and_keys(qk_norm: bool) -> None:
    student = small_student(qk_norm=qk_norm)
    vit: Any = student.backbone
    attn, x = vit.blocks[0].attn, torch.randn(2, 3, 32, 32)
    if qk_norm:
        attn.q_norm.weight.data.uniform_(0.5, 4)
    entered: list[torch.Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _m, inputs: entered.append(inputs[0]))
    fused = attn.fused_attn
    with torch.no_grad(), attention_weights(student) as seen:
        inside = student(x).cls_logits
    handle.remove()
    q, k, _ = attn.qkv(entered[0]).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) / math.sqrt(8)).softmax(3)
    assert len(seen) == 2 and torch.allclose(seen[0], expected, atol=1e-6)
    with torch.no_grad():
        assert attn.fused_attn == fused and torch.allclose(student(x).cls_logits, inside, atol=1e-5)
        assert len(seen) == 2  # nothing is hooked any more


def test_distances_of_a_student_average_over_images_whatever_the_batches() -> None:
    student, images = small_student(), torch.randn(5, 3, 32, 32)
    whole, parts = (distances_by_layer(student, torch.split(images, n)) for n in (5, 2))
    assert whole.shape == (2, 3) and torch.allclose(whole, parts)
    for block in student.backbone.blocks:
        block.get_parameter("attn.qkv.weight").data.zero_()
    uniform = float(patch_distances((4, 4), (8, 8)).mean())
    assert distances_by_layer(student, [images]).flatten().tolist() == pytest.approx([uniform] * 6)


def test_a_vit_without_such_attention_is_refused() -> None:
    student = small_student()
    for block in student.backbone.blocks:
        block.attn = nn.Identity()
    with pytest.raises(StudentError, match="does not show its weights"), attention_weights(student):
        pass


# --- receptive field ---------------------------------------------------------------------------------------------------


def convolutions(*layers: tuple[int, int]) -> nn.Sequential:
    """3-channel convolutions of (kernel, stride) with weights 1, padded so that sizes divide."""
    made = [nn.Conv2d(3, 3, kernel, stride, kernel // 2, bias=False) for kernel, stride in layers]
    for layer in made:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*made)


@pytest.mark.parametrize(
    ("layers", "size", "extent"),
    [(((3, 1), (3, 1)), 21, 5), (((3, 2), (3, 2)), 41, 7), (((7, 2), (3, 1), (1, 1)), 31, 11)],
)
def test_the_extent_of_a_stack_of_convolutions_is_the_known_one(layers: Any, size: int, extent: int) -> None:
    field = receptive_field(convolutions(*layers), torch.randn(4, 3, size, size))
    assert field.theoretical == (extent, extent) and not field.whole_input


def test_the_square_of_a_uniform_gradient_and_that_of_a_single_pixel() -> None:
    flat = receptive_field(convolutions((5, 1)), torch.randn(2, 3, 21, 21))
    assert flat.effective == {"0.68": pytest.approx(5.0), "0.95": pytest.approx(5.0)}  # 3 x 3 would hold 36 %
    point = receptive_field(convolutions((1, 1)), torch.randn(2, 3, 21, 21))
    assert point.effective == {"0.68": pytest.approx(1.0), "0.95": pytest.approx(1.0)} and point.theoretical == (1, 1)
    assert flat.offset == pytest.approx((0, 0)) and point.offset == pytest.approx((0, 0))


def test_a_cell_that_does_not_lie_where_its_pixels_do_has_an_offset() -> None:
    # Cell 5 of 10 covers pixels 10 and 11; a convolution of stride 2 centres it on pixel 10.
    assert receptive_field(convolutions((3, 2)), torch.randn(2, 3, 20, 20)).offset == pytest.approx((-0.5, -0.5))


def test_a_square_holds_no_less_than_its_share() -> None:
    peak = torch.zeros(9, 9, dtype=torch.float64)
    peak[4, 4], peak[2, 4], peak[6, 4] = 0.7, 0.15, 0.15
    assert [centred_side(peak, share) for share in (0.68, 0.7, 0.71)] == [1.0, 1.0, 5.0]


def test_a_field_as_large_as_the_input_is_said_to_be() -> None:
    pooled = nn.Sequential(convolutions((3, 2)), nn.AdaptiveAvgPool2d(1))
    assert receptive_field(pooled, torch.randn(2, 3, 10, 10)).whole_input


def test_a_network_that_ignores_its_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        receptive_field(lambda x: 0 * x, torch.randn(1, 3, 8, 8))


# --- agreement ---------------------------------------------------------------------------------------------------------


def test_who_is_followed_is_counted_cell_by_cell() -> None:
    cells = Cells(local=torch.tensor([[[0, 1, 2, 2]]]), image=torch.tensor([2]), label=torch.tensor([1]))
    shares = agreement(torch.tensor([[[0, 2, 2, 1]]]), cells)
    assert shares == {
        "all": {"local": 0.5, "global": 0.5, "label": 0.25},
        "differ": {"local": 0.5, "global": 0.5, "label": 0.0},
        "same": {"local": 0.5, "global": 0.5, "label": 0.5},
    }
    assert agreement_map(torch.tensor([[[0, 2, 2, 1]]]), cells.local) == [[1.0, 0.0, 1.0, 0.0]]
    assert teacher_facts(cells) == {
        "images": 1,
        "grid": [1, 4],
        "cells_differ": 0.5,
        "label": {"all": {"local": 0.25, "global": 0.0}, "differ": {"local": 0.5, "global": 0.0}},
    }


def test_a_student_that_copies_the_teacher_agrees_with_it_everywhere(tmp_path: Path) -> None:
    teacher, images = load(tiny_teacher(tmp_path)), pixels()
    cells = teacher_cells(teacher, images.to(torch.uint8), torch.tensor([0, 1, 2]))
    dense_BKhw, global_BK = teacher.forward_dense(images.to(torch.uint8).float())
    copied = agreement(dense_BKhw.argmax(1), cells)
    assert copied["all"]["local"] == copied["differ"]["local"] == 1.0 and copied["differ"]["global"] == 0.0
    followed = agreement(global_BK.argmax(1)[:, None, None].expand(3, 4, 4), cells)
    assert followed["all"]["global"] == 1.0 and followed["differ"]["local"] == 0.0
    assert followed["all"]["local"] == pytest.approx(1 - teacher_facts(cells)["cells_differ"])


def test_a_part_without_cells_is_left_out() -> None:
    cells = Cells(torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]))
    assert agreement(cells.local, cells).keys() == {"all", "same"}
    assert teacher_facts(cells)["label"].keys() == {"all"}


# --- the scripts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, cache, and the runs `cskd` and `plain` (no distillation) of three epochs."""
    folder = cached_data(tmp_path_factory.mktemp("analysis"))
    train(run_settings(folder, folder / "cskd", keep=100, save_every=2), quiet=True)
    train(config(folder, "plain", loss={"method": "none"}, train={"keep": 100, "ema": None}), quiet=True)
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return facts


def test_an_analysis_has_every_epoch_of_every_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert analysis.main([str(out), str(base / "cskd"), str(base / "plain"), "--images", "10", "--device", "cpu"]) == 0
    facts = last_line(capsys)
    assert facts == json.loads((out / "analysis.json").read_text())
    taught, plain = facts["runs"]["cskd"], facts["runs"]["plain"]
    assert [row["epoch"] for row in taught["agreement"]] == [1, 2, 3]  # not those inside an epoch
    assert [round(row["blend"], 3) for row in taught["agreement"]] == [1.0, 0.667, 0.333]
    assert [at["epoch"] for at in taught["cells"]] == [1, 2, 3]
    for row, at in zip(taught["agreement"], taught["cells"], strict=True):
        cells = [share for line in at["local"] for share in line]
        assert sum(cells) / len(cells) == pytest.approx(row["all"]["local"])
    assert "agreement" not in plain and "plain" in facts["left_out"][0]
    for run in (taught, plain):
        assert [len(heads) for heads in run["attention"]["heads"]] == [2, 2]
        assert 0 < run["attention"]["mean"][0] < 32 * math.sqrt(2)
        assert run["accuracy"]["epoch"] == [1, 2, 3]
    assert (taught["weights"], plain["weights"]) == ("ema", "model")
    assert {"class", "distillation", "patches", "all"} <= taught["accuracy"]["heads"].keys()
    assert {p.name for p in out.glob("*.png")} == FIGURES
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width >= 900 * 0.7 and picture.width <= WIDTH * 150


@pytest.mark.slow
def test_many_runs_with_names_of_any_kind_can_be_drawn(base: Path, tmp_path: Path) -> None:
    facts = analysis.analyse([open_run(base / "cskd")], 4, torch.device("cpu"))
    run = facts["runs"]["cskd"]
    assert set(draw(tmp_path, facts | {"runs": {f"_$run_{i}^$": run for i in range(9)}})) == FIGURES


def test_a_state_gives_the_weights_of_its_epoch(base: Path) -> None:
    run = open_run(base / "cskd")
    last = {name: t.clone() for name, t in run.load(run.states[-1]).backbone.state_dict().items()}
    exported = load_student(base / "cskd")[0].backbone.state_dict()
    assert all(torch.equal(t, last[name]) for name, t in exported.items())
    first = {name: t.clone() for name, t in run.load(run.states[0]).backbone.state_dict().items()}
    assert not torch.equal(first["head.weight"], last["head.weight"])


def test_a_damaged_state_is_refused(base: Path, tmp_path: Path) -> None:
    run = open_run(base / "cskd")
    data = bytearray(run.states[0].path.read_bytes())
    data[-5] ^= 1
    bad = tmp_path / run.states[0].path.name
    bad.write_bytes(data)
    with pytest.raises(StudentError, match="its digest is not that of its content"):
        run.load(type(run.states[0])(bad, run.states[0].step, 1))


@pytest.mark.parametrize("what", ["no run", "no states", "images", "other teacher", "other weights"])
def test_what_can_not_be_analysed_ends_with_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    run, arguments = tmp_path / "run", []
    run.mkdir()
    if what != "no run":
        for path in (base / "cskd").iterdir():
            (run / path.name).symlink_to(path)
    runs, resolved = [run], (base / "cskd" / "resolved.yaml").read_text()
    if what == "no states":
        (run / "resume").unlink()
    elif what == "images":
        arguments = ["--images", "0"]
    elif what == "other teacher":
        (run / "resolved.yaml").unlink()
        (run / "resolved.yaml").write_text(resolved.replace("crop_pct: null", "crop_pct: 0.5"))
        runs = [base / "cskd", run]
    elif what == "other weights":
        (tmp_path / "net.py").write_text((base / "net.py").read_text().replace("manual_seed(1)", "manual_seed(2)"))
        (run / "resolved.yaml").unlink()
        (run / "resolved.yaml").write_text(resolved.replace(str(base / "net.py"), str(tmp_path / "net.py")))
    assert analysis.main([str(tmp_path / "out"), *map(str, runs), *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("benchmarks/")]
    expected = {
        "no run": "has no resolved.yaml",
        "no states": "train.keep",
        "images": "--images is 0",
        "other teacher": "another teacher",
        "other weights": "weights_sha256",
    }
    assert len(lines) == 1 and expected[what] in lines[0]


def test_a_report_says_the_same_of_cached_and_of_live_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Weights so large that the bias, the same in every cell, decides nothing.
    (tmp_path / "net.py").write_text(TEACHER.replace("Linear(12, 5)", "Linear(12, 5); self.fc.weight.data *= 100"))
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10)
    make_tiny_data(tmp_path / "val", n=12, block=20, shard=10)
    settings = config(tmp_path, cache={"views": 1})
    cache_teacher(settings, quiet=True)
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    facts = []
    for path in (tmp_path / "cache", ""):
        arguments = [str(tmp_path / "c.yaml"), "--set", f"cache.path={path}", "--views", "60", "--train-images", "20"]
        assert teacher_report.main(arguments) == 0
        facts.append(last_line(capsys)[str(tmp_path / "c.yaml")])
    cached, live = (of["views"] for of in facts)
    assert (cached["source"], live["source"]) == ("cache", "live") and cached["images"] == live["images"] == 42
    for name in ("local_differs", "half_differs", "segments"):
        assert cached[name] == pytest.approx(live[name], abs=0.005)
    assert 0 < live["local_differs"] < 1 < live["segments"] and live["half_differs"] < live["local_differs"]
    assert (facts[0]["val"]["images"], facts[0]["train"]["images"]) == (12, 20)
    # kernel 3, stride 4, then kernel 3, stride 2: 3 + 2 * 4
    assert facts[0]["field"]["theoretical"] == [11, 11] and facts[0]["grid"] == [4, 4]


def test_what_a_report_can_not_use_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cached_data(tmp_path, cache={"views": 1})
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config(folder)))
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text().replace("manual_seed(1)", "manual_seed(2)"))
    for override, expected in (
        ("data.val=", "data.val is empty"),
        ("data.train=nowhere", "nowhere"),
        ("cache.views=1", "another teacher"),
    ):
        assert teacher_report.main([str(path), "--set", override]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and expected in lines[0]


def test_counts_of_a_report_are_those_of_the_logits() -> None:
    dense_BKhw = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)  # cell 0 says class 0, cell 1 class 1
    global_BK = torch.tensor([[0.0, 1.0]])  # class 1; cell 0 leaves it at blend 1 / 3
    counts = teacher_report.CellCounts()
    counts.add(dense_BKhw, global_BK, torch.tensor([0]))
    facts = counts.facts(labelled=True)
    assert facts == {
        "images": 1,
        "local_differs": 0.5,
        "half_differs": 0.5,
        "segments": 1.5,
        "local_right": 0.5,
        "top1": 0.0,
    }
    slower = torch.tensor([[2.0, 0.0], [1.9, 3.0]]).reshape(1, 2, 1, 2)  # cell 0 leaves it at 1 / 1.1
    counts = teacher_report.CellCounts()
    counts.add(slower, global_BK)
    assert counts.facts(labelled=False) == {"images": 1, "local_differs": 0.5, "half_differs": 0.0, "segments": 1.5}
