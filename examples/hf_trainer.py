"""A cache in the Trainer of Hugging Face: its sampler is the plan, and its loss reads the targets.

pip install transformers accelerate; python examples/hf_trainer.py caches/mine
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import Sampler

import cskd


class Distiller(transformers.Trainer):
    """Trainer with the order of a plan, and the loss of the label and the teacher's cells."""

    def __init__(self, plan: cskd.PlanSampler, **settings: Any) -> None:
        super().__init__(train_dataset=plan.dataset, data_collator=collate, **settings)
        self.plan, self.grid = plan, plan.dataset.grid

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.plan

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch."""
        batch: cskd.ReplayBatch = inputs["batch"]
        hidden = model.vit(inputs["pixel_values"]).last_hidden_state
        cells = model.classifier(hidden[:, 1:]).transpose(1, 2)
        side = round(cells.shape[2] ** 0.5)
        cells = F.adaptive_avg_pool2d(cells.unflatten(2, (side, side)), self.grid)
        blend = cskd.blend_schedule(self.plan.epoch, int(self.args.num_train_epochs), "linear")
        label_loss = F.cross_entropy(model.classifier(hidden[:, 0]), batch.soft_labels(smoothing=0.1))
        return label_loss + F.cross_entropy(cells, batch.targets.at(blend))


def collate(samples: Any) -> dict[str, Any]:
    """A batch as the dict that the Trainer expects."""
    batch = cskd.collate(samples)
    return {"pixel_values": batch.images, "batch": batch}


def main(cache: str | Path, output: str | Path, epochs: int = 2, batch: int = 8, **settings: Any) -> list[float]:
    """Train; returns the logged losses."""
    dataset = cskd.ReplayDataset(cache, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(
        image_size=dataset.recipe.size, patch_size=8, num_labels=len(dataset.classes), **shape
    )
    arguments = transformers.TrainingArguments(
        str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        **settings,
    )
    plan = cskd.PlanSampler(dataset, batch)
    trainer = Distiller(plan, model=transformers.ViTForImageClassification(config), args=arguments)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.manual_seed(0)
    print(f"loss of the last step: {main(sys.argv[1], 'runs/hf')[-1]:.3f}")
