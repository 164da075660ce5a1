"""`cskd train`, which also writes down what each rank is fed: a line of [samples, views] a step, in $CSKD_RECORD/rankN."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

import cskd.pipeline.train_step
from cskd import cli
from cskd.views.mix_pixels import InputMaker


class Recorder(InputMaker):
    """Sees each batch where the training loop hands it to the device."""

    def mixed(self, batch: dict[str, Tensor]) -> Tensor:
        with (Path(os.environ["CSKD_RECORD"]) / f"rank{os.environ.get('RANK', 0)}").open("a") as out:
            print(json.dumps([batch["sample"].tolist(), batch["view"].tolist()]), file=out)
        return super().mixed(batch)


if __name__ == "__main__":
    cskd.pipeline.train_step.InputMaker = Recorder  # type: ignore[attr-defined]  # the name that the stage looks up
    cli.main()
