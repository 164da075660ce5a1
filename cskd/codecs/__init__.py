"""Codecs: teacher outputs as arrays a store can hold. Importing this imports no torch."""

from __future__ import annotations

import re

from cskd.codecs.base import Arrays, Codec, Outputs
from cskd.errors import CodecError
from cskd.near import did_you_mean

__all__ = ["Arrays", "Codec", "Outputs", "get_codec"]


def get_codec(name: str, classes: int, grid: tuple[int, int]) -> Codec:
    """The codec a config names: 'envelope', 'int8', 'topk:K' (K classes per cell), 'global:BITS', 'global:topK'.

    The name that a codec has in a cache is without the colon, and is known, too.

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
    hint = did_you_mean(
        name, ("envelope", "int8", "topk:10", "global:8", "global:top10", "features:8", "features:pca384")
    )
    raise CodecError(
        f"unknown codec {name!r}; {hint and f'{hint} '}the known ones are envelope, int8 and topk:10 (any number of "
        "classes), of the image alone global:8 (2 to 16 bits) and global:top10, of the features features:8 and features:pca384"
    )
