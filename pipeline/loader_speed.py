"""How many cores a GPU needs: what it takes of images for a student, against the views that a core makes."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from cskd.config import RecipeConfig, StudentConfig
from cskd.dataset.images import decode
from cskd.machine.arithmetic import autocast
from cskd.method.losses import output_tensors
from cskd.packing.payloads import Remake, encoded_again
from cskd.seeds import mix64_array
from cskd.student import build_student
from cskd.views.digest import pixel_crc
from cskd.views.ops import apply
from cskd.views.recipe import sample_params

PHOTO = (375, 500)  # height, width, pixels: the middle of ImageNet's
CLASSES = 1000
WARM = 3  # steps that are not counted: the first ones choose kernels and allocate


def views_per_second(
    recipe: RecipeConfig, seconds: float, images: Sequence[bytes] = (), repeats: int = 1, augment: bool = True
) -> float:
    """Views that this thread makes as a loader worker: `repeats` of each image that it decodes, augmented and checked.

    images: encoded; none: of ImageNet's size. augment: false where the device makes the views, and a worker decodes alone.
    """
    encoded = itertools.cycle(images or [photo()])
    seeds = mix64_array(np.arange(1 << 12, dtype=np.uint64)).tolist()
    done, clock = 0, time.perf_counter()
    while time.perf_counter() - clock < seconds or not done:
        image = decode(next(encoded))
        height, width = image.shape[:2]
        for _ in range(repeats):
            if augment:
                pixel_crc(apply(image, sample_params(seeds[done % len(seeds)], height, width, recipe)))
            done += 1
    return done / (time.perf_counter() - clock)


def packed_raw(images: Sequence[bytes], short_side: int) -> list[bytes]:
    """Encoded images as `cskd pack --raw --short-side` would store them."""
    return [encoded_again(image, Remake(short_side, raw=True)).data for image in images or [photo()]]


def images_per_second(
    config: StudentConfig, size: int, batch: int, setting: str, device: torch.device, seconds: float
) -> float:
    """Images of training steps of a student with fresh weights on the device, without the optimiser. setting: `train.autocast`."""
    student = build_student(config, CLASSES, size).to(device).train()
    x_BCHW = torch.zeros(batch, 3, size, size, device=device)

    def step() -> None:
        with autocast(setting, device):
            out = student(x_BCHW, (1, 1))
        torch.stack([logits.square().mean() for logits in output_tensors(out)]).sum().backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(WARM):
        step()
    done, clock = 0, time.perf_counter()
    while time.perf_counter() - clock < seconds or not done:
        step()
        done += 1
    return done * batch / (time.perf_counter() - clock)


def photo(height: int = PHOTO[0], width: int = PHOTO[1], number: int = 0) -> bytes:
    """A JPEG with edges and noise, of about as many bytes as ImageNet's have; each number has another pattern."""
    y, x = np.mgrid[:height, :width] + 7 * number
    waves = 127 + 60 * np.sin(x / (23 + number % 11)) * np.cos(y / 17) + 40 * ((x // 50 + y // 50) % 2)
    noise = (mix64_array(np.arange(height * width * 3, dtype=np.uint64)) % 25).reshape(height, width, 3)
    pixels = np.clip(waves[:, :, None] + noise.astype(float) - 12, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()
