"""A training loop of your own: any model, any loss, the views and targets of a cache. One process, or many by torchrun.

python examples/plain_loop.py caches/mine
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

import cskd


def main(cache: str | Path, epochs: int = 2, batch: int = 8, workers: int = 0) -> list[float]:
    """Train a small ViT; returns the loss of every step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = cskd.ReplayDataset(cache, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    plan = cskd.PlanSampler(dataset, global_batch=batch)
    loader = DataLoader(dataset, plan.batch_size, sampler=plan, num_workers=workers, persistent_workers=workers > 0)
    size, classes = dataset.recipe.size, len(dataset.classes)
    vit: Any = VisionTransformer(size, 8, num_classes=classes, embed_dim=48, depth=2, num_heads=3).to(device)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        plan.set_epoch(epoch)  # other views, another order
        blend = cskd.blend_schedule(epoch, epochs, "linear")
        for views in loader:
            views = views.to(device)
            tokens = vit.forward_features(views.images)
            cells = F.adaptive_avg_pool2d(patch_map(vit.head(tokens[:, 1:])), dataset.grid)
            label_loss = F.cross_entropy(vit.forward_head(tokens), views.soft_labels(smoothing=0.1))
            loss = label_loss + F.cross_entropy(cells, views.targets.at(blend))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: mean loss {sum(losses[-len(loader) :]) / len(loader):.3f} over {len(loader)} steps")
    return losses


def patch_map(logits_BNK: torch.Tensor) -> torch.Tensor:
    """Logits of the patches as a map [B, K, side, side]."""
    B, N, K = logits_BNK.shape
    return logits_BNK.transpose(1, 2).reshape(B, K, round(N**0.5), -1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], workers=2)
