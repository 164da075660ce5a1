"""What a cluster is asked for: the options of `cskd launch`, each with its bounds and the clusters that it is of."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import yaml

from cskd.errors import ConfigError

Cluster = Literal["slurm", "k8s", "ray"]

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035, which Kubernetes asks for of a Service
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")  # RFC 1123
_NAME_MOST = 40  # characters: -stage1-0-abcde comes after it, and a host has 63
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}")  # sbatch(1), --time
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VOLUME = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?):(/.*)")


def _says(help: str, *only: Cluster, **bounds: Any) -> dict[str, Any]:
    return {"help": f"({', '.join(only)}) {help}" if only else help, "only": only, **bounds}


@dataclass(frozen=True)
class Options:
    """The command line makes its options from these fields. One that is None was not given."""

    name: str | None = field(
        default=None, metadata=_says("Of the jobs; default: that of the config's file.", metavar="NAME")
    )
    only: Literal["stage1", "stage2"] | None = field(default=None, metadata=_says("Write that stage alone."))
    workers: int = field(default=4, metadata=_says("Tasks, pods or actors that share stage 1.", min=1, max=10_000))
    gpus: int = field(
        default=1, metadata=_says("GPUs of each of them, 0 for CPUs; an actor of Ray has one at most.", min=0, max=64)
    )
    nodes: int = field(default=1, metadata=_says("Machines of stage 2.", min=1, max=10_000))
    node_gpus: int | None = field(
        default=None, metadata=_says("GPUs of each machine; default: as --gpus.", min=0, max=64)
    )
    cpus: int = field(default=8, metadata=_says("Cores for each GPU, or for each task without one.", min=1, max=1024))
    memory: int | None = field(
        default=None, metadata=_says("GiB for each GPU, or for each task without one.", min=1, max=4096)
    )
    retries: int = field(
        default=5, metadata=_says("How often a worker that died is started again.", "k8s", "ray", min=0, max=1000)
    )
    time: str | None = field(
        default=None,
        metadata=_says("Limit of a job; then it is queued again, and goes on.", "slurm", metavar="D-H:M:S"),
    )
    partition: str | None = field(default=None, metadata=_says("Where the jobs are queued.", "slurm"))
    account: str | None = field(default=None, metadata=_says("Who pays for them.", "slurm"))
    setup: list[str] | None = field(
        default=None,
        metadata=_says("Line of shell before the work, as `module load cuda`; repeatable.", "slurm", metavar="LINE"),
    )
    image: str | None = field(
        default=None, metadata=_says("Container image in which cskd runs; SLURM's by apptainer.", "slurm", "k8s")
    )
    volume: list[str] | None = field(
        default=None,
        metadata=_says(
            "Claim that all pods mount; repeatable. The first is where they work.", "k8s", metavar="CLAIM:/PATH"
        ),
    )
    namespace: str | None = field(default=None, metadata=_says("Where the jobs are made.", "k8s"))
    address: str = field(default="auto", metadata=_says("Of the Ray cluster; local: one on this machine.", "ray"))
    env: list[str] | None = field(
        default=None, metadata=_says("Variable of the workers; repeatable.", metavar="NAME=VALUE")
    )
    extra: list[str] | None = field(
        default=None,
        metadata=_says(
            "What has no option: a '#SBATCH ...' line; YAML that is merged into each Job; YAML of Ray's options for an actor.",
            metavar="TEXT",
        ),
    )

    @property
    def gpus_of_a_node(self) -> int:
        return self.gpus if self.node_gpus is None else self.node_gpus

    @property
    def variables(self) -> dict[str, str]:
        return dict(text.split("=", 1) for text in self.env or [])

    @property
    def volumes(self) -> list[tuple[str, str]]:
        """(claim, where it is mounted) of each."""
        return [(found[1], found[3]) for text in self.volume or [] if (found := _VOLUME.fullmatch(text))]

    @property
    def merged(self) -> dict[str, Any]:
        """`extra` where it is YAML."""
        whole: dict[str, Any] = {}
        for text in self.extra or []:
            whole = merge(whole, yaml.safe_load(text))
        return whole

    def checked(self, cluster: Cluster) -> Options:
        """These options. Raises ConfigError for one that is not of this cluster, or has no usable value."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            word, only = f"--{f.name.replace('_', '-')}", f.metadata["only"]
            if only and cluster not in only and value != f.default:
                raise ConfigError(f"{word} is of {' and '.join(only)}, and this is for {cluster}; leave it out")
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not (text and text.isprintable()):
                    raise ConfigError(
                        f"{word} {text!r} is empty or has a line break or a control character in it; mend it"
                    )
        for word, value, form, expected in (
            *(
                ("--name", self.name, _NAME, "lower-case letters, digits and -, a letter first"),
                ("--time", self.time, _TIME, "1-12:00:00"),
            ),
            ("--namespace", self.namespace, _NAMESPACE, "lower-case letters, digits and -"),
            *(("--volume", text, _VOLUME, "CLAIM:/PATH") for text in self.volume or []),
            *(("--env", text.partition("=")[0], _VARIABLE, "NAME=VALUE") for text in self.env or []),
        ):
            if value is not None and not form.fullmatch(value):
                raise ConfigError(f"{word} {value!r} is not usable, expected {expected}")
        if self.name and len(self.name) > _NAME_MOST:
            raise ConfigError(f"--name {self.name!r} has {len(self.name)} characters, expected at most {_NAME_MOST}")
        if bad := next((text for text in self.env or [] if "=" not in text), None):
            raise ConfigError(
                f'--env {bad!r} has no value, expected NAME=VALUE; `--env {bad}="${bad}"` gives this shell\'s'
            )
        if cluster == "k8s" and not (self.image and self.volume):
            lacks = "--volume CLAIM:/PATH" if self.image else "--image IMAGE"
            raise ConfigError(f"pods need a container image and a volume that all see; give {lacks}, too")
        if cluster == "ray" and self.gpus > 1:
            raise ConfigError(f"--gpus is {self.gpus}, and an actor of Ray has one GPU; ask for more --workers instead")
        self._check_extra(cluster)
        return self

    def _check_extra(self, cluster: Cluster) -> None:
        for text in self.extra or []:
            if cluster == "slurm":
                if not re.match(r"#SBATCH\s+-", text):
                    raise ConfigError(f"--extra {text!r} is no directive of sbatch, expected '#SBATCH --OPTION=VALUE'")
                continue
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                value = None
            if not isinstance(value, dict):
                form = "{spec: {template: {spec: {...}}}}" if cluster == "k8s" else "{resources: {big: 1}}"
                raise ConfigError(f"--extra {text!r} is no mapping in YAML, expected something like '{form}'")


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both mappings as one: mappings within are merged, lists are joined, and of two values the second one stays.

    Of the items of lists those of one `name` are one, as Kubernetes merges containers and variables.
    """
    whole = dict(base)
    for key, value in more.items():
        old = whole.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            whole[key] = merge(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            whole[key] = _joined(old, value)
        else:
            whole[key] = value
    return whole


def _joined(items: list[Any], more: list[Any]) -> list[Any]:
    whole = list(items)
    places = {item["name"]: i for i, item in enumerate(whole) if isinstance(item, dict) and "name" in item}
    for item in more:
        place = places.get(item.get("name")) if isinstance(item, dict) else None
        if place is None:
            whole.append(item)
        else:
            whole[place] = merge(whole[place], item)
    return whole


def name_of(config: str) -> str:
    """A job's name from that of a config's file."""
    name = re.sub(r"[^a-z0-9]+", "-", config.lower()).strip("-") or "cskd"
    return (name if name[0].isalpha() else f"cskd-{name}")[:_NAME_MOST].rstrip("-")


def takes(fields_of: type[Any], option: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command of the command line the fields of a dataclass as options, in place of its `**options`. option: what makes
    one from its help and bounds, as `typer.Option` does."""

    def taking(command: Callable[..., None]) -> Callable[..., None]:
        own, hints, keyword = (
            inspect.signature(command, eval_str=True),
            get_type_hints(fields_of),
            inspect.Parameter.KEYWORD_ONLY,
        )
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for f in dataclasses.fields(fields_of):
            made = option(**{name: value for name, value in f.metadata.items() if name != "only"})
            parameters.append(
                inspect.Parameter(f.name, keyword, default=f.default, annotation=Annotated[hints[f.name], made])
            )
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return taking
