"""The command line: exit codes, one line for what went wrong, one JSON object, and what resumes after a cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cskd import cli
from cskd.config import to_yaml
from cskd.machine import ending, stops
from cskd.pipeline.care.verify import verify
from cskd.pipeline.show.metrics import read_metrics
from cskd.store.cache import open_cache
from cskd.store.format import commit_file
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER
from tests.pipeline.test_pipeline import config as tiny_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache, data, val and c.yaml, whose run lasts six steps."""
    folder = tmp_path_factory.mktemp("cli [bold]")
    make_tiny_cache(folder, n=20)
    make_tiny_data(folder / "val", n=8)
    (folder / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"val": str(folder / "val")},
                "cache": {"path": str(folder / "cache")},
                "student": {
                    "model": "deit_tiny_distilled_patch16_224",
                    "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
                },
                "loss": {"method": "deit-hard"},
                "train": {
                    "output": str(folder / "run"),
                    "epochs": 3,
                    "global_batch": 8,
                    "warmup_epochs": 1,
                    "workers": 0,
                    "device": "cpu",
                },
            }
        )
    )
    return folder


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, *stops.ASKS)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


class Result:
    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, *words: str) -> None:
        """Exit code 1, nothing on stdout, and one line on stderr that holds the words and is no bug of ours."""
        assert (self.code, self.out) == (1, "")
        assert self.err.startswith("cskd: ") and self.err.count("\n") == 1, self.err
        assert "unexpected" not in self.err
        for word in words:
            assert word in self.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*argv: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["cskd", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return Result(stop.value.code, out.out, out.err)

    return call


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["'train.epoch'", "'train.epochs'"]),
        ("foo.bar=3", ["'foo'", "expected one of data, teacher"]),
        ("train.epochs=x", ["train.epochs is 'x'", "a whole number"]),
        ("zzz", ["'zzz'", "KEY=VALUE"]),
        ("train.epochs=[", ["'['", "quotes"]),
        ("recipe.flip=0.1", ["recipe.flip is 0.1", "was made with 0.5"]),
        ("train.global_batch=7", ["train.global_batch is 7", "use 8"]),
        ("train.global_batch=64", ["train.global_batch 64", "at most 20"]),
        ("train.epochs=1", ["train.warmup_epochs is 1.0", "less than train.epochs"]),
        ("data.val=/does/not/exist", ["/does/not/exist", "cskd pack"]),
        ("student.model=vit_nope", ["vit_nope", "timm.list_models"]),
        ("cache.path=/does/not/exist", ["/does/not/exist", "cskd cache-teacher"]),
        ("train.output=/dev/null/run", ["/dev/null is no folder", "set another"]),
        ("train.device=foo", ["'foo'", "auto or cpu"]),
    ],
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it(
    made: Path, run: Any, override: str, words: list[str]
) -> None:
    output = made / "refused"
    run("train", made / "c.yaml", "--set", f"train.output={output}", "--set", override).refused(*words)
    assert not (output / "resume").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00[", b"a: [b", b"- a"])
def test_a_config_that_is_none_is_refused_by_its_path(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would lose its middle, so that the line fits
    path = Path("configs/c.yaml")
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    run("train", path, "--json").refused(f"{path} ")


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1', b"\xff"])
def test_a_damaged_manifest_is_refused_by_its_path(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, manifest: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged").mkdir()
    Path("damaged/manifest.json").write_bytes(manifest)
    run("inspect", "damaged").refused("damaged/manifest.json ")


def test_what_a_damaged_unit_advises_brings_it_back_into_stage_1(tmp_path: Path, made: Path, run: Any) -> None:
    cache = make_tiny_cache(tmp_path, n=20)
    record = cache.root / commit_file(0, 0)
    for unit in (cache.root / "units" / "b00000").glob("v0000*"):
        unit.write_bytes(unit.read_bytes()[:100])
    sets = ("--set", f"cache.path={cache.root}", "--set", f"train.output={tmp_path / 'run'}")
    result = run("train", made / "c.yaml", *sets)
    advice = f"remove {record.relative_to(cache.root)} of the cache and run the same `cskd cache-teacher` command again"
    result.refused("damaged", advice)
    record.unlink()
    assert open_cache(cache.root).missing() == [(0, 0)]


def test_usage_errors_exit_with_2(run: Any) -> None:
    for argv in (
        ["train"],
        ["nope"],
        ["train", "c.yaml", "--nope"],
        ["eval", "a", "b", "--batch", "0"],
        ["eval", "a", "b", "--autocast", "fp8"],
    ):
        result = run(*argv)
        assert (result.code, result.out) == (2, "")
        assert "Usage" in result.err


def test_json_is_one_object_and_a_finished_run_still_says_its_top_1(made: Path, run: Any) -> None:
    config, output = made / "c.yaml", made / "run [red] é"
    sets = ("--set", f"train.output={output}")
    first = run("train", config, *sets, "--json")
    report = json.loads(first.out)
    assert (first.code, first.err, report["steps"]) == (0, "", 6)
    again = json.loads(run("train", config, *sets, "--json").out)
    assert (again["steps"], again["top1"]) == (0, report["top1"])
    shown = run("train", config, *sets).out
    assert f"{output}: finished before, nothing to do" in shown  # whole, unwrapped, its brackets no markup
    assert f"class {report['top1']['class']:.2f}" in shown
    scores = json.loads(run("eval", output, made / "val", "--workers", 0, "--autocast", "auto", "--json").out)
    assert scores["arithmetic"] == report["arithmetic"]
    assert scores["heads"]["class"]["top1"] == pytest.approx(report["top1"]["class"])


def test_training_says_its_top_1_after_every_evaluation_and_at_the_end_where_its_files_are(
    made: Path, run: Any
) -> None:
    output = made / "told"
    sets = ("--set", f"train.output={output}", "--set", "train.eval_every=2")
    told = run("train", made / "c.yaml", *sets)
    head = "class+distillation"
    rows = {row["epoch"] + 1: row[f"top1.{head}"] for row in read_metrics(output) if "score" in row}
    best = max(rows, key=lambda epoch: rows[epoch])
    lines = [line for line in told.err.splitlines() if line.startswith("train: top-1")]
    assert list(rows) == [2, 3] and len(lines) == 2
    assert lines[0] == f"train: top-1 {rows[2]:.2f} % after epoch 2 ({head}), best {rows[2]:.2f} % after epoch 2"
    assert lines[1].removeprefix("train: ") in told.out and f"best {rows[best]:.2f} % after epoch {best}" in lines[1]
    assert f"{output / 'model.safetensors'} (live), next to it" in told.out


@pytest.mark.parametrize("command", ["", *(c.name or c.callback.__name__ for c in cli.app.registered_commands)])  # type: ignore[union-attr]
def test_h_is_help_for_every_command(run: Any, command: str) -> None:
    short, long = (run(*command.split(), option) for option in ("-h", "--help"))
    assert (short.code, short.err) == (0, "") and "Usage" in short.out
    assert short.out == long.out


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupt_prints_the_line_that_resumes(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int
) -> None:
    import cskd.pipeline.doctor

    def interrupted(*_: object) -> None:
        raise raised

    monkeypatch.setattr(cskd.pipeline.doctor, "doctor", interrupted)
    result = run("doctor", "--json")
    assert (result.code, result.out) == (code, "")
    assert result.err == "\ninterrupted; go on with: cskd doctor --json\n"


def test_an_evaluation_leaves_batches_that_are_read_ahead_fit_for_training() -> None:
    """With workers a training batch may be received while an evaluation one is waited for."""
    import torch

    from cskd.machine.ranks import Ranks
    from cskd.pipeline.evaluate import score_heads
    from cskd.views.mix_pixels import InputMaker

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        assert not torch.is_inference_mode_enabled()
        yield {}

    stream = batches()
    with pytest.raises(KeyError):  # the batch was received, and is empty
        score_heads({}, stream, 1, InputMaker([0.0] * 3, [1.0] * 3, torch.device("cpu")), "none", Ranks())


def start(*argv: object, **more: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, **more)


def test_help_loads_no_torch() -> None:
    code = "import sys; from cskd import cli; sys.argv = ['cskd', '--help']\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cache-teacher" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
@pytest.mark.parametrize("kind", ["ctrl-c", "kill -9"])
@pytest.mark.slow
def test_a_run_with_workers_that_is_cut_resumes_where_it_stood(made: Path, tmp_path: Path, run: Any, kind: str) -> None:
    """Ctrl-C reaches every process of the terminal, none of which may print a traceback; kill -9 only the main one."""
    output = tmp_path / "run"
    sets = ("--set", f"train.output={output}", "--set", "train.epochs=4000", "--set", "train.workers=1")
    process = start("train", made / "c.yaml", *sets, "--json", start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("resume/step-*")):
            assert process.poll() is None and time.monotonic() < deadline, "no state was ever saved"
            time.sleep(0.02)
        if kind == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            process.kill()
    assert out == ""
    if kind == "ctrl-c":
        assert process.returncode == 130
        assert err.startswith("\ninterrupted; go on with: cskd train ") and err.count("\n") == 2, err
    step = max(int(p.stem.removeprefix("step-")) for p in output.glob("resume/step-*.safetensors"))
    more = ("--set", f"train.max_steps={step + 1}", "--set", "train.workers=0")
    assert json.loads(run("train", made / "c.yaml", *sets, *more, "--json").out)["steps"] == 1


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stage_1_that_is_interrupted_drops_its_unit_at_once_and_resumes(tmp_path: Path, kind: signal.Signals) -> None:
    """Its claims are given back, no file of the unit is left, and the line it prints finishes the cache. From its first unit
    on the teacher takes a second for a batch, and so minutes for the rest."""
    slow = f'        any(pathlib.Path({str(tmp_path)!r}).glob("cache/commits/*/*.json")) and time.sleep(1)\n'
    line = "        return self.body(x)\n"
    assert line in TEACHER
    (tmp_path / "net.py").write_text(f"import pathlib, time\n{TEACHER.replace(line, slow + line)}")
    make_tiny_data(tmp_path / "train", n=40, block=20, shard=20)
    c = tiny_config(tmp_path, cache={"path": str(tmp_path / "cache"), "views": 30})
    (tmp_path / "c.yaml").write_text(to_yaml(c))
    process = start("cache-teacher", tmp_path / "c.yaml", "--json")
    try:
        wait_for(process, lambda: list((tmp_path / "cache" / "commits").glob("*/*.json")))
        process.send_signal(kind)
        clock = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - clock < ending.GRACE
    finally:
        if process.poll() is None:
            process.kill()
    assert (process.returncode, out) == (128 + kind, "")
    assert err == f"\ninterrupted; go on with: cskd cache-teacher {tmp_path / 'c.yaml'} --json\n"
    assert not (tmp_path / "cache" / "claims").exists() and not list((tmp_path / "cache").rglob(".*.tmp"))
    report = verify(tmp_path / "cache", quiet=True)
    assert report.missing and not report.errors and not report.sealed


def test_a_second_interrupt_ends_a_run_that_is_in_the_midst_of_a_library_call() -> None:
    """Where Python can't run the handler of a signal: the main thread does not come back from C."""
    code = """
import hashlib, os, signal, sys, threading, time
from cskd import cli
def stuck(standalone_mode):
    def twice():
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=twice, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes in C
cli.app, sys.argv = stuck, ["cskd", "train", "c.yaml"]
cli.main()
"""
    clock = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted; go on with: cskd train c.yaml\n")
    assert time.monotonic() - clock < 30


def wait_for(process: subprocess.Popen[str], there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, "the process ended, or never came that far"
        time.sleep(0.02)


@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), (600.0, 2)])
def test_an_interrupt_that_a_library_swallows_ends_the_run_all_the_same(grace: float, signals: int) -> None:
    """Left after GRACE, or at once by a second Ctrl-C."""
    code = f"""
import os, signal, sys, time
from cskd import cli
from cskd.machine import ending
def deaf(standalone_mode):
    for _ in range({signals}):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except SystemExit:
            pass
    time.sleep(60)
cli.app, ending.GRACE, sys.argv = deaf, {grace}, ["cskd", "train", "a b.yaml"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted; go on with: cskd train 'a b.yaml'\n")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="where semaphores have names in /dev/shm")
def test_who_leaves_at_once_leaves_no_semaphore_and_no_word_of_one() -> None:
    code = """
import multiprocessing, os, signal, sys, time
from cskd import cli
from cskd.machine import ending

def deaf(**_):
    before = set(os.listdir("/dev/shm"))
    queue = multiprocessing.get_context("forkserver").Queue()
    print(*(name for name in set(os.listdir("/dev/shm")) - before if name.startswith("sem.mp-")), flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except SystemExit:
        time.sleep(60)  # held up on its way out
    return queue

cli.app, ending.GRACE, sys.argv = deaf, 0.2, ["cskd", "train", "c.yaml"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted; go on with: cskd train c.yaml")
    assert done.stdout.split() and not [name for name in done.stdout.split() if Path("/dev/shm", name).exists()]
