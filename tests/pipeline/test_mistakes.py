"""Mistakes that people make, with the line that each gets: the value, what was expected, the next step. Nothing is lost."""

from __future__ import annotations

import io
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cskd import cli
from tests.caches import make_tiny_cache, make_tiny_data

LONGEST = 300  # characters of a line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache, data, val, source (class folders), c.yaml, and things that are often taken for them."""
    folder = tmp_path_factory.mktemp("m")
    make_tiny_cache(folder, n=20)
    make_tiny_data(folder / "val", n=8)
    make_tiny_data(folder / "others", n=8, classes=["cat", "dog"])
    for name in "ab":
        (folder / "source" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (i * 100, 50, 50)).save(folder / "source" / name / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "readme.txt").write_text("no image")
    (folder / "flat").mkdir()
    shutil.copy(folder / "source" / "a" / "0.png", folder / "flat" / "0.png")
    (folder / "short.tar").write_bytes((folder / "data" / "00000.tar").read_bytes()[:700])
    (folder / "page.tar").write_text("<!doctype html><title>404</title>")
    with tarfile.open(folder / "no_labels.tar", "w") as tar:
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        info = tarfile.TarInfo("0001.png")
        info.size = picture.tell()
        tar.addfile(info, io.BytesIO(picture.getvalue()))
    (folder / "model.bin").write_bytes(b"\x80\x04 no weights")
    (folder / "net.py").write_text("def bild(num_classes): ...\n")
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "note.txt").write_text("mine")
    config = {
        "data": {"train": str(folder / "data"), "val": str(folder / "val")},
        "cache": {"path": str(folder / "cache")},
        "student": {
            "model": "deit_tiny_distilled_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
        },
        "loss": {"method": "deit-hard"},
        "train": {"output": str(folder / "run"), "epochs": 3, "global_batch": 8, "warmup_epochs": 1, "workers": 0},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    teacher = {"model": "resnet10t", "kwargs": {"num_classes": 5}}
    new = {"cache": {"path": str(folder / "new"), "views": 2}, "teacher": teacher, "recipe": {"size": 32}}
    (folder / "new.yaml").write_text(yaml.safe_dump(config | new))
    (folder / "tabs.yaml").write_text("train:\n\tepochs: 3\n")
    (folder / "twice.yaml").write_text("train: {epochs: 3}\ntrain: {epochs: 4}\n")
    (folder / "list.yaml").write_text("- train\n")
    return folder


# command line (DIR is the folder above), and what its line holds: regular expressions, in this order
MISTAKES = [
    ("train", ["x"]),
    ("train DIR/none.yaml", ["x"]),
    ("train DIR", ["x"]),
    ("train DIR/tabs.yaml", ["x"]),
    ("train DIR/twice.yaml", ["x"]),
    ("train DIR/list.yaml", ["x"]),
    ("train DIR/short.tar", ["x"]),
    ("trian DIR/c.yaml", ["x"]),
    ("train DIR/c.yaml --sett train.epochs=3", ["x"]),
    ("train DIR/c.yaml --set train.epoch=3", ["x"]),
    ("train DIR/c.yaml --set epochs=3", ["x"]),
    ("train DIR/c.yaml --set trian.epochs=3", ["x"]),
    ("train DIR/c.yaml --set train.epochs", ["x"]),
    ("train DIR/c.yaml --set train.epochs=", ["x"]),
    ("train DIR/c.yaml --set train.epochs=three", ["x"]),
    ("train DIR/c.yaml --set train.epochs=3.5", ["x"]),
    ("train DIR/c.yaml --set train.epochs=0", ["x"]),
    ("train DIR/c.yaml --set train.epochs=-1", ["x"]),
    ("train DIR/c.yaml --set train.lr=nan", ["x"]),
    ("train DIR/c.yaml --set train.lr=1e-3x", ["x"]),
    ("train DIR/c.yaml --set train.warmup_epochs=5", ["x"]),
    ("train DIR/c.yaml --set train.global_batch=7", ["x"]),
    ("train DIR/c.yaml --set train.global_batch=512", ["x"]),
    ("train DIR/c.yaml --set train.micro_batch=3", ["x"]),
    ("train DIR/c.yaml --set train.device=gpu", ["x"]),
    ("train DIR/c.yaml --set train.device=cuda", ["x"]),
    ("train DIR/c.yaml --set train.device=cuda:9", ["x"]),
    ("train DIR/c.yaml --set train.autocast=half", ["x"]),
    ("train DIR/c.yaml --set train.autocast=yes", ["x"]),
    ("train DIR/c.yaml --set train.export=ema", ["x"]),
    ("train DIR/c.yaml --set train.trackers=wandb", ["x"]),
    ("train DIR/c.yaml --set train.trackers=[wanbd]", ["x"]),
    ("train DIR/c.yaml --set train.output=", ["x"]),
    ("train DIR/c.yaml --set train.output=DIR/cache", ["x"]),
    ("train DIR/c.yaml --set train.output=DIR/source", ["x"]),
    ("train DIR/c.yaml --set train.output=DIR/note.txt", ["x"]),
    ("train DIR/c.yaml --set train.output=s3://bucket/run", ["x"]),
    ("train DIR/c.yaml --set cache.path=DIR/nowhere", ["x"]),
    ("train DIR/c.yaml --set cache.path=", ["x"]),
    ("train DIR/c.yaml --set cache.path=DIR/data", ["x"]),
    ("train DIR/c.yaml --set cache.path=gs://bucket/cache", ["x"]),
    ("train DIR/c.yaml --set data.val=DIR/nowhere", ["x"]),
    ("train DIR/c.yaml --set data.val=DIR/source", ["x"]),
    ("train DIR/c.yaml --set data.val=DIR/cache", ["x"]),
    ("train DIR/c.yaml --set data.val=DIR/others", ["x"]),
    ("train DIR/c.yaml --set data.train=DIR/others", ["x"]),
    ("train DIR/c.yaml --set student.model=deit_tiny_distiled_patch16_224", ["x"]),
    ("train DIR/c.yaml --set student.model=resnet50", ["x"]),
    ("train DIR/c.yaml --set student.kwargs.patchsize=8", ["x"]),
    ("train DIR/c.yaml --set student.kwargs.num_heads=3", ["x"]),
    ("train DIR/c.yaml --set student.init=DIR/none.safetensors", ["x"]),
    ("train DIR/c.yaml --set student.init=DIR/model.bin", ["x"]),
    ("train DIR/c.yaml --set loss.method=cskd", ["x"]),
    ("train DIR/c.yaml --set loss.method=off", ["x"]),
    ("train DIR/c.yaml --set loss.decay=exponential", ["x"]),
    ("train DIR/c.yaml --set recipe.flip=0.1", ["x"]),
    ("train DIR/c.yaml --set recipe.size=64", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=resnet51", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=deit_tiny_patch16_224", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/net.py", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/net.py:build", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/broken.py:build", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/absent.py:build", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.weights=DIR/none.pth", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.weights=DIR/model.bin", ["x"]),
    ("cache-teacher DIR/new.yaml --set teacher.precision=int8", ["x"]),
    ("cache-teacher DIR/new.yaml --set cache.codecs=[envelop]", ["x"]),
    ("cache-teacher DIR/new.yaml --set cache.views=0", ["x"]),
    ("cache-teacher DIR/new.yaml --set cache.path=DIR/data", ["x"]),
    ("cache-teacher DIR/new.yaml --set recipe.mixup=2", ["x"]),
    ("cache-teacher DIR/new.yaml --set recipe.rand_augment=rand-m99", ["x"]),
    ("pack DIR/nowhere DIR/out", ["x"]),
    ("pack DIR/empty DIR/out", ["x"]),
    ("pack DIR/texts DIR/out", ["x"]),
    ("pack DIR/flat DIR/out", ["x"]),
    ("pack DIR/page.tar DIR/out", ["x"]),
    ("pack DIR/short.tar DIR/out", ["x"]),
    ("pack DIR/source DIR/source", ["x"]),
    ("pack DIR/source DIR/note.txt", ["x"]),
    ("pack DIR/source DIR/cache", ["x"]),
    ("pack DIR/source DIR/out --split trian", ["x"]),
    ("pack DIR/source DIR/out --short-side 0", ["x"]),
    ("index DIR/nowhere/*.tar", ["x"]),
    ("index DIR/no_labels.tar", ["x"]),
    ("index DIR/source", ["x"]),
    ("inspect DIR/nowhere", ["x"]),
    ("inspect DIR/data", ["x"]),
    ("inspect DIR/cache --sample 99", ["x"]),
    ("inspect DIR/cache --sample 0 --view 99", ["x"]),
    ("inspect DIR/cache --sample nobody", ["x"]),
    ("inspect DIR/cache --sample 0 --png DIR/note.txt", ["x"]),
    ("verify DIR/source", ["x"]),
    ("repair DIR/nowhere", ["x"]),
    ("gc DIR/data", ["x"]),
    ("eval DIR/nowhere DIR/val", ["x"]),
    ("eval DIR/source DIR/val", ["x"]),
    ("eval DIR/cache DIR/val", ["x"]),
    ("doctor DIR/none.yaml", ["x"]),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    line: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(made.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["cskd", *line.replace("DIR", str(made)).split(" ")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    print("@@", line, "=>", stop.value.code, out.err.strip().replace(str(made), "DIR"), out.out)
