"""Both stages on a Ray cluster: what the drivers that `cskd launch ray` writes call.

An actor of stage 1 is a process that works as `cskd cache-teacher` does, and knows no other. Ray restarts one that dies, and gives
it its call again: it goes on from what is committed, and from the drafts of the one before. Of stage 2 each actor runs torchrun on
a machine of its own; when one is lost all begin again, and the run resumes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from cskd.config import load_config
from cskd.config.load import config_text
from cskd.errors import ConfigError, CskdError, fitted, one_line, said
from cskd.files.temporary import temporary_folder
from cskd.machine.ending import logged
from cskd.machine.launch import WORKER, WORKERS, launched, without_launch
from cskd.pipeline.cache_teacher import CacheReport, cache_teacher
from cskd.pipeline.show.progress import Progress, say

TELL_SECONDS = 1.0  # between two words of an actor on how far it is
LOOK_SECONDS = 1.0  # between two looks of the driver


@dataclass(frozen=True)
class Pool:
    """config: a file that the driver sees; its text goes to the actors, so their machines need not. folder: where they work, since
    relative paths in it are of that. cpus, gpus, memory_gib: of an actor. extra: more of Ray's options for one."""

    config: str
    sets: list[str]
    folder: str
    address: str = "auto"
    actors: int = 4
    cpus: int = 8
    gpus: int = 1
    memory_gib: int | None = None
    retries: int = 5
    env: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def stage1(self) -> NoReturn:
        """Make the cache, and leave with an exit code."""
        _leave(lambda: _said(self.make_cache()))

    def stage2(self) -> NoReturn:
        """Train, and leave with an exit code."""
        _leave(self.train)

    def make_cache(self) -> CacheReport:
        """Stage 1.

        Raises:  ConfigError where there is no Ray; what an actor found wrong, if a user can mend it; CskdError when all died.
        """
        ray = self._connected()
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Board).remote()
        actor = ray.remote(**self._options(), max_restarts=self.retries, max_task_retries=self.retries)(_Worker)
        text = config_text(self.config)
        actors = [actor.remote(number, self.actors, self.folder) for number in range(self.actors)]
        calls = {one.work.remote(text, self.sets, board): number for number, one in enumerate(actors)}
        reports: list[CacheReport] = []
        lost: list[str] = []
        try:
            with Progress("cache-teacher", 0, "views") as progress:
                while calls:
                    done, _ = ray.wait(list(calls), timeout=LOOK_SECONDS)
                    for call in done:
                        self._take(ray, call, calls.pop(call), reports, lost)
                    seen, progress.total, begun = ray.get(board.state.remote())
                    progress.update(seen, actors=f"{begun} of {self.actors}")
        finally:
            for one in [*actors, board]:
                ray.kill(one)
        if not reports:
            raise CskdError(fitted(f"all {self.actors} actors died ({lost[0]}); the same command goes on"))
        return reports[0]

    def _take(self, ray: Any, call: Any, number: int, reports: list[CacheReport], lost: list[str]) -> None:
        try:
            kind, what = ray.get(call)
        except ray.exceptions.RayError as e:
            lost.append(f"actor {number}: {one_line(e, 100)}")
            say([f"{lost[-1]}; the others take up its work"])
            return
        if kind == "error":
            raise CskdError(fitted(f"actor {number}: {what}"))
        reports.append(CacheReport(**what))

    def train(self) -> None:
        """Stage 2. Raises CskdError when a machine's torchrun fails, or machines are lost more often than `retries`."""
        ray = self._connected()
        node = ray.remote(**self._options())(_Node)
        for again in range(self.retries, -1, -1):
            group = ray.util.placement_group([self._bundle()] * self.actors, strategy="STRICT_SPREAD")
            nodes: list[Any] = []
            try:
                if not group.wait(60):
                    say([f"waiting for {self.actors} machines with {self._bundle()} each"])
                ray.get(group.ready())
                strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
                for i in range(self.actors):
                    nodes.append(
                        node.options(scheduling_strategy=strategy(group, placement_group_bundle_index=i)).remote(
                            self.folder
                        )
                    )
                endpoint = ray.get(nodes[0].endpoint.remote())
                text = config_text(self.config)
                codes = ray.get([one.train.remote(text, self.sets, self._torchrun(endpoint)) for one in nodes])
                if bad := [code for code in codes if code]:
                    raise CskdError(
                        f"stage 2 ended with exit code {bad[0]}, for the reason above; run this again to go on"
                    )
                return
            except ray.exceptions.RayError as e:
                if not again:
                    raise CskdError(
                        fitted(f"a machine of stage 2 was lost: {one_line(e, 100)}; the same command goes on")
                    ) from e
                say([f"a machine was lost; stage 2 begins again from its last state: {one_line(e, 100)}"])
            finally:
                for one in nodes:
                    ray.kill(one)
                ray.util.remove_placement_group(group)

    def _connected(self) -> Any:
        try:
            import ray
            import ray.util.scheduling_strategies
        except ModuleNotFoundError:
            raise ConfigError("ray is not installed here; pip install 'cskd[ray]'") from None
        load_config(self.config, self.sets)
        try:
            if not ray.is_initialized():
                ray.init(address=self.address, log_to_driver=True, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise ConfigError(
                fitted(
                    f"no Ray cluster at {self.address!r} ({one_line(e, 80)}); `ray start --head`, or launch with --address"
                )
            ) from e
        has = ray.cluster_resources()
        if lacks := [f"{n:g} {what}" for what, n in self._bundle().items() if has.get(what, 0) < n]:
            say([f"the cluster has no machine with {', '.join(lacks)} by now; this waits for one"])
        return ray

    def _options(self) -> dict[str, Any]:
        memory = {} if self.memory_gib is None else {"memory": self.memory_gib << 30}
        env = {"runtime_env": {"env_vars": self.env}} if self.env else {}  # is there before torch is loaded
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory, **env, **self.extra}

    def _bundle(self) -> dict[str, float]:
        options = self._options()
        bundle = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
        return {name: value for name, value in {**bundle, **options.get("resources", {})}.items() if value}

    def _torchrun(self, endpoint: str) -> list[str]:
        """Its options, of which there are none where one process does."""
        ranks = max(1, self.gpus)
        if self.actors * ranks == 1:
            return []
        run = ["--nnodes", str(self.actors), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        return [*run, "--rdzv-id", "cskd", "--rdzv-endpoint", endpoint]


class _Board:
    """How far the actors are: the one that knows most counts."""

    def __init__(self) -> None:
        self._seen = self._total = 0
        self._begun: set[int] = set()

    def tell(self, number: int, seen: int, total: int) -> None:
        self._begun.add(number)
        self._seen, self._total = max(self._seen, seen), total

    def state(self) -> tuple[int, int, int]:
        return self._seen, self._total, len(self._begun)


class _Worker:
    """Stage 1 in this process, from the place of its number on."""

    def __init__(self, number: int, count: int, folder: str) -> None:
        os.chdir(folder)
        without_launch(os.environ)
        os.environ |= {WORKER: str(number), WORKERS: str(count)}
        self._number = number

    def work(self, text: str, sets: list[str], board: Any) -> tuple[str, Any]:
        last = 0.0

        def tell(made: int, seen: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= TELL_SECONDS or seen == total:
                last = time.monotonic()
                board.tell.remote(self._number, seen, total)

        try:
            with _file(text) as config:
                return "report", asdict(cache_teacher(load_config(config, sets), quiet=True, tell=tell))
        except CskdError as e:
            return "error", str(e)
        except OSError as e:
            return "error", said(e)


class _Node:
    """torchrun, or one process alone, on this machine."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        without_launch(os.environ)

    def endpoint(self) -> str:
        """A host and a free port of it."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, text: str, sets: list[str], launcher: list[str]) -> int:
        """Its exit code."""
        # It ends with this actor, whatever ends that.
        bound = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with _file(text) as config:
            # By modules of the actor's Python: the programs of an environment need not be on PATH, nor in its folder.
            run = [sys.executable, "-m", "torch.distributed.run", *launcher] if launcher else [sys.executable]
            command = [
                *bound,
                *run,
                "-m",
                "cskd",
                "train",
                config,
                *(word for text in sets for word in ("--set", text)),
            ]
            return subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}).returncode  # as a program has it


@contextlib.contextmanager
def _file(text: str) -> Any:
    """The config as a file of this machine."""
    with temporary_folder("launch") as folder:
        path = folder / "config.yaml"
        path.write_text(text, encoding="utf-8")
        yield str(path)


def _leave(work: Callable[[], None]) -> NoReturn:
    """The exit code of a driver, and why in one line."""
    if launched().by == "torchrun":
        sys.exit("this is started once, without torchrun")
    try:
        work()
    except CskdError as e:
        sys.exit(fitted(f"cskd: {e}"))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        sys.exit(fitted(f"cskd: unexpected {one_line(e, 100)}; {logged(e)}"))
    sys.exit(0)


def _said(report: CacheReport) -> None:
    print(f"{report.cache}: sealed, content {report.content_root}")
