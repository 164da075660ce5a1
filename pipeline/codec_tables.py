"""The tables of codecs that store the feature map: fitted once, before a cache is begun, on the first views of its first unit."""

from __future__ import annotations

from pathlib import Path

import torch

from cskd.codecs import Arrays, Codec, get_codec, of_map_alone
from cskd.codecs.features import FeaturesCodec
from cskd.errors import CacheError
from cskd.pipeline.measure_precision import first_views
from cskd.store.cache import Cache
from cskd.store.identity import Identity
from cskd.store.tables import read_tables, write_tables
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.model import Teacher
from cskd.views.maker import ViewMaker


def refuse_head(identity: Identity, teacher: Teacher) -> None:
    """TeacherError where a codec stores what this teacher does not give: features of cells that one linear layer classifies,
    unless it has no logits of cells; CodecError for logits that it lacks."""
    for codec in _codecs(identity, teacher):
        if codec.reads_features and teacher.has_cells:
            teacher.classifier(codec.name)


def fit_tables(root: Path, identity: Identity, teacher: Teacher, maker: ViewMaker) -> dict[str, str] | None:
    """Put the tables of a new cache's codecs in place. Returns: their sha256 by codec; None where no codec has any.

    Raises:  as `refuse_head`.
    """
    fitted = _fitted(_codecs(identity, teacher), teacher, maker)
    return {codec.name: write_tables(root, codec.name, tables) for codec, tables in fitted} or None


def _codecs(identity: Identity, teacher: Teacher) -> list[Codec]:
    codecs = [get_codec(name, teacher.classes, teacher.grid) for name in identity.codecs]
    if not teacher.has_cells:
        of_map_alone(codecs, teacher.has_classes)
    return codecs


def refit_lost(cache: Cache, teacher: Teacher, maker: ViewMaker) -> None:
    """Fit tables again that are lost. CacheError where they come out otherwise, as with another library."""
    lost = []
    for name, digest in (cache.manifest.tables or {}).items():
        try:
            read_tables(cache.root, name, digest)
        except CacheError:
            lost.append(cache.codecs[name])
    for codec, tables in _fitted(lost, teacher, maker):
        if write_tables(cache.root, codec.name, tables) != (cache.manifest.tables or {})[codec.name]:
            raise CacheError(
                f"{cache.root}: the tables of codec '{codec.name}' are lost, and fitted again they are others; `cskd repair` "
                "restores them if their second copy is there, else cache into another folder"
            )


def _fitted(codecs: list[Codec], teacher: Teacher, maker: ViewMaker) -> list[tuple[FeaturesCodec, Arrays]]:
    wanted = [codec for codec in codecs if isinstance(codec, FeaturesCodec)]
    if not wanted:
        return []
    classifier = teacher.classifier(wanted[0].name) if teacher.has_cells else None
    views = first_views(maker, max(codec.fitted_on for codec in wanted), 1)
    with threads_of_a_lane(teacher.device, teacher.reentrant):
        maps = [teacher.with_features(part)[2] for part in torch.split(views, teacher.batch)]
    return [(codec, codec.fit(classifier, maps)) for codec in wanted]
