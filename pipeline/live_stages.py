"""A cache's teacher of which only the first layers run, for terms of stages whose maps are too large to be kept."""

from __future__ import annotations

import torch

from cskd.config import LossConfig
from cskd.method.terms import needs
from cskd.pipeline.recorded_teacher import recorded_teacher
from cskd.pipeline.show.progress import Notes
from cskd.store.cache import Cache
from cskd.teacher.model import Teacher


def first_layers(cache: Cache, loss: LossConfig, device: torch.device, notes: Notes) -> Teacher | None:
    """The teacher of a cache, without what comes after the stages of the terms that are live; None where none is.

    Raises:  CacheError where it is not the cache's any more; TeacherError for a stage that it does not have.
    """
    stages = needs(loss).live
    if not stages:
        return None
    teacher = recorded_teacher(cache, device)
    kept, whole = teacher.stages.truncate(stages)
    notes.add(
        [
            f"live: the teacher runs at every step up to {', '.join(stages)}, with {kept:,} of its {whole:,} numbers; nothing else of "
            "it is in memory"
        ]
    )
    return teacher
