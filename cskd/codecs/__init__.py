"""Codecs: teacher outputs as arrays a store can hold. Importing this imports no torch."""

from __future__ import annotations

import re

from cskd.codecs.base import Arrays, Codec
from cskd.codecs.own import VARIABLE, known_own, own_codec
from cskd.errors import CodecError, shortened
from cskd.near import did_you_mean

__all__ = ["Arrays", "Codec", "get_codec", "known_own"]


def get_codec(name: str, classes: int, grid: tuple[int, int]) -> Codec:
    """A codec by its name: 'envelope', 'int8', 'topk:K' (or 'topkK', K classes per cell), or that of a user's own.

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
    if (own := own_codec(name, classes, grid)) is not None:
        return own
    hint = did_you_mean(name, ("envelope", "int8", "topk:10"))
    raise CodecError(
        f"unknown codec {shortened(repr(name), 40)}; {hint and f'{hint} '}the known ones are envelope, int8 and topk:10 (any number "
        f"of classes), one of your own is set by {VARIABLE}=path/to/file.py:Class"
    )
