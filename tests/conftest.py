"""What every test has: caches of its own, one thread of torch, the sample data where a checkout has it beside it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports torch: exact comparisons and small tensors gain nothing by more threads, and subprocesses
# started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A config without a device means the CPU here, on a machine with a GPU too: hashes, lanes and threads that tests expect are
# a CPU's. CSKD_TEST_DEVICE=cuda shows the GPU to those that need one.
if os.environ.get("CSKD_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download weights fails at once
# Whichever test starts the fork server first: without it every loader worker after that one imports torch by itself.
multiprocessing.set_forkserver_preload(["cskd.loading.stage1", "cskd.loading.raw_batches"])

# The same examples in every run, and no failure because a machine is busy: neither is slow data an error.
hypothesis.settings.register_profile(
    "cskd", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("cskd")


def pytest_collection_finish() -> None:
    """The garbage collector, which the tests of memory call, has no need to look through all modules and tests each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a generator of its own does not depend on which tests this process has run before."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder of the sample images and teachers (`$CSKD_DATA`, else `shared` beside the checkout); skips when absent."""
    path = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    if not (path / "data").is_dir() or not (path / "teachers").is_dir():
        pytest.skip(f"no sample data at {path}; set CSKD_DATA to a folder with data/ and teachers/")
    return path


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test takes the power away, and a process that is killed loses nothing of what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's model caches."""
    base = tmp_path_factory.getbasetemp()
    for name in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(base / name.lower()))


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tests leave blank pictures, which spares 0.15 s each, except where pictures are what is tested."""
    module = sys.modules.get("cskd.pipeline.run_folder")
    if module is not None and request.path.stem not in ("test_run_folder", "test_resumed_run"):
        from PIL import Image

        for name in ("draw_results", "draw_confusion", "draw_batch"):
            monkeypatch.setattr(module, name, lambda *_: Image.new("RGB", (1, 1)))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 in this process, see `tests.s3`; skips without moto or obstore."""
    from tests.s3 import moto_server

    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket, which this process may read and write."""
    from tests.s3 import new_bucket, use_endpoint

    use_endpoint(monkeypatch, s3_endpoint)
    return new_bucket(s3_endpoint)
