"""`cskd launch`: write the files with which a cluster runs both stages, and submit them if that is asked for.

config    is read and checked here, so that a key that is wrong costs no queue
look      at what nodes don't see: folders on a disk of this machine, or on no volume of a pod
write     a file per stage and `submit.sh`; nothing that is there already is overwritten
submit    with the cluster's own program
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cskd.config import load_config
from cskd.errors import ConfigError, DataError, PathError, fitted, why
from cskd.files.durable import put
from cskd.files.folders import refuse_output
from cskd.files.hub import is_hub
from cskd.pipeline.launch import kubernetes, ray_text, slurm
from cskd.pipeline.launch.job import Job
from cskd.pipeline.launch.options import Cluster, Options, name_of
from cskd.pipeline.show.progress import print_lines

_FILES: dict[Cluster, Callable[[Job], dict[str, str]]] = {
    "slurm": slurm.files,
    "k8s": kubernetes.files,
    "ray": ray_text.files,
}
_NOTES: dict[Cluster, Callable[[Job], list[str]]] = {
    "slurm": slurm.notes,
    "k8s": kubernetes.notes,
    "ray": lambda job: [*job.variables_note("actors"), *job.local_note(files=False)],
}
_PROGRAMS = {"slurm": "sbatch", "k8s": "kubectl", "ray": "ray"}
_WHERE = {"slurm": "a login node", "k8s": "a machine with kubectl", "ray": "a machine of the cluster"}


@dataclass(frozen=True)
class LaunchReport:
    """What was written, and what came of submitting it. files: text by path; nothing is written with --dry-run."""

    cluster: str
    files: dict[str, str]
    written: bool
    run: str  # what submits them
    submitted: bool
    notes: list[str]


def launch(
    cluster: Cluster,
    config: Path,
    overrides: list[str] | None,
    output: Path | None,
    options: Options,
    force: bool = False,
    dry_run: bool = False,
    submit: bool = False,
) -> LaunchReport:
    """Write the files of a launch to `output`, by default launch/NAME, and with `submit` run its submit.sh.

    Raises:  ConfigError for a config or an option that is not usable; PathError where other files are there already, unless `force`.
    """
    options = options.checked(cluster)
    if dry_run and submit:
        raise ConfigError("--dry-run writes nothing, and --submit needs what is written; leave one of them out")
    if submit and not shutil.which(_PROGRAMS[cluster]):
        raise ConfigError(
            f"this machine has no {_PROGRAMS[cluster]}; leave --submit out, and run submit.sh on {_WHERE[cluster]}"
        )
    job = _job(config, overrides, output, options)
    notes = _NOTES[cluster](job)
    files = {str(job.output / name): text for name, text in _FILES[cluster](job).items()}
    if not dry_run:
        _write(job, files, force, logs=cluster == "slurm")
    run = f"bash {shlex.quote(str(job.output / slurm.SUBMIT))}"
    if submit:
        _submit(job.output / slurm.SUBMIT, cluster)
    return LaunchReport(cluster, files, not dry_run, run, submit, notes)


@contextmanager
def _variables(given: dict[str, str]) -> Iterator[None]:
    """Those of --env, which workers will have, are set while the config is read."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _job(config: Path, overrides: list[str] | None, output: Path | None, options: Options) -> Job:
    with _variables(options.variables):
        settings = load_config(config, overrides)
    cache = settings.cache.path
    only_read = is_hub(cache) or cache.startswith(("http://", "https://"))
    makes_cache = bool(settings.teacher.model and cache) and not only_read
    stages = tuple(stage for stage in (1, 2) if options.only in (None, f"stage{stage}"))
    if 1 in stages and not makes_cache:
        if options.only:
            raise ConfigError(
                f"{config} has no stage 1: that needs teacher.model and a cache.path to write to; leave --only out"
            )
        stages = (2,)
    options = replace(options, name=options.name or name_of(config.stem))
    place = (output or Path("launch") / str(options.name)).absolute()
    refuse_output(place, None, "--output")
    job = Job(settings, config.absolute(), tuple(overrides or ()), Path.cwd(), place, options, stages)
    for what, text in (("CONFIG", str(job.config)), ("--output", str(place)), ("the current folder", str(job.folder))):
        if not text.isprintable():
            raise PathError(
                f"{what} {text!r} has a line break or a control character in it, and batch files can't; rename it"
            )
    for text in job.sets:
        if not text.isprintable():
            raise ConfigError(f"--set {text!r} has a line break or a control character in it; write it into the config")
    return job


def _write(job: Job, files: dict[str, str], force: bool, logs: bool) -> None:
    for name, text in files.items():
        path = Path(name)
        if not force and os.path.lexists(path) and not _holds(path, text):
            raise PathError(fitted(f"{path} is there already, with another text; give --force, or another --output"))
    try:
        for name, text in files.items():
            put(Path(name), text.encode())
        if logs:
            (job.output / slurm.LOGS).mkdir(exist_ok=True)
    except OSError as e:
        raise PathError(fitted(f"--output {job.output}: {why(e)}")) from e


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def _submit(script: Path, cluster: Cluster) -> None:
    """With what it prints on stderr, so that a report in JSON is alone on stdout."""
    code = subprocess.run(["bash", str(script)], stdout=2).returncode
    if code:
        raise DataError(
            fitted(f"{script} ended with exit code {code}, for the reason that {_PROGRAMS[cluster]} gave above")
        )


def render(report: LaunchReport, console: Console) -> None:
    """The report for people: the files, or their text, and the line that submits them."""
    lines = [f"note: {note}" for note in report.notes]
    for name, text in report.files.items():
        lines += [name] if report.written else [f"==> {name} <==", *text.splitlines(), ""]
    print_lines(console, *lines)
    if not report.submitted:
        print_lines(console, f"submit: {report.run}" if report.written else "nothing was written")
