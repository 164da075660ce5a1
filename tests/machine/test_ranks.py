"""`cskd train` as torchrun starts it: what is fed at each global step does not depend on ranks, workers or restarts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cskd.config import to_yaml
from cskd.errors import StudentError
from cskd.machine.ranks import Ranks
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.show.metrics import read_metrics
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

ROOT = Path(__file__).resolve().parent.parent.parent
Steps = list[list[tuple[int, int]]]  # (sample, view) of each row, a list a global step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    made = config(folder, cache={"views": 6}, train={"repeats": 3, "epochs": 4})
    cache_teacher(made, quiet=True)
    (folder / "c.yaml").write_text(to_yaml(made))
    return folder


def feed(
    base: Path, name: str, ranks: int, workers: int, *steps: int, output: str = "", more: tuple[str, ...] = ()
) -> Steps:
    """Run `cskd train` once for each of `steps` (0: to the end), and what its ranks were fed, joined by global step.

    output: of the run, where it is not `name`; more: other keys of the config.
    """
    record = base / f"record {name}"
    record.mkdir()
    sets = [f"train.output={base / (output or name)}", f"train.workers={workers}", *more]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    for stop in steps or (0,):
        settings = [word for s in (*sets, f"train.max_steps={stop}") for word in ("--set", s)]
        command = [
            sys.executable,
            *launch,
            str(ROOT / "tests" / "recorder.py"),
            "train",
            str(base / "c.yaml"),
            *settings,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CSKD_RECORD": str(record)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [(record / f"rank{r}").read_text().splitlines() for r in range(ranks)]
    parts = [[list(zip(*json.loads(line), strict=True)) for line in rank] for rank in lines]
    return [[row for part in step for row in part] for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def one(base: Path) -> Steps:
    """What one rank is fed by a run that nothing stops."""
    return feed(base, "one", 1, 0)


@pytest.mark.slow
def test_the_sequence_is_the_same_for_any_ranks_workers_and_restarts(base: Path, one: Steps) -> None:
    """At world size 1 the final weights are the same too; at 2 the gradients are averaged in another order."""
    assert len(one) == 4 * 4 and all(len(step) == 8 for step in one)
    assert len({tuple(step) for step in one}) == len(one)
    assert feed(base, "one, cut in an epoch", 1, 1, 5, 0) == one
    assert feed(base, "two", 2, 1) == one
    assert rows(base / "one, cut in an epoch") == rows(base / "one")
    assert weights(base / "one, cut in an epoch") == weights(base / "one")


@pytest.mark.slow
def test_the_sequence_is_the_same_for_more_workers_and_cuts(base: Path, one: Steps) -> None:
    assert feed(base, "one, 3 workers", 1, 3) == one
    assert feed(base, "one, cut twice in an epoch", 1, 1, 5, 7, 0) == one
    assert feed(base, "two uncut", 2, 1) == one
    assert feed(base, "two, cut", 2, 0, 6, 0) == one
    assert rows(base / "two, cut") == rows(base / "two uncut")
    assert rows(base / "one, cut twice in an epoch") == rows(base / "one")
    runs = ("one", "one, 3 workers", "one, cut twice in an epoch")
    assert len({weights(base / run) for run in runs}) == 1


def weights(run: Path) -> str:
    """sha256 of a run's exported weights."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def rows(run: Path) -> list[dict[str, object]]:
    """The metrics of a run without what the clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run)]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(base: Path, one: Steps) -> None:
    """Cut inside an epoch; the epoch's losses are means over all of its steps all the same."""
    first = feed(base, "two of three", 2, 0, 6)
    counted = (base / "two of three" / "confusion.csv").read_text().splitlines()[1:]
    assert sum(int(line.rpartition(",")[2]) for line in counted) == 12  # of both ranks
    then = feed(base, "one of three", 1, 0, 0, output="two of three")
    assert first + then == one
    noted = json.loads((base / "two of three" / "config.json").read_text())["cskd"]["changed"]
    assert noted == [f"ranks changed from 2 to 1 at step 6: {noted[0].partition(': ')[2]}"] and "drop path" in noted[0]
    for mixed, alone in zip(read_metrics(base / "two of three"), read_metrics(base / "one"), strict=True):
        assert mixed["step"] == alone["step"]
        assert mixed["loss"] == pytest.approx(alone["loss"], rel=0.05)


@pytest.mark.slow  # its parts in one process: tests/pipeline/test_many_devices.py, tests/files/test_claims.py
def test_stage_1_under_torchrun_shares_the_work_and_reports_once(base: Path) -> None:
    """Without a process group: through claims alone."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "cli.py")]
    cache = base / "shared cache"
    command = [*run, "cache-teacher", str(base / "c.yaml"), "--set", f"cache.path={cache}", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["content_root"] == verify(base / "cache", quiet=True).content_root
    assert verify(cache, quiet=True).sound


@pytest.mark.slow
def test_one_two_and_three_ranks_end_with_the_same_weights_up_to_rounding(base: Path) -> None:
    """Four micro-batches, which three ranks share unevenly; with dropout and drop path, so that other draws would be other weights:
    those of other micro-batches are. Three ranks that are cut and go on end with the bits of three that are not."""
    kwargs = "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, proj_drop_rate: 0.2}"
    more: tuple[str, ...] = (
        "train.micro_batch=2",
        "train.opt=sgd",
        "train.autocast=none",
        "train.repeats=1",
        f"student.kwargs={kwargs}",
    )
    more += ("train.lr=1", "train.warmup_epochs=0")
    fed = {name: feed(base, name, ranks, 0, 4, more=more) for name, ranks in ((f"micro {n}", n) for n in (1, 2, 3))}
    assert fed["micro 1"] == fed["micro 2"] == fed["micro 3"]
    feed(base, "micro cut", 3, 0, 2, 4, more=more)
    made = {name: load_file(base / name / "model.safetensors") for name in (*fed, "micro cut")}

    def apart(one: str, other: str) -> float:
        return max((made[one][name] - made[other][name]).abs().max().item() for name in made[one])

    assert (
        apart("micro 1", "micro 2") < 1e-5 and apart("micro 1", "micro 3") < 1e-5 and apart("micro 3", "micro cut") == 0
    )
    feed(base, "other draws", 1, 0, 4, more=(*more, "train.micro_batch=4"))
    made["other"] = load_file(base / "other draws" / "model.safetensors")
    assert apart("micro 1", "other") > 1e-4


@pytest.mark.parametrize(("steps", "agree"), [((5, 5), True), ((5, 3), False), ((0, 5), False)])
def test_ranks_that_would_resume_from_different_steps_all_stop(steps: tuple[int, int], agree: bool) -> None:
    """As where one of them can't read the newest state, and falls back to the one before."""

    class Two(Ranks):
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([sum(steps), sum(s * s for s in steps)])

    for rank, step in enumerate(steps):
        with contextlib.nullcontext() if agree else pytest.raises(StudentError, match=f"resumes from step {step}"):
            Two(rank=rank, count=2).refuse_differing(step, torch.device("cpu"))


def test_one_rank_agrees_with_itself() -> None:
    Ranks().refuse_differing(7, torch.device("cpu"))
