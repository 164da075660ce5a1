"""A few images that stand for a data set: copied out of the packed one, or made where none is packed yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import torch

from cskd.config import Config, RecipeConfig, TeacherConfig
from cskd.dataset.inventory import Inventory, Sample, evenly, write_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import TeacherError, one_line
from cskd.files.paths import is_remote
from cskd.pipeline.loader_speed import PHOTO, photo
from cskd.teacher.build import build

IMAGENET = 1_281_167  # images of a data set that nobody has counted yet
VAL_IMAGES = 128  # of data.val, to time an evaluation with
PATTERNS = 64  # different images among those that are made
_VIEW_OF_PHOTO = 224  # pixels of a view that is usual for an image of PHOTO's size

Images = Iterator[tuple[str, int, bytes]]  # key, label, encoded


@dataclass(frozen=True)
class DataFacts:
    """The data sets that are planned for. train, val: None where they are not packed."""

    train: Inventory | None
    val: Inventory | None
    images: int  # of training, packed or not
    classes: list[str]
    notes: list[str]


def is_packed(folder: str) -> bool:
    """Whether there is something at `data.train` or `data.val`; whether it is sound is looked at when it is opened."""
    return bool(folder) and (is_remote(folder) or Path(folder).exists())


def unpacked(config: Config, images: int | None) -> DataFacts:
    """For a config whose images are not packed yet: so many, ImageNet's where nobody says; classes are the teacher's outputs."""
    count, (height, width) = images or IMAGENET, made_size(config.recipe)
    where = f"{config.data.train} is not there" if config.data.train else "data.train is empty"
    counted = "" if images else ", ImageNet's; --images says how many yours are"
    note = f"{where}: measured on made images of {height} x {width} pixels, and counted as {count:,}{counted}"
    also = "the sizes of codecs and the time to decode will differ with real images; evaluations are not counted"
    classes = [f"class {k}" for k in range(outputs_of(config.teacher, config.recipe.size))]
    return DataFacts(None, None, count, classes, [note, also])


def outputs_of(config: TeacherConfig, size: int) -> int:
    """How many logits a teacher gives. Raises TeacherError as `build`, and where it can't take an image of `size` pixels."""
    built = build(config)
    if isinstance(stated := getattr(built.model, "num_classes", None), int):
        return stated
    side = config.input_size or int(built.stated.get("input_size") or size)
    try:
        with torch.no_grad():
            return int(built.model.eval()(torch.zeros(1, 3, side, side)).shape[-1])
    except Exception as e:  # a user's network raises whatever it likes
        raise TeacherError(f"teacher.model {config.model} can't take {side} x {side} pixels: {one_line(e)}") from None


def made_size(recipe: RecipeConfig) -> tuple[int, int]:
    """Height and width of made images: as far above the view as ImageNet's are above 224, for crops that resize."""
    if recipe.crop != "resized":
        return recipe.size, recipe.size
    return max(8, PHOTO[0] * recipe.size // _VIEW_OF_PHOTO), max(8, PHOTO[1] * recipe.size // _VIEW_OF_PHOTO)


def copied(inventory: Inventory, count: int) -> Images:
    """Images spread evenly over a packed data set."""
    reader = ShardReader(inventory)
    for i in evenly(len(inventory), count).tolist():
        yield inventory.key(i), int(inventory.label[i]), reader.read(i)
    reader.close()


def made(recipe: RecipeConfig, classes: int, count: int) -> Images:
    """JPEGs that look like nothing, a few patterns again and again."""
    patterns = [photo(*made_size(recipe), number) for number in range(min(PATTERNS, count))]
    for i in range(count):
        yield f"made{i:06d}", i % classes, patterns[i % len(patterns)]


def write_sample(folder: Path, images: Images, classes: list[str]) -> tuple[Inventory, float]:
    """Shards and an inventory of one block in a new folder. Returns the inventory, and the seconds that reading took."""
    from cskd.store.shard_writer import ShardWriter  # here: webdataset takes seconds to import

    folder.mkdir(parents=True)
    shards, samples, reading = ShardWriter(folder, 1 << 30), [], 0.0
    clock = time.perf_counter()
    try:
        for key, label, data in images:
            reading += time.perf_counter() - clock
            shard, offset = shards.add(key, "jpg", data, label)
            samples.append(Sample(key, label, google_crc32c.value(data), shard, offset, len(data)))
            clock = time.perf_counter()
        files = shards.close()
    finally:
        shards.abandon()
    return write_inventory(folder, samples, classes=classes, shards=files, block=len(samples)), reading
