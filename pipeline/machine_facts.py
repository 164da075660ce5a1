"""Plain facts of a machine and a config, which the table of `combinations.py` looks at."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cskd.config import Config


@dataclass(frozen=True)
class Mount:
    """Where a folder lies. kind: of the file system, as the kernel names it; options: all that it is mounted with."""

    folder: str
    kind: str
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Facts:
    """What the table looks at. The defaults are those of a machine on which nothing is wrong."""

    system: str = "Linux"
    free_threaded: bool = False
    encoding: str = "utf-8"  # of what is printed
    path_encoding: str = "utf-8"
    environment: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # of installed distributions
    floors: Mapping[str, str] = field(default_factory=dict)  # the oldest versions that cskd takes
    cuda_build: str | None = None  # the CUDA of torch's build
    hip_build: str | None = None
    cuda_driver: tuple[int, int] | None = None  # newest CUDA of NVIDIA's driver; None: there is no driver
    gpus: tuple[tuple[int, int], ...] = ()  # compute capabilities of those that torch sees
    built_for: tuple[str, ...] = ()  # sm_90, compute_90, ... of torch's build
    open_files: int | None = None  # that a process may have; None: no limit
    workers: int = 0
    prefetch: int = 0
    mounts: tuple[Mount, ...] = ()
    temporary: str = ""  # the folder that is used
    compiles: bool = False  # the config asks for torch.compile
    compiler: bool = True  # a C++ compiler is on the path
    hub_weights: bool = False  # the config asks for timm's own weights


def gather(config: Config, workers: int) -> Facts:
    """The facts of this machine for a config. workers: that its training would have here."""
    import torch

    installed = {
        d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    cuda = torch.cuda.is_available()
    places = [".", config.cache.path, config.train.output]
    return Facts(
        system=platform.system(),
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        encoding=getattr(sys.stdout, "encoding", None) or "utf-8",
        path_encoding=sys.getfilesystemencoding(),
        environment=dict(os.environ),
        versions=installed,
        floors=_floors(),
        cuda_build=torch.version.cuda,
        hip_build=torch.version.hip,
        cuda_driver=_cuda_driver(),
        gpus=tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) if cuda else (),
        built_for=tuple(torch.cuda.get_arch_list()) if cuda and not torch.version.hip else (),
        open_files=_open_files(),
        workers=workers,
        prefetch=config.train.prefetch,
        mounts=tuple(dict.fromkeys(m for place in places if place and (m := mount_of(Path(place), mounts())))),
        temporary=tempfile.gettempdir(),
        compiles=config.teacher.compile or config.train.compile,
        compiler=any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))),
        hub_weights=config.teacher.weights == "hub" and not config.teacher.model.startswith("torchvision:"),
    )


def _floors() -> dict[str, str]:
    """Of each distribution that cskd requires, the oldest version; none where cskd runs without being installed."""
    try:
        required = importlib.metadata.requires("cskd") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [re.match(r"([\w.-]+)>=([\d.]+)$", line) for line in required]
    return {match[1].lower(): match[2] for match in found if match}


def _cuda_driver() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver runs, as the driver itself says; asked for without starting a GPU."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver, version = ctypes.CDLL(name), ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft in (resource.RLIM_INFINITY, -1) else soft


def mounts() -> str:
    """The lines of /proc/self/mountinfo; none where this is not Linux."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def mount_of(folder: Path, mounts: str) -> Mount | None:
    """Where a folder lies, or would, by the lines of /proc/self/mountinfo (proc(5)); of two on one place the later one."""
    place, best = folder.expanduser().absolute().resolve(), None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        at, own, (kind, _, whole) = before.split()[4], before.split()[5], after.split(maxsplit=2)
        root = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), at))
        if place.is_relative_to(root) and (best is None or len(root.parts) >= best[0]):
            best = (len(root.parts), Mount(str(folder), kind, frozenset([*own.split(","), *whole.split(",")])))
    return best[1] if best else None
