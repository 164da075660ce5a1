"""Every example runs on a small cache, as it stands."""

from __future__ import annotations

import importlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.caches import CLASSES, make_tiny_cache

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cache(tmp_path_factory.mktemp("examples"), ["envelope", "int8"], n=18, views=2).root


def test_one_sample(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import look

    sample = look.main(cache)
    printed = capsys.readouterr().out
    assert CLASSES[sample.label] in printed and str(sample.parameters) in printed
    body = (EXAMPLES / "look.py").read_text().partition("    dataset = ")[2].partition("    return")[0]
    assert len(body.splitlines()) == 5


@pytest.mark.parametrize("name", ["look", "plain_loop", "webdataset_join"])
def test_an_example_without_its_arguments_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(SystemExit, match=rf"python \S*{name}\.py "):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_a_loop_of_ones_own_learns(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import plain_loop

    losses = plain_loop.main(cache, epochs=6)
    assert capsys.readouterr().out.count("mean loss") == 6
    assert len(losses) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_script_of_timms_kind_learns(cache: Path) -> None:
    from examples import timm_style

    shape = ["patch_size=8", "embed_dim=48", "depth=2", "num_heads=3"]
    losses = timm_style.main([str(cache), "--epochs", "4", "--lr", "3e-3", "--model-kwargs", *shape])
    assert len(losses) >= 4 and losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")  # those of the framework are not ours
def test_lightning_feeds_other_views_in_every_epoch(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    example: Any = importlib.import_module("examples.lightning_module")
    seen: list[set[int]] = []

    class Watch(example.lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append({p.view for p in batch.parameters})

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    run = example.main(cache, default_root_dir=tmp_path, accelerator="cpu", callbacks=[Watch()], **quiet)
    assert run.global_step == 4 and seen == [{0}, {0}, {1}, {1}]
    assert {"label", "dist", "patch"} <= run.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_hugging_face_feeds_other_views_in_every_epoch(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    example: Any = importlib.import_module("examples.hf_trainer")
    seen: list[set[int]] = []
    compute_loss = example.Distiller.compute_loss

    def watched(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({p.view for p in inputs["batch"].parameters})
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(example.Distiller, "compute_loss", watched)
    losses = example.main(cache, tmp_path, use_cpu=True, disable_tqdm=True, save_strategy="no")
    assert len(losses) == 4 and seen == [{0}, {0}, {1}, {1}]


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_draws_the_envelope_of_a_cell(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code cells, one after the other; no outputs are kept in the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = json.loads((EXAMPLES / "envelope.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (tmp_path / "notebook.py").write_text("\n".join("".join(cell["source"]) for cell in code), encoding="utf-8")
    monkeypatch.setenv("CSKD_CACHE", str(cache))
    try:
        names = runpy.run_path(str(tmp_path / "notebook.py"))
        assert len(names["pieces"][names["row"], names["col"]]) > 1
        assert len(names["right"].lines) >= 3 and names["right"].get_legend() is not None
    finally:
        plt.close("all")
