"""Curated texts: configs in YAML that stand for billions of values, or lead somewhere; files of class names; overrides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.hostile.base import Base, Case, bound, sparse, write
from cskd.codecs import get_codec
from cskd.config import load_config, to_yaml
from cskd.student import build_student
from cskd.teacher.build import build
from cskd.teacher.class_map import class_map


def text_cases(base: Base) -> list[Case]:
    return yaml_cases() + override_cases() + class_cases() + model_cases(base)


def bomb(levels: int, kind: str) -> str:
    """Ten times ten times ... values by aliases."""
    lines = ["a0: &a0 [x]" if kind == "list" else "a0: &a0 {x: 1}"]
    for i in range(1, levels):
        if kind == "list":
            lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
        elif kind == "merge":
            lines.append(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}")
        else:
            lines.append(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}")
    return "\n".join(lines) + "\n"


def yaml_cases() -> list[Case]:
    refused = {
        "aliases of lists for 10^12 values": bomb(13, "list"),
        "aliases of mappings for 10^12 values": bomb(13, "map"),
        "merges for 10^12 values": bomb(13, "merge"),
        "aliases inside teacher.kwargs": "teacher:\n  kwargs:\n"
        + "".join(f"    {line}\n" for line in bomb(9, "list").split("\n") if line),
        "a list that holds itself": "data: &a [*a]\n",
        "a mapping that holds itself": "teacher: {kwargs: &a {a: *a}}\n",
        "100,000 lists in one another": "a: " + "[" * 100_000,
        "5,000 mappings in one another": "{a: " * 5000,
        "60 levels in teacher.kwargs": "teacher: {kwargs: " + "{a: " * 60 + "1" + "}" * 60 + "}\n",
        "2 MB of comment": "# " + "x" * 2_000_000 + "\n",
        "a Python object": "data: !!python/object/apply:os.system ['touch canary']\n",
        "a Python name": "data: !!python/name:os.system\n",
        "an unknown tag": "data: !canary {}\n",
        "a day that is none": "train: {output: 2001-99-99}\n",
        "a date for text": "train: {output: 2001-01-01}\n",
        "binary for text": "train: {output: !!binary aGVsbG8=}\n",
        "binary that is none": "train: {output: !!binary '%%%'}\n",
        "a timestamp that is none": "train: {output: !!timestamp x}\n",
        "an integer that is none": "train: {epochs: !!int x}\n",
        "a number of 10,000 digits": "train: {epochs: " + "9" * 10_000 + "}\n",
        "a number of 100,000 hexadecimal digits": "train: {epochs: 0x" + "f" * 100_000 + "}\n",
        "a number over every other": "train: {lr: .inf}\n",
        "a number that is none": "train: {lr: .nan}\n",
        "a number beyond float": "train: {lr: 1e999}\n",
        "10^18 epochs": "train: {epochs: 1000000000000000000}\n",
        "10^9 views": "cache: {views: 1000000000}\n",
        "10^6 workers": "cache: {workers: 1000000}\n",
        "a view of 10^6 pixels a side": "recipe: {size: 1000000}\n",
        "a batch of 2^40": "teacher: {batch: 1099511627776}\n",
        "a grid of 10^6": "teacher: {grid: [1000000, 1000000]}\n",
        "10^9 operations of RandAugment": "recipe: {randaugment: rand-m9-n1000000000}\n",
        "operations of RandAugment beyond float": "recipe: {randaugment: rand-n" + "9" * 400 + "}\n",
        "10^9 erased rectangles": "recipe: {erase: 1.0, erase_count: 1000000000}\n",
        "a codec that is a path": "cache: {codecs: ['../../canary']}\n",
        "a zero byte in a path": 'train: {output: "a\\0b"}\n',
        "an escape sequence in a path": 'train: {output: "\\e]0;x\\a"}\n',
        "a new line in a path": 'cache: {path: "a\\nb"}\n',
        "half a character in a path": 'cache: {path: "\\ud800"}\n',
        "a date in teacher.kwargs": "teacher: {kwargs: {a: 2001-01-01}}\n",
        "a set in teacher.kwargs": "teacher: {kwargs: {a: !!set {x}}}\n",
        "an infinity in student.kwargs": "student: {kwargs: {a: .inf}}\n",
        "a key of 100,000 characters": "train: {" + "k" * 100_000 + ": 1}\n",
        "a key that is a list": "? [a, b]\n: 1\n",
        "a key that is null": "train: {null: 1}\n",
        "a section that is text": "train: rm -rf\n",
        "a text of 400,000 characters for a number": "train: {epochs: " + "x" * 400_000 + "}\n",
        "a list at its top": "- a\n- b\n",
        "two documents": "train: {}\n---\ntrain: {}\n",
        "bytes that are no UTF-8": "\udcff",
        "an unset variable": "train: {output: '${CSKD_NO_SUCH_VARIABLE}'}\n",
        "a tab": "train:\n\tepochs: 1\n",
        "a zero byte": "train: \0\n",
    }
    read = {
        "aliases that a person would write": "recipe: &r {size: 32}\n",
        "rich markup in a path": "train: {output: '[bold red]x[/]'}\n",
        "nothing": "",
        "a null section": "train:\n",
    }
    cases = [
        Case(f"config: {name}", bound(lambda work, text: write(work / "c.yaml", os.fsencode(text)), text), _load, how)
        for how, texts in (("refused", refused), ("read", read))
        for name, text in texts.items()
    ]
    odd: dict[str, Callable[[Path], object]] = {
        "that is a pipe": lambda work: os.mkfifo(work / "c.yaml"),
        "that is a folder": lambda work: (work / "c.yaml").mkdir(),
        "that is a device": lambda work: (work / "c.yaml").symlink_to("/dev/zero"),
        "of 1 TB": lambda work: sparse(work / "c.yaml", 10**12, b"a: "),
    }
    return cases + [Case(f"config: one {name}", make, _load) for name, make in odd.items()]


def _load(work: Path) -> None:
    config = load_config(work / "c.yaml")
    to_yaml(config)
    for name in config.cache.codecs:
        get_codec(name, 1000, (7, 7))


def override_cases() -> list[Case]:
    texts = {
        "without a value": "train.epochs",
        "of nothing": "=1",
        "into a value": "train.epochs.x=1",
        "of a bomb": "train.output=" + "[" * 100_000,
        "of an object": "data.train=!!python/object/apply:os.system [touch canary]",
        "of 2,000 levels": ".".join("a" * 2000) + "=1",
        "of a key that is none": "train.__class__=x",
        "of a date": "train.output=2001-99-99",
    }
    return [
        Case(
            f"config: override {name}",
            lambda work: write(work / "c.yaml", "train: {epochs: 1}\n"),
            bound(lambda work, text: load_config(work / "c.yaml", [text]), text),
        )
        for name, text in texts.items()
    ]


def class_cases() -> list[Case]:
    """`teacher.classes`, a file of the teacher's class names."""
    makes: dict[str, Callable[[Path], object]] = {
        "a pipe": lambda work: os.mkfifo(work / "c.txt"),
        "a device": lambda work: (work / "c.txt").symlink_to("/dev/zero"),
        "of 1 TB": lambda work: sparse(work / "c.txt", 10**12),
        "no UTF-8": lambda work: write(work / "c.txt", b"\xff\xfe\xff"),
        "with a name twice": lambda work: write(work / "c.txt", "a\na\n"),
        "of 60,000 other names": lambda work: write(work / "c.txt", "".join(f"{i:0100d}\n" for i in range(60_000))),
        "of one name of 5 MB": lambda work: write(work / "c.txt", "x" * 5_000_000 + "\n"),
    }
    return [
        Case(
            f"classes: a file that is {name}"
            if name in ("a pipe", "a device", "no UTF-8")
            else f"classes: a file {name}",
            make,
            bound(
                lambda work, outputs: class_map(str(work / "c.txt"), ["zebra"], outputs),
                60_000 if "60,000" in name else 1,
            ),
        )
        for name, make in makes.items()
    ]


def model_cases(base: Base) -> list[Case]:
    """Models by which a config would load files, reach the network, or take all memory."""
    teacher: dict[str, dict[str, object]] = {
        "timm reads a checkpoint": {"model": "resnet18", "kwargs": {"checkpoint_path": "canary"}},
        "timm fetches weights": {"model": "resnet18", "kwargs": {"pretrained": True}},
        "timm's settings name a file": {"model": "resnet18", "kwargs": {"pretrained_cfg": {"file": "canary"}}},
        "timm's settings are laid over": {
            "model": "resnet18",
            "kwargs": {"pretrained_cfg_overlay": {"url": "http://x"}},
        },
        "timm's folder is elsewhere": {"model": "resnet18", "kwargs": {"cache_dir": "/canary"}},
        "it is fetched from the hub": {"model": "hf-hub:x/y"},
        "it is read from a folder": {"model": "local-dir:/canary"},
        "it is a scheme": {"model": "pipe:touch canary"},
        "it is a device": {"model": "/dev/zero.py:build"},
        "it is no file": {"model": "/nowhere/net.py:build"},
        "it has 10^12 channels": {"model": "resnet18", "kwargs": {"num_classes": 10**12}},
        "its arguments are text": {"model": "resnet18", "kwargs": {"layers": "x", "channels": "[bold]"}},
        "its weights are a pipe": {"model": f"{base.folder / 'linear.py'}:build", "weights": "PIPE.pt"},
        "its weights are a folder": {"model": f"{base.folder / 'linear.py'}:build", "weights": "."},
    }
    student: dict[str, dict[str, object]] = {
        "timm reads a checkpoint": {"model": "deit_tiny_patch16_224", "kwargs": {"checkpoint_path": "canary"}},
        "timm's settings name a file": {"model": "deit_tiny_patch16_224", "kwargs": {"pretrained_cfg": {"file": "x"}}},
        "it is fetched from the hub": {"model": "hf-hub:x/y"},
        "it has 65,536 features in 200 blocks": {
            "model": "deit_tiny_patch16_224",
            "kwargs": {"embed_dim": 65536, "depth": 200, "num_heads": 2},
        },
        "its patches have no size": {"model": "deit_tiny_patch16_224", "kwargs": {"patch_size": 0}},
        "its patches have a negative size": {"model": "deit_tiny_patch16_224", "kwargs": {"patch_size": -16}},
        "its heads are none": {"model": "deit_tiny_patch16_224", "kwargs": {"num_heads": 0}},
        "its arguments are text": {"model": "deit_tiny_patch16_224", "kwargs": {"embed_dim": "x"}},
        "its size is a mapping": {"model": "deit_tiny_patch16_224", "kwargs": {"img_size": {"a": 1}}},
        "it starts from a pipe": {"model": "deit_tiny_patch16_224", "init": "PIPE.pt"},
        "it starts from a device": {"model": "deit_tiny_patch16_224", "init": "/dev/zero"},
    }

    def make(work: Path) -> None:
        write(work / "linear.py", (base.folder / "linear.py").read_bytes())
        os.mkfifo(work / "PIPE.pt")

    def build_teacher(work: Path, section: dict[str, object]) -> None:
        if "weights" in section:
            section = {**section, "weights": str(work / str(section["weights"]))}
        build(base.config(work, work, teacher=section).teacher)

    def build_own(work: Path, section: dict[str, object]) -> None:
        if section.get("init") == "PIPE.pt":
            section = {**section, "init": str(work / "PIPE.pt")}
        build_student(base.config(work, work, student={"kwargs": {}, **section}).student, 2, 224)

    cases = [Case(f"teacher: {name}", make, bound(build_teacher, section)) for name, section in teacher.items()]
    return cases + [Case(f"student: {name}", make, bound(build_own, section)) for name, section in student.items()]
