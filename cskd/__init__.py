"""Cumulative Spatial Knowledge Distillation (arXiv 2307.08500) from a teacher cache that is computed once.

The names in `__all__` are the public interface, docs/LIBRARY.md shows them at work. Each is loaded when it is first used:
`import cskd` itself loads neither torch nor anything else of the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cskd.codecs.base import Arrays as Arrays
    from cskd.codecs.base import Codec as Codec
    from cskd.codecs.base import Field as Field
    from cskd.config import LossConfig as LossConfig
    from cskd.errors import CskdError as CskdError
    from cskd.library import CacheReport as CacheReport
    from cskd.library import Inspection as Inspection
    from cskd.library import TrainReport as TrainReport
    from cskd.library import cache_teacher as cache_teacher
    from cskd.library import inspect as inspect
    from cskd.library import train as train
    from cskd.loading.replay_batch import ReplayBatch as ReplayBatch
    from cskd.loading.replay_batch import ReplaySample as ReplaySample
    from cskd.loading.replay_batch import SampleParameters as SampleParameters
    from cskd.loading.replay_batch import Targets as Targets
    from cskd.loading.replay_batch import collate as collate
    from cskd.loading.replay_dataset import PlanSampler as PlanSampler
    from cskd.loading.replay_dataset import ReplayDataset as ReplayDataset
    from cskd.method.ckf import blend_schedule as blend_schedule
    from cskd.method.losses import DistillationLoss as DistillationLoss
    from cskd.method.losses import HardTargets as HardTargets
    from cskd.method.losses import MixedLabels as MixedLabels
    from cskd.method.losses import SoftTargets as SoftTargets
    from cskd.method.losses import StudentOutput as StudentOutput

__version__ = "0.1.0"

_HOME = {
    "Arrays": "cskd.codecs.base",
    "CacheReport": "cskd.library",
    "Codec": "cskd.codecs.base",
    "CskdError": "cskd.errors",
    "DistillationLoss": "cskd.method.losses",
    "Field": "cskd.codecs.base",
    "HardTargets": "cskd.method.losses",
    "Inspection": "cskd.library",
    "LossConfig": "cskd.config",
    "MixedLabels": "cskd.method.losses",
    "PlanSampler": "cskd.loading.replay_dataset",
    "ReplayBatch": "cskd.loading.replay_batch",
    "ReplayDataset": "cskd.loading.replay_dataset",
    "ReplaySample": "cskd.loading.replay_batch",
    "SampleParameters": "cskd.loading.replay_batch",
    "SoftTargets": "cskd.method.losses",
    "StudentOutput": "cskd.method.losses",
    "Targets": "cskd.loading.replay_batch",
    "TrainReport": "cskd.library",
    "blend_schedule": "cskd.method.ckf",
    "cache_teacher": "cskd.library",
    "collate": "cskd.loading.replay_batch",
    "inspect": "cskd.library",
    "train": "cskd.library",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cskd' has no attribute {name!r}; it offers {', '.join(__all__)}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found  # from now on without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
