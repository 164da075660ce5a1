"""`cskd push` and hf:// against a stand-in of the hub: what goes there comes back, and a run from it is the run from here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cskd import cli
from cskd.config import Config, TeacherConfig, from_dict
from cskd.errors import CacheError, ConfigError, HubError, PathError, StudentError, TeacherError
from cskd.files import hub as addresses
from cskd.files.writer import LOCK
from cskd.machine.ranks import Ranks
from cskd.pipeline import training_run
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.gc import gc
from cskd.pipeline.care.repair import repair
from cskd.pipeline.care.verify import verify
from cskd.pipeline.hub import contents
from cskd.pipeline.hub import push as module
from cskd.pipeline.hub.contents import plain
from cskd.pipeline.hub.push import push
from cskd.pipeline.look.check_config import check_config
from cskd.pipeline.run_folder import RunFolder
from cskd.pipeline.train import train
from cskd.storage import open_storage
from cskd.storage.objects import Objects
from cskd.store.cache import open_cache
from cskd.store.seal import seal_cache
from cskd.student.checkpoint import load_student
from cskd.teacher.build import build
from tests.caches import make_tiny_cache, make_tiny_data
from tests.hub_server import READER, Hub, running_hub

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>':DeprecationWarning"
)  # of the hub's client, to its own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache with its data, and a run of it."""
    folder = tmp_path_factory.mktemp("push")
    seal_cache(make_tiny_cache(folder, n=20), 0.0)
    make_tiny_data(folder / "val", n=8)
    train(config_of(folder, folder / "cache", folder / "run"), quiet=True)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "hub cache") as hub:
        yield hub


def config_of(base: Path, cache: Path | str, output: Path, **train_keys: Any) -> Config:
    return from_dict(
        {
            "data": {"train": str(base / "data"), "val": str(base / "val")},
            "cache": {"path": str(cache)},
            "student": {
                "model": "deit_tiny_distilled_patch16_224",
                "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
            },
            "train": {
                "output": str(output),
                "epochs": 2,
                "global_batch": 8,
                "warmup_epochs": 1,
                "workers": 0,
                "device": "cpu",
            }
            | train_keys,
        }
    )


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_from_the_hub_is_the_run_from_here_even_when_the_repository_moves_on(
    base: Path, hub: Hub, tmp_path: Path
) -> None:
    report = push(base / "cache", "me/cache", quiet=True)
    address = "hf://datasets/me/cache"
    pinned = report.address
    assert pinned == f"{address}@{hub.repos['dataset', 'me/cache'].branches['main'][-1]}"

    run = config_of(base, address, tmp_path / "run", max_steps=1)
    train(run, quiet=True)
    hub.put("dataset", "me/cache", {"manifest.json": b"another one"})
    addresses._snapshot.cache_clear()  # as a new process
    train(config_of(base, address, tmp_path / "run"), quiet=True)
    assert sha(tmp_path / "run/model.safetensors") == sha(base / "run/model.safetensors")
    assert yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())["cache"]["path"] == pinned
    with pytest.raises(CacheError, match=r"manifest.json is not readable"):
        train(config_of(base, address, tmp_path / "other"), quiet=True)


def test_what_comes_back_is_what_was_there_and_names_no_folder_of_this_machine(base: Path, hub: Hub) -> None:
    push(base / "cache", "me/cache", quiet=True)
    files = hub.repos["dataset", "me/cache"].files()
    own = {str(p.relative_to(base / "cache")): p.read_bytes() for p in (base / "cache").rglob("*") if p.is_file()}
    made = {"manifest.json", "manifest.copy.json", "resolved.yaml", "inventory/inventory.json"}
    assert files.keys() - own.keys() == {"README.md"} and own.keys() - files.keys() == set()
    assert {name for name in own if files[name] != own[name]} <= made
    assert not [name for name, data in files.items() if str(base).encode() in data]
    opened = open_cache("hf://datasets/me/cache")
    assert opened.fingerprint == open_cache(base / "cache").fingerprint
    assert (
        verify(opened.root, quiet=True).sound and verify(opened.root, data=base / "data", replay=4, quiet=True).replayed
    )
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["viewer"] is False


def test_a_killed_push_is_no_cache_and_the_same_command_completes_it(
    base: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_FILES", 10)
    commits, create = 0, huggingface_hub.HfApi.create_commit

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal commits
        commits += 1
        if commits == 3:
            raise SystemExit(143)
        return create(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", killed)
    with pytest.raises(SystemExit):
        push(base / "cache", "me/cache", quiet=True)
    there = len(hub.repos["dataset", "me/cache"].files())
    assert there == 20
    with pytest.raises(CacheError, match=r"manifest.json is missing"):
        open_cache("hf://datasets/me/cache")
    addresses._snapshot.cache_clear()

    report = push(base / "cache", "me/cache", quiet=True)
    assert (
        report.sent == len(report.files) - there and verify(open_cache("hf://datasets/me/cache").root, quiet=True).sound
    )
    assert hub.count("PUT", "/lfs/") == len({m for m in hub.log if m[0] == "PUT"})  # no file was sent twice
    before = len(hub.repos["dataset", "me/cache"].commits)
    assert push(base / "cache", "me/cache", quiet=True).sent == 0
    assert len(hub.repos["dataset", "me/cache"].commits) == before


@pytest.mark.slow  # a process for each kill
def test_a_process_that_is_killed_anywhere_goes_on(base: Path, hub: Hub, tmp_path: Path) -> None:
    process, seen, at = 0, 0, 0

    def kill(method: str, path: str) -> int | None:
        nonlocal seen
        seen += 1
        if process and seen == at:
            os.kill(process, signal.SIGKILL)
        return None

    hub.refuse = kill
    about = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "cskd.cli", "push", str(base / "cache"), "me/cache"]
    killed = 0
    for moment in (5, 9, 7, 10_000):
        at, seen = moment, 0
        with subprocess.Popen(command, env=os.environ | about, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as run:
            process = run.pid
            _, err = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), err.decode()
        killed += run.returncode != 0
        there = hub.repos["dataset", "me/cache"].files() if ("dataset", "me/cache") in hub.repos else {}
        assert ("manifest.json" in there) <= ("sealed.json" in there)
    assert killed >= 2 and run.returncode == 0
    assert verify(open_cache("hf://datasets/me/cache").root, quiet=True).sound


def test_a_run_is_a_model_of_timm_and_a_start_for_others(base: Path, hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(base / "run", run)
    for name in ("curves.png", "notes.txt", ".secret.png", "confusion.csv", "model_old.pth"):
        (run / name).write_bytes(b"a,b\n1,2\n")
    facts = json.loads((run / "config.json").read_text())
    facts["cskd"]["changed"] = [f"student.init changed from {base}/a.pth to {base}/b.pth at step 3"]
    (run / "config.json").write_text(json.dumps(facts))
    report = push(run, "me/run", quiet=True)
    files = hub.repos["model", "me/run"].files()
    assert set(files) == {
        *("model.safetensors", "config.json", "resolved.yaml", "metrics.csv", "metrics.jsonl"),
        *("curves.png", "results.png", "confusion.png", "train_batch0.png", "confusion.csv", "README.md"),
    }
    assert not [name for name, data in files.items() if str(base).encode() in data or b"/tmp" in data]
    assert json.loads(files["config.json"])["cskd"]["changed"] == ["student.init changed from a.pth to b.pth at step 3"]
    assert json.loads(files["config.json"])["label_names"] == facts["label_names"]

    expected = load_file(run / "model.safetensors")
    for name in ("hf-hub:me/run", f"hf-hub:me/run@{report.address.partition('@')[2]}"):
        state = timm.create_model(name, pretrained=True).state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())
    student, _ = load_student("hf://me/run")  # type: ignore[arg-type]
    assert student.num_classes == 5
    config = config_of(base, base / "cache", tmp_path / "next", max_steps=1, lr=0.0, warmup_lr=0.0, min_lr=0.0)
    config = replace(config, student=replace(config.student, init="hf://me/run"))
    train(config, quiet=True)
    assert yaml.safe_load((tmp_path / "next/resolved.yaml").read_text())["student"]["init"] == report.address
    assert json.loads((tmp_path / "next/hub.json").read_text())["pins"] == {"hf://me/run": report.address}
    started = load_file(tmp_path / "next/model.safetensors")
    assert torch.equal(started["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])

    (run / "confusion.csv").write_bytes(b"a,b\n")
    hub.put("model", "me/run", {"model_ema.safetensors": b"of an older push", "README.md": b"# mine"})
    again = push(run, "me/run", quiet=True)
    assert (again.sent, again.removed) == (1, ["model_ema.safetensors"])
    assert hub.repos["model", "me/run"].files()["README.md"] == b"# mine" and "was edited, and stays" in again.notes[0]


def test_what_lies_on_an_object_store_is_pushed_as_from_its_folder(
    base: Path, hub: Hub, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, real = list[int](), module._here

    @contextlib.contextmanager
    def here(part: list[Any]) -> Iterator[Any]:
        with real(part) as sources:
            staged.append(sum(isinstance(source, Path) for source in sources.values()))
            yield sources
        assert not any(s.exists() for f in part if isinstance(s := sources[f.path], Path) and f.source is not s)

    monkeypatch.setattr(module, "_here", here)
    monkeypatch.setattr(module, "PART_FILES", 5)
    for kind, what in (("dataset", "cache"), ("model", "run")):
        upload(base / what, f"{s3}/{what}")
        if kind == "model":
            open_storage(f"{s3}/run").put("resume/best-9.csv", b"a\n")  # stays there
        there = push(Path(f"{s3}/{what}"), f"me/{what}", quiet=True)
        push(base / what, f"me/own-{what}", quiet=True)
        files, own = (hub.repos[kind, f"me/{name}"].files() for name in (what, f"own-{what}"))
        differing = {name for name in files.keys() | own.keys() if files.get(name) != own.get(name)}
        assert differing == ({"README.md"} if kind == "dataset" else set())  # which names the repository
        assert (there.source, there.notes) == (f"{s3}/{what}", [])
        assert push(Path(f"{s3}/{what}"), f"me/{what}", quiet=True).sent == 0
    assert max(staged) == 5
    stored: Any = open_storage(f"{s3}/run")
    listed, gone = Objects.list, replace(next(stored.list()), key="model_ema.safetensors")
    open_storage(f"{s3}/run").put(LOCK, b"{}")
    assert "is being trained, or was killed" in push(Path(f"{s3}/run"), "me/run", quiet=True).notes[0]
    monkeypatch.setattr(Objects, "list", lambda *_: iter([*listed(stored), gone]))
    assert gone.key not in [file.path for file in push(Path(f"{s3}/run"), "me/run", quiet=True).files]
    monkeypatch.setattr(Objects, "list", listed)
    open_storage(f"{s3}/run").put("resolved.yaml", b"a: [")
    with pytest.raises(ConfigError, match=f"^{s3}/run/resolved.yaml is not readable"):
        push(Path(f"{s3}/run"), "me/run", quiet=True)
    open_storage(f"{s3}/run").delete("config.json")
    with pytest.raises(StudentError, match=f"{s3}/run has no config.json"):
        push(Path(f"{s3}/run"), "me/run", quiet=True)
    with pytest.raises(PathError, match=r"RUN\|CACHE is .*nothing, which holds neither"):
        push(Path(f"{s3}/nothing"), "me/run", quiet=True)
    (unit, *_) = (about.key for about in open_storage(f"{s3}/cache").list("units"))
    open_storage(f"{s3}/cache").delete(unit)
    with pytest.raises(CacheError, match=f"{unit} is not there; run `cskd verify {s3}/cache`"):
        push(Path(f"{s3}/cache"), "me/cache", quiet=True)


def upload(folder: Path, location: str) -> None:
    storage = open_storage(location)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path.read_bytes())


def test_a_card_of_the_run_s_own_goes_there(base: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    (tmp_path / "run/README.md").write_text("---\nlibrary_name: timm\n---\n# Mine\n")
    push(tmp_path / "run", "me/run", private=True, revision="v1", quiet=True)
    repo = hub.repos["model", "me/run"]
    assert repo.private and repo.files("v1")["README.md"].endswith(b"# Mine\n") and repo.files("main") == {}


def test_a_run_that_was_cut_has_a_card_and_one_without_is_pushed_with_a_note(
    base: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", RunFolder.draw

    def cut(self: RunFolder, rows: Any, last: bool = False) -> None:
        real(self, rows, last)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "draw", cut)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(base, base / "cache", run), quiet=True)
    assert "1 of 2, " in (run / "README.md").read_text() and push(run, "me/run", quiet=True).notes == []
    (run / "README.md").unlink()
    (note,) = push(run, "me/other", quiet=True).notes
    assert note.startswith("no README.md") and "README.md" not in hub.repos["model", "me/other"].files()


def test_an_unfinished_cache_goes_there_only_when_it_is_meant(base: Path, hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(base / "cache", cache)
    (cache / "sealed.json").unlink()
    with pytest.raises(CacheError, match="is not sealed; finish it with"):
        push(cache, "me/cache", quiet=True)
    (cache / "commits/b00001/v0001.json").unlink()
    with pytest.raises(
        CacheError, match=r"lacks 1 of 12 units; finish it with .* or push what there is with --allow-inc"
    ):
        push(cache, "me/cache", quiet=True)
    assert hub.log == []
    report = push(cache, "me/cache", allow_incomplete=True, quiet=True)
    assert report.notes == ["incomplete: 1 unit missing, not sealed"]
    assert len(open_cache("hf://datasets/me/cache").missing()) == 1
    assert push(base / "cache", "me/cache", quiet=True).sent == 5  # unit, record, index, seal, card

    hub.put("dataset", "me/cache", {"manifest.json": b'{"fingerprint": "another one"}'})
    with pytest.raises(
        HubError, match=r"^REPO 'me/cache' holds another cache, with fingerprint another one, this one has"
    ):
        push(base / "cache", "me/cache", quiet=True)


def test_a_dry_run_asks_nobody(base: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "argv", ["cskd", "push", str(base / "run"), "me/run", "--dry-run", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    report = json.loads(capsys.readouterr().out)
    assert hub.log == [] and report["dry_run"] and report["sent"] == 0 and report["address"] == "hf://me/run"
    assert {"path": "model.safetensors", "bytes": (base / "run/model.safetensors").stat().st_size} in report["files"]


@pytest.mark.parametrize(
    ("words", "repo", "said"),
    [
        ("run", "me", "REPO 'me' is no name of a repository, expected OWNER/NAME"),
        ("run", "me/a b", "REPO 'me/a b' is no name"),
        ("run", "s3://me/run", "is no name of a repository"),
        ("run", "me/run/x", "names more than a repository"),
        ("run", "datasets/me/run", "is a dataset repository, a run goes to a model"),
        ("cache", "hf://models/me/x", "is a model repository, a cache goes to a dataset"),
        ("run", "me/data", "is a dataset repository, and this goes to a model; give another name"),
        ("run", "you/run", "does not let this token write it"),
        ("run --private", "me/public", "is public, and --private was asked for"),
        ("run --revision " + "0" * 40, "me/run", "is no branch that can be written to"),
        ("data", "me/run", "is a packed data set, and `cskd push` takes"),
        ("nothing", "me/run", "RUN|CACHE is"),
        ("run no-token", "me/run", "there is no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        ("run reader", "me/run", "does not let this token write it"),
        ("run wrong", "me/run", "the hub does not accept the token"),
        ("run offline", "me/run", "HF_HUB_OFFLINE is set, so nothing can be sent; unset it"),
        ("run down", "me/run", "the hub can't be reached"),
        ("run busy", "me/run", "the hub asks for fewer requests"),
    ],
)
def test_what_can_t_be_pushed_is_refused_in_one_line(
    base: Path,
    hub: Hub,
    words: str,
    repo: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.put("dataset", "me/data", {"a": b"1"})
    hub.put("model", "me/public", {"a": b"1"})
    source, *rest = words.split()
    match rest[:1]:
        case ["no-token"]:
            monkeypatch.delenv("HF_TOKEN")
        case ["reader"]:
            monkeypatch.setenv("HF_TOKEN", READER)
        case ["wrong"]:
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        case ["offline"]:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case ["down"]:
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        case ["busy"]:
            hub.refuse = lambda method, path: 429 if "/api/" in path else None
    options = rest if words.partition(" ")[2].startswith("--") else []
    monkeypatch.setattr(sys, "argv", ["cskd", "push", str(base / source), repo, *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (1, "") and err.startswith("cskd: ") and said in err
    assert err.count("\n") == 1 and len(err) <= 301 and "unexpected" not in err


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_IN_FOLDER", "LARGEST"])
def test_over_the_hub_s_limits_nothing_is_sent(
    base: Path, hub: Hub, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, limit, 2)
    with pytest.raises(HubError, match=r"the hub .*(at most 2|takes files of at most 2)[;,]|hub at most 2; cache"):
        push(base / "cache", "me/cache", quiet=True)
    assert hub.log == []


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/srv/ann/data/train", "train"),
        ("~/data/net.py:build", "net.py:build"),
        ("data/imagenet/train", "data/imagenet/train"),
        ("weights taken from /srv/a b/x.pth", "weights taken from a b/x.pth"),
        ("from '/srv/a/x.pth', and /etc/y", "from 'x.pth', and y"),
        ("https://host/a/b and hf://me/net/x", "https://host/a/b and hf://me/net/x"),
        ("top-1/top-5 of 1/2", "top-1/top-5 of 1/2"),
    ],
)
def test_of_an_absolute_path_the_last_name_stays(text: str, public: str) -> None:
    assert plain({"a": [text], "b": 3}) == {"a": [public], "b": 3}


@pytest.fixture
def net(hub: Hub, tmp_path: Path) -> torch.nn.Module:
    """A model of timm, which hf://me/net holds, next to code that must not run."""
    torch.manual_seed(0)
    net: torch.nn.Module = timm.create_model("test_resnet", num_classes=5)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    about = {"num_classes": 5, "input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": about}
    weights, code = (tmp_path / "model.safetensors").read_bytes(), b"raise SystemExit('run')"
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": weights, "model.py": code}
    hub.put("model", "me/net", files)
    return net


def test_a_teacher_comes_from_the_hub_without_its_code(hub: Hub, net: torch.nn.Module) -> None:
    commit = hub.repos["model", "me/net"].branches["main"][-1]
    for weights in ("hub", "hf://me/net", "hf://me/net/model.safetensors"):
        built = build(TeacherConfig(model="hf://me/net", weights=weights))
        assert built.source == {"model": f"hf://me/net@{commit}", "kwargs": {}} and built.stated["input_size"] == 64
        assert torch.equal(built.model.state_dict()["fc.weight"], net.state_dict()["fc.weight"])
    with pytest.raises(TeacherError, match=r"is code, and no code of a repository is run; download the file, read it"):
        build(TeacherConfig(model="hf://me/net/model.py:build"))
    hub.put("model", "me/text", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(TeacherError, match=r"^teacher.model 'hf://me/text@\w{40}' is no repository of a timm model"):
        build(TeacherConfig(model="hf://me/text"))


@pytest.mark.usefixtures("net")
def test_stage_1_goes_on_with_the_teacher_that_it_was_begun_with(base: Path, hub: Hub, tmp_path: Path) -> None:
    raw = {
        "data": {"train": str(base / "val")},
        "teacher": {"model": "hf://me/net", "weights": "hub", "check": "note", "batch": 8},
        "recipe": {"size": 64},
        "cache": {"path": str(tmp_path / "cache"), "views": 1, "workers": 0, "device": "cpu"},
    }
    cache_teacher(from_dict(raw), quiet=True)
    pinned = f"hf://me/net@{hub.repos['model', 'me/net'].branches['main'][-1]}"
    assert json.loads((tmp_path / "cache/hub.json").read_text())["pins"] == {"hf://me/net": pinned}
    assert yaml.safe_load((tmp_path / "cache/resolved.yaml").read_text())["teacher"]["model"] == pinned

    hub.put("model", "me/net", {"model.safetensors": b"another one"})
    addresses._snapshot.cache_clear()  # as a new process
    assert cache_teacher(from_dict(raw), quiet=True).units == 0
    assert verify(tmp_path / "cache", quiet=True).sound and gc(tmp_path / "cache", older_than=0).removed == []


def test_other_ranks_read_the_commit_that_the_first_wrote_down(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("model", "me/net", {"model.safetensors": b"1"})
    config = from_dict({"student": {"init": "hf://me/net"}, "train": {"output": str(tmp_path / "run")}})
    other = SimpleNamespace(first=False, barrier=lambda: None)
    assert training_run._pinned(config, Ranks(), False, True).student.init == f"hf://me/net@{first}"
    hub.put("model", "me/net", {"model.safetensors": b"2"})
    addresses._snapshot.cache_clear()  # as another process
    assert training_run._pinned(config, other, False, True).student.init == f"hf://me/net@{first}"  # type: ignore[arg-type]


def test_the_hub_is_never_written_to_but_by_push(base: Path, hub: Hub, tmp_path: Path) -> None:
    address = "hf://datasets/me/cache"
    for call in (
        lambda: cache_teacher(config_of(base, address, tmp_path / "run"), quiet=True),
        lambda: gc(Path(address)),
        lambda: repair(Path(address), quiet=True),
        lambda: push(Path(address), "me/other", quiet=True),
    ):
        with pytest.raises(PathError, match=r"'hf:/+datasets/me/cache' is an address \(hf:\), expected a local path"):
            call()
    assert hub.log == [] and list(tmp_path.iterdir()) == []


def test_check_reads_a_cache_on_the_hub(base: Path, hub: Hub, tmp_path: Path) -> None:
    push(base / "cache", "me/cache", quiet=True)
    (tmp_path / "c.yaml").write_text(
        f"data: {{train: '{base}/data'}}\ncache: {{path: 'hf://datasets/me/cache'}}\nloss: {{method: none}}\n"
    )
    row = next(row for row in check_config(tmp_path / "c.yaml").rows if row.name == "the cache")
    assert row.state == "ok" and "3 views of 20 images" in row.found
    report = check_config(tmp_path / "c.yaml", ["cache.path=hf://datasets/me/none"])
    (wrong,) = [row for row in report.rows if row.state == "wrong"]
    assert "there is no dataset repository of that name that this user may read" in wrong.found
