"""Mistakes that people make, with the line that each gets: the value, what was expected, the next step. Nothing is lost."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
    (folder / "model.bin").write_bytes(b"\x80\x04 no weights")
    (folder / "model.pkl").write_bytes(b"\x80\x04 no weights")
    (folder / "net.py").write_text("def bild(num_classes): ...\n")
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "runs.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "script.py").write_text(
        "import torch, warnings\ndef build(**_):\n    with warnings.catch_warnings(action='ignore'):\n"
        "        return torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3)))\n"
    )
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


# command line (DIR is the folder above), and what its line holds: in this order
MISTAKES = [
    ("train DIR/c.yaml --set train.batch_size=8", ["unknown key 'train.batch_size'", "it is 'train.global_batch'"]),
    ("train DIR/c.yaml --set train.learning_rate=1", ["unknown key 'train.learning_rate'", "it is 'train.lr'"]),
    ("train DIR/c.yaml --set train.drop_path=0.1", ["unknown key 'train.drop_path'", "it is 'student.drop_path'"]),
    ("train DIR/c.yaml --set recipe.reprob=0.25", ["unknown key 'recipe.reprob'", "here it is 'recipe.erase'"]),
    ("train DIR/c.yaml --set recipe.aa=rand-m9", ["unknown key 'recipe.aa'", "here it is 'recipe.randaugment'"]),
    ("train DIR/c.yaml --set train.sched=step", ["unknown key 'train.sched'", "not here: the learning rate", "cosine"]),
    ("train DIR/c.yaml --set recipe.vflip=0.5", ["unknown key 'recipe.vflip'", "not here: views are never turned"]),
    ("train DIR/c.yaml --set teacher.precision=fp32", ["teacher.precision is 'fp32'", "write float32"]),
    ("train DIR/c.yaml --set train.autocast=fp32", ["train.autocast is 'fp32'", "write none"]),
    (
        "train DIR/c.yaml --set teacher.precision=bf16",
        ["teacher.precision is bf16", "was made in float32", "leave it out"],
    ),
    (
        "train DIR/c.yaml --set student.model=deit_tny",
        ["student.model 'deit_tny' is no model of timm", "did you mean 'deit_tiny_patch16_224'?"],
    ),
    ("train DIR/c.yaml --set train.lr=0,001", ["train.lr is '0,001'", "expected a number"]),
    ("train DIR/c.yaml --set train.output=1:30", ["train.output is 90", "write '1:30' in quotes"]),
    ("train DIR/c.yaml --set train.seed=1e18", ["train.seed is", "write 1000000000000000000"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/runs.py:build", ["runs.py ends the program", "__main__"]),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/script.py:build", ["a TorchScript module", "plain nn.Module"]),
    ("verify DIR/source --images", ["no inventory at DIR/source", "make one with 'cskd pack' or 'cskd index'"]),
    ("train", ["Missing argument 'CONFIG'."]),
    ("train DIR/none.yaml", ["no config at DIR/none.yaml", "give the path of a YAML file; `cskd configs` lists"]),
    ("train DIR", ["DIR can't be read", "give another path"]),
    ("train DIR/tabs.yaml", ["DIR/tabs.yaml is not readable YAML", "put spaces there"]),
    ("train DIR/twice.yaml", ["DIR/twice.yaml has the key train twice", "leave one out"]),
    ("train DIR/list.yaml", ["DIR/list.yaml holds a list", "cted sections such as 'teacher:' and 'train:'"]),
    (
        "train DIR/model.pkl",
        ["DIR/model.pkl is not readable YAML", "expected a file such as those that `cskd configs` lists"],
    ),
    ("trian DIR/c.yaml", ["No such command 'trian'. Did you mean 'train'?"]),
    ("train DIR/c.yaml --sett train.epochs=3", ["No such option: --sett (Possible options: --set)"]),
    ("train DIR/c.yaml --set train.epoch=3", ["unknown key 'train.epoch'", "did you mean 'train.epochs'?"]),
    ("train DIR/c.yaml --set epochs=3", ["unknown key 'epochs'", "did you mean 'train.epochs'?"]),
    ("train DIR/c.yaml --set trian.epochs=3", ["unknown key 'trian'", "did you mean 'train'?"]),
    (
        "train DIR/c.yaml --set train.epochs",
        ["--set 'train.epochs' is not KEY=VALUE", " KEY=VALUE, for example --set train.epochs=10"],
    ),
    ("train DIR/c.yaml --set train.epochs=", ["train.epochs is null, expected a whole number"]),
    (
        "train DIR/c.yaml --set train.epochs=three",
        ["train.epochs is 'three'", "in.epochs is 'three', expected a whole number"],
    ),
    (
        "train DIR/c.yaml --set train.epochs=3.5",
        ["train.epochs is 3.5", "ole number (YAML reads 3.5 as the number 3.5)"],
    ),
    ("train DIR/c.yaml --set train.epochs=0", ["train.epochs is 0", "s is 0, expected from 1 to 1,000,000 (epochs)"]),
    ("train DIR/c.yaml --set train.epochs=-1", ["train.epochs is -1", " is -1, expected from 1 to 1,000,000 (epochs)"]),
    ("train DIR/c.yaml --set train.lr=nan", ["train.lr is 'nan', expected a number"]),
    ("train DIR/c.yaml --set train.lr=1e-3x", ["train.lr is '1e-3x', expected a number"]),
    ("train DIR/c.yaml --set train.warmup_epochs=5", ["train.warmup_epochs is 5.0", "set one of them"]),
    ("train DIR/c.yaml --set train.global_batch=7", ["train.global_batch is 7 on 1 rank", "use 8"]),
    ("train DIR/c.yaml --set train.global_batch=512", ["an epoch has 20 samples", "use a batch of at most 20"]),
    (
        "train DIR/c.yaml --set train.micro_batch=3",
        ["train.micro_batch is 3", " at least 2, a multiple of 2, or null (views)"],
    ),
    ("train DIR/c.yaml --set train.device=gpu", ["train.device 'gpu' is not usable here", "use auto or cpu"]),
    ("train DIR/c.yaml --set train.device=cuda", ["train.device 'cuda' is not usable here", "use auto or cpu"]),
    ("train DIR/c.yaml --set train.device=cuda:9", ["train.device 'cuda:9' is not usable here", "use auto or cpu"]),
    (
        "train DIR/c.yaml --set train.autocast=half",
        ["train.autocast is 'half'", "half', expected one of auto, none, bf16, fp16"],
    ),
    (
        "train DIR/c.yaml --set train.autocast=yes",
        ["train.autocast is true", "to, none, bf16, fp16 (YAML reads yes as true)"],
    ),
    (
        "train DIR/c.yaml --set train.export=ema",
        ["train.export is 'ema'", "ema', expected live or best without train.ema"],
    ),
    (
        "train DIR/c.yaml --set train.trackers=wandb",
        ["train.trackers is 'wandb'", "ch one of tensorboard, wandb, trackio, mlflow"],
    ),
    ("train DIR/c.yaml --set train.trackers=[wanbd]", ["train.trackers[0] is 'wanbd'", "did you mean 'wandb'?"]),
    (
        "train DIR/c.yaml --set train.output=",
        ["train.output is empty", "say where results go, for example --set train.output=runs/mi"],
    ),
    (
        "train DIR/c.yaml --set train.output=DIR/cache",
        ["train.output and cache.path are both DIR/cache", "give each a folder of its own"],
    ),
    (
        "train DIR/c.yaml --set train.output=DIR/note.txt",
        ["train.output DIR/note.txt", "set another, --set train.output=runs/x"],
    ),
    (
        "train DIR/c.yaml --set train.output=ftp://bucket/run",
        ["train.output 'ftp://bucket/run' is an address", "copy or mount it here, and give that path"],
    ),
    (
        "train DIR/c.yaml --set cache.path=DIR/nowhere",
        ["no cache at DIR/nowhere", "make one with `cskd cache-teacher CONFIG`"],
    ),
    (
        "train DIR/c.yaml --set cache.path=",
        [
            "cache.path is empty and loss.method deit-hard reads a teacher's target",
            "set cache.path, run the teacher with --online, or train a ba",
        ],
    ),
    (
        "train DIR/c.yaml --set cache.path=DIR/data",
        ["DIR/data is a packed data set, expected a cache", "`cskd verify DIR/data --images` looks at it"],
    ),
    (
        "train DIR/c.yaml --set cache.path=ftp://bucket/cache",
        ["cache.path 'ftp://bucket/cache' is an address", "copy or mount it here, and give that path"],
    ),
    ("train DIR/c.yaml --set data.val=DIR/nowhere", ["data.val", "make one with 'cskd pack' or 'cskd index'"]),
    ("train DIR/c.yaml --set data.val=DIR/source", ["data.val", "make one with 'cskd pack' or 'cskd index'"]),
    (
        "train DIR/c.yaml --set data.val=DIR/cache",
        ["data.val: DIR/cache is a cache, expected a packed data set", "`cskd inspect DIR/cache` shows it"],
    ),
    (
        "train DIR/c.yaml --set data.val=DIR/others",
        ["data.val DIR/others has other classes than the images trained on", "pack it with --classes and their list"],
    ),
    (
        "train DIR/c.yaml --set data.train=DIR/others",
        ["DIR/others holds the data set 2c941a300257", "point to the data that it was made from"],
    ),
    (
        "train DIR/c.yaml --set student.model=deit_tiny_distiled_patch16_224",
        [
            "student.model 'deit_tiny_distiled_patch16_224' is no model of timm 1.0",
            "did you mean 'deit_tiny_distilled_patch16_224'?",
        ],
    ),
    (
        "train DIR/c.yaml --set student.model=resnet50",
        ["resnet50 can't be built with", "got an unexpected keyword argument", "mend student.kwargs"],
    ),
    (
        "train DIR/c.yaml --set student.kwargs.patchsize=8",
        ["deit_tiny_distilled_patch16_224 can't be built with {'depth'", "mend student.kwargs"],
    ),
    (
        "train DIR/c.yaml --set student.kwargs.num_heads=3",
        ["deit_tiny_distilled_patch16_224 can't be built with {'depth'", "mend student.kwargs"],
    ),
    (
        "train DIR/c.yaml --set student.init=DIR/none.safetensors",
        ["student.init", "give a .safetensors, a .pt or a run's folder"],
    ),
    (
        "train DIR/c.yaml --set student.init=DIR/model.bin",
        ["student.init DIR/model.bin is no checkpoint", "give a ViT's state dict, .safetensors or of torch.save"],
    ),
    ("train DIR/c.yaml --set loss.method=cskd", ["loss.method is 'cskd'", "did you mean 'cskd-soft'?"]),
    ("train DIR/c.yaml --set loss.method=off", ["loss.method is false", "write none"]),
    (
        "train DIR/c.yaml --set loss.decay=exponential",
        ["loss.decay is 'exponential'", "e of linear, quadratic, cosine, local, global"],
    ),
    ("train DIR/c.yaml --set recipe.flip=0.1", ["recipe.flip is 0.1", "leave it out or set it so"]),
    ("train DIR/c.yaml --set recipe.size=64", ["recipe.size is 64", "leave it out or set it so"]),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=resnet51",
        ["teacher.model 'resnet51' is no timm model", "torchvision's are torchvision:NAME, your own is path/to/file"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=",
        ["teacher.model is empty", "give a timm name such as resnet50, or path/to/file.py:build"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=deit_tiny_patch16_224",
        ["the teacher's forward_features gives a tensor [2", "give a CNN such as resnet50"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=DIR/net.py",
        ["teacher.model 'DIR/net.py' is no timm model", "torchvision's are torchvision:NAME, your own is path/to/file"],
    ),
    ("cache-teacher DIR/new.yaml --set teacher.model=DIR/net.py:build", ["teacher.model", "did you mean 'bild'?"]),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=DIR/broken.py:build",
        ["teacher.model", "ntaxError: invalid syntax (broken.py, line 1)"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.model=DIR/absent.py:build",
        ["teacher.model", "give path/to/file.py:build"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.weights=DIR/none.pth",
        ["teacher.weights", "give a .safetensors or .pth file, or 'hub'"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.weights=DIR/model.bin",
        ["teacher.weights", "give a state dict, .safetensors or of torch.save"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.weights=DIR/empty",
        ["DIR/empty is a folder without model", "or an index of such; give a .safetensors or .pth file, or 'hub'"],
    ),
    (
        "cache-teacher DIR/new.yaml --set teacher.precision=int8",
        ["teacher.precision is 'int8'", "e of auto, float32, tf32, bf16, fp16, float64"],
    ),
    (
        "cache-teacher DIR/new.yaml --set cache.codecs=[envelop]",
        ["unknown codec 'envelop'", "did you mean 'envelope'? the known ones are envelope, int8 a"],
    ),
    (
        "cache-teacher DIR/new.yaml --set cache.views=0",
        ["cache.views is 0", " expected from 1 to 100,000 (views per image)"],
    ),
    (
        "cache-teacher DIR/new.yaml --set cache.path=DIR/data",
        ["cache.path and data.train are both DIR/data", "give each a folder of its own"],
    ),
    (
        "cache-teacher DIR/new.yaml --set recipe.rand_augment=rand-m99",
        ["unknown key 'recipe.rand_augment'", "did you mean 'recipe.randaugment'?"],
    ),
    (
        "pack DIR/nowhere DIR/out",
        ["nothing at DIR/nowhere", "expected a folder of class folders, a tar of one, or webdata"],
    ),
    (
        "pack DIR/empty DIR/out",
        ["DIR/empty holds no images in class folders", "expected CLASS/NAME with one of bmp, gif, jpeg, jpg, pgm, pn"],
    ),
    (
        "pack DIR/texts DIR/out",
        ["DIR/texts holds no images in class folders", "expected CLASS/NAME with one of bmp, gif, jpeg, jpg, pgm, pn"],
    ),
    (
        "pack DIR/flat DIR/out",
        ["DIR/flat holds 1 image", "sort them into class folders, give their labels with --label"],
    ),
    ("pack DIR/page.tar DIR/out", ["DIR/page.tar is not a whole tar", "copy or make it again"]),
    ("pack DIR/short.tar DIR/out", ["DIR/short.tar was cut off inside 'image000.png'", "copy or make it again"]),
    (
        "pack DIR/source DIR/source",
        ["DIR/source is the source", "pack into another folder, or use 'cskd index' for shards as "],
    ),
    ("pack DIR/source DIR/note.txt", ["DIR/note.txt is a file", "give another one"]),
    ("pack DIR/source DIR/cache", ["OUT DIR/cache is a cache", "give a folder of its own"]),
    (
        "pack DIR/source DIR/out --split trian",
        ["DIR/source holds no folder of images for '--split trian'", "name one of them"],
    ),
    ("pack DIR/source DIR/out --short-side 0", ["Invalid value for '--short-side': "]),
    ("index DIR/nowhere/*.tar", ["no .tar files at DIR/nowhere/*.tar", "expected webdataset shards (decompressed)"]),
    ("index DIR/source", ["no .tar files at DIR/source", "expected webdataset shards (decompressed)"]),
    ("inspect DIR/nowhere", ["no cache at DIR/nowhere", "make one with `cskd cache-teacher CONFIG`"]),
    ("inspect DIR/source", ["no cache at DIR/source", "make one with `cskd cache-teacher CONFIG`"]),
    ("inspect DIR/cache --sample 99", ["no sample number 99", "umber 99, expected a key or a number in 0..19"]),
    (
        "inspect DIR/cache --sample 0 --view 99",
        ["view 99 is outside this cache's 0..2", "give one of these with --view"],
    ),
    (
        "inspect DIR/cache --sample nobody",
        ["no sample 'nobody' in DIR/data/inventory", "its keys look like 'image000'"],
    ),
    (
        "inspect DIR/cache --sample 0 --png DIR/note.txt",
        ["--png DIR/note.txt is there and is no PNG", "give another path"],
    ),
    ("verify DIR/source", ["no cache at DIR/source", "make one with `cskd cache-teacher CONFIG`"]),
    ("repair DIR/nowhere", ["no cache at DIR/nowhere", "give the folder that cache.path names"]),
    ("gc DIR/source", ["no cache at DIR/source", "make one with `cskd cache-teacher CONFIG`"]),
    ("eval DIR/nowhere DIR/val", ["no file DIR/nowhere", "give the folder of a run, or a weight file in it"]),
    (
        "eval DIR/source DIR/val",
        ["no file DIR/source/model.safetensors", "give the folder of a run, or a weight file in it"],
    ),
    ("doctor DIR/none.yaml", ["no config at DIR/none.yaml", "give the path of a YAML file; `cskd configs` lists"]),
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
    text = out.err.replace(str(made), "DIR")
    if "Usage" in text:
        assert stop.value.code == 2
    else:
        assert (stop.value.code, text[:6], text.count("\n")) == (1, "cskd: ", 1)
        assert len(out.err) <= LONGEST + 1
    at = 0
    for word in words:
        assert word in text[at:], text
        at = text.index(word, at)
    assert sorted(made.rglob("*")) == before, "something was made, or lost"


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 60
