"""What the loss reads: targets of a batch out of the cache, or from the teacher itself, by the same rule.

Shapes: B batch, K classes, h w teacher grid (7 7).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cskd.codecs import Codec
from cskd.codecs.features import FeaturesBitsCodec, FeaturesCodec
from cskd.codecs.stages import StageCodec
from cskd.config import LossConfig
from cskd.config.schema import Decay, LossTerm
from cskd.errors import ConfigError, TeacherError
from cskd.loading.epoch_table import prefixed
from cskd.loading.joined import JoinedCaches
from cskd.loading.sources import Batch, TargetSpec
from cskd.machine.arithmetic import full_precision
from cskd.method.ckf import blend_at, hard_targets
from cskd.method.features import MapShape
from cskd.method.losses import AnyTargets, BothTargets, FeatureTargets, HardTargets, MixedLabels, OfOne, SoftTargets
from cskd.method.terms import expanded, needs
from cskd.store.cache import Cache
from cskd.teacher.model import Teacher
from cskd.views.mix_pixels import mixed_pixels


def codec_for(loss: LossConfig, codecs: Mapping[str, Codec], where: str, cache: str = "") -> tuple[str, str]:
    """The codecs that a loss reads classes and logits from: those that are exact for it where there are any, and hold no more
    than it asks for. Where it reads features, the codec of these gives logits, too. cache: the name of theirs.

    Returns: (for classes, for logits and features); the second is '' where neither is read, the first may be any where no classes
             are.
    Raises:  ConfigError when soft terms find hard targets only, terms of cells the image's targets only, or terms of features
             no codec of them; `where` names what holds the codecs.
    """
    codecs = {name: codec for name, codec in codecs.items() if codec.has_classes or codec.reads_features}
    hard = _fitting(loss, codecs, where, cache, soft=False)
    if needs(loss, cache).features:
        of_features = _of_features(loss, codecs, where, cache)
        if needs(loss, cache).soft and not codecs[of_features].soft:
            raise ConfigError(
                f"loss.terms: the teacher of {where} has no logits of cells (teacher.dense: none), and features and logits of one "
                "cache are read together; take the logits from another one, or terms of classes: kind: ce"
            )
        return hard, of_features
    if not needs(loss, cache).soft:
        return hard, ""
    if not any(codec.soft for codec in codecs.values()):
        more = "int8" if reads_cells(loss, soft=True, cache=cache) else "global:8"
        who, other = _asking(loss, cache, lambda term: term.kind != "ce")
        raise ConfigError(
            f"{who} needs the teacher's logits and {where} holds only {list(codecs)}; cache with cache.codecs: [envelope, {more}], or "
            f"use {other or 'kind: ce'}"
        )
    return hard, _fitting(loss, {name: codec for name, codec in codecs.items() if codec.soft}, where, cache, soft=True)


def stage_codecs(loss: LossConfig, codecs: Mapping[str, Codec], where: str, cache: str = "") -> dict[str, str]:
    """The codec that each stage which a loss reads comes from, of several the one that keeps most. ConfigError where there is none."""
    chosen: dict[str, str] = {}
    asked = needs(loss, cache)
    for stage in [stage for stage in asked.stages if stage not in asked.live]:
        found = {n: c for n, c in codecs.items() if isinstance(c, StageCodec) and c.stage == stage}
        if not found:
            title = next(t.title for t in loss.terms if t.stage == stage and t.cache == cache)
            there = [f"{c.stage!r}" for c in codecs.values() if isinstance(c, StageCodec)]
            raise ConfigError(
                f"loss.terms: {title} needs the teacher's stage {stage!r} and {where} holds {', '.join(there) or 'no stage'}; cache with "
                f"cache.codecs: [envelope, 'stage:{stage}:8'], or :pca64, which is smaller"
            )
        chosen[stage] = max(found, key=lambda name: found[name].keeps)
    return chosen


def _asking(loss: LossConfig, cache: str, which: Callable[[LossTerm], bool]) -> tuple[str, str]:
    """Who asks for targets of a cache, in words: the method, or a term of the list; and what else the method could be, '' of a term."""
    own = [
        term for term in loss.terms if not term.own and term.cache == cache and term.target != "label" and which(term)
    ]
    by_method = loss.method not in ("none", "terms") and not cache
    if by_method or not own:
        return f"loss.method {loss.method}", "a '-hard' method"
    return f"loss.terms: {own[0].title}", ""


def _of_features(loss: LossConfig, codecs: Mapping[str, Codec], where: str, cache: str) -> str:
    """The codec whose feature maps are nearest to the teacher's. ConfigError where there is none."""
    found = {name: codec for name, codec in codecs.items() if isinstance(codec, FeaturesCodec)}
    if not found:
        term = next(term for term in loss.terms if term.of_features and term.cache == cache)
        raise ConfigError(
            f"loss.terms: {term.title} needs the teacher's features and {where} holds only {list(codecs)}; cache with "
            "cache.codecs: [envelope, features:8]"
        )
    return max(
        found, key=lambda name: getattr(found[name], "bits", 0) if isinstance(found[name], FeaturesBitsCodec) else 0
    )


def reads_cells(loss: LossConfig, soft: bool, cache: str = "") -> bool:
    """Whether a loss asks a cache for classes, or logits, that differ from cell to cell."""
    return any(
        term.target == "cells" and (term.kind != "ce") == soft and (term.decay or loss.decay) != "global"
        for term in expanded(loss)
        if not term.own and term.cache == cache
    )


def _fitting(loss: LossConfig, codecs: Mapping[str, Codec], where: str, cache: str, soft: bool) -> str:
    cells = reads_cells(loss, soft, cache)
    if needs(loss, cache).hard != "none" and not soft:
        known = {name: codec for name, codec in codecs.items() if codec.has_classes}
        if not known:
            raise ConfigError(
                f"loss.method {loss.method} reads the teacher's classes and {where} holds only {list(codecs)} of a teacher without a "
                "classifier; set loss.method: terms with terms of its features (docs/TRAINING.md)"
            )
        codecs = known
    if cells and not any(codec.cells for codec in codecs.values()):
        who, by_method = _asking(loss, cache, lambda term: term.target == "cells" and (term.kind != "ce") == soft)
        other = "loss.method: deit-soft, deit-hard, or loss.decay: global" if by_method else "its decay: global"
        raise ConfigError(
            f"{who} teaches cells and {where} holds {list(codecs)}, of which none has more than the image's targets alone; cache with "
            f"cache.codecs: [{'int8' if soft else 'envelope'}], or set {other}"
        )
    return min(codecs, key=lambda name: (codecs[name].cells != cells, not soft and not codecs[name].exact_hard))


def refuse_unnamed(loss: LossConfig, caches: Collection[str]) -> None:
    """ConfigError for a term that reads a cache which train.caches does not name."""
    for i, term in enumerate(loss.terms):
        if term.cache and term.cache not in caches:
            known = ", ".join(name for name in caches if name) or "none"
            raise ConfigError(
                f"loss.terms[{i}].cache is {term.cache!r}, expected a name in train.caches, which has {known}; add it there"
            )
    read = {term.cache for term in loss.terms}
    if unread := [name for name in caches if name and name not in read]:
        raise ConfigError(
            f"train.caches.{unread[0]} is read by no term of the loss; leave it out, or read it: loss.terms: [{{head: class, target: "
            f"global, kind: kl, cache: {unread[0]}}}]"
        )


def refuse_other_cells(loss: LossConfig, grids: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
    """ConfigError for a term of cells that are not those of the first. grids: of each cache by name, what it is and its grid."""
    first, expected = grids[""]
    for term in loss.terms:
        where, found = grids[term.cache]
        if term.target == "cells" and found != expected:
            raise ConfigError(
                f"loss.terms: {term.title} reads cells of {where}, {found}, and those of {first} are {expected}; make both with one "
                "teacher.grid"
            )


class _Targets:
    """What a loss needs of one teacher, epoch by epoch."""

    def __init__(self, config: LossConfig, epochs: int, cache: str = "") -> None:
        self._config, self._epochs, self.needs = config, epochs, needs(config, cache)

    def blend(self, epoch: int, decay: Decay | None = None) -> int:
        return blend_at(epoch, self._epochs, decay or self._config.decay)

    def blends(self, epoch: int, decays: tuple[Decay, ...]) -> dict[str, int]:
        return {decay: self.blend(epoch, decay) for decay in decays}

    def soft(self, global_BK: Tensor, dense_BKhw: Tensor, epoch: int) -> SoftTargets:
        return SoftTargets(global_BK, dense_BKhw, self.blend(epoch), self.blends(epoch, self.needs.soft_decays))


class _OfCache(_Targets):
    """Those of one of the caches."""

    def __init__(self, name: str, cache: Cache, config: LossConfig, epochs: int) -> None:
        super().__init__(config, epochs, name)
        self._name, self._codecs = name, cache.codecs
        self.codec, self.soft_codec = codec_for(config, cache.codecs, cache.location, name)
        self.stages = stage_codecs(config, cache.codecs, cache.location, name)

    @property
    def maps(self) -> dict[str, MapShape]:
        """Of the maps that are read, by `map_name` of a term."""
        found, codec = dict[str, MapShape](), self._codecs.get(self.soft_codec)
        if self.needs.features and isinstance(codec, FeaturesCodec):
            found[self._name] = MapShape(codec.channels, codec.grid)
        for stage, codec_name in self.stages.items():
            of = self._codecs[codec_name]
            assert isinstance(of, StageCodec)
            found[f"{self._name}:{stage}"] = MapShape(of.channels, of.map_grid)
        return found

    def spec(self, epoch: int) -> TargetSpec:
        hard, soft, *maps = (
            f"{self._name}/{c}" if self._name and c else c for c in (self.codec, self.soft_codec, *self.stages.values())
        )
        if self.needs.hard == "none" and soft:
            return TargetSpec("soft", soft, self.blend(epoch), maps=tuple(maps))
        blends = tuple(self.blends(epoch, self.needs.decays).items())
        return TargetSpec(self.needs.hard, hard, self.blend(epoch), soft, blends, tuple(maps))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> OfOne:
        def moved(name: str) -> Tensor | None:
            column = batch.get(prefixed(self._name, name))
            return None if column is None else column.to(device, non_blocking=True)

        hard = soft = None
        if self.needs.hard != "none":
            more = {
                str(decay): cells for decay in self.needs.decays if (cells := moved(f"cell_class.{decay}")) is not None
            }
            image = moved("global_class")
            assert image is not None
            hard = HardTargets(image, moved("cell_class"), more)
        features = None

        def stored_of(what: str) -> dict[str, Tensor]:
            prefix = prefixed(self._name, f"{what}.")
            return {
                name.removeprefix(prefix): t.to(device, non_blocking=True)
                for name, t in batch.items()
                if name.startswith(prefix)
            }

        with full_precision(device):  # their codecs state an error that TF32 would exceed
            if self.needs.soft or self.needs.features:
                stored = stored_of("target")
                codec = self._codecs[self.soft_codec]
                if isinstance(codec, FeaturesCodec) and self.needs.features:
                    features = codec.features_torch(stored)
                if self.needs.soft:
                    if codec.cells:
                        dense_BKhw, global_BK = codec.logits_torch(stored)
                    else:
                        global_BK = codec.global_logits_torch(stored)
                        dense_BKhw = global_BK[:, :, None, None].expand(-1, -1, *codec.grid)
                    soft = self.soft(global_BK, dense_BKhw, epoch)
            stages = dict[str, Tensor]()
            for stage, name in self.stages.items():
                of = self._codecs[name]
                assert isinstance(of, StageCodec)
                stages[stage] = of.map_torch(stored_of(f"map.{name}"))
        return _joined(hard, soft, features, stages)


class CachedTargets:
    """Targets of a loss from a cache, or from several that are joined. Raises ConfigError when one holds no codec that the loss can
    read, when a term names a cache that is not there, and when its cells are not those of the first."""

    def __init__(
        self, cache: Cache | JoinedCaches, config: LossConfig, epochs: int, live: Teacher | None = None
    ) -> None:
        """live: the teacher of the first cache, of which the first layers run for the terms that are live."""
        caches = {"": cache} if isinstance(cache, Cache) else {"": cache.first, **cache.others}
        refuse_unnamed(config, caches)
        refuse_other_cells(config, {name: (one.location, one.grid) for name, one in caches.items()})
        self._of = {name: _OfCache(name, one, config, epochs) for name, one in caches.items()}
        self.maps = {name: shape for of in self._of.values() for name, shape in of.maps.items()}
        self._live, self._stages, self.runs_teacher = live, needs(config).live if live else (), live is not None
        if live is not None:
            self.maps |= {f":{stage}": MapShape(*live.stages.shape(stage)) for stage in self._stages}

    def spec(self, epoch: int) -> TargetSpec:
        others = tuple((name, of.spec(epoch)) for name, of in self._of.items() if name)
        return replace(self._of[""].spec(epoch), others=others)

    def of(self, batch: Batch, epoch: int, device: torch.device) -> AnyTargets:
        found = {name: of.of(batch, epoch, device) for name, of in self._of.items()}
        if self._live is not None:
            maps = self._live.stages_of(mixed_pixels(batch, device), self._stages)
            _refuse_odd(maps)
            found[""] = _with_stages(found[""], maps)
        return found if len(found) > 1 else found[""]


class LiveTargets(_Targets):
    """Targets of a loss from the teacher, run on the very images the student sees, in batches of the size stage 1 uses. cache: its
    name in `train.caches`, where it is not the first."""

    runs_teacher = True

    def __init__(self, teacher: Teacher, config: LossConfig, epochs: int, cache: str = "") -> None:
        super().__init__(config, epochs, cache)
        self._teacher = teacher
        if not teacher.has_cells and any(reads_cells(config, soft, cache) for soft in (False, True)):
            raise ConfigError(
                f"loss.method {config.method} teaches cells, and with teacher.dense: none they have no logits; take terms of the image or "
                "of features"
            )
        if not teacher.has_classes and (self.needs.soft or self.needs.hard != "none"):
            raise ConfigError(
                f"loss.method {config.method} reads the teacher's classes, and it has no classifier; take terms of its features"
            )
        self.maps: dict[str, MapShape] = {}
        if self.needs.features:
            self.maps[cache] = MapShape(teacher.feature_channels("loss.terms of features"), teacher.grid)
        for stage in self.needs.stages:
            self.maps[f"{cache}:{stage}"] = MapShape(*teacher.stages.shape(stage))

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec("none", "", self.blend(epoch))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> OfOne:
        if self.needs.nothing:
            return None
        dense_BKhw, global_BK, _, maps, stages = self._teacher.outputs_of(
            mixed_pixels(batch, device), self.needs.stages
        )
        features_BChw = maps if self.needs.features else None
        if not bool(dense_BKhw.isfinite().all() & global_BK.isfinite().all()):  # codecs refuse the same in stage 1
            raise TeacherError("the teacher's logits hold NaN or an infinity; check its weights and teacher.precision")
        _refuse_odd(stages)
        hard = None
        if self.needs.hard != "none":
            global_class = hard_targets(global_BK[:, :, None, None], global_BK, 0)[:, 0, 0]
            of_cells = self.needs.hard == "cells"
            cells = hard_targets(dense_BKhw, global_BK, self.blend(epoch)) if of_cells else None
            blends = self.blends(epoch, self.needs.decays)
            more = {decay: hard_targets(dense_BKhw, global_BK, blend) for decay, blend in blends.items()}
            hard = HardTargets(global_class, cells, more)
        soft = self.soft(global_BK, dense_BKhw, epoch) if self.needs.soft else None
        return _joined(hard, soft, features_BChw, stages)


class LiveTeachers:
    """Targets of a loss from several teachers that run live. Raises ConfigError as `CachedTargets`."""

    runs_teacher = True

    def __init__(self, teachers: Mapping[str, Teacher], config: LossConfig, epochs: int) -> None:
        """teachers: by name in `train.caches`, '' the first."""
        refuse_unnamed(config, teachers)
        grids = {name: (f"the teacher {name or 'of the config'}", of.grid) for name, of in teachers.items()}
        refuse_other_cells(config, grids)
        self._of = {name: LiveTargets(teacher, config, epochs, name) for name, teacher in teachers.items()}
        self.maps = {name: shape for of in self._of.values() for name, shape in of.maps.items()}

    def spec(self, epoch: int) -> TargetSpec:
        return self._of[""].spec(epoch)

    def of(self, batch: Batch, epoch: int, device: torch.device) -> AnyTargets:
        return {name: of.of(batch, epoch, device) for name, of in self._of.items()}


def _joined(
    hard: HardTargets | None, soft: SoftTargets | None, features: Tensor | None, stages: Mapping[str, Tensor]
) -> OfOne:
    logits = BothTargets(hard, soft) if hard is not None and soft is not None else hard or soft
    return logits if features is None and not stages else FeatureTargets(features, logits, stages)


def _refuse_odd(maps: Mapping[str, Tensor]) -> None:
    """TeacherError where a map holds what is no number, which the codecs of stages refuse in stage 1."""
    if odd := [name for name, x in maps.items() if not bool(x.isfinite().all())]:
        raise TeacherError(
            f"the teacher's map of stage {odd[0]} holds NaN or an infinity; check its weights and teacher.precision"
        )


def _with_stages(targets: OfOne, maps: dict[str, Tensor]) -> OfOne:
    if isinstance(targets, FeatureTargets):
        return replace(targets, stages={**targets.stages, **maps})
    return FeatureTargets(None, targets, maps)


class NoTargets:
    """Of a run that is taught nothing but labels: neither cache nor teacher is asked."""

    runs_teacher, maps = False, dict[str, MapShape]()

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec("none", "", 0)

    def of(self, batch: Batch, epoch: int, device: torch.device) -> None:
        return None


def mixed_labels(batch: Batch, device: torch.device) -> MixedLabels:
    """Labels of the mixed images of a batch, on the device."""
    return MixedLabels(*(batch[name].to(device, non_blocking=True) for name in ("label", "partner_label", "share")))
