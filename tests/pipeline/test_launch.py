"""`cskd launch`: what is written is what shells and clusters read back, word for word, and what can't be is refused in a line."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cskd import cli
from cskd.errors import ConfigError, CskdError, PathError
from cskd.machine.launch import WORKER, launched, without_launch, worker
from cskd.pipeline.launch import job as launch_job
from cskd.pipeline.launch.launch import LaunchReport, launch
from cskd.pipeline.launch.options import Cluster, Options, merge, name_of

NAMES = ["plain.yaml", "it's two.yaml", 'a "b" $HOME `id`.yaml', "$(touch x); & #.yaml", "- -é.yaml"]
SETS = ["recipe.seed=3", 'train.output=it\'s $HOME "x" `id` \\ #']
IN_PODS = Options(image="registry/cskd:1", volume=["data:/data"])
STUB = '#!/bin/bash\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$CALLS"\n'


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, whose name needs quotes; programs that note their arguments; a config."""
    folder = tmp_path / "it's $HOME"
    (folder / "bin").mkdir(parents=True)
    for program in ("cskd", "torchrun", "sbatch", "scontrol", "kubectl", "apptainer", "srun", "python"):
        (folder / "bin" / program).write_text(STUB)
        (folder / "bin" / program).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder / "calls"))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    write_config(folder, "my.yaml")
    return folder


def write_config(folder: Path, name: str) -> Path:
    text = (
        "data: {train: train, val: val}\nteacher: {model: 'net.py:build'}\ncache: {path: cache}\ntrain: {output: run}\n"
    )
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def calls(folder: Path) -> list[list[str]]:
    """Programs that were called, each with its arguments."""
    found: list[list[str]] = []
    programs = {path.name for path in (folder / "bin").iterdir()}
    for word in (folder / "calls").read_text().split("\0")[:-1]:
        if word in programs and (not found or found[-1][0] != "torchrun"):
            found.append([])
        found[-1].append(word)
    return found


def write(cluster: Cluster, options: Options, name: str = "my.yaml", sets: list[str] | None = None) -> LaunchReport:
    return launch(cluster, Path(name), sets, Path("out"), options)


def shown(cluster: Cluster, options: Options, sets: list[str] | None = None) -> LaunchReport:
    """The same, and nothing is written."""
    return launch(cluster, Path("my.yaml"), sets, Path("out"), options, dry_run=True)


def run(script: str) -> int:
    return subprocess.run(["bash", script], timeout=120, stdout=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_script_starts_the_command_word_for_word(work: Path, name: str) -> None:
    path = write_config(work, name)
    variables = ["A=it's $HOME", 'B="b" `id`', "C="]
    (work / "bin/cskd").write_text(STUB + 'printf "%s\\0" "$A" "$B" "$C" "$PWD" >> "$CALLS"\nexit 3\n')
    write("slurm", Options(env=variables, gpus=4, node_gpus=1, setup=['export A="$A!"']), name, SETS)
    sets = [word for text in SETS for word in ("--set", text)]
    shell = ["it's $HOME!", '"b" `id`', "", str(work)]
    assert run("out/stage1.sbatch") == 3
    assert run("out/stage2.sbatch") == 3
    assert calls(work) == [
        ["cskd", "cache-teacher", str(path), *sets, "--devices", "all", *shell],
        ["cskd", "train", str(path), *sets, *shell],
    ]
    assert not (work / "x").exists()


def test_stage_2_is_torchrun_on_one_machine_or_under_srun_on_several(work: Path) -> None:
    write("slurm", Options(gpus=2))
    assert run("out/stage2.sbatch") == 0
    (one,) = calls(work)
    assert one[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    assert one[4:] == ["--no-python", "cskd", "train", str(work / "my.yaml")]
    (work / "calls").unlink()
    (work / "bin/scontrol").write_text('#!/bin/bash\nprintf "n1\\nn2\\n"\n')
    (work / "bin/srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nSLURM_NODEID=1 "$@"\n')
    launch("slurm", Path("my.yaml"), SETS, Path("out"), Options(gpus=2, nodes=3), force=True)
    assert run("out/stage2.sbatch") == 0
    (several,) = calls(work)
    assert several[:3] == ["torchrun", "--rdzv-conf", "is_host=0"]
    where = several[several.index("--rdzv-id") :]
    assert where[:5] == ["--rdzv-id", "9", "--rdzv-endpoint", "n1:20009", "--no-python"]
    assert where[5:] == ["cskd", "train", str(work / "my.yaml"), *(w for text in SETS for w in ("--set", text))]


def test_before_its_time_is_over_a_task_ends_its_work_and_is_queued_again(work: Path) -> None:
    (work / "bin/cskd").write_text(STUB + "trap 'exit 143' TERM\ntouch began\nwhile :; do sleep 0.01; done\n")
    write("slurm", Options())
    for signum, queued in ((signal.SIGUSR1, [["scontrol", "requeue", "7_2"]]), (signal.SIGTERM, [])):
        process = subprocess.Popen(["bash", "out/stage1.sbatch"], stdout=subprocess.DEVNULL)
        while not (work / "began").exists():
            time.sleep(0.005)
        process.send_signal(signum)
        assert process.wait(120) == 143
        assert calls(work)[1:] == queued
        (work / "calls").unlink()
        (work / "began").unlink()


def test_work_that_ended_well_at_the_last_moment_is_not_queued_again(work: Path) -> None:
    (work / "bin/cskd").write_text(STUB + "trap 'exit 0' TERM\ntouch began\nwhile :; do sleep 0.01; done\n")
    write("slurm", Options())
    process = subprocess.Popen(["bash", "out/stage1.sbatch"])
    while not (work / "began").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0 and len(calls(work)) == 1


def test_a_signal_right_after_the_work_was_begun_finds_it(work: Path) -> None:
    (work / "bin/cskd").write_text(STUB + "trap 'exit 0' TERM\nwhile :; do sleep 0.01; done\n")
    write("slurm", Options())
    script = work / "out/stage1.sbatch"
    before, line, after = script.read_text().partition("work=$!\nwait")
    script.write_text(f"{before}sleep 0.3; kill -USR1 $$\n{line}{after}")  # bash has not been told which process it is
    assert subprocess.run(["bash", str(script)], timeout=20).returncode == 0 and len(calls(work)) == 1


def test_stage_2_is_submitted_to_begin_after_stage_1(work: Path) -> None:
    (work / "bin/sbatch").write_text(STUB + "echo '11;cluster'\n")
    report = launch("slurm", Path("my.yaml"), None, None, Options(name="x"), submit=True)
    assert report.submitted and Path(report.run.split("'", 1)[1].rsplit("/", 1)[0]).name == "x"
    first, second = calls(work)
    assert first == ["sbatch", "--parsable", "stage1.sbatch"]
    assert second[2:] == ["--dependency=afterok:11", "--kill-on-invalid-dep=yes", "stage2.sbatch"]
    (work / "bin/sbatch").write_text("#!/bin/bash\nexit 5\n")
    with pytest.raises(CskdError, match=r"submit\.sh ended with exit code 5"):
        launch("slurm", Path("my.yaml"), None, None, Options(name="x"), submit=True)


def test_directives_say_what_was_asked_for_and_quote_what_sbatch_would_split(work: Path) -> None:
    options = Options(
        workers=3, gpus=2, cpus=5, memory=7, time="1-02:00:00", partition="a b", extra=["#SBATCH --qos=x"]
    )
    write("slurm", replace(options, nodes=4, node_gpus=8, image="x.sif"))
    head = [line for line in Path("out/stage1.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert head[0] == "#SBATCH --job-name=my-stage1" and head[-1] == "#SBATCH --qos=x"
    expected = ["--array=0-2", "--gpus-per-node=2", "--cpus-per-task=10", "--mem=14G", "--time=1-02:00:00", "--requeue"]
    assert {f"#SBATCH {word}" for word in [*expected, '--partition="a b"', "--signal=B:USR1@120"]} < set(head)
    assert f'#SBATCH --output="{work}/out/logs/stage1-%A_%a.log"' in head and (work / "out/logs").is_dir()
    second = Path("out/stage2.sbatch").read_text()
    assert (
        "--nodes=4" in second and "--gpus-per-node=8" in second and "exec apptainer exec --nv x.sif torchrun" in second
    )


def manifests(options: Options, sets: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """The objects of each file."""
    report = shown("k8s", options, sets)
    return {
        Path(name).name: list(yaml.safe_load_all(text)) for name, text in report.files.items() if name.endswith(".yaml")
    }


def test_an_indexed_job_has_the_config_and_the_words_of_the_command_and_no_shell(work: Path) -> None:
    extra = "{spec: {template: {spec: {nodeSelector: {a.b/c: d}, volumes: [{name: more, emptyDir: {}}]}}}}"
    options = replace(IN_PODS, workers=5, gpus=2, memory=8, env=["A=$(B) $C"], extra=[extra], namespace="team")
    made = manifests(options, SETS)
    (held,) = made["config.yaml"]
    assert held["data"]["config.yaml"] == (work / "my.yaml").read_text()
    (first,) = made["stage1.yaml"]
    spec, pod = first["spec"], first["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert (first["metadata"]["namespace"], pod["nodeSelector"]) == ("team", {"a.b/c": "d"})
    assert [volume["name"] for volume in pod["volumes"]] == ["volume0", "config", "shm", "more"]
    (container,) = pod["containers"]
    words = [text.replace("$$", "$") for text in container["command"]]  # as Kubernetes does
    assert words == [
        "cskd",
        "cache-teacher",
        "/etc/cskd/config.yaml",
        "--set",
        SETS[0],
        "--set",
        SETS[1],
        "--devices",
        "all",
    ]
    assert container["env"] == [{"name": "CSKD_WORKERS", "value": "5"}, {"name": "A", "value": "$$(B) $$C"}]
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 2}
    assert container["resources"]["requests"] == {"cpu": "16", "memory": "16Gi"}


def test_pods_of_stage_2_find_each_other_by_a_service(work: Path) -> None:
    service, second = manifests(replace(IN_PODS, nodes=3, name="deit"))["stage2.yaml"]
    pod = second["spec"]["template"]["spec"]
    words = pod["containers"][0]["command"]
    assert pod["subdomain"] == service["metadata"]["name"] == "deit-stage2" and service["spec"]["clusterIP"] == "None"
    assert words[words.index("--rdzv-endpoint") + 1] == f"{second['metadata']['name']}-0.{pod['subdomain']}:29500"
    (alone,) = manifests(replace(IN_PODS, name="deit"))["stage2.yaml"]
    assert alone["spec"]["template"]["spec"]["containers"][0]["command"][:2] == ["cskd", "train"]


@pytest.mark.parametrize(("conditions", "code"), [("SuccessCriteriaMet Complete", 0), ("FailureTarget Failed", 1)])
def test_stage_2_is_made_when_the_job_of_stage_1_is_complete_and_only_then(
    work: Path, conditions: str, code: int
) -> None:
    write("k8s", replace(IN_PODS, namespace="team"))
    (work / "bin/kubectl").write_text(STUB + f'[ "$1" = get ] && echo "{conditions}"\nexit 0\n')
    assert run("out/submit.sh") == code
    assert calls(work)[0] == ["kubectl", "apply", "--namespace", "team", "-f", "config.yaml", "-f", "stage1.yaml"]
    assert (calls(work)[-1][-1] == "stage2.yaml") is (code == 0)


def test_a_driver_of_ray_is_python_that_says_what_was_asked_for(work: Path) -> None:
    options = Options(
        workers=6, cpus=3, retries=2, env=["A=it's"], extra=["{resources: {big: 1}}"], address="1.2.3.4:5"
    )
    write("ray", options, sets=SETS)
    for stage, actors in ((1, 6), (2, 1)):
        text = Path(f"out/stage{stage}.py").read_text()
        (made,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.keywords]
        given = {word.arg: ast.literal_eval(word.value) for word in made.keywords}
        assert (given["actors"], given["sets"], given["folder"]) == (actors, SETS, str(work))
        assert given["env"] == {"A": "it's"} and given["extra"] == {"resources": {"big": 1}}
    assert run("out/submit.sh") == 0
    assert calls(work) == [["python", "stage1.py"], ["python", "stage2.py"]]


def test_what_is_there_already_is_kept_unless_force_is_given(work: Path) -> None:
    first = write("slurm", Options())
    assert first.files == write("slurm", Options()).files
    with pytest.raises(PathError, match="is there already, with another text; give --force"):
        write("slurm", Options(workers=9))
    assert not shown("slurm", Options(workers=9)).written
    assert all(Path(name).read_text() == text for name, text in first.files.items())
    forced = launch("slurm", Path("my.yaml"), None, Path("out"), Options(workers=9), force=True)
    assert all(Path(name).read_text() == text for name, text in forced.files.items())


@pytest.mark.parametrize(
    ("cluster", "options", "says"),
    [
        ("slurm", Options(volume=["a:/b"]), "--volume is of k8s, and this is for slurm"),
        ("slurm", Options(retries=3), "--retries is of k8s and ray"),
        ("ray", Options(partition="x"), "--partition is of slurm"),
        ("k8s", replace(IN_PODS, setup=["x"]), "--setup is of slurm"),
        ("k8s", replace(IN_PODS, time="1:00:00"), "--time is of slurm"),
        ("k8s", Options(volume=["a:/b"]), "give --image IMAGE, too"),
        ("k8s", Options(image="x"), "give --volume CLAIM:/PATH, too"),
        ("k8s", replace(IN_PODS, volume=["data:rel"]), "expected CLAIM:/PATH"),
        ("k8s", replace(IN_PODS, namespace="A_b"), "--namespace 'A_b' is not usable"),
        ("k8s", replace(IN_PODS, extra=["[1]"]), "is no mapping in YAML"),
        ("k8s", replace(IN_PODS, extra=["{"]), "is no mapping in YAML"),
        ("ray", Options(extra=["#SBATCH -x"]), "is no mapping in YAML"),
        ("ray", Options(gpus=2), "an actor of Ray has one GPU"),
        ("slurm", Options(name="A b"), "expected lower-case letters"),
        ("k8s", replace(IN_PODS, name="2024"), "a letter first"),
        ("slurm", Options(name="a" * 41), "expected at most 40"),
        ("slurm", Options(time="soon"), "expected 1-12:00:00"),
        ("slurm", Options(env=["1A=x"]), "expected NAME=VALUE"),
        ("slurm", Options(env=["HOME"]), "has no value"),
        ("slurm", Options(env=["A=x\ny"]), "has a line break"),
        ("slurm", Options(setup=["a\nb"]), "has a line break"),
        ("slurm", Options(account=""), "is empty"),
        ("slurm", Options(extra=["--qos=x"]), "is no directive of sbatch"),
        ("slurm", Options(extra=["#SBATCH --x\nrm"]), "has a line break"),
    ],
)
def test_an_option_that_is_of_no_use_is_refused_in_a_line(
    work: Path, cluster: Cluster, options: Options, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        write(cluster, options)
    assert says in str(caught.value) and len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_without_the_clusters_program_nothing_is_submitted(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(work / "none"))
    for cluster, options, program in (
        ("slurm", Options(), "sbatch"),
        ("k8s", IN_PODS, "kubectl"),
        ("ray", Options(), "ray"),
    ):
        with pytest.raises(ConfigError, match=f"this machine has no {program}; leave --submit out"):
            launch(cluster, Path("my.yaml"), None, Path("out"), options, submit=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--dry-run writes nothing"):
        launch("slurm", Path("my.yaml"), None, Path("out"), Options(), submit=True, dry_run=True)


def test_stage_1_is_written_only_where_there_is_one(work: Path) -> None:
    alone = ["teacher.model=", "loss.method=none"]
    assert {Path(n).name for n in shown("slurm", Options(), alone).files} == {"stage2.sbatch", "submit.sh"}
    with pytest.raises(ConfigError, match="has no stage 1"):
        shown("slurm", Options(only="stage1"), alone)
    assert "dependency" not in shown("slurm", Options(only="stage1")).files[str(work / "out/submit.sh")]


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (Options(nodes=2), "no torchrun next to"),
        (Options(gpus=2), "no torchrun next to"),
        (Options(gpus=0), ""),
        (Options(only="stage1"), ""),
        (Options(nodes=2, image="x.sif"), ""),
    ],
)
def test_a_program_that_the_scripts_call_and_that_is_not_here_is_noted(
    work: Path, monkeypatch: pytest.MonkeyPatch, options: Options, gone: str
) -> None:
    assert not [note for note in shown("slurm", options).notes if "the scripts call it" in note]
    (work / "bin/torchrun").unlink()
    monkeypatch.setenv("PATH", str(work / "none"))
    found = [note for note in shown("slurm", options).notes if "the scripts call it" in note]
    assert bool(found) == bool(gone) and all(gone in note for note in found)


def test_what_other_nodes_do_not_see_is_noted(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "1 1 0:1 / / rw - {} none rw\n"
    monkeypatch.setattr(launch_job, "mounts", lambda: line.format("ext4"))
    (note,) = shown("slurm", Options(), sets=["data.val="]).notes
    assert "cache.path (ext4)" in note and "CONFIG (ext4)" in note and "data.val" not in note
    (note,) = shown("slurm", Options(only="stage1")).notes
    assert "train.output" not in note
    monkeypatch.setattr(launch_job, "mounts", lambda: line.format("nfs4"))
    assert shown("slurm", Options(only="stage1")).notes == []
    sets = ["cache.path=/data/cache", "data.train=train", "train.output=../run", "teacher.model=resnet18", "data.val="]
    (note,) = shown("k8s", IN_PODS, sets=sets).notes
    assert note.endswith("goes with the pod: train.output (../run)")


def test_a_variable_of_the_config_that_workers_lack_is_noted_and_that_of_env_counts(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (work / "my.yaml").read_text().replace("val: val", "val: '${PLACE:-val}'")
    (work / "my.yaml").write_text(f"# ${{OF_A_COMMENT}}\n{text}")
    monkeypatch.setenv("OF_A_COMMENT", "x")
    monkeypatch.delenv("PLACE", raising=False)
    assert not [note for note in shown("ray", Options()).notes if "the config reads" in note]
    monkeypatch.setenv("PLACE", "/here/only")
    line = "the config reads PLACE, set here and not in {}; give --env PLACE=..."
    assert line.format("pods") in shown("k8s", IN_PODS).notes and line.format("actors") in shown("ray", Options()).notes
    assert not [note for note in shown("slurm", Options()).notes if "PLACE" in note]  # sbatch hands on its environment
    notes = shown("k8s", replace(IN_PODS, env=["PLACE=/data/val"])).notes
    assert not [note for note in notes if "PLACE" in note or "/here/only" in note or "/data/val" in note]
    assert os.environ["PLACE"] == "/here/only"


def test_the_command_line_takes_every_option(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    given = ["--workers", "2", "--env", "A=1", "--env", "B=2", "--set", "cache.views=4", "--output", "o", "--json"]
    monkeypatch.setattr(sys, "argv", ["cskd", "launch", "slurm", "my.yaml", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    facts = json.loads(capfd.readouterr().out)
    assert not ended.value.code and "--array=0-1" in facts["files"][str(work / "o/stage1.sbatch")]
    monkeypatch.setattr(sys, "argv", ["cskd", "launch", "slurm", "my.yaml", "--workers", "0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_names_and_extras_are_made_of_what_is_given() -> None:
    assert [name_of(text) for text in ("My_Config 2", "é", "-a-", "x" * 60)] == ["my-config-2", "cskd", "a", "x" * 40]
    assert merge({"a": {"b": [1], "c": 1}}, {"a": {"b": [2], "c": 3}, "d": 4}) == {"a": {"b": [1, 2], "c": 3}, "d": 4}
    named = merge({"a": [{"name": "x", "b": 1}, {"name": "y"}]}, {"a": [{"name": "x", "c": 2}, {"name": "z"}, 3]})
    assert named == {"a": [{"name": "x", "b": 1, "c": 2}, {"name": "y"}, {"name": "z"}, 3]}


def test_a_launcher_without_a_variable_of_its_own_gives_a_worker_its_number() -> None:
    assert worker({WORKER: "5", "SLURM_ARRAY_TASK_ID": "1"}).number == 5
    environ = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "RANK": "1", "WORLD_SIZE": "2", "PATH": "x"}
    without_launch(environ)
    assert environ == {"SLURM_PROCID": "3", "PATH": "x"} and launched(environ).count == 1


@pytest.mark.parametrize(
    ("cache", "stages"),
    [
        ("s3://bucket/cache", 2),
        ("gs://bucket/cache", 2),
        ("az://box/cache", 2),
        ("hf://datasets/me/cache", 1),
        ("https://host/cache", 1),
    ],
)
def test_a_cache_on_an_object_store_has_a_stage_1_and_one_that_is_only_read_has_none(
    work: Path, cache: str, stages: int
) -> None:
    made = write("slurm", Options(), sets=[f"cache.path={cache}"])
    assert sum(name.endswith(".sbatch") for name in made.files) == stages
