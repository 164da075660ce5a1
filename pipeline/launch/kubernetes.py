"""The manifests of Kubernetes: an Indexed Job for stage 1, one of torchrun for stage 2, and the config as a ConfigMap.

Fields are those of batch/v1 as of Kubernetes 1.29: `backoffLimitPerIndex` and `podFailurePolicy` are on by default from there.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cskd.config.load import config_text
from cskd.errors import counted
from cskd.machine.launch import WORKERS
from cskd.pipeline.launch.job import Job
from cskd.pipeline.launch.options import merge
from cskd.pipeline.launch.slurm import SUBMIT

CONFIG = PurePosixPath("/etc/cskd/config.yaml")  # where pods have it
PORT = 29500  # of torchrun's rendezvous: each pod has ports of its own
GRACE = 60  # seconds between a pod's TERM and its KILL; cskd takes 20 of them at most
CONFIG_MOST = 1 << 20  # bytes of a ConfigMap

_ABOUT = {
    "config": "# The config, which all pods of {name} mount. --set of cskd launch stands in their commands.\n",
    "stage1": (
        "# Stage 1 of {name}: {workers} share the cache. Each begins at the place of its completion index, takes what is missing,\n"
        "# and ends when the cache is sealed. A pod that is evicted or preempted is replaced, and does not count as a failure.\n"
    ),
    "stage2": (
        "# Stage 2 of {name}: one run of torchrun on {nodes}. A pod that died is replaced, and the run goes on from the state that\n"
        "# was saved last.\n"
    ),
}

_SUBMIT = """\
#!/bin/bash
# {what}
set -euo pipefail
cd -- {folder}
kubectl apply{namespace} -f config.yaml{first}
"""
_THEN = """\
echo "waiting for job {job}; run this again if it is interrupted here"
until state=$(kubectl get job{namespace} {job} -o jsonpath='{{.status.conditions[?(@.status=="True")].type}}') &&
  [[ " $state " == *" Complete "* || " $state " == *" Failed "* ]]; do
  sleep 15
done
if [[ " $state " == *" Failed "* ]]; then
  echo "stage 1 failed: kubectl logs{namespace} job/{job} says why; delete the job and run this again, and it goes on" >&2
  exit 1
fi
kubectl apply{namespace} -f stage2.yaml
"""


def files(job: Job) -> dict[str, str]:
    """The text of each file, by its name."""
    made = {"config.yaml": _dumped(job, "config", [_config_map(job)])}
    if 1 in job.stages:
        made["stage1.yaml"] = _dumped(job, "stage1", [_job(job, 1)])
    if 2 in job.stages:
        made["stage2.yaml"] = _dumped(
            job, "stage2", [*([_service(job)] if job.options.nodes > 1 else []), _job(job, 2)]
        )
    return {**made, SUBMIT: _submit(job)}


def notes(job: Job) -> list[str]:
    """Of variables that pods lack, and of what the config names and no volume holds: it is missing, or goes with the pod."""
    mounts = [PurePosixPath(path) for _, path in job.options.volumes]
    outside = [
        f"{key} ({text})"
        for key, text in job.places().items()
        if not any((mounts[0] / text).is_relative_to(mount) for mount in mounts) or ".." in PurePosixPath(text).parts
    ]
    lost = f"on no --volume, so only in the image, and what is written there goes with the pod: {', '.join(outside)}"
    return [*job.variables_note("pods"), *([lost] if outside else [])]


def _config_map(job: Job) -> dict[str, Any]:
    return _object(job, "v1", "ConfigMap", "config") | {"data": {CONFIG.name: config_text(job.config)}}


def _service(job: Job) -> dict[str, Any]:
    """Gives each pod of stage 2 a host name by which the others find it, before it is ready."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": f"{job.name}-stage2"},
    }
    return _object(job, "v1", "Service", "stage2") | {"spec": {**spec, "ports": [{"name": "torchrun", "port": PORT}]}}


def _job(job: Job, stage: int) -> dict[str, Any]:
    options, name = job.options, f"stage{stage}"
    pods = options.workers if stage == 1 else options.nodes
    mounts = [{"name": f"volume{i}", "mountPath": path} for i, (_, path) in enumerate(options.volumes)]
    volumes: list[dict[str, Any]] = [
        {"name": f"volume{i}", "persistentVolumeClaim": {"claimName": claim}}
        for i, (claim, _) in enumerate(options.volumes)
    ]
    count = {WORKERS: str(pods)} if stage == 1 else {}  # which no pod of an indexed job can tell by itself
    variables = {**count, **options.variables}
    container = {
        "name": name,
        "image": options.image,
        "command": [text.replace("$", "$$") for text in _command(job, stage)],  # $(NAME) would be a variable's value
        "workingDir": options.volumes[0][1],
        **({"env": [{"name": n, "value": v.replace("$", "$$")} for n, v in variables.items()]} if variables else {}),
        "resources": _resources(job, stage),
        "volumeMounts": [
            *mounts,
            {"name": "config", "mountPath": str(CONFIG.parent), "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        **({"subdomain": f"{job.name}-stage2"} if stage == 2 and pods > 1 else {}),
        "containers": [container],
        "volumes": [
            *volumes,
            {"name": "config", "configMap": {"name": f"{job.name}-config"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # batches pass between processes through it
        ],
    }
    spec = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        # A worker of stage 1 is replaced by itself; where one of stage 2 ends, the others end, too.
        **({"backoffLimitPerIndex": options.retries} if stage == 1 else {"backoffLimit": options.retries * pods}),
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # 2: a command line that is no use to repeat
                {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [2]}},
            ]
        },
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": job.name}}, "spec": pod},
    }
    return merge(_object(job, "batch/v1", "Job", name) | {"spec": spec}, options.merged)


def _command(job: Job, stage: int) -> list[str]:
    there = replace(job, config=Path(CONFIG))
    if stage == 1:
        return there.command(1)
    host = f"{job.name}-stage2-0.{job.name}-stage2"
    # Seconds for all pods to come: one may have the image and a machine long before the others.
    patience = ["--rdzv-conf", "read_timeout=600,join_timeout=1800"]
    return there.torchrun(["--rdzv-id", job.name, "--rdzv-endpoint", f"{host}:{PORT}", *patience])


def _resources(job: Job, stage: int) -> dict[str, Any]:
    asked: dict[str, Any] = {"cpu": str(job.cpus(stage))}
    limits: dict[str, Any] = {}
    if memory := job.memory(stage):
        asked["memory"] = limits["memory"] = f"{memory}Gi"
    if gpus := job.gpus(stage):
        limits["nvidia.com/gpu"] = gpus  # asked for by its limit
    return {"requests": asked, **({"limits": limits} if limits else {})}


def _object(job: Job, version: str, kind: str, part: str) -> dict[str, Any]:
    where = {"namespace": job.options.namespace} if job.options.namespace else {}
    labels = {"app.kubernetes.io/name": job.name, "app.kubernetes.io/managed-by": "cskd"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": f"{job.name}-{part}", **where, "labels": labels}}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]  # labels are shared between objects


def _dumped(job: Job, part: str, objects: list[dict[str, Any]]) -> str:
    options = job.options
    words = {"workers": counted(options.workers, "pod"), "nodes": counted(options.nodes, "machine")}
    text = yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, explicit_start=len(objects) > 1
    )
    return _ABOUT[part].format(name=job.name, **words) + text


def _submit(job: Job) -> str:
    namespace = f" --namespace {shlex.quote(job.options.namespace)}" if job.options.namespace else ""
    both = len(job.stages) == 2
    what = (
        "Makes the jobs: stage 1, and stage 2 when it is complete."
        if both
        else f"Makes the job of stage {job.stages[0]}."
    )
    text = _SUBMIT.format(
        what=what, folder=shlex.quote(str(job.output)), namespace=namespace, first=f" -f stage{job.stages[0]}.yaml"
    )
    return text + (_THEN.format(job=f"{job.name}-stage1", namespace=namespace) if both else "")
