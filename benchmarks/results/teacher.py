"""Train a teacher of docs/RESULTS.md: a CIFAR ResNet, or a network of involutions, on packed images. The same command goes on after a kill.

    python -m benchmarks.results.teacher OUT --train DATA --val DATA [--init WEIGHTS] [--blocks 9] [--epochs 14] ...

SGD with Nesterov momentum, one cycle of the learning rate, shifts of 4 pixels, flips, CutMix of half the batches (a cell
then learns to answer for what it sees), averaged weights. Every epoch a row in OUT/teacher.jsonl and a state; at the end
OUT/teacher.safetensors, the averaged weights. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from benchmarks.results import results_folder, shared_weights
from benchmarks.results.involution import InvolutionNet
from benchmarks.results.networks import CifarResNet
from cskd.dataset.images import decode
from cskd.dataset.inventory import open_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import ConfigError, CskdError
from cskd.files.durable import put
from cskd.files.folders import mark, refuse_output
from cskd.files.writer import sole_writer
from cskd.machine.arithmetic import autocast
from cskd.machine.devices import pick_device
from cskd.machine.threads import choose_threads, computing_with
from cskd.pipeline.show.progress import Progress
from cskd.seeds import hash64
from cskd.views.mix_pixels import normalise

NETWORKS: dict[str, type[nn.Module]] = {"residual": CifarResNet, "involution": InvolutionNet}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PRESETS: dict[str, dict[str, Any]] = {
    "few": {"train": results_folder() / "data" / "few", "blocks": 3, "epochs": 80, "lr": 0.2, "eval_every": 10},
    "few_involution": {
        "train": results_folder() / "data" / "few",
        "network": "involution",
        "blocks": 2,
        "widths": [32, 96, 192],
        "kernels": [3, 5, 5],
        "epochs": 24,
        "lr": 0.1,
        "eval_every": 6,
    },
    "all": {"train": results_folder() / "data" / "all", "init": shared_weights("cifar10_resnet56.safetensors")},
}
PADDING = 4  # pixels an image may be shifted
EMA = 0.999


@dataclass(frozen=True)
class Images:
    """uint8 [N, 3, 32, 32] and int64 [N], on the device that trains."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> Images:
        """All images of a packed data set, decoded."""
        inventory = open_inventory(folder)
        reader = ShardReader(inventory)
        pixels = np.stack([decode(reader.read(i)) for i in range(len(inventory))])
        labels = torch.from_numpy(np.asarray(inventory.label, np.int64))
        return cls(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device), labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="few, few_involution, all, or a name for another one")
    parser.add_argument("--train", type=Path, help="packed images to learn from")
    parser.add_argument("--val", type=Path, default=results_folder() / "data" / "val", help="packed images to look at")
    parser.add_argument("--init", type=Path, help="weights of the same network to start from")
    parser.add_argument("--network", choices=NETWORKS, default="residual")
    parser.add_argument("--blocks", type=int, default=9, help="in each stage: 9 is ResNet-56, 3 ResNet-20")
    parser.add_argument("--widths", type=int, nargs=3, default=[16, 32, 64], help="channels of the stages")
    parser.add_argument("--kernels", type=int, nargs=3, default=[3, 3, 3], help="of the stages; 1 sees no neighbours")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--lr", type=float, default=0.05, help="the largest")
    parser.add_argument("--cutmix", type=float, default=0.5, help="share of batches")
    parser.add_argument("--eval-every", type=int, default=2, help="epochs")
    parser.add_argument("--threads", type=int, help="of arithmetic; default: from the cores")
    parser.add_argument("--device", default="auto")
    name = parser.parse_args(arguments).name
    parser.set_defaults(**PRESETS.get(name, {}), out=results_folder() / "teachers" / name)
    args = parser.parse_args(arguments)
    if args.train is None:
        parser.error(f"--train is missing: teacher {name} is none of {', '.join(PRESETS)}")
    try:
        print(json.dumps(train_teacher(args)))
    except CskdError as e:
        print(f"benchmarks/results/teacher.py: {e}", file=sys.stderr)
        return 1
    return 0


def train_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the last row: epoch, seconds, top-1 of the averaged weights on both data sets."""
    device = pick_device(args.device)
    refuse_output(args.out, "run", "OUT")
    threads = choose_threads(args.threads)
    with sole_writer(args.out, "give another folder"), computing_with(threads.count):
        mark(args.out, "run")
        run = Run(args, device)
        while run.epoch < args.epochs:
            run.train_epoch()
        if not (args.out / "teacher.safetensors").exists():
            weights = {k: v.contiguous().cpu() for k, v in run.averaged.module.state_dict().items()}
            put(args.out / "teacher.safetensors", lambda temp: save_file(weights, temp))
    return run.rows[-1] | {"device": _name(device), "parameters": sum(p.numel() for p in run.model.parameters())}


class Run:
    """Network, optimiser and averaged weights; everything random is a function of the epoch, so a state is enough."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.train, self.val = Images.of(args.train, device), Images.of(args.val, device)
        torch.manual_seed(0)
        model: Any = NETWORKS[args.network](args.blocks, args.widths, args.kernels)
        if args.init:
            model.load_state_dict(load_file(args.init))
        self.model = model.to(device).to(memory_format=torch.channels_last)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.averaged = ModelEmaV3(model, decay=EMA, use_warmup=True)
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        self.batch = min(128, len(self.train) // 16)
        self.steps = len(self.train) // self.batch
        self._state = args.out / "state.pt"
        told = {k: v for k, v in vars(args).items() if k not in ("name", "threads", "device", "out")}
        if args.network == "residual":
            del told["network"]  # as states say that were begun when there was no other
        self._begun = {k: str(v) for k, v in told.items()}
        if self._state.exists():
            self._load()

    def train_epoch(self) -> None:
        """One epoch, its row and its state."""
        start = time.perf_counter()
        torch.manual_seed(hash64("teacher epoch", self.epoch))  # augmentation and order
        order = torch.randperm(len(self.train)).to(self.device)
        loss_sum, done = torch.zeros((), device=self.device), self.epoch * self.steps
        total = self.args.epochs * self.steps
        label = f"teacher, epoch {self.epoch + 1} of {self.args.epochs}"
        with Progress(label, self.steps * self.batch, unit="images") as progress:
            for step in range(self.steps):
                rows = order[step * self.batch : (step + 1) * self.batch]
                loss = self._loss(rows)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.args.lr * one_cycle((done + step + 1) / total)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.averaged.update(self.model, step=done + step + 1)
                loss_sum += loss.detach()
                progress.update((step + 1) * self.batch)
        self.epoch += 1
        row: dict[str, Any] = {"epoch": self.epoch, "loss": loss_sum.item() / self.steps}
        if self.epoch % self.args.eval_every == 0 or self.epoch == self.args.epochs:
            row["top1"] = self.top1(self.averaged.module, self.val)
        if self.epoch == self.args.epochs:
            row["top1_train"] = self.top1(self.averaged.module, self.train)
        earlier = self.rows[-1]["seconds"] if self.rows else 0.0
        self.rows.append(row | {"seconds": earlier + time.perf_counter() - start})
        self._save()
        print(json.dumps(self.rows[-1]), flush=True)

    def top1(self, model: nn.Module, images: Images) -> float:
        """Per cent, float32."""
        model.eval()
        hits = 0
        with torch.no_grad():
            for pixels, labels in zip(images.pixels.split(256), images.labels.split(256), strict=True):
                hits += int((model(normalise(pixels.float(), MEAN, STD)).argmax(1) == labels).sum())
        model.train()
        return 100 * hits / len(images)

    def _loss(self, rows: Tensor) -> Tensor:
        pixels, labels = shift_and_flip(self.train.pixels[rows]), self.train.labels[rows]
        share, partner = 1.0, labels
        if torch.rand(()).item() < self.args.cutmix:
            pixels, share, order = cut_and_paste(pixels)
            partner = labels[order]
        with autocast("auto", self.device):
            logits = self.model(normalise(pixels.float(), MEAN, STD).contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        own, other = (F.cross_entropy(logits, y, label_smoothing=0.05) for y in (labels, partner))
        return share * own + (1 - share) * other

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "begun": self._begun,
        }
        put(self._state, lambda temp: torch.save(state, temp))
        put(self.args.out / "teacher.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows).encode())

    def _load(self) -> None:
        state = torch.load(self._state, map_location=self.device, weights_only=True)
        if state["begun"] != self._begun:
            raise ConfigError(f"{self.args.out} holds a teacher begun with {state['begun']}; give another name")
        self.model.load_state_dict(state["model"])
        self.averaged.module.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows, self.epoch = state["rows"], len(state["rows"])


def one_cycle(progress: float) -> float:
    """Share of the largest learning rate at `progress` in (0, 1]: up in a fifth of the run, then down as a cosine."""
    return progress / 0.2 if progress < 0.2 else 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def shift_and_flip(pixels: Tensor) -> Tensor:
    """Each image shifted by up to PADDING pixels, what comes in from outside black, and every second mirrored."""
    count, side = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels, (PADDING,) * 4)
    corner = torch.randint(0, 2 * PADDING + 1, (2, count)).to(pixels.device)
    along = torch.arange(side, device=pixels.device)
    rows, columns = corner[0][:, None] + along, corner[1][:, None] + along
    mirrored = (torch.rand(count) < 0.5).to(pixels.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(count, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_and_paste(pixels: Tensor) -> tuple[Tensor, float, Tensor]:
    """CutMix with one box a batch (arXiv 1905.04899): images, share of the own image, and whose the box is."""
    side = pixels.shape[-1]
    order = torch.randperm(len(pixels)).to(pixels.device)
    half = int(side * math.sqrt(torch.rand(()).item())) // 2
    row, column = torch.randint(0, side, (2,)).tolist()
    top, bottom = max(0, row - half), min(side, row + half)
    left, right = max(0, column - half), min(side, column + half)
    pasted = pixels.clone()
    pasted[:, :, top:bottom, left:right] = pixels[order][:, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / side**2, order


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    raise SystemExit(main())
