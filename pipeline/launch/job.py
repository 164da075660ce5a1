"""What is to run, whatever the cluster: the config with its overrides, the folder to run in, and the commands of both stages."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cskd.config import Config
from cskd.config.load import config_text
from cskd.pipeline.launch.options import Options
from cskd.pipeline.machine_facts import mount_of, mounts

# File systems of one machine; what is in neither list of anybody is not warned of.
LOCAL = (
    "apfs",
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "ntfs",
    "overlay",
    "ramfs",
    "squashfs",
    "tmpfs",
    "vfat",
    "xfs",
    "zfs",
)


@dataclass(frozen=True)
class Job:
    """config: its file, absolute; sets: what overrides its keys. folder: where the commands are started, since relative paths of
    the config are of it. output: where the files of the launch go. stages: 1, 2 or both."""

    settings: Config
    config: Path
    sets: tuple[str, ...]
    folder: Path
    output: Path
    options: Options
    stages: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.options.name or ""

    def command(self, stage: int) -> list[str]:
        """What a process of a stage is, without a launcher."""
        program = ["cskd", "cache-teacher" if stage == 1 else "train", str(self.config)]
        for text in self.sets:
            program += ["--set", text]
        return [*program, *(["--devices", "all"] if stage == 1 and self.options.gpus > 1 else [])]

    def torchrun(self, where: list[str]) -> list[str]:
        """Stage 2 on one machine of its `nodes`. where: the options that say how they find each other, of several."""
        ranks = max(1, self.options.gpus_of_a_node)
        if self.options.nodes == 1:
            how = ["--standalone", "--nproc-per-node", str(ranks)]
        else:
            how = [
                "--nnodes",
                str(self.options.nodes),
                "--nproc-per-node",
                str(ranks),
                "--rdzv-backend",
                "c10d",
                *where,
            ]
        alone = self.options.nodes * ranks == 1
        return self.command(2) if alone else ["torchrun", *how, "--no-python", *self.command(2)]

    def cpus(self, stage: int) -> int:
        return self.options.cpus * max(1, self.gpus(stage))

    def memory(self, stage: int) -> int | None:
        """GiB."""
        return self.options.memory and self.options.memory * max(1, self.gpus(stage))

    def gpus(self, stage: int) -> int:
        return self.options.gpus if stage == 1 else self.options.gpus_of_a_node

    def places(self) -> dict[str, str]:
        """What workers read and write, by what the config calls it; addresses are left out, since all see those."""
        settings = self.settings
        named = {
            "data.train": settings.data.train,
            "data.val": settings.data.val,
            "cache.path": settings.cache.path,
            **{f"train.caches.{name}": path for name, path in settings.train.caches.items()},
            "train.output": settings.train.output if 2 in self.stages else "",
            "teacher.model": _file_of(settings.teacher.model),
            "teacher.weights": _file_of(settings.teacher.weights or ""),
        }
        return {key: text for key, text in named.items() if text and "://" not in text}

    def local_note(self, files: bool = True) -> list[str]:
        """Of what lies on a disk of this machine, where other nodes look for it too. files: they read the config and the files of
        the launch, and run this Python."""
        places = {key: self.folder / os.path.expanduser(text) for key, text in self.places().items()}
        if files:
            python = {} if self.options.image else {"the Python of cskd": Path(sys.prefix)}
            places = {
                **places,
                "CONFIG": self.config,
                "--output": self.output,
                "the current folder": self.folder,
                **python,
            }
        kinds = {key: mount.kind for key, path in places.items() if (mount := mount_of(path, mounts()))}
        here = [f"{key} ({kind})" for key, kind in kinds.items() if kind in LOCAL]
        if not here:
            return []
        return [f"on a disk of this machine, and all nodes need to see it: {', '.join(here)}"]

    def variables_note(self, workers: str) -> list[str]:
        """Of variables that the config reads and that are set here, where workers don't have the environment of `cskd launch`."""
        lines = [line for line in config_text(self.config).splitlines() if not line.lstrip().startswith("#")]
        read = sorted({name for text in (*lines, *self.sets) for name in re.findall(r"\$\{(\w+)", text)})
        lack = [name for name in read if name in os.environ and name not in self.options.variables]
        return (
            [f"the config reads {', '.join(lack)}, set here and not in {workers}; give --env {lack[0]}=..."]
            if lack
            else []
        )


def _file_of(text: str) -> str:
    """The file in 'path/to/file.py:build' or 'FILE:KEY'; nothing of names that are no paths."""
    path, _, name = text.rpartition(":")
    file = path if name and path else text
    return file if "/" in file and "://" not in text and not text.startswith("torchvision:") else ""
