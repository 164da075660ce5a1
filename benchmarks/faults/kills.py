"""Killed and racing processes: stage 1, training, and both kinds through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cskd.store.cache
from benchmarks.children import KILLED, end_child, start_child
from benchmarks.faults.bench import ROOT, Bench, files, flipped
from benchmarks.faults.damage import all_named
from cskd.config import to_yaml
from cskd.files.claims import Claims
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.store.commit import publish

RACERS = 4
UNITS = 6  # of the whole cache
EPOCHS, STEPS = 3, 6  # of training; steps of an epoch


def kills(bench: Bench, count: int) -> Counter[str]:
    """kill -9 of stage 1 with two workers, one to three times in a row; then to the end. Half of them at any moment of a run,
    which begins with what takes longest, half while units are written: as soon as so many files of them are there."""
    counts, seconds = Counter(kills=0, kills_wrong=0), bench.seconds
    while counts["kills"] < count:
        cache = bench.fresh("killed")
        for _ in range(bench.rng.choice((1, 1, 2, 3))):
            if bench.rng.random() < 0.5:
                status, answer = bench.make(cache, kill_after=bench.rng.uniform(0.0, seconds), workers=2)
                seconds *= 1.01 if status == KILLED else 0.9  # a busy machine becomes faster and slower
            else:
                wanted = _written(cache) + bench.rng.randint(1, 2 * UNITS)
                delay = bench.rng.uniform(0.0, 0.003)
                armed = lambda cache=cache, wanted=wanted: _written(cache) >= wanted  # noqa: E731
                status, answer = bench.make(cache, kill_after=delay, workers=2, armed=armed)
            counts["kills_wrong"] += status not in (KILLED, 0) or (status == 0 and "value" not in (answer or {}))
            if status == KILLED:
                counts["kills"] += 1
                counts[f"kills_{_when(cache)}"] += 1
        counts["kills_wrong"] += not bench.resumed(cache, workers=bench.rng.choice((0, 2)))
    return counts


def _written(cache: Path) -> int:
    """Unit files and records, finished or not."""
    return sum(len(names) for part in ("units", "commits") for _, _, names in os.walk(cache / part))


def _when(cache: Path) -> str:
    """How far a killed run had come."""
    made = len(list(cache.glob("commits/*/*.json")))
    return "before_the_first_unit" if made == 0 else "between_units" if made < UNITS else "after_the_last_unit"


def races(bench: Bench, count: int) -> Counter[str]:
    """Four processes at once, of which one's record must win for each unit: on one missing unit, and on a cache that is not
    there yet; heeding each other's claims or deaf to them, so that all make the same unit."""
    counts = Counter(races=0, races_wrong=0)
    for i in range(count):
        whole = i % 4 == 3
        cache = bench.fresh("raced", without=None if whole else (bench.rng.randrange(2), bench.rng.randrange(3)))
        answers = at_once(partial(_racer, bench, cache, i % 2 == 1))
        good = all(status == 0 and "value" in answer for status, answer in answers)
        made = [answer["value"] for _, answer in answers] if good else []
        won, tried = sum(m[1] for m in made), sum(m[2] for m in made)
        good = good and {m[0] for m in made} == {bench.root} and won == (UNITS if whole else 1) and bench.sound(cache)
        counts.update(Counter(races=1, races_wrong=not bench.judged(good, cache, answers), races_contested=tried > won))
    return counts


def _racer(bench: Bench, cache: Path, deaf: bool) -> list[Any]:
    """Stage 1 in one of them: content hash, records of its own that count, records it tried to put in place."""
    won = list[bool]()

    def counted(*args: Any) -> bool:
        won.append(publish(*args))
        return won[-1]

    setattr(cskd.store.cache, "publish", counted)  # noqa: B010
    if deaf:
        setattr(Claims, "take", lambda self, name: self._folder / name)  # noqa: B010
    return [cache_teacher(bench.config(cache), quiet=True).content_root, sum(won), len(won)]


def at_once(function: Callable[[], Any], count: int = RACERS) -> list[tuple[int, Any]]:
    """Run in so many children, which begin when all are there; their exit statuses and answers."""
    gate, opener = os.pipe()

    def racer() -> Any:
        os.close(opener)
        os.read(gate, 1)  # until nobody has the other end
        return function()

    children = [start_child(racer) for _ in range(count)]
    os.close(opener)
    os.close(gate)
    return [end_child(child) for child in children]


def training(bench: Bench, count: int) -> Counter[str]:
    """kill -9 of training at a random moment, or before a random step and often before a later one of the same epoch; the newest
    of several states is damaged at times; then to the end."""
    clock = time.perf_counter()
    weights = bench.train("undisturbed")[1]["value"][0]
    seconds = time.perf_counter() - clock
    counts = Counter(training=0, training_wrong=0)
    while counts["training"] < count:
        output = bench.folder / "cut"
        shutil.rmtree(output, ignore_errors=True)
        if bench.rng.random() < 0.5:
            status, _ = bench.train("cut", kill_after=bench.rng.uniform(0.1, 1.0) * seconds)
            seconds *= 1.01 if status == KILLED else 0.9
            counts.update(training=status == KILLED, training_at_any_moment=status == KILLED)
        else:
            step = bench.rng.randrange(EPOCHS * STEPS)
            later = range(step + 1, (step // STEPS + 1) * STEPS)  # of the same epoch; the run goes on before `step`
            steps = [step, *bench.rng.sample(later, min(1, len(later)))]
            struck = [bench.train("cut", kill_at=s)[0] == KILLED for s in steps]
            counts.update(training=sum(struck), training_at_a_step=sum(struck), training_wrong=struck.count(False))
            counts["training_twice_in_an_epoch"] += len(steps) == 2
        states = sorted(output.glob("resume/step-*.safetensors"))
        damaged = len(states) > 1 and bench.rng.random() < 0.3
        if damaged:
            states[-1].write_bytes(flipped(states[-1].read_bytes(), bench.rng))
            counts["training_newest_state_damaged"] += 1
        _, answer = bench.train("cut")
        digest, notes = (answer or {}).get("value", ["", []])
        good = digest == weights and (not damaged or any("is damaged" in note for note in notes))
        counts["training_wrong"] += not good
        if not good:
            print(f"training: {answer}", file=sys.stderr)
    return counts


def cli_kills(bench: Bench, count: int) -> Counter[str]:
    """`cskd cache-teacher` with two workers, killed at any time of its start, or just after it made so many units; once or twice."""
    counts = Counter(cli_kills=0, cli_kills_wrong=0)
    while counts["cli_kills"] < count:
        cache = bench.fresh("cli")
        for _ in range(bench.rng.choice((1, 2))):
            process = start_cli("cache-teacher", config_file(bench, cache, workers=2), "--json")
            units = bench.rng.randrange(-2, UNITS)
            deadline = time.monotonic() + (bench.rng.uniform(0.0, 5.0) if units < 0 else 120.0)
            while process.poll() is None and time.monotonic() < deadline:
                if units >= 0 and (cache / "claims").exists() and len(list(cache.glob("commits/*/*.json"))) >= units:
                    time.sleep(bench.rng.uniform(0.0, 0.1))
                    break
                time.sleep(0.002)
            process.kill()
            process.communicate()
            if process.returncode == KILLED:
                counts["cli_kills"] += 1
                counts[f"cli_kills_{_when(cache)}"] += 1
        again = run_cli("cache-teacher", config_file(bench, cache), "--json")
        good = again[0] == 0 and json.loads(again[1])["content_root"] == bench.root and bench.sound(cache)
        counts["cli_kills_wrong"] += not bench.judged(good, cache, again)
    return counts


def cli_damage(bench: Bench, count: int) -> Counter[str]:
    """A file flipped, cut or removed: `cskd verify` ends with 1 and names it, `cskd repair` brings back every byte."""
    counts = Counter(cli_damage=0, cli_damage_missed=0, cli_damage_repaired_wrong=0)
    for _ in range(count):
        cache = bench.fresh("cli")
        shutil.copytree(bench.cache, cache)
        name = bench.rng.choice(sorted(bench.whole))
        data = bench.whole[name]
        match bench.rng.randrange(3):
            case 0:
                (cache / name).write_bytes(flipped(data, bench.rng))
            # Without its seal a cache is as before it: whole, and said not to be sealed.
            case 1 if name != "sealed.json":
                (cache / name).unlink()
            case _:
                (cache / name).write_bytes(data[: bench.rng.randrange(len(data))])
        code, out, err = run_cli("verify", cache, "--json")
        errors = json.loads(out)["errors"] if out else [err.removeprefix("cskd: ")]
        named = code == 1 and all_named({name: b""}, bench.whole, errors)
        repaired = run_cli("repair", cache, "--json")
        good = repaired[0] == 0 and files(cache) == bench.whole
        counts.update(Counter(cli_damage=1, cli_damage_missed=not bench.judged(named, cache, (name, code, out, err))))
        counts.update(Counter(cli_damage_repaired_wrong=not bench.judged(good, cache, repaired)))
    return counts


def cli_races(bench: Bench, count: int) -> Counter[str]:
    """Four `cskd cache-teacher` at once on one missing unit."""
    counts = Counter(cli_races=0, cli_races_wrong=0)
    for _ in range(count):
        cache = bench.fresh("cli", without=(bench.rng.randrange(2), bench.rng.randrange(3)))
        config = config_file(bench, cache)
        processes = [start_cli("cache-teacher", config, "--json") for _ in range(RACERS)]
        answers = [(process.communicate(timeout=300), process.returncode) for process in processes]
        roots = [json.loads(out)["content_root"] if code == 0 else err for (out, err), code in answers]
        good = set(roots) == {bench.root} and bench.sound(cache)
        counts.update(Counter(cli_races=1, cli_races_wrong=not bench.judged(good, cache, answers)))
    return counts


def config_file(bench: Bench, cache: Path, workers: int = 0) -> Path:
    path = bench.folder / "c.yaml"
    path.write_text(to_yaml(bench.config(cache, workers=workers)))
    return path


def start_cli(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_cli(*arguments: object) -> tuple[int, str, str]:
    """Exit status, and what it printed."""
    process = start_cli(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
