"""Training on labels alone, from packed images: method none with no cache and no teacher.

View v of a sample is view v of the cache that `cskd cache-teacher` would make from the same config: same seed, pixels and
mixing, so a baseline differs from a distilled student in what is taught and in nothing else. With `--online` there are
cache.views of them, as for the runs it is compared with; otherwise as many as the run needs, or train.views.
"""

from __future__ import annotations

from cskd.config import Config
from cskd.errors import ConfigError
from cskd.loading.live import LiveViews
from cskd.loading.targets import NoTargets
from cskd.machine.ranks import Ranks
from cskd.pipeline.online import decodable, training_images
from cskd.store.identity import identity_of
from cskd.views.maker import ViewMaker


def open_baseline(config: Config, ranks: Ranks, online: bool, quiet: bool) -> tuple[LiveViews, NoTargets, list[str]]:
    """Views of data.train, no targets, and notes. Finds the images that can't be decoded, once a run.

    Raises: ConfigError for a train.views that train.repeats does not divide, DataError and CacheError as a cache would.
    """
    inventory = training_images(config)
    views = config.train.views or config.cache.views if online else _views(config)
    bad, left_out = decodable(ViewMaker(inventory, config.recipe), config, ranks, quiet)
    # No teacher to name: what is left tells these views from those of other images or another recipe.
    identity = identity_of(inventory, config.recipe, {}, (1, 1), [])
    source = LiveViews(inventory, config.recipe, views, (1, 1), bad, f"none, {identity.fingerprint[:16]}")
    return source, NoTargets(), [_note(config, views), *left_out]


def _views(config: Config) -> int:
    """train.views, or as many as all epochs feed: each run of `repeats` epochs takes `repeats` of them."""
    views, repeats = config.train.views, config.train.repeats
    if views % repeats:
        above = -(-views // repeats) * repeats
        raise ConfigError(
            f"train.views is {views} and train.repeats {repeats}, which must divide it; set train.views={above}, or 0"
        )
    return views or -(-config.train.epochs // repeats) * repeats


def _note(config: Config, views: int) -> str:
    needed = -(-config.train.epochs // config.train.repeats) * config.train.repeats
    again = "none is used twice" if views >= needed else f"each is used up to {-(-needed // views)} times"
    return (
        f"loss.method none: no cache and no teacher; views 0 to {views - 1} are made from data.train by the config's recipe, "
        f"as stage 1 would make them, and {again}"
    )
