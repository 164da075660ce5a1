"""Does a step from the cache cost what a plain supervised one costs? And what does it cost with the teacher beside it?

    python -m benchmarks.train_step [--rounds R] [--batch B] [--students deit_tiny,deit_small,deit_base] [--sides SIDE ...] [--device cuda]

ImageNet sample at 224 pixels, DeiT's full recipe and mixing, real loaders. One process a side and round, in turns:

    supervised  our `train`, loss.method none on the mean of both heads, as timm trains
    cached      our `train`, loss.method cskd-hard, from a cache, every view checked against its digest
    online      our `train --online`, cskd-hard, RegNetY-16GF running at every step (random weights, which cost the same)
    timm        timm's loader, model, mixing and optimiser, supervised: what its train script does a step
    timm kd     the same with its TokenDistillationTask (hard) and RegNetY-16GF; only on a GPU, or with --timm-kd

These have the settings that are ours by default: the student in bf16 where the device computes in it (timm's side, too, and with
timm's attention not fused, which is faster there), the teacher in float32. On a CPU there are besides, for those who set otherwise:

    ... float32   the student in float32, with the teacher in float32 where it runs
    online fast   as online, the teacher in bf16 with its batch norms folded

On a GPU: teacher in bf16 and folded, fused AdamW, compiled student. Our sides are the loop of `cskd.pipeline.train` itself, timed
between its calls of `Progress.update`; start-up and the first steps are not counted. Memory is the sum of the peaks of a
side's processes. About 8 minutes on 2 cores. Needs $CSKD_DATA (else `shared` beside the checkout). Prints the machine, a
table, and one JSON line last: `cached_over_supervised`, `online_over_cached`, `cached_over_timm` with the default settings,
the first two with `_float32` and `online_fast_over_cached` besides, seconds a step and peak MiB of every side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loader_sides import family, mend_posterize, proc_fields

# A worker imports this file, as it does the `cskd` script: what only a side needs is imported where it is used.

ROOT = Path(__file__).resolve().parent.parent
DEIT: dict[str, Any] = {"size": 224, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25}
TEACHER = "regnety_160"
WARM = 2  # steps that are not counted; more where something is compiled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="counted steps a side and round; fewer of slow sides")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--students", default="deit_tiny")
    parser.add_argument("--sides", nargs="*", metavar="SIDE", help="only these, such as: supervised cached")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--timm-kd", action="store_true", help="timm's distillation on a CPU, too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(run_side(json.loads(options.side))), flush=True)
        return 0
    shared = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    source = shared / "data" / "imagenet-sample.tar"
    if not source.is_file():
        print(f"benchmarks/train_step.py: no {source}; set CSKD_DATA to the folder with data/ in it", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, shared, Path(folder))
    print(json.dumps(result))
    return 0


def compare(options: argparse.Namespace, shared: Path, folder: Path) -> dict[str, Any]:
    """All sides of all students, after the cache is made."""
    import safetensors.torch
    import torch

    from cskd.machine.devices import pick_device
    from cskd.pipeline.cache_teacher import cache_teacher
    from cskd.pipeline.pack import pack_data
    from cskd.teacher.build import build_model

    cuda = pick_device(options.device).type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    needed = options.batch * (warm("cuda" if cuda else "cpu") + options.steps + 1)  # no epoch ends while the clock runs
    source = extract(shared / "data" / "imagenet-sample.tar", folder / "images", needed)
    pack_data(source, folder / "data", limit=needed, quiet=True)
    torch.manual_seed(0)
    safetensors.torch.save_file(build_model(TEACHER, {}).state_dict(), str(folder / "teacher.safetensors"))
    cache_teacher(_config(_side(options, folder, "cached", ""), shared), quiet=True)

    result: dict[str, Any] = {
        "benchmark": "train_step",
        "rounds": options.rounds,
        "batch": options.batch,
        "device": name,
    }
    sides = ["supervised", "cached", "timm", "online"]
    sides += [] if cuda else [f"{side} float32" for side in sides] + ["online fast"]
    sides += ["timm kd"] if cuda or options.timm_kd else []
    sides = [side for side in sides if side in (options.sides or sides)]
    for student in options.students.split(","):
        seconds, peaks, said = defaultdict(list), defaultdict(list), {}
        for turn in range(options.rounds):
            for side in sides[:: 1 if turn % 2 else -1]:
                found = _process(_side(options, folder, side, f"{student}_distilled_patch16_224"), shared)
                seconds[side].append(found["seconds"])
                peaks[side].append(found["peak_mib"])
                said[side] = found["bound_by"]
        step = {side: statistics.median(seconds[side]) for side in sides}
        print(f"\n{student}, batches of {options.batch}\n  {'':<20}{'s a step':>10}{'images/s':>10}{'peak MiB':>10}")
        for side in sides:
            every = " ".join(f"{s:.3f}" for s in seconds[side])
            print(
                f"  {side:<20}{step[side]:>10.3f}{options.batch / step[side]:>10.1f}{max(peaks[side]):>10.0f}   ({every})"
            )
            print(f"      {said[side]}" if said[side] else "", flush=True)
        ratios = {
            f"{a}_over_{b}{kind}".replace(" ", "_"): step[a + kind] / step[b + kind]
            for kind in ([""] if cuda else ["", " float32"])
            for a, b in (("cached", "supervised"), ("online", "cached"), ("cached", "timm"), ("online fast", "cached"))
            if a + kind in step and b + kind in step
        }
        result |= {f"{name}{_of(student)}": ratio for name, ratio in ratios.items()}
        result |= {
            f"seconds{_of(student)}": {side: round(s, 4) for side, s in step.items()},
            f"peak_mib{_of(student)}": {side: round(max(peaks[side])) for side in sides},
        }
    return result


def extract(tar: Path, folder: Path, needed: int) -> Path:
    """The folder of class folders in a tar, its images linked under other names until there are `needed`."""
    with tarfile.open(tar) as opened:
        opened.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    images = sorted(source.glob("*/*.JPEG"))
    for copy in range(1, -(-needed // len(images))):
        for image in images:
            os.link(image, image.with_name(f"{image.stem}_{copy}{image.suffix}"))
    return source


def _of(student: str) -> str:
    return "" if student == "deit_tiny" else f"_{student}"


def _side(options: argparse.Namespace, folder: Path, side: str, student: str) -> dict[str, Any]:
    slow = side.startswith("online") or side == "timm kd"
    steps = max(2, options.steps // (4 if slow else 2 if side.endswith("float32") else 1))
    names = ("batch", "workers", "device")
    return {"side": side, "student": student, "folder": str(folder), "steps": steps} | {
        name: getattr(options, name) for name in names
    }


def _process(side: dict[str, Any], shared: Path) -> dict[str, Any]:
    """A side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--side", json.dumps(side)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CSKD_DATA": str(shared)}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"benchmarks/train_step.py: the side {side['side']!r} failed, exit {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_side(side: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step, peak memory, and what our own report says."""
    if side["side"].startswith("timm"):
        return _timm(side)
    import cskd.pipeline.train
    from cskd.machine.devices import pick_device

    config = _config(side, Path(os.environ["CSKD_DATA"]))
    watch = Stopwatch(warm(pick_device(side["device"]).type), side["steps"])
    cskd.pipeline.train.Progress = watch  # type: ignore[assignment, attr-defined]  # the name that the stage looks up
    report = cskd.pipeline.train.train(config, online=side["side"].startswith("online"), quiet=True)
    return watch.found() | {"bound_by": report.bound_by}


def warm(device: str) -> int:
    """Steps before the clock starts; on a GPU the student is compiled in them."""
    return 20 if device == "cuda" else WARM


def wait_for_device() -> None:
    """Until a GPU has done all that was launched. The loss in a line of progress is an earlier one, which is not waited for."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Stopwatch:
    """Stands where `cskd.pipeline.train` has its progress line, and takes the time of the steps in between."""

    def __init__(self, warm: int, steps: int) -> None:
        self._warm, self._steps, self._seen = warm, steps, 0
        self._begun = self._seconds = self._peak = 0.0

    def __call__(self, *_: object, **__: object) -> Stopwatch:
        return self

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, loss: Any) -> None:
        """After every step."""
        self._seen += 1
        if self._seen in (self._warm, self._warm + self._steps):
            wait_for_device()
        if self._seen == self._warm:
            self._begun = time.perf_counter()
        if self._seen == self._warm + self._steps:
            self._seconds, self._peak = time.perf_counter() - self._begun, peak_mib()

    def found(self) -> dict[str, Any]:
        """Seconds a step and peak memory."""
        return {"seconds": self._seconds / self._steps, "peak_mib": self._peak}


def _config(side: dict[str, Any], shared: Path) -> Any:
    from cskd.config import from_dict
    from cskd.machine.devices import pick_device

    folder, device = Path(side["folder"]), pick_device(side["device"]).type
    online, steps = side["side"].startswith("online"), warm(device) + side["steps"]
    fast = device == "cuda" or side["side"].endswith("fast") or not side["student"]
    mobilenet = {
        "model": "mobilenetv2_100",
        "kwargs": {"pad_type": "same"},
        "weights": str(shared / "teachers" / "imagenet_mobilenetv2_100.safetensors"),
    }
    regnet = {"model": TEACHER, "weights": str(folder / "teacher.safetensors")}
    # The cached side's teacher does not run: a small one makes the cache. Both end in 7x7 cells of 1,000 classes.
    teacher = (regnet if online else mobilenet) | {"check_images": 8, "min_top1": 0.0}
    teacher |= {"precision": "bf16", "fold": True} if fast else {}
    return from_dict(
        {
            "data": {"train": str(folder / "data")},
            "teacher": {**teacher, "input_size": 224, "batch": min(64, side["batch"])},
            "recipe": DEIT,
            "cache": {"path": str(folder / "cache"), "views": 1, "device": side["device"]},
            "student": {"model": side["student"] or "deit_tiny_distilled_patch16_224"},
            "loss": {"method": "none", "baseline_head": "mean"}
            if side["side"].startswith("supervised")
            else {"method": "cskd-hard"},
            "train": {
                "output": str(folder / f"run {time.time_ns()}"),
                "global_batch": side["batch"],
                "workers": side["workers"],
                "device": side["device"],
                "autocast": _autocast(side),
                "compile": device == "cuda",
                "max_steps": steps,
                "epochs": 300,
            },
        }
    )


def _autocast(side: dict[str, Any]) -> str:
    """Of the student."""
    return "none" if side["side"].endswith("float32") else "auto"


def _timm(side: dict[str, Any]) -> dict[str, Any]:
    """timm's parts put together as its train script does; the task is that of the script's --kd-distill-type token."""
    import timm
    import torch
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask, TokenDistillationTask

    from cskd.machine.arithmetic import autocast, half
    from cskd.machine.devices import pick_device
    from cskd.teacher.build import build_model

    device = pick_device(side["device"])
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    if not cuda and half(_autocast(side), device) == "bf16":
        timm.layers.set_fused_attn(False)  # on a CPU faster in bf16, as for our side
    model: Any = timm.create_model(side["student"], num_classes=1000).to(device)
    criterion = SoftTargetCrossEntropy()
    if side["side"] == "timm kd":
        model.set_distilled_training(True)
        teacher: Any = build_model(TEACHER, {}).to(device)
        teacher = teacher.to(memory_format=torch.channels_last)
        task: Any = TokenDistillationTask(model, teacher, criterion, distill_type="hard", device=device, verbose=False)
    else:
        task = ClassificationTask(model, criterion=criterion, device=device, verbose=False)
    if cuda:
        task = torch.compile(task)
    fused: dict[str, Any] = {"fused": True} if cuda else {}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, **fused)
    batches, counted = _timm_batches(side, device), warm(device.type)
    model.train()
    clock = 0.0
    for step in range(counted + side["steps"]):
        pixels, target = next(batches)
        with autocast(_autocast(side), device):
            loss = task(pixels, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == counted:
            loss.item()
            clock = time.perf_counter()
    loss.item()
    return {"seconds": (time.perf_counter() - clock) / side["steps"], "peak_mib": peak_mib(), "bound_by": ""}


def _timm_batches(side: dict[str, Any], device: Any) -> Iterator[Any]:
    """timm's training loader in its faster mode, mixed and normalised."""
    import timm.data

    mend_posterize()
    images = Path(side["folder"]) / "images"
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 1000}
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(next(p for p in images.iterdir() if p.is_dir()))),
        224,
        side["batch"],
        is_training=True,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment=DEIT["randaugment"],
        interpolation="bicubic",
        num_workers=side["workers"],
        collate_fn=timm.data.FastCollateMixup(**mixing),
        device=device,
    )
    while True:
        yield from loader


def peak_mib() -> float:
    """Peak resident MiB of this process and all below it, each at its own peak; shared pages are counted in each."""
    return sum(proc_fields(Path(f"/proc/{pid}/status")).get("VmHWM", 0) for pid in family()) / 1024


if __name__ == "__main__":
    sys.exit(main())
