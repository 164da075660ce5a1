"""The teacher of a cache, built again from what its manifest records."""

from __future__ import annotations

import torch

from cskd.config import from_dict
from cskd.errors import CacheError
from cskd.store.cache import Cache, first_difference
from cskd.teacher.model import Teacher, load_teacher


def recorded_teacher(cache: Cache, device: torch.device) -> Teacher:
    """On a device, which may be of another kind than stage 1's: there it is the same teacher up to rounding.

    Raises:  TeacherError where it can't be built; CacheError where it is not the cache's, naming the field.
    """
    config = from_dict({"teacher": cache.manifest.config["teacher"]}).teacher
    teacher = load_teacher(config, cache.classes, device, cache.recipe.size)
    here = {"device": teacher.fingerprint.device}
    different = first_difference({**cache.identity.teacher, **here}, {**teacher.fingerprint.facts, **here})
    if different:
        field, old, new = different
        raise CacheError(
            f"{cache.location}: the teacher's {field} was {old!r}, now it is {new!r}; give it back its files and versions"
        )
    return teacher
