"""Are views made by torch operations, in batches, those of the CPU's path, and what do they cost?

    python -m benchmarks.device_views [--device cuda] [--views 5000] [--batch 256] [--mixed]

Decodes the images of the ImageNet sample ($CSKD_DATA, else `shared` beside the checkout), makes views of them by DeiT's
full recipe both ways, and compares the digest of each; with --mixed the mixed pixels, too. Times are of one CPU thread
for the CPU's path (`apply`, `pixel_crc`) and the plan, and of the device for the rest; the first batch is not counted.
On the CPU the second way is slow: it multiplies by matrices that are mostly zeros. 5,000 views take minutes there.

Of one batch, three views of each image, it counts what does not depend on the machine: launches, the bytes that they read
and write, and the arithmetic of their matrix products.

Prints the machine, a table, and one JSON line last. Exits 1 when a view differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cskd.config import RecipeConfig
from cskd.dataset.images import decode
from cskd.seeds import mix64
from cskd.views.digest import pixel_crc, view_digest
from cskd.views.mix_pixels import _mix_batch, mix_pixels
from cskd.views.mixing import pair_params
from cskd.views.on_device import make_views, pixel_crcs, plan_views
from cskd.views.ops import apply
from cskd.views.recipe import describe, sample_params

ROOT = Path(__file__).resolve().parent.parent
DEIT = RecipeConfig(size=224, randaugment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0)
Image = NDArray[np.uint8]


class Clock:
    """Seconds by name, of wall or CPU time; waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self.seconds[name] += self._now() - begun

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Work(TorchDispatchMode):
    """Counts launches and the bytes that they read and write, as if none stayed in a cache."""

    NAMING = frozenset(
        [
            "view",
            "_unsafe_view",
            "expand",
            "permute",
            "transpose",
            "unbind",
            "split",
            "split_with_sizes",
            "slice",
            "select",
            "unsqueeze",
            "alias",
            "empty",
            "detach",
            "lift_fresh",
            "as_strided",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func._schema.name.split("::")[1]
        if name not in self.NAMING:
            self.launches += 1
            self.bytes += sum(map(_bytes, self._touched(name, args, out)))
        return out

    @staticmethod
    def _touched(name: str, args: Any, out: Any) -> list[Any]:
        """Tensors that are read or written, one that is both twice; of a part that is moved, the part."""
        if name in ("index_select", "gather"):
            return [args[2], out, out]
        if name in ("index_copy_", "scatter_add_"):
            return [args[-2], args[-1], args[-1], *([args[-1]] * (name == "scatter_add_"))]
        return tree_leaves((args, out))


def _bytes(x: Any) -> int:
    """Of a tensor's memory, an expanded one's once; 0 for anything else."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) if isinstance(x, torch.Tensor) else 0


def sample_images(limit: int) -> list[Image]:
    """Decoded images of the sample."""
    path = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared")) / "data" / "imagenet-sample.tar"
    if not path.is_file():
        raise SystemExit(f"benchmarks/device_views.py: no {path}; set CSKD_DATA to the folder with data/ in it")
    images: list[Image] = []
    with tarfile.open(path) as tar:
        for member in tar:
            if len(images) < limit and member.name.lower().endswith((".jpeg", ".jpg")):
                file = tar.extractfile(member)
                assert file is not None
                images.append(decode(file.read()))
    return images


def compare(images: list[Image], views: int, batch: int, device: torch.device, mixed: bool) -> dict[str, Any]:
    """Both ways, batch by batch. The seed of a view is a hash of its number."""
    clock, used, different, operations = Clock(device), Counter[str](), [], Counter[str]()
    counted = 0
    for first in range(0, views, batch):
        numbers = range(first, min(first + batch, views))
        own = [images[n % len(images)] for n in numbers]
        seeds = [mix64(n) for n in numbers]
        params = [
            sample_params(seed, image.shape[0], image.shape[1], DEIT) for seed, image in zip(seeds, own, strict=True)
        ]
        operations.update(op.name for p in params for op in p.ops)
        operations.update("erase" for p in params for _ in p.erasures)
        begun = time.process_time()
        expected = [apply(image, p) for image, p in zip(own, params, strict=True)]
        middle = time.process_time()
        crcs = [pixel_crc(view) for view in expected]
        spent = {"apply": middle - begun, "pixel_crc": time.process_time() - middle}
        begun = time.process_time()
        plan = plan_views(params, [image.shape[:2] for image in own])
        spent["plan"] = time.process_time() - begun
        clock.seconds.clear()
        with clock.of("upload"):
            pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in own])).to(device)
            plan = plan.to(device)
        with clock.of("make_views"):
            made = make_views(pixels, plan)
        with clock.of("pixel_crcs"):
            found = pixel_crcs(made)
        if first or views <= batch:  # the first batch warms up
            used.update(spent)
            used.update(clock.seconds)
            counted += len(numbers)
        for n, p, *digests in zip(numbers, params, *_digests(seeds, crcs, found.tolist()), strict=True):
            if digests[0] != digests[1]:
                different.append(f"view {n}: {describe(p)}")
        if mixed:
            different += _mixed_differences(made, expected, seeds, first)
        print(f"{numbers.stop} views, {len(different)} differ", file=sys.stderr, flush=True)
    costs = {f"{name}_us": round(1e6 * seconds / counted, 1) for name, seconds in used.items()}
    return {
        "views": views,
        "different": len(different),
        "which": different[:5],
        **costs,
        "operations": dict(operations),
    }


def work(images: list[Image], batch: int) -> dict[str, float]:
    """What a batch takes, digests included, three views of each image."""
    own = [images[n // 3 % len(images)] for n in range(batch)]
    params = [sample_params(mix64(n), image.shape[0], image.shape[1], DEIT) for n, image in enumerate(own)]
    plan = plan_views(params, [image.shape[:2] for image in own])
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in own]))
    with FlopCounterMode(display=False) as flops, Work() as moved:
        views = make_views(pixels, plan)
        pixel_crcs(views)
    pairs, box = torch.arange(batch).flip(0), torch.tensor([[50, 150, 50, 150]]).expand(batch, 4)
    with Work() as mixed:
        _mix_batch(views, pairs, torch.arange(batch).remainder(3).to(torch.uint8), torch.full((batch,), 40000), box)
    return {
        "launches": moved.launches,
        "moved_mb": round(moved.bytes / batch / 1e6, 2),
        "mixing_mb": round(mixed.bytes / batch / 1e6, 2),
        "gflop": round(flops.get_total_flops() / batch / 1e9, 3),
    }


def _digests(seeds: list[int], *crcs: list[int]) -> list[list[int]]:
    """Digests of views that neighbours in the batch are mixed by, for each list of crcs."""
    fields = [pair_params(seed, seeds[min(i ^ 1, len(seeds) - 1)], DEIT) for i, seed in enumerate(seeds)]
    return [[view_digest(crc, *f, seed) for crc, f, seed in zip(c, fields, seeds, strict=True)] for c in crcs]


def _mixed_differences(made: torch.Tensor, expected: list[Image], seeds: list[int], first: int) -> list[str]:
    mates = [min(i ^ 1, len(seeds) - 1) for i in range(len(seeds))]
    mode, lam, box = zip(
        *(pair_params(seed, seeds[m], DEIT) for seed, m in zip(seeds, mates, strict=True)), strict=True
    )
    fields = [torch.tensor(mates), torch.tensor(mode, dtype=torch.uint8), torch.tensor(lam), torch.tensor(box)]
    there = mix_pixels(made, *(field.to(made.device) for field in fields)).cpu()
    here = mix_pixels(torch.from_numpy(np.stack(expected)), *fields)
    return [f"mixed view {first + i}" for i in range(len(seeds)) if not torch.equal(there[i], here[i])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--views", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--mixed", action="store_true", help="compare mixed pixels, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, Pillow {PIL.__version__}; {name}")
    images = sample_images(args.views)
    found = work(images, args.batch)
    print(
        "{launches} launches a batch; {moved_mb} MB and {gflop} GFLOP a view, mixing {mixing_mb} MB".format(**found),
        flush=True,
    )
    found |= compare(images, args.views, args.batch, device, args.mixed) | {"device": name, "batch": args.batch}
    print("".join(f"{key:<14}{value:>10} us a view\n" for key, value in found.items() if key.endswith("_us")))
    print(f"{found['different']} of {found['views']} views differ")
    print(json.dumps(found))
    return int(found["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
