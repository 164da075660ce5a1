"""A cache in Lightning: the sampler is told the epoch by the Trainer, and targets follow the epoch's blend.

pip install lightning; python examples/lightning_module.py caches/mine
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import cskd


class Distilled(lightning.LightningModule):
    """A plain ViT whose image logits learn from the label, and whose cells learn from the teacher's."""

    def __init__(self, dataset: cskd.ReplayDataset, epochs: int) -> None:
        super().__init__()
        self.grid, self.epochs = dataset.grid, epochs
        self.loss = cskd.DistillationLoss(cskd.LossConfig(method="cskd-hard"))
        self.vit: Any = timm.models.VisionTransformer(
            dataset.recipe.size, 8, num_classes=len(dataset.classes), embed_dim=48, depth=2, num_heads=3
        )

    def training_step(self, batch: cskd.ReplayBatch, batch_idx: int) -> Tensor:
        tokens = self.vit.forward_features(batch.images)
        cells = self.vit.head(tokens[:, 1:]).transpose(1, 2)
        side = round(cells.shape[2] ** 0.5)
        cells = torch.nn.functional.adaptive_avg_pool2d(cells.unflatten(2, (side, side)), self.grid)
        output = cskd.StudentOutput(self.vit.forward_head(tokens), None, cells)
        blend = cskd.blend_schedule(self.current_epoch, self.epochs, "linear")
        loss, terms = self.loss(output, batch.labels, batch.targets.hard(blend))
        self.log_dict({name: float(value) for name, value in terms.items()}, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(cache: str | Path, epochs: int = 2, batch: int = 8, **trainer: Any) -> lightning.Trainer:
    """Train; the Trainer afterwards."""
    dataset = cskd.ReplayDataset(cache, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    plan = cskd.PlanSampler(dataset, batch)
    loader = DataLoader(dataset, plan.batch_size, sampler=plan)
    # The sampler has this rank's share already, of as many ranks as torch.distributed has: see docs/LIBRARY.md.
    run = lightning.Trainer(max_epochs=epochs, use_distributed_sampler=False, **trainer)
    run.fit(Distilled(dataset, epochs), loader)
    return run


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1])
