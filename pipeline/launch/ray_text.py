"""The drivers for a Ray cluster: a pool of actors for stage 1, torchrun on its machines for stage 2."""

from __future__ import annotations

import shlex
import sys

from cskd.errors import counted
from cskd.pipeline.launch.job import Job
from cskd.pipeline.launch.slurm import SUBMIT

_DRIVER = '''\
"""{about}

Run it on a machine of the cluster, or give --address of cskd launch: python {file}
"""

from cskd.pipeline.launch.ray_pool import Pool

pool = Pool(
{fields})

if __name__ == "__main__":
    pool.{call}
'''

_STAGE1 = (
    "Stage 1 of {config} on Ray: {workers} share the cache. Each begins at another place, and takes what is missing.\n\n"
    "An actor that dies is started again, and goes on. Run it again, and it goes on from what was committed."
)
_STAGE2 = (
    "Stage 2 of {config} on Ray: one run of torchrun on {nodes}.\n\n"
    "When a machine is lost it begins again from the state that was saved last."
)
_SUBMIT = """\
#!/bin/bash
# Runs {what}; ends when they have ended.
set -euo pipefail
cd -- {folder}
"""


def files(job: Job) -> dict[str, str]:
    """The text of each file, by its name."""
    made = {f"stage{stage}.py": _driver(job, stage) for stage in job.stages}
    what = " and then ".join(f"stage {stage}" for stage in job.stages)
    run = "".join(f"{shlex.quote(sys.executable)} {name}\n" for name in made)
    return {**made, SUBMIT: _SUBMIT.format(what=what, folder=shlex.quote(str(job.output))) + run}


def _driver(job: Job, stage: int) -> str:
    options = job.options
    fields = {
        "config": str(job.config),
        "sets": list(job.sets),
        "folder": str(job.folder),
        "address": options.address,
        "actors": options.workers if stage == 1 else options.nodes,
        "cpus": job.cpus(stage),
        "gpus": job.gpus(stage),
        "memory_gib": job.memory(stage),
        "retries": options.retries,
        "env": options.variables,
        "extra": options.merged,
    }
    words = {"workers": counted(options.workers, "actor"), "nodes": counted(options.nodes, "machine")}
    about = (_STAGE1 if stage == 1 else _STAGE2).format(
        config=job.config.name.replace("\\", "\\\\").replace('"', "'"), **words
    )
    text = "".join(f"    {name}={value!r},\n" for name, value in fields.items())
    return _DRIVER.format(about=about, file=f"stage{stage}.py", fields=text, call=f"stage{stage}()")
