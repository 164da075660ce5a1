"""The batch scripts of SLURM: an array for stage 1, a job of torchrun after it for stage 2."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cskd.errors import counted
from cskd.pipeline.launch.job import Job

NOTICE = 120  # seconds before its end in which a job saves what it has; cskd takes 20 of them at most
LOGS = "logs"
SUBMIT = "submit.sh"

_PLAIN = re.compile(r"[\w./:=@%+,-]+")

_STAGE1 = """\
# Stage 1 of {config}: {workers} of one array share the cache. Each begins at another
# place, takes what is missing, and ends when the cache is sealed. Submit it again, and it goes on."""
_STAGE2 = """\
# Stage 2 of {config}: one run on {nodes}. Submit it again, and it goes on from the state
# that was saved last."""

# The batch shell gets USR1 before the time is over, and TERM where somebody else ends or queues the job again.
_WORK = """\
# {notice} seconds before the time is over the work is asked to save what it has, and the {what} is queued again.
finish() {{
  trap - USR1 TERM
  work=$!  # a signal may come before the line below has it
  [ -z "$work" ] || {terminate}
  wait "$work"
}}
again() {{
  finish && exit 0
  echo "the time is over: {what} $job is queued again"
  scontrol requeue "$job"
  exit 143
}}
work=
job={job}
trap again USR1
trap 'finish; exit 143' TERM

{command} &
work=$!
wait "$work"
"""

_WHERE = ("--rdzv-id", "ID", "--rdzv-endpoint", "ENDPOINT")  # in whose place the script has variables

_SUBMIT = """\
#!/bin/bash
# Submits {what}.
set -euo pipefail
cd -- {folder}
"""


def files(job: Job) -> dict[str, str]:
    """The text of each file, by its name."""
    made = {f"stage{stage}.sbatch": _script(job, stage) for stage in job.stages}
    return {**made, SUBMIT: _submit(job)}


def notes(job: Job) -> list[str]:
    """Of what other nodes do not see, and of programs that the scripts call and that are not here."""
    called = {word for stage in job.stages for word in (job.command(1) if stage == 1 else job.torchrun([]))[:1]}
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    gone = [] if job.options.image else sorted(word for word in called if not shutil.which(word, path=where))
    lacks = f"no {' and no '.join(gone)} next to {sys.executable} or on PATH, and the scripts call it; install it there, or give --setup"
    return [*job.local_note(), *([lacks] if gone else [])]


def _script(job: Job, stage: int) -> str:
    head = ["#!/bin/bash", _about(job, stage), *(f"#SBATCH {line}" for line in _directives(job, stage))]
    head += job.options.extra or []
    body = ["", f"cd -- {shlex.quote(str(job.folder))} || exit 1"]
    if not job.options.image:
        body.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"  # where cskd launch ran')
    body += [f"export {name}={shlex.quote(value)}" for name, value in job.options.variables.items()]
    body += job.options.setup or []
    return "\n".join([*head, *body, "", _work(job, stage)])


def _about(job: Job, stage: int) -> str:
    nodes = counted(job.options.nodes, "machine")
    text = _STAGE1 if stage == 1 else _STAGE2
    return text.format(config=job.config.name, workers=counted(job.options.workers, "task"), nodes=nodes)


def _directives(job: Job, stage: int) -> Iterator[str]:
    options = job.options
    yield _directive("job-name", f"{job.name}-stage{stage}")
    if stage == 1:
        yield f"--array=0-{options.workers - 1}"
    yield f"--nodes={1 if stage == 1 else options.nodes}"
    yield "--ntasks-per-node=1"
    if gpus := job.gpus(stage):
        yield f"--gpus-per-node={gpus}"
    yield f"--cpus-per-task={job.cpus(stage)}"
    if memory := job.memory(stage):
        yield f"--mem={memory}G"
    for word, value in (("time", options.time), ("partition", options.partition), ("account", options.account)):
        if value is not None:
            yield _directive(word, value)
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{NOTICE}"
    log = f"stage{stage}-{'%A_%a' if stage == 1 else '%j'}.log"
    yield _directive("output", f"{str(job.output / LOGS).replace('%', '%%')}/{log}")


def _directive(word: str, value: str) -> str:
    """An option as sbatch reads it from a file: no shell expands it, and a backslash or quotes keep what is special."""
    if _PLAIN.fullmatch(value):
        return f"--{word}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{word}="{escaped}"'


def _work(job: Job, stage: int) -> str:
    inside = (
        ["apptainer", "exec", *(["--nv"] if job.gpus(stage) else []), job.options.image] if job.options.image else []
    )
    what, number, before = "job", '"$SLURM_JOB_ID"', ""
    terminate = 'kill -TERM "$work"'
    if stage == 1:
        # By SLURM_JOB_ID the last task of an array would queue the whole of it again.
        what, number = "task", '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
        command = shlex.join([*inside, *job.command(1)])
    elif job.options.nodes == 1:
        command = shlex.join([*inside, *job.torchrun([])])
    else:
        before = (
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)  # has the store by which all find each other\n'
            "port=$((20000 + SLURM_JOB_ID % 10000))  # two jobs may share a machine\n\n"
        )
        program, *rest = job.torchrun([*_WHERE])
        rest_of_it = shlex.join(rest).replace(
            shlex.join(_WHERE), '--rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port"', 1
        )
        start = f'exec {shlex.join([*inside, program])} --rdzv-conf "is_host=$((SLURM_NODEID == 0))" "$@"'
        command = (
            f"srun --ntasks-per-node=1 --cpus-per-task={job.cpus(2)} --kill-on-bad-exit=1 \\\n"
            f"  bash -c {shlex.quote(start)} stage2 \\\n  {rest_of_it}"
        )
        terminate = 'scancel --signal=TERM "$SLURM_JOB_ID"  # the tasks on all machines'
    return before + _WORK.format(notice=NOTICE, what=what, terminate=terminate, job=number, command=command)


def _submit(job: Job) -> str:
    both = len(job.stages) == 2
    what = "stage 1, and stage 2 to begin when all its tasks have ended well" if both else f"stage {job.stages[0]}"
    text = _SUBMIT.format(what=what, folder=shlex.quote(str(job.output)))
    for stage in job.stages:
        after = ' --dependency="afterok:$stage1" --kill-on-invalid-dep=yes' if stage == 2 and both else ""
        text += f"stage{stage}=$(sbatch --parsable{after} stage{stage}.sbatch)\nstage{stage}=${{stage{stage}%%;*}}\n"
        text += f'echo "stage {stage} is job $stage{stage}"\n'
    return text
