"""The tables of codecs that store the feature map: fitted once, before a cache is begun, on the first views of its first unit."""

from __future__ import annotations

from cskd.codecs import Arrays, Codec, Outputs, get_codec, of_map_alone
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.stages import StageCodec, stages_of
from cskd.codecs.tabled import TabledCodec
from cskd.errors import CacheError
from cskd.pipeline.measure_precision import first_views
from cskd.storage import Place
from cskd.store.cache import Cache
from cskd.store.identity import Identity
from cskd.store.tables import restore_tables, write_tables
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.model import Teacher
from cskd.views.maker import ViewMaker


def refuse_head(identity: Identity, teacher: Teacher) -> None:
    """TeacherError where a codec stores what this teacher does not give: features of cells that one linear layer classifies, unless it
    has no logits of cells, or the map of a stage that it does not have; CodecError for logits that it lacks."""
    codecs = _codecs(identity, teacher)
    for codec in codecs:
        if codec.reads_features and teacher.has_cells:
            teacher.classifier(codec.name)
    teacher.stages.watch(stages_of({codec.name: codec for codec in codecs}))


def fit_tables(root: Place, identity: Identity, teacher: Teacher, maker: ViewMaker) -> dict[str, str] | None:
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
    """Have both copies of all tables: by one another, or fitted again. CacheError where they come out otherwise, as with another library."""
    lost = []
    for name, digest in (cache.manifest.tables or {}).items():
        try:
            restore_tables(cache.storage, name, digest)
        except CacheError:
            lost.append(cache.codecs[name])
    for codec, tables in _fitted(lost, teacher, maker):
        if write_tables(cache.storage, codec.name, tables) != (cache.manifest.tables or {})[codec.name]:
            raise CacheError(
                f"{cache.location}: the tables of codec '{codec.name}' are lost, and fitted again they are others; cache "
                "into another folder"
            )


def _fitted(codecs: list[Codec], teacher: Teacher, maker: ViewMaker) -> list[tuple[TabledCodec, Arrays]]:
    wanted = [codec for codec in codecs if isinstance(codec, TabledCodec)]
    if not wanted:
        return []
    views = first_views(maker, max(codec.fitted_on for codec in wanted), 1)
    of_stages = {codec.stage: codec.fitted_on for codec in wanted if isinstance(codec, StageCodec)}
    found: list[Outputs] = []
    with threads_of_a_lane(teacher.device, teacher.reentrant):
        for at in range(0, len(views), teacher.batch):
            # Maps of early stages are large: only as many are kept as are asked for.
            stages = [stage for stage, count in of_stages.items() if at < count]
            found.append(teacher.outputs_of(views[at : at + teacher.batch], stages)._replace(dense=views[:0]))
    return [(codec, _fit(codec, teacher, found)) for codec in wanted]


def _fit(codec: TabledCodec, teacher: Teacher, outputs: list[Outputs]) -> Arrays:
    if isinstance(codec, StageCodec):
        maps = [one.stages[codec.stage] for one in outputs if codec.stage in one.stages]
        return codec.fit([x[: max(0, codec.fitted_on - i * teacher.batch)] for i, x in enumerate(maps)])
    assert isinstance(codec, FeaturesCodec)
    classifier = teacher.classifier(codec.name) if teacher.has_cells else None
    return codec.fit(classifier, [one.features for one in outputs if one.features is not None])
