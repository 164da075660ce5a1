"""The on-disk format of a cache, in this one place. Raise FORMAT with every change; golden files keep the old ones readable.

    CACHE/
      manifest.json                     identity (what the cache is of), fingerprint (its hash), versions, checks,
                                        and `sha256`, the hash of all of that
      manifest.copy.json                the same once more, for `cskd repair`
      resolved.yaml                     the config that made it
      sealed.json                       once all units are there: counts, and the hash over their content (cskd/store/seal.py)
      index.jsonl.zst                   all commit records once more, for readers of a sealed cache (see cskd/store/index.py)
      codecs/features8.3b1d….safetensors    what all units of a codec share, and once more as `….copy.safetensors`; its hash is
                                        in the manifest (see cskd/store/tables.py)
      inventory/                        copy of the data set's inventory (see cskd/dataset/inventory.py)
      units/b00012/v0003.envelope.0f3a….zarr.zip
                                        one view of one block, one codec; named by the hash of its bytes; never rewritten
      units/b00012/v0003.envelope.0f3a….tar
                                        the same in the container `webdataset` (see cskd/store/unit_tar.py)
      units/b00012/v0003.draft.5c21….zarr.zip
                                        of a unit that is not whole yet; only while stage 1 runs, or was interrupted
                                        (see cskd/store/draft.py)
      hub.json                          which commits its teacher's addresses on the hub stood for (see cskd/files/hub.py)
      claims/                           who is making what; only while stage 1 runs (see cskd/files/claims.py)
      commits/b00012/v0003.json         the only thing that makes a unit exist (see cskd/store/commit.py)

A unit file is a zipped zarr 3 group, stored (not deflated), members sorted, dates fixed. Rows are the block's samples in
block order without the quarantined ones; R rows, h x w teacher grid:

    key_hash   uint64 [R]      hash of the sample's key: joins a row to the inventory
    seed       uint64 [R]      of the view (cskd.seeds.view_seeds)
    digest     uint32 [R]      of pixels and mixing fields (cskd.views.digest.view_digest)
    label      int32  [R]      of the sample itself, unmixed
    partner    int32  [R]      mixing partner, position in the block; -1 = unmixed
    mode       uint8  [R]      0 none, 1 mixup, 2 cutmix
    lam        uint16 [R]      own share of pixels and label, 1/65536; 0 where unmixed
    box        uint16 [R, 4]   top, bottom, left, right in pixels of the view
    targets/…                  the codec's own arrays (cskd/codecs)

Every array is one chunk up to CHUNK_BYTES (else chunked along its first axis): bytes -> zstd -> crc32c. All chunks are
written, so a missing one is corruption and never zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.files.hub import PINS

FORMAT = 1
CONTAINERS = {"zarr": ".zarr.zip", "webdataset": ".tar"}  # the files of units, and how their names end
# Of a manifest. Targets, records and seals are the same in every container; a version that knows zarr alone has to stop.
MANIFEST_FORMATS = {"zarr": FORMAT, "webdataset": 2}
CHUNK_BYTES = 64 * 2**20
ZSTD_LEVEL = 9

UNIT_FIELDS: dict[str, tuple[type[np.generic], tuple[str, ...]]] = {
    "key_hash": (np.uint64, ("sample",)),
    "seed": (np.uint64, ("sample",)),
    "digest": (np.uint32, ("sample",)),
    "label": (np.int32, ("sample",)),
    "partner": (np.int32, ("sample",)),
    "mode": (np.uint8, ("sample",)),
    "lam": (np.uint16, ("sample",)),
    "box": (np.uint16, ("sample", "edge")),
}


@dataclass(frozen=True)
class Unit:
    """One view of one block, decoded. Row r is the block's sample `position[r]`.

    position int64 [R]; fields, see `UNIT_FIELDS`; targets, the arrays of one codec.
    """

    position: NDArray[np.int64]
    fields: dict[str, NDArray[Any]]
    targets: dict[str, NDArray[Any]]


MANIFEST, MANIFEST_COPY = "manifest.json", "manifest.copy.json"
RESOLVED = "resolved.yaml"
SEAL = "sealed.json"
INDEX = "index.jsonl.zst"
INVENTORY = "inventory"
TABLES = "codecs"
PROBE = ".cskd-probe-"  # and a number: an object that is written to try a store, and taken away again
# All of a cache's folder.
OWN_NAMES = (MANIFEST, MANIFEST_COPY, RESOLVED, SEAL, INDEX, INVENTORY, TABLES, PINS, "units", "commits", "claims")


def unit_file(block: int, view: int, codec: str, digest: str, container: str = "zarr") -> PurePosixPath:
    """Path of a unit's file inside the cache; `digest` is the hex sha256 of its bytes."""
    name = f"v{view:04d}.{codec}.{digest[:16]}{CONTAINERS[container]}"
    return PurePosixPath("units") / f"b{block:05d}" / name


def draft_file(block: int, view: int, digest: str) -> PurePosixPath:
    """Path of a draft inside the cache, see `cskd.store.draft`; `digest` as in `unit_file`."""
    return unit_file(block, view, "draft", digest)


def commit_file(block: int, view: int) -> PurePosixPath:
    """Path of a unit's commit record inside the cache."""
    return PurePosixPath(f"commits/b{block:05d}/{record_name(view)}")  # one path: three joined take three times as long


def record_name(view: int) -> str:
    """File name of a unit's commit record in its block's folder."""
    return f"v{view:04d}.json"
