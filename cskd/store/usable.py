"""Whether a cache can be trained from: by this version of the program, and as far as it is finished."""

from __future__ import annotations

from cskd.dataset.images import POLICY
from cskd.errors import CacheError, ConfigError
from cskd.store.cache import Cache, first_difference
from cskd.store.format import RESOLVED
from cskd.views.recipe import RECIPE_CODE_VERSION


def refuse_other_code(cache: Cache) -> None:
    """CacheError when this version of the program reads or augments images in another way than stage 1 did."""
    now = {"recipe_code": RECIPE_CODE_VERSION, "images": POLICY}
    difference = first_difference({name: getattr(cache.identity, name) for name in now}, now)
    if difference:
        key, old, new = difference
        raise CacheError(
            f"{cache.location} was made with {key} = {old!r}, this version of cskd has {new!r}: its views would not replay; "
            "train with the version it was made with, or cache again"
        )


def usable_views(cache: Cache, wanted: int) -> int:
    """How many of a cache's first views a run feeds: `train.views`, or all of them.

    Raises:  CacheError while one of them lacks a unit, with the command that makes it; ConfigError past the last view.
    """
    if wanted > cache.views:
        raise ConfigError(f"train.views is {wanted}, {cache.location} has {cache.views}; cache more, or use fewer")
    views = wanted or cache.views
    missing = cache.missing(list(range(views)))
    if missing:
        (block, view), whole = missing[0], cache.blocks * views
        ready = min(v for _, v in missing)
        instead = f", or train on the first {ready} views with --set train.views={ready}" if ready else ""
        raise CacheError(
            f"{cache.location} lacks {len(missing)} of {whole} units, the first is block {block}, view {view}; "
            f"finish it with `cskd cache-teacher {cache.path(RESOLVED)}`{instead}"
        )
    return views


def refuse_no_classes(cache: Cache, cure: str) -> None:
    """CacheError for a cache without targets of classes, where these are wanted. cure: what to do instead."""
    if not any(codec.has_classes for codec in cache.codecs.values()):
        raise CacheError(f"{cache.location} holds features alone, since its teacher has no classifier; {cure}")
