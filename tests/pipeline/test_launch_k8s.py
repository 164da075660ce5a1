"""What `cskd launch k8s` writes, against the schemas of Kubernetes and by the real kubectl, to a server that keeps objects."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cskd.pipeline.launch.launch import launch
from cskd.pipeline.launch.options import Options
from tests.kube_server import LOOKS, kube_server

OPTIONS = Options(
    name="deit",
    image="registry/cskd:1",
    volume=["data:/data", "more:/more"],
    workers=3,
    nodes=2,
    memory=8,
    namespace="team",
    env=["A=$(B)", "C="],
    extra=["{spec: {template: {spec: {nodeSelector: {pool: a100}, tolerations: [{key: gpu, operator: Exists}]}}}}"],
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The folder of a launch."""
    config = tmp_path / "my.yaml"
    config.write_text("data: {train: train}\nteacher: {model: resnet18}\ncache: {path: cache}\n")
    launch("k8s", config, ["recipe.seed=3"], tmp_path / "out", OPTIONS)
    return tmp_path / "out"


def objects(files: Path) -> list[dict[str, Any]]:
    return [each for path in sorted(files.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_each_object_has_the_fields_of_its_schema_and_no_others(files: Path, version: str) -> None:
    pytest.importorskip("kubernetes_validate")
    validate: Any = importlib.import_module("kubernetes_validate")
    kinds = []
    for each in objects(files):
        validate.validate(each, version, strict=True)
        kinds.append(each["kind"])
        with pytest.raises(validate.ValidationError):
            validate.validate(each | {"specs": {}}, version, strict=True)
    assert sorted(kinds) == ["ConfigMap", "Job", "Job", "Service"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
@pytest.mark.parametrize("fails", [False, True])
def test_kubectl_makes_stage_1_waits_and_then_makes_stage_2(files: Path, tmp_path: Path, fails: bool) -> None:
    with kube_server() as kube:
        (tmp_path / "kubeconfig").write_text(_kubeconfig(kube.url))
        kubectl = (
            f'#!/bin/bash\n[ "$1" != apply ] || set -- "$@" --validate=false\nexec {shutil.which("kubectl")} "$@"\n'
        )
        (tmp_path / "bin").mkdir()  # without a check against the server's OpenAPI, which this one has not
        for name, text in {"kubectl": kubectl, "sleep": "#!/bin/bash\n"}.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environ = os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path), "PATH": path}
        for file in sorted(files.glob("*.yaml")):
            dry = ["kubectl", "create", "--dry-run=client", "--validate=false", "-o", "yaml", "-f", str(file)]
            shown = subprocess.run(dry, env=environ, capture_output=True, text=True, check=True).stdout
            assert list(yaml.safe_load_all(shown)) == [
                each | {"metadata": {**each["metadata"], "namespace": "team"}}
                for each in yaml.safe_load_all(file.read_text())
            ]
        assert kube.objects == {}
        if fails:
            kube.failing.add("deit-stage1")
        done = subprocess.run(
            ["bash", str(files / "submit.sh")], env=environ, capture_output=True, text=True, timeout=300
        )
        made = [path.rsplit("/", 2)[-2:] for path in kube.objects]
        first = "/apis/batch/v1/namespaces/team/jobs/deit-stage1"
        assert kube.looks[first] == LOOKS
        assert made[:2] == [["configmaps", "deit-config"], ["jobs", "deit-stage1"]]
        assert made[2:] == ([] if fails else [["services", "deit-stage2"], ["jobs", "deit-stage2"]])
        assert done.returncode == int(fails) and ("stage 1 failed" in done.stderr) is fails
        job = next(each for each in objects(files) if each["metadata"]["name"] == "deit-stage1")
        assert kube.objects[first]["spec"] == job["spec"]


def _kubeconfig(url: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "x", "cluster": {"server": url}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "users": [{"name": "x", "user": {}}],
            "current-context": "x",
        }
    )
