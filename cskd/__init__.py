"""Cumulative Spatial Knowledge Distillation (arXiv 2307.08500) from a teacher cache that is computed once.

The names in `__all__` are the public interface, docs/LIBRARY.md shows them at work. Each is loaded when it is first used:
`import cskd` itself loads neither torch nor anything else of the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cskd.errors import CskdError as CskdError
    from cskd.loading.replay_batch import ReplayBatch as ReplayBatch
    from cskd.loading.replay_batch import ReplaySample as ReplaySample
    from cskd.loading.replay_batch import SampleParameters as SampleParameters
    from cskd.loading.replay_batch import Targets as Targets
    from cskd.loading.replay_dataset import PlanSampler as PlanSampler
    from cskd.loading.replay_dataset import ReplayDataset as ReplayDataset
    from cskd.method.ckf import blend_schedule as blend_schedule

__version__ = "0.1.0"

_HOME = {
    "CskdError": "cskd.errors",
    "PlanSampler": "cskd.loading.replay_dataset",
    "ReplayBatch": "cskd.loading.replay_batch",
    "ReplayDataset": "cskd.loading.replay_dataset",
    "ReplaySample": "cskd.loading.replay_batch",
    "SampleParameters": "cskd.loading.replay_batch",
    "Targets": "cskd.loading.replay_batch",
    "blend_schedule": "cskd.method.ckf",
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
