"""Codecs: teacher outputs as arrays a store can hold. Importing this imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cskd.codecs.base import Arrays, Codec, Outputs
from cskd.codecs.own import VARIABLE, known_own, own_codec
from cskd.errors import CodecError, shortened
from cskd.near import did_you_mean

__all__ = ["Arrays", "Codec", "Outputs", "get_codec", "known_own", "of_map_alone"]


def of_map_alone(codecs: Iterable[Codec], classified: bool) -> None:
    """Say of some codecs that their teacher has no logits of cells. Raises CodecError for one that stores such, or that stores the
    image's, and there are none either. classified: the teacher has those."""
    from cskd.codecs.features import FeaturesCodec

    for codec in codecs:
        if isinstance(codec, FeaturesCodec):
            codec.of_map_alone(classified)
        elif codec.cells or (codec.soft and not classified):
            what = "logits of cells" if codec.cells else "the image's logits"
            has = "teacher.dense: none gives none" if codec.cells else "the teacher has no classifier"
            raise CodecError(
                f"codec '{codec.name}' stores {what}, and {has}; set cache.codecs: [features:8]"
                + (", or global:8 for a teacher with a classifier" if codec.cells else "")
            )


def get_codec(name: str, classes: int, grid: tuple[int, int]) -> Codec:
    """A codec by its name: 'envelope', 'int8', 'topk:K', 'global:BITS', 'global:topK', 'features:BITS', 'features:pcaR[:BITS]',
    'stage:NAME:BITS', 'stage:NAME:pcaR[:BITS]', or that of a user's own. The name that a codec has in a cache is without the colon, and is known, too.

    Never by a place, since names come out of caches, too: `known_own` gives the name of what a config says.

    Raises:  CodecError for an unknown name, or classes or a grid the codec can't hold.
    """
    if name == "envelope":
        from cskd.codecs.envelope import EnvelopeCodec

        return EnvelopeCodec(classes, grid)
    if name == "int8":
        from cskd.codecs.int8 import Int8Codec

        return Int8Codec(classes, grid)
    if match := re.fullmatch(r"topk:?([1-9]\d*)", name):
        from cskd.codecs.topk import TopkCodec

        return TopkCodec(int(match[1]), classes, grid)
    if match := re.fullmatch(r"global:?(top:?)?([1-9]\d{0,5})", name):
        from cskd.codecs.global_logits import GlobalBitsCodec, GlobalTopkCodec

        return (GlobalTopkCodec if match[1] else GlobalBitsCodec)(int(match[2]), classes, grid)
    if match := re.fullmatch(r"features:?([1-9]\d{0,5})", name):
        from cskd.codecs.features import FeaturesBitsCodec

        return FeaturesBitsCodec(int(match[1]), classes, grid)
    if match := re.fullmatch(r"features:?pca([1-9]\d{0,4})(?:[:b]([1-9]\d?))?", name):
        from cskd.codecs.features_pca import DEFAULT_BITS, FeaturesPcaCodec

        return FeaturesPcaCodec(int(match[1]), int(match[2] or DEFAULT_BITS), classes, grid)
    if name.startswith("stage"):
        from cskd.codecs.stages import stage_codec

        if (stage := stage_codec(name, classes, grid)) is not None:
            return stage
        if name.startswith("stage:"):
            raise CodecError(
                f"codec {shortened(repr(name), 60)}: expected stage:NAME:BITS or stage:NAME:pcaR[:BITS], NAME a module of the teacher, "
                "as in stage:layer2:8 or stage:layer2:pca64"
            )
    if (own := own_codec(name, classes, grid)) is not None:
        return own
    hint = did_you_mean(
        name, ("envelope", "int8", "topk:10", "global:8", "global:top10", "features:8", "features:pca384")
    )
    raise CodecError(
        f"unknown codec {shortened(repr(name), 40)}; {hint and f'{hint} '}the known ones are envelope, int8 and topk:10 (also "
        f"features:8, features:pca384, stage:layer2:8; of the image alone global:8, global:top10); your own: {VARIABLE}=path/to/file.py:Class"
    )
