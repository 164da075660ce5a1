"""Known bad combinations of versions, platform and settings, for `cskd doctor`: one table over plain facts.

A row says how a combination is known, what goes wrong with it, what to do, and where others met it. What has a row of its
own in the doctor (hard links, shared memory, disks, threads, the JPEG decoder, start methods) is not here again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cskd.loading.need import prefetch_of
from cskd.pipeline.machine_facts import Facts, Mount

NETWORK = ("cifs", "smb3", "smbfs", "9p", "drvfs", "vboxsf", "prl_fs", "afs", "afpfs", "webdav", "davfs")
MEMORY = ("tmpfs", "ramfs")
FILES_EACH = 8  # open files of the main process for each worker: pipes, queues, sentinels
FILES_ELSE = 128  # and what it has open anyway: libraries, shards, the files of a run


@dataclass(frozen=True)
class Combination:
    """found: what of it is here, in words, or nothing; harm: what goes wrong; remedy: one line; source: who met it."""

    name: str
    found: Callable[[Facts], str]
    harm: str
    remedy: str
    source: str
    state: Literal["warn", "fail"] = "warn"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: those of 2.14.1+cu132 are 2, 14, 1."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0]))


def too_old(facts: Facts) -> str:
    """Each distribution that is older than cskd takes."""
    old = [
        f"{name} {facts.versions[name]} (needs {floor})"
        for name, floor in facts.floors.items()
        if name in facts.versions and numbers(facts.versions[name]) < numbers(floor)
    ]
    return ", ".join(old)


def _unpaired(facts: Facts) -> str:
    torch, vision = (facts.versions.get(name, "") for name in ("torch", "torchvision"))
    if not torch or not vision:
        return ""
    of_torch, of_vision = numbers(torch)[:2], numbers(vision)[:2]
    builds = [build for build in (torch.partition("+")[2], vision.partition("+")[2]) if build]
    # torch 2.0 came with torchvision 0.15, and each minor version since with the next. From 0.29 on torchvision is built on
    # torch's stable interface, and takes newer ones, too: 0.29.2 says torch>=2.14.0.
    its_own = (0, of_torch[1] + 15) if of_torch[1:] and of_torch[0] == 2 else of_vision
    paired = of_vision == its_own or (0, 29) <= of_vision < its_own
    cpu_and_cuda = "cpu" in builds and ("+cpu" not in torch or "+cpu" not in vision) and facts.system != "Darwin"
    return f"torch {torch}, torchvision {vision}" if not paired or cpu_and_cuda or len(set(builds)) > 1 else ""


def _no_cuda(facts: Facts) -> str:
    here = facts.cuda_driver and not facts.cuda_build and not facts.hip_build
    return (
        f"torch {facts.versions.get('torch', '')}, an NVIDIA driver for CUDA {_dotted(facts.cuda_driver)}"
        if here
        else ""
    )


def _old_driver(facts: Facts) -> str:
    if not facts.cuda_driver or not facts.cuda_build or numbers(facts.cuda_build)[0] <= facts.cuda_driver[0]:
        return ""
    return f"torch for CUDA {facts.cuda_build}, a driver for CUDA {_dotted(facts.cuda_driver)}"


def _other_gpu(facts: Facts) -> str:
    """GPUs that torch's build has code for neither of their kind nor to translate."""
    built = [(word.partition("_")[0], word.rpartition("_")[2].rstrip("af")) for word in facts.built_for]
    whole = [(kind, (int(n[:-1]), int(n[-1]))) for kind, n in built if n.isdigit() and len(n) > 1]
    missing = [
        gpu
        for gpu in facts.gpus
        if not any(made[0] == gpu[0] and made <= gpu if kind == "sm" else made <= gpu for kind, made in whole)
    ]
    return f"sm_{missing[0][0]}{missing[0][1]}, torch for {', '.join(facts.built_for)}" if missing and whole else ""


def _hidden_gpu(facts: Facts) -> str:
    value = facts.environment.get("CUDA_VISIBLE_DEVICES")
    hidden = facts.cuda_driver and facts.cuda_build and value is not None and value.strip() in ("", "-1")
    return f"CUDA_VISIBLE_DEVICES={value!r}" if hidden else ""


def _two_pillows(facts: Facts) -> str:
    simd = facts.versions.get("pillow-simd")
    return f"pillow-simd {simd}, pillow {facts.versions.get('pillow', 'not installed')}" if simd else ""


def files_needed(workers: int, prefetch: int) -> int:
    """Open files of the main process: each shared buffer of a worker is one, and what a worker is talked to by."""
    return FILES_ELSE + workers * (prefetch_of(workers, prefetch) + 1 + FILES_EACH)


def _few_files(facts: Facts) -> str:
    need = files_needed(facts.workers, facts.prefetch)
    few = facts.open_files is not None and facts.open_files < need
    return f"{facts.open_files} open files, {facts.workers} workers need about {need}" if few else ""


def _mounted(kinds: Iterable[str]) -> Callable[[Facts], str]:
    def found(facts: Facts) -> str:
        return _some(m for m in facts.mounts if m.kind in kinds or ("fuse" in kinds and m.kind.startswith("fuse")))

    return found


def _in_container(facts: Facts) -> str:
    """Folders of a config, not just the one that the doctor is called in, in the layer of a container."""
    return _some(m for m in facts.mounts if m.kind in ("overlay", "aufs") and m.folder != ".")


def _unsynced(facts: Facts) -> str:
    """Mounts that report a file as written before it is."""
    off = {"volatile", "nobarrier", "barrier=0"}
    return _some((m for m in facts.mounts if m.options & off), lambda m: ",".join(sorted(m.options & off)))


def _some(mounts: Iterable[Mount], word: Callable[[Mount], str] = lambda mount: mount.kind) -> str:
    return ", ".join(f"{mount.folder} ({word(mount)})" for mount in mounts)


def _preloaded(facts: Facts) -> str:
    libraries = re.split(r"[\s:]+", facts.environment.get("LD_PRELOAD", ""))
    return ", ".join(name for name in libraries if re.search("eatmydata|nosync", name))


def _not_utf8(facts: Facts) -> str:
    odd = {e for e in (facts.encoding, facts.path_encoding) if e.lower().replace("-", "").replace("_", "") != "utf8"}
    return ", ".join(sorted(odd))


def _offline(facts: Facts) -> str:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    on = [n for n in names if facts.environment.get(n, "").upper() in ("1", "ON", "YES", "TRUE")]
    return f"{on[0]}={facts.environment[on[0]]}, teacher.weights: hub" if on and facts.hub_weights else ""


def _other_temporary(facts: Facts) -> str:
    asked = facts.environment.get("TMPDIR", "")
    return f"TMPDIR={asked}, used is {facts.temporary}" if asked and not _same(asked, facts.temporary) else ""


def _same(one: str, other: str) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version or ()))


COMBINATIONS = (
    Combination(
        "versions",
        too_old,
        "an interface that cskd uses is missing or another, as with zarr 2, which newer numcodecs don't even let load",
        "pip install -U cskd, or these packages, in an environment of its own",
        "zarr-developers/numcodecs#721, jfolz/simplejpeg#2; the floors in pyproject.toml",
        "fail",
    ),
    Combination(
        "torch and torchvision",
        _unpaired,
        "torchvision's operators are built for one torch, or for none older: importing timm ends with 'operator torchvision::nms does not exist'",
        "install both in one command from one index: pip install -U torch torchvision",
        "pytorch/pytorch#157648, pytorch/vision#8985, tenstorrent/tt-forge#890",
        "fail",
    ),
    Combination(
        "torch without CUDA",
        _no_cuda,
        "the GPU of this machine stays unused",
        "pip install --force-reinstall torch torchvision, from the index that pytorch.org names for this CUDA",
        "pytorch/pytorch#1564",
    ),
    Combination(
        "NVIDIA driver",
        _old_driver,
        "a driver runs builds of its own CUDA's first number and older ones, so torch sees no GPU",
        "update the driver, or install torch for the driver's CUDA from the index that pytorch.org names",
        "pytorch/pytorch#4546; docs.nvidia.com/deploy/cuda-compatibility, minor version compatibility",
    ),
    Combination(
        "GPU and torch's build",
        _other_gpu,
        "torch has no code for this GPU: 'no kernel image is available'",
        "install a torch that is built for it, from the index that pytorch.org names",
        "pytorch/pytorch#150733, pytorch/pytorch#45130",
        "fail",
    ),
    Combination(
        "hidden GPUs",
        _hidden_gpu,
        "device: auto is the CPU then",
        "unset CUDA_VISIBLE_DEVICES, or name GPUs in it",
        "CUDA C++ programming guide, environment variables",
    ),
    Combination(
        "Pillow-SIMD",
        _two_pillows,
        "it resizes with other roundings, so views don't replay; next to Pillow it is chance which of the two is loaded",
        "pip uninstall pillow-simd, then pip install --force-reinstall pillow",
        "uploadcare/pillow-simd#21, uploadcare/pillow-simd#81",
        "fail",
    ),
    Combination(
        "open files",
        _few_files,
        "workers hand batches over as open files; beyond the limit they end with 'received 0 items of ancdata'",
        "ulimit -n 65536 before the command, or set fewer train.workers",
        "pytorch/pytorch#973, pytorch/pytorch#11201",
    ),
    Combination(
        "file system",
        _mounted((*NETWORK, "fuse")),
        "many of these have no hard links, no order among several writers, or a sync that does nothing",
        "put cache.path and train.output on a local disk or NFS, and copy a finished cache; shards to read are fine",
        "GoogleCloudPlatform/gcsfuse#178, GoogleCloudPlatform/gcsfuse#11, gsd-build/gsd-2#5106",
    ),
    Combination(
        "file system in memory",
        _mounted(MEMORY),
        "what lies there is gone after a restart, and counts as memory",
        "put cache.path and train.output on a disk",
        "Linux, Documentation/filesystems/tmpfs.rst",
    ),
    Combination(
        "container",
        _in_container,
        "what lies in a container's own layer goes with the container",
        "mount a volume for cache.path and train.output: docker run -v FOLDER:FOLDER",
        "Docker's documentation, storage",
    ),
    Combination(
        "sync that does nothing",
        _unsynced,
        "a unit counts as saved before it is, so a loss of power can leave a commit record without its unit",
        "mount it without that option; after such a loss run cskd verify, then cskd repair",
        "Linux, Documentation/filesystems/overlayfs.rst (volatile), ext4.rst (barrier)",
    ),
    Combination(
        "LD_PRELOAD",
        _preloaded,
        "it turns every sync off, so a loss of power can leave a commit record without its unit",
        "unset LD_PRELOAD for cskd",
        "stewartsmith/libeatmydata#12",
    ),
    Combination(
        "free-threaded Python",
        lambda facts: "Python without the GIL" if facts.free_threaded else "",
        "libraries that cskd needs turn the GIL on again, or have no builds for it; nobody has run cskd on it",
        "use the ordinary build of the same version",
        "zarr-developers/numcodecs#749, zarr-developers/numcodecs#858",
    ),
    Combination(
        "encoding",
        _not_utf8,
        "names of files and classes outside of it can't be opened or printed",
        "export LANG=C.UTF-8 PYTHONUTF8=1, and unset LC_ALL and PYTHONIOENCODING",
        "Textualize/rich#212, PEP 540",
    ),
    Combination(
        "offline",
        _offline,
        "weights that this machine has not loaded yet can't be fetched",
        "run it once with a network, or name a file in teacher.weights",
        "huggingface/pytorch-image-models#1825",
    ),
    Combination(
        "temporary files",
        _other_temporary,
        "TMPDIR can't be written to, so Python took another folder, perhaps on a small disk",
        "create that folder, or set TMPDIR to one that exists",
        "Python's documentation of tempfile.gettempdir",
    ),
    Combination(
        "compiler",
        lambda f: "compile: true, no C++ compiler on the path" if f.compiles and not f.compiler else "",
        "torch.compile builds C++ code on this machine and ends with 'No working C++ compiler found'",
        "install g++, name another in CXX, or set teacher.compile and train.compile to false",
        "pytorch/pytorch#92745",
    ),
)
