"""`cskd train`, which also writes down what each rank is fed: a line of [samples, views] a step, in $CSKD_RECORD/rankN."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cskd import cli
from cskd.pipeline.train_step import TrainStep

if __name__ == "__main__":
    real: Callable[..., Any] = TrainStep.__call__

    def recorded(self: TrainStep, batch: dict[str, Tensor], *rest: Any) -> Any:
        with (Path(os.environ["CSKD_RECORD"]) / f"rank{os.environ.get('RANK', 0)}").open("a") as out:
            print(json.dumps([batch["sample"].tolist(), batch["view"].tolist()]), file=out)
        return real(self, batch, *rest)

    TrainStep.__call__ = recorded  # type: ignore[method-assign, assignment]
    cli.main()
