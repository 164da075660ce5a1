"""Codecs: teacher outputs as arrays a store can hold. Importing this imports no torch."""

from __future__ import annotations

import re

from cskd.codecs.base import Arrays, Codec
from cskd.errors import CodecError
from cskd.near import did_you_mean

__all__ = ["Arrays", "Codec", "get_codec"]


def get_codec(name: str, classes: int, grid: tuple[int, int]) -> Codec:
    """The codec a config names: 'envelope', 'int8', 'topk:K' (or 'topkK', K classes per cell).

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
    hint = did_you_mean(name, ("envelope", "int8", "topk:10"))
    raise CodecError(
        f"unknown codec {name!r}; {hint and f'{hint} '}the known ones are envelope, int8 and topk:10 (any number of classes)"
    )
