"""Two ranks that share `train.scratch`, one of which is killed while they make a table: nobody hangs, and nothing is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cskd.config import to_yaml
from cskd.pipeline.train import train
from tests.pipeline.test_pipeline import cached_data, run_settings

ROOT = Path(__file__).resolve().parent.parent.parent
# `cskd` as a rank, of which rank $CSKD_DIES is killed when it reads a unit of epoch 1, unless it was started again.
SCRIPT = """
import os, signal
import cskd.loading.epoch_table as tables
from cskd import cli

real, read = tables.build_table, tables._read

def build_table(source, plan, spec, first, stop, folder, *rest):
    dies = "epoch00001" in str(folder) and os.environ["RANK"] == os.environ["CSKD_DIES"]
    if dies and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        tables._read = lambda *of: os.kill(os.getpid(), signal.SIGKILL)
    return real(source, plan, spec, first, stop, folder, *rest)

import cskd.loading.tasks
cskd.loading.tasks.build_table = build_table
cli.main()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("scratch"))


def torchrun(base: Path, name: str, dies: int, restarts: int) -> subprocess.CompletedProcess[str]:
    folder = base / name
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    made = run_settings(
        base, folder / "run", scratch=str(folder / "scratch"), epochs=2, micro_batch=2, opt="sgd", autocast="none"
    )
    (folder / "c.yaml").write_text(to_yaml(made))
    (folder / "ranks.py").write_text(SCRIPT)
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, str(folder / "ranks.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CSKD_DIES": str(dies)}
    command += ["train", str(folder / "c.yaml")]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "restarts"), [(0, 1), (1, 1), (0, 0), (1, 0)])
def test_a_rank_that_is_killed_while_a_table_is_made(base: Path, dies: int, restarts: int) -> None:
    """torchrun starts both again, or ends; then the same command goes on. The first rank names the folder of both."""
    name = f"{dies} {restarts}"
    done = torchrun(base, name, dies, restarts)
    assert re.search(r"exitcode *: -9", done.stderr), done.stderr[-3000:]
    if not restarts:
        assert done.returncode == 1
        done = torchrun(base, name, 2, 0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((base / name / "scratch").iterdir()) == []
    if not (base / "alone").exists():
        train(run_settings(base, base / "alone", epochs=2, micro_batch=2, opt="sgd", autocast="none"), quiet=True)
    one, two = (load_file(folder / "model.safetensors") for folder in (base / "alone", base / name / "run"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
