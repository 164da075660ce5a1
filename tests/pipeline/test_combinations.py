"""Known bad combinations: each row is found in facts made for it, says what to do, and is not found next to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cskd.config import Config
from cskd.pipeline.combinations import COMBINATIONS, files_needed, numbers
from cskd.pipeline.doctor import Check, combination_rows
from cskd.pipeline.machine_facts import Facts, Mount, gather, mount_of


def of(**versions: str) -> dict[str, Any]:
    return {"versions": {name.replace("_", "-"): version for name, version in versions.items()}}


def on(*mounts: Mount) -> dict[str, Any]:
    return {"mounts": mounts}


FLOORS = {"zarr": "3.1", "timm": "1.0.20", "numcodecs": "0.14", "simplejpeg": "1.9"}
DRIVER: dict[str, Any] = {"cuda_driver": (12, 4), "cuda_build": "12.8"}
HOPPER: dict[str, Any] = {"built_for": ("sm_80", "sm_86", "sm_90", "sm_100a")}

FOUND = [
    ("versions", of(zarr="2.18.7", numcodecs="0.16.6") | {"floors": FLOORS}, "zarr 2.18.7 (needs 3.1)"),
    ("versions", of(timm="0.9.16") | {"floors": FLOORS}, "timm 0.9.16 (needs 1.0.20)"),
    ("versions", of(simplejpeg="1.7.2") | {"floors": FLOORS}, "simplejpeg 1.7.2"),
    ("torch and torchvision", of(torch="2.14.1", torchvision="0.28.0"), "torchvision 0.28.0"),
    ("torch and torchvision", of(torch="2.15.0", torchvision="0.28.0"), "torchvision 0.28.0"),
    ("torch and torchvision", of(torch="2.13.0", torchvision="0.29.2"), "torchvision 0.29.2"),
    ("torch and torchvision", of(torch="2.14.1+cpu", torchvision="0.29.1"), "torch 2.14.1+cpu"),
    ("torch and torchvision", of(torch="2.14.1", torchvision="0.29.1+cpu"), "torchvision 0.29.1+cpu"),
    ("torch and torchvision", of(torch="2.14.1+cu126", torchvision="0.29.1+cu132"), "+cu132"),
    ("torch without CUDA", {"cuda_driver": (13, 1), **of(torch="2.14.1+cpu")}, "2.14.1+cpu, an NVIDIA driver for CUDA 13.1"),
    ("NVIDIA driver", DRIVER | {"cuda_build": "13.2"}, "torch for CUDA 13.2, a driver for CUDA 12.4"),
    ("GPU and torch's build", HOPPER | {"gpus": ((9, 0), (12, 0))}, "sm_120, torch for sm_80"),
    ("GPU and torch's build", HOPPER | {"gpus": ((7, 0),)}, "sm_70"),
    ("hidden GPUs", DRIVER | {"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES=''"),
    ("hidden GPUs", DRIVER | {"environment": {"CUDA_VISIBLE_DEVICES": "-1"}}, "'-1'"),
    ("Pillow-SIMD", of(pillow="13.0.0", pillow_simd="9.5.0.post2"), "pillow-simd 9.5.0.post2, pillow 13.0.0"),
    ("Pillow-SIMD", of(pillow_simd="9.5.0.post2"), "pillow not installed"),
    ("open files", {"open_files": 256, "workers": 16, "prefetch": 4}, "256 open files, 16 workers need about 304"),
    *(
        ("file system", on(Mount("caches", kind)), f"caches ({kind})")
        for kind in ("fuse.gcsfuse", "fuse", "fuseblk", "cifs", "smb3", "9p", "vboxsf")
    ),
    ("file system in memory", on(Mount("runs", "tmpfs")), "runs (tmpfs)"),
    ("container", on(Mount("caches/x", "overlay")), "caches/x (overlay)"),
    ("sync that does nothing", on(Mount(".", "overlay", frozenset({"rw", "volatile"}))), ". (volatile)"),
    ("sync that does nothing", on(Mount(".", "ext4", frozenset({"barrier=0"}))), ". (barrier=0)"),
    ("LD_PRELOAD", {"environment": {"LD_PRELOAD": "libc.so:libeatmydata.so"}}, "libeatmydata.so"),
    ("free-threaded Python", {"free_threaded": True}, "without the GIL"),
    ("encoding", {"encoding": "latin-1"}, "latin-1"),
    ("encoding", {"path_encoding": "ascii"}, "ascii"),
    ("offline", {"environment": {"HF_HUB_OFFLINE": "1"}, "hub_weights": True}, "HF_HUB_OFFLINE=1"),
    ("offline", {"environment": {"TRANSFORMERS_OFFLINE": "yes"}, "hub_weights": True}, "TRANSFORMERS_OFFLINE=yes"),
    ("temporary files", {"environment": {"TMPDIR": "/scratch/x"}, "temporary": "/var/tmp"}, "TMPDIR=/scratch/x, used is /var/tmp"),
    ("compiler", {"compiles": True, "compiler": False}, "no C++ compiler"),
]  # fmt: skip

SOUND: list[dict[str, Any]] = [
    {},
    of(zarr="3.1", timm="1.0.31", numcodecs="0.16.6", simplejpeg="1.10.0") | {"floors": FLOORS},
    of(torch="2.14.1", torchvision="0.29.1"),
    of(torch="2.14.1+cpu", torchvision="0.29.1+cpu"),
    of(torch="2.15.0+cu132", torchvision="0.30.0+cu132"),
    of(torch="2.15.0", torchvision="0.29.2"),  # which says torch>=2.14.0
    of(torch="2.11.0", torchvision="0.26.0"),
    of(torch="3.0.0", torchvision="1.0.0"),  # nothing is known of them
    of(torch="2.14.1a0+git123", torchvision="0.29.1a0+git123"),
    of(pillow="13.0.0"),
    DRIVER,
    DRIVER | {"cuda_driver": (13, 0)},
    DRIVER | {"cuda_build": None, "hip_build": "6.4"},
    DRIVER | {"environment": {"CUDA_VISIBLE_DEVICES": "0,1"}},
    {"environment": {"CUDA_VISIBLE_DEVICES": ""}},
    HOPPER | {"gpus": ((8, 0), (8, 9), (9, 0), (10, 0))},
    {"built_for": ("sm_80", "compute_90"), "gpus": ((12, 0),)},  # translated when it is loaded
    {"gpus": ((9, 0),)},
    {"open_files": 1024, "workers": 32, "prefetch": 4},
    {"open_files": None, "workers": 32, "prefetch": 4},
    on(Mount(".", "ext4", frozenset({"rw", "relatime"})), Mount("caches", "nfs4"), Mount("runs", "lustre")),
    on(Mount(".", "overlay")),
    {"encoding": "UTF-8", "path_encoding": "utf_8"},
    {"environment": {"HF_HUB_OFFLINE": "1"}},
    {"environment": {"HF_HUB_OFFLINE": "0"}, "hub_weights": True},
    {"environment": {"TMPDIR": "/scratch/x/"}, "temporary": "/scratch/x"},
    {"environment": {"LD_PRELOAD": "libjemalloc.so.2"}},
    {"compiler": False},
    {"compiles": True},
]


@pytest.mark.parametrize(("name", "facts", "says"), FOUND)
def test_a_bad_combination_is_found_by_facts_and_says_what_to_do(name: str, facts: dict[str, Any], says: str) -> None:
    (row,) = combination_rows(Facts(**facts))
    (known,) = [c for c in COMBINATIONS if c.name == name]
    assert (row.name, row.state) == (name, known.state)
    assert says in row.value and row.advice == f"{known.harm}; {known.remedy}"


@pytest.mark.parametrize("facts", SOUND)
def test_what_is_next_to_it_is_no_bad_combination(facts: dict[str, Any]) -> None:
    assert combination_rows(Facts(**facts)) == [
        Check("bad combinations", f"none of the {len(COMBINATIONS)} that are known")
    ]


def test_every_row_is_tried_has_a_source_and_is_short() -> None:
    assert {c.name for c in COMBINATIONS} == {name for name, _, _ in FOUND}
    assert all(c.source and "\n" not in c.remedy and len(f"{c.harm}; {c.remedy}") <= 300 for c in COMBINATIONS)


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 22 0:27 / /net rw - nfs4 server:/net rw,vers=4.2,addr=10.0.0.1
31 30 0:28 / /net/my\\040data rw shared:5 - fuse.sshfs me@host:/x rw,user_id=0
32 22 0:29 / /dev/shm rw - tmpfs tmpfs rw,size=64k
33 22 0:30 / /dev/shm rw - ramfs none rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/srv/x", "ext4"),
        ("/net/me/runs", "nfs4"),
        ("/net/my data/caches", "fuse.sshfs"),
        ("/nets", "ext4"),
        ("/dev/shm/x", "ramfs"),
    ],
)
def test_a_folder_that_is_still_to_be_made_has_its_file_system_found(folder: str, kind: str) -> None:
    mount = mount_of(Path(folder), MOUNTS)
    assert mount is not None and mount.kind == kind and "rw" in mount.options


def test_no_mounts_are_known_where_there_is_no_proc() -> None:
    assert mount_of(Path("x"), "") is None


def test_versions_are_compared_by_their_numbers() -> None:
    assert numbers("2.14.1+cu132") == (2, 14, 1) and numbers("0.29.1a0+git") == (0, 29, 1)
    assert numbers("1.10") > numbers("1.9.2") and numbers("") == ()
    assert files_needed(0, 4) < files_needed(4, 4) < files_needed(16, 4)


def test_the_facts_of_this_machine_are_gathered() -> None:
    facts = gather(Config(), 3)
    assert facts.floors["timm"] and facts.versions["torch"] and facts.temporary and facts.workers == 3
    assert combination_rows(facts)
