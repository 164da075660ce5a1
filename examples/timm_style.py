"""A cache in a training script of timm's kind: its loader, Mixup and teacher are replaced, everything else stays.

python examples/timm_style.py caches/mine --model vit_tiny_patch16_224
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import cskd

parser = argparse.ArgumentParser(description="Train a ViT on the views of a cache, distilled from its image targets.")
parser.add_argument("cache")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--alpha", type=float, default=0.5, help="share of the teacher's class")
parser.add_argument("--workers", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; returns the mean loss of every epoch."""
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = cskd.ReplayDataset(args.cache).recipe.size
    model: Any = timm.create_model(args.model, img_size=size, **args.model_kwargs).to(device)
    data: Any = timm.data.resolve_data_config({}, model=model)
    dataset = cskd.ReplayDataset(args.cache, mean=data["mean"], std=data["std"])
    model.reset_classifier(len(dataset.classes))
    plan = cskd.PlanSampler(dataset, args.batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset, plan.batch_size, sampler=plan, num_workers=args.workers, pin_memory=device.type == "cuda"
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=0)
    assert scheduler is not None
    ema, losses = ModelEmaV3(model, decay=0.99), []
    for epoch in range(epochs):
        plan.set_epoch(epoch)
        losses.append(train_one_epoch(model, loader, optimizer, args.alpha, device, ema))
        scheduler.step(epoch + 1)
    return losses


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    alpha: float,
    device: torch.device,
    ema: ModelEmaV3,
) -> float:
    """One pass over the loader, whose batches are mixed already; returns the mean loss."""
    label_loss, teacher_loss = SoftTargetCrossEntropy(), nn.CrossEntropyLoss()
    meter = AverageMeter()
    model.train()
    for batch in loader:
        batch = batch.to(device, non_blocking=True)
        output = model(batch.images)
        loss = (1 - alpha) * label_loss(output, batch.soft_labels(smoothing=0.1))
        loss = loss + alpha * teacher_loss(output, batch.targets.image_class)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        meter.update(loss.item(), len(batch))
    return float(meter.avg)


if __name__ == "__main__":
    print(main())
