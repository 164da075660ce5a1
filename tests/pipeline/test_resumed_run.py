"""A run that was cut writes what it would have written, in every file; what may change when it is resumed, and what may not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import cskd.pipeline.training_run
from cskd.config import Config, to_yaml
from cskd.errors import ConfigError, StudentError
from cskd.machine.ranks import Ranks
from cskd.pipeline import outputs
from cskd.pipeline.conflicts import as_begun, change_note, changed_on_resume, refuse_other_run
from cskd.pipeline.look.check_config import check_config
from cskd.pipeline.run_state import RunState
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.student.best import Best
from cskd.student.optim import Optimisation
from cskd.student.resume import digest
from tests.pipeline.test_pipeline import cached_data, run_settings

STEPS = 5  # of an epoch
CLOCK = "seconds"  # the one field that says how long something took


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("resumed"))


def settings(base: Path, output: Path, **changes: Any) -> Config:
    return run_settings(base, output, **{"save_every": 1, "epochs": 2, **changes})


def files(run: Path) -> dict[str, Any]:
    """Every file of a run by name, without what the clock says."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if name == "metrics.jsonl":
            found[name] = [{k: v for k, v in row.items() if k != CLOCK} for row in read_metrics(run)]
        elif name == "metrics.csv":
            found[name] = path.read_text().splitlines()[0], len(path.read_text().splitlines())
        elif name == "resolved.yaml":
            found[name] = path.read_text().replace(str(run), "RUN")
        elif name == "README.md":  # its last line is the hash of the others
            apart = (f"# {run.name}", f"- name: {run.name}", "| wall time")
            found[name] = [line for line in path.read_text().splitlines()[:-1] if not line.startswith(apart)]
        else:
            found[name] = path.read_bytes()
    return found


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """End the run before update `step` (counted from 0), or at its end in the midst of `what`."""
    if what == "update":
        real = Optimisation.update

        def update(self: Optimisation, loss: torch.Tensor, at: int) -> Any:
            if at == step:
                raise KeyboardInterrupt
            return real(self, loss, at)

        monkeypatch.setattr(Optimisation, "update", update)
        return
    inner, calls = getattr(cskd.pipeline.training_run, what), list[int]()

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(cskd.pipeline.training_run, what, called)


@pytest.mark.parametrize("export", [{}, {"export": "best", "best": "top1.ema.all"}], ids=["ema", "best"])
def test_a_run_cut_anywhere_leaves_the_files_of_one_that_was_not(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: dict[str, Any]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(cached, whole, **export), quiet=True)
    for step, what in ((2, "update"), (4, "update"), (0, "score_heads"), (0, "export"), (STEPS + 3, "update")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_at(patch, step, what)
            train(settings(cached, cut, **export), quiet=True)
    train(settings(cached, cut, max_steps=9, **export), quiet=True)
    train(settings(cached, cut, **export), quiet=True)
    expected, found = files(whole), files(cut)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name] and "step-00000009" not in name] == []
    name = "resume/step-00000009.safetensors"  # inside an epoch: it knows how long that took so far
    assert without_clock(cut / name) == without_clock(whole / name)


def without_clock(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Tensors and JSON of a state."""
    with safe_open(path, framework="pt") as f:
        body = json.loads(f.metadata()["cskd"])
        tensors = {name: f.get_tensor(name).numpy().tobytes() for name in f.keys()}  # noqa: SIM118  not a dict
    assert isinstance(body["info"]["progress"].pop(CLOCK), float)
    return tensors, body


def test_a_finished_run_keeps_its_rows_when_its_command_is_given_again(cached: Path, tmp_path: Path) -> None:
    stopped = settings(cached, tmp_path / "run", max_steps=3)
    first = train(stopped, quiet=True)
    before = files(tmp_path / "run")
    again = train(stopped, quiet=True)
    assert (again.steps, again.top1) == (0, first.top1)
    assert files(tmp_path / "run") == before


def test_online_forwards_are_counted_over_the_whole_run(cached: Path, tmp_path: Path) -> None:
    train(settings(cached, tmp_path / "whole"), online=True, quiet=True)
    train(settings(cached, tmp_path / "cut", max_steps=3), online=True, quiet=True)
    train(settings(cached, tmp_path / "cut"), online=True, quiet=True)
    rows = [[row["teacher_forwards"] for row in read_metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert rows[0] == rows[1] and 0 < rows[0][0] < rows[0][1]


class Two(Ranks):
    """Two ranks of one process; a sum over them is ready once both have given theirs."""

    other: dict[str, Any]

    def __init__(self, rank: int, other: dict[str, Any]) -> None:
        super().__init__(rank=rank, count=2)
        object.__setattr__(self, "other", other)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(torch.as_tensor(self.other["value"], dtype=x.dtype))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_sums_of_an_epoch_go_on_with_any_number_of_ranks(count: int) -> None:
    """Their mean over ranks stays what it was; with the same number each rank's own sum does, to the last bit."""
    rows = [[0.1, 0.3], [0.7, 1.1]]
    record = {"losses": rows, "counted": 3, "seconds": 1.5, "teacher_forwards": 24, "first_loss": 2.0}
    states = []
    for rank in range(count):
        state = RunState(Ranks(rank, count), torch.device("cpu"), ("label",), 5)
        state.restore(record, step=8, steps_per_epoch=5)
        states.append(state._losses)
    if count == 2:
        assert torch.equal(torch.stack(states), torch.tensor(rows))
    torch.testing.assert_close(torch.stack(states).mean(0), torch.tensor(rows).mean(0))


def test_the_record_holds_each_ranks_sums_and_all_their_forwards() -> None:
    other: dict[str, Any] = {"value": 0}
    state = RunState(Two(0, other), torch.device("cpu"), ("label",), 5)
    state.add(torch.tensor(0.5), {"label": torch.tensor(0.25)}, 1)
    other["value"] = torch.tensor([[0.0, 0.0], [2.0, 3.0]])
    state._forwards, state._forwards_before = 24, 0

    def both(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([[0.0, 0.0], [2.0, 3.0]]) if x.ndim == 2 else x + 8

    object.__setattr__(state.ranks, "sum", both)
    record = state.record()
    assert record["losses"] == [[0.5, 0.25], [2.0, 3.0]] and record["counted"] == 1
    assert record["teacher_forwards"] >= 24 + 8


# --- what may change ---

IDENTITY: dict[str, Any] = {
    "cache": "a",
    "views": 3,
    "online": False,
    "ranks": 2,
    "student": {},
    "loss": {"baseline_head": "class"},
    "train": {},
}


def identity(**changes: Any) -> dict[str, Any]:
    made = {**IDENTITY, "train": {"lr": 1.0, "seed": 0, "ema_warmup": True, "best": None}}
    train = {k: v for k, v in changes.items() if k in made["train"]}
    return made | {"train": made["train"] | train} | {k: v for k, v in changes.items() if k not in train}


def test_what_may_change_is_noted_and_the_rest_is_refused_with_what_sets_it_back(tmp_path: Path) -> None:
    now = identity(lr=0.1, ranks=1)
    refuse_other_run(identity(), now, tmp_path, True)
    changes = changed_on_resume(identity(), now)
    assert changes == [("ranks", 2, 1), ("train.lr", 1.0, 0.1)]
    assert change_note(*changes[1], 12) == "train.lr changed from 1.0 to 0.1 at step 12"
    assert "drop path" in change_note(*changes[0], 12)
    for change, back in (
        ({"seed": 1}, r"--set train\.seed=0,"),
        ({"views": 6}, r"--set train\.views=3,"),
        ({"online": True}, "without --online,"),
        ({"cache": "b"}, r"set cache\.path"),
        ({"cache": "none, b"}, r"set cache\.path"),
    ):
        with pytest.raises(ConfigError, match=back) as refused:
            refuse_other_run(identity(), identity(**change), Path("runs/mine"), True)
        assert len(str(refused.value)) <= 300


def test_a_record_of_an_earlier_version_stands_for_what_that_version_did(cached: Path, tmp_path: Path) -> None:
    old = identity()
    old["train"] = {"lr": 1.0, "seed": 0}
    assert changed_on_resume(old, identity(ema_warmup=False)) == []
    assert changed_on_resume(old, identity()) == [("train.ema_warmup", False, True)]
    asked = settings(cached, tmp_path, ema=0.9)
    mine, notes = as_begun(asked, old)
    assert (asked.train.ema_warmup, mine.train.ema_warmup) == (True, False)
    assert notes == ["train.ema_warmup is false, as this run was begun"]
    written = dataclasses.replace(asked, given=asked.given | {"train.ema_warmup"})
    assert as_begun(written, old) == (written, [])
    assert as_begun(asked, None) == (asked, [])
    assert (
        as_begun(asked, identity(ema_warmup=False))[0].train.ema_warmup is False
    )  # of the state after the first resume
    without = settings(cached, tmp_path, ema=None)
    assert as_begun(without, old) == (without, [])  # there is no average to speak of


def aged(path: Path) -> None:
    """Make a state what the version before this one wrote."""
    with safe_open(path, framework="pt") as f:
        body = json.loads(f.metadata()["cskd"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  not a dict
    for name in ("progress", "device", "val"):
        del body["info"][name]
    for name in ("ema_warmup", "best"):
        del body["info"]["train"][name]
    metadata = {"cskd": json.dumps(body, sort_keys=True)}
    metadata["sha256"] = digest(tensors, metadata["cskd"])
    save_file(tensors, path, metadata)


def test_a_run_of_the_version_before_resumes_as_it_was_begun(cached: Path, tmp_path: Path) -> None:
    train(settings(cached, tmp_path / "whole", ema_warmup=False), quiet=True)
    train(settings(cached, tmp_path / "old", ema_warmup=False, max_steps=3), quiet=True)
    for path in (tmp_path / "old" / "resume").iterdir():
        aged(path)
    report = train(settings(cached, tmp_path / "old"), quiet=True)
    assert any("train.ema_warmup is false" in note for note in report.notes)
    assert any("means over its remaining steps" in note for note in report.notes)
    for name in ("model.safetensors", "model_last.safetensors"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_metrics(tmp_path / "old")[1]["loss"] == read_metrics(tmp_path / "whole")[1]["loss"]


def test_a_new_learning_rate_holds_from_the_step_of_the_resume_on_and_is_written_down(
    cached: Path, tmp_path: Path
) -> None:
    train(settings(cached, tmp_path / "run", max_steps=3), quiet=True)
    report = train(settings(cached, tmp_path / "run", lr=1e-4, max_steps=7), quiet=True)
    text = "train.lr changed from 0.001 to 0.0001 at step 3"
    assert text in report.notes
    train(settings(cached, tmp_path / "run", lr=1e-4), quiet=True)  # remembered, and no change now
    rows = read_metrics(tmp_path / "run")
    assert [row.get("changed") for row in rows] == [text, None]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cskd"]["changed"] == [text]
    assert rows[0]["lr"] <= 1e-4


def test_a_resumed_run_says_where_it_goes_on_and_another_student_is_refused_by_its_key(
    cached: Path, tmp_path: Path
) -> None:
    begun = settings(cached, tmp_path / "run", max_steps=3)
    assert not [note for note in train(begun, quiet=True).notes if "goes on" in note]
    other = dataclasses.replace(
        begun, student=dataclasses.replace(begun.student, model="deit_small_distilled_patch16_224")
    )
    with pytest.raises(
        ConfigError, match=r"was begun with student\.model = deit_tiny\w+, now it is deit_small\w+; set it back"
    ):
        train(other, quiet=True)
    report = train(settings(cached, tmp_path / "run", max_steps=4), quiet=True)
    assert f"the run in {tmp_path / 'run'} goes on after step 3 of 4" in report.notes


def test_a_disk_that_can_not_hold_a_run_is_refused_before_the_first_step_and_by_check(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run of as many states as are kept leaves is the figure, but for one state and the small files."""
    made = settings(cached, tmp_path / "run", epochs=3, ema=0.9, best="top1.class")
    train(made, quiet=True)
    left = [path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors")]
    state = max(left)
    new = dataclasses.replace(made, train=dataclasses.replace(made.train, output=str(tmp_path / "new")))
    (tmp_path / "c.yaml").write_text(to_yaml(new))
    disk = SimpleNamespace(free=(sum(left) + state) * 2)
    monkeypatch.setattr(outputs, "shutil", SimpleNamespace(disk_usage=lambda _: disk))
    room = lambda: next(r for r in check_config(tmp_path / "c.yaml").rows if r.name == "room for the run")  # noqa: E731
    assert (room().state, made.train.keep, made.train.epochs) == ("ok", 2, 3)
    need = float(room().found.split(" MB")[0].replace(",", "")) * 1e6
    assert 0.85 * (sum(left) + state) < need < 1.15 * (sum(left) + state)
    disk.free = int(need / 2)
    assert room().state == "wrong" and "new: its disk has " in room().found and "train.keep" in room().found
    with pytest.raises(ConfigError, match=r"new: its disk has \d+ MB free, and the run takes"):
        train(new, quiet=True)
    assert not (tmp_path / "new" / "resume").exists()
    train(made, quiet=True)  # one that is there goes on


def test_a_record_that_is_none_is_refused(cached: Path, tmp_path: Path) -> None:
    state = RunState(Ranks(), torch.device("cpu"), ("label",), 5)
    for record in ([1], {"changes": [1]}, {"losses": 3, "counted": 3}, {"teacher_forwards": "many"}, "text"):
        with pytest.raises(StudentError, match="record that is none"):
            state.restore(record, 3, 5)


def test_what_sets_a_source_of_views_back_can_be_done() -> None:
    """A baseline has no cache to set back, and a run with the teacher next to it reads none."""
    for begun, now, back in (
        ({"cache": "none, a"}, {"cache": "none, b"}, "restore data.train, recipe and teacher"),
        ({"cache": "none, a"}, {"cache": "b"}, "restore loss.method none"),
        ({"online": True, "cache": "a"}, {"online": True, "cache": "b"}, "restore data.train, recipe and teacher"),
    ):
        with pytest.raises(ConfigError, match=back):
            refuse_other_run(identity(**begun), identity(**now), Path("runs/mine"), True)


def test_another_score_starts_the_search_for_the_best_again() -> None:
    for new in (None, "top1.all"):
        state = RunState(Ranks(), torch.device("cpu"), ("label",), 2)
        state.best = state.shown = Best("top1.class", 50.0, 4, "0" * 64)
        state.change([("train.best", "top1.class", new)], 4)
        assert state.best is None and state.shown is None


def test_a_run_that_exports_something_else_for_a_while_still_finds_its_best(cached: Path, tmp_path: Path) -> None:
    """As where it is requeued without the key: what the run is begun with stays, unless the user writes another."""
    whole = settings(cached, tmp_path / "whole", export="best", epochs=3)
    train(whole, quiet=True)
    cut = settings(cached, tmp_path / "cut", export="best", epochs=3, max_steps=STEPS)
    train(cut, quiet=True)
    notes = train(settings(cached, tmp_path / "cut", epochs=3, max_steps=2 * STEPS), quiet=True).notes
    assert any(note.startswith("train.best is top1.") and "as this run was begun" in note for note in notes)
    train(settings(cached, tmp_path / "cut", export="best", epochs=3), quiet=True)
    for run in ("whole", "cut"):
        assert (tmp_path / run / "model.safetensors").exists()
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
