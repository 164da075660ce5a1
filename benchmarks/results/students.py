"""Which students docs/RESULTS.md reports: every run by name, with the overrides that `cskd train` takes.

A run's name is its folder, QUESTION/METHOD/seedN, and the same name gives the same run on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from benchmarks.results import ROOT, results_folder
from cskd.config import Config, load_config
from cskd.config.yaml_text import read_yaml

HERE = Path(__file__).resolve().parent
METHODS = {  # name in tables -> loss section
    "none": ("loss.method=none",),
    "deit-hard": ("loss.method=deit-hard",),
    "deit-soft": ("loss.method=deit-soft",),
    "cskd-linear": ("loss.method=cskd-hard", "loss.decay=linear"),
    "cskd-quadratic": ("loss.method=cskd-hard", "loss.decay=quadratic"),
    "cskd-cosine": ("loss.method=cskd-hard", "loss.decay=cosine"),
    "cskd-soft": ("loss.method=cskd-soft", "loss.decay=linear"),
    "local": ("loss.method=cskd-hard", "loss.decay=local"),
    "global": ("loss.method=cskd-hard", "loss.decay=global"),
}
PRESETS = {  # name in the table of presets -> its config in configs/
    "deit-hard": "cifar10_deit_hard",
    "deit-soft": "cifar10_deit_soft",
    "cskd": "cifar10",
    "dkd": "cifar10_dkd",
    "logit-standardisation": "cifar10_standardised",
    "vkd": "cifar10_vkd",
    "locality-guidance": "cifar10_locality",
    "cskd-locality": "cifar10_cskd_locality",
    "dearkd": "cifar10_dearkd",
    "civt": "cifar10_civt",
}
SECOND = {  # teachers of further caches, by the name in train.caches
    "involution": ("teacher.model=benchmarks/results/involution.py:build", "teacher.kwargs={}"),
}
PRESET_EPOCHS = 15
MAIN = ("none", "deit-hard", "cskd-linear", "local")  # those with most seeds
PLAIN = (  # a student without a distillation token, its class token read by the one head
    "student.model=vit_tiny_patch16_224",
)


@dataclass(frozen=True)
class StudentRun:
    """One student. `question`: few, all, or a variation of one of them; `rank`: those with lower ones are trained first."""

    question: str
    method: str
    seed: int
    config: str = "few.yaml"
    sets: tuple[str, ...] = field(default=(), repr=False)
    online: bool = False  # the teacher runs at every step, for the comparison with the cache
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.question}/{self.method}/seed{self.seed}{'-online' if self.online else ''}"

    @property
    def of_preset(self) -> bool:
        return self.question == "presets" and self.method in PRESETS

    @property
    def folder(self) -> Path:
        return results_folder() / "runs" / self.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """What tells this run from the config it is a run of."""
        method = preset_sets(PRESETS[self.method]) if self.of_preset else METHODS[self.method]
        return (*method, f"train.seed={self.seed}", *self.sets)

    def load(self, more: tuple[str, ...] = ()) -> Config:
        """The whole config of the run."""
        return load_config(HERE / self.config, [*self.overrides, f"train.output={self.folder}", *more])

    @property
    def command(self) -> str:
        """The line that trains it by hand, in the default folder."""
        sets = " ".join(f"--set {quote(s)}" for s in (*self.overrides, f"train.output=runs/results/runs/{self.name}"))
        sets = sets.replace(str(results_folder()), "runs/results")
        return (
            f"cskd train {(HERE / self.config).resolve().relative_to(ROOT)} {sets}{' --online' if self.online else ''}"
        )


def preset_sets(stem: str) -> tuple[str, ...]:
    """What a preset's config says of its loss, and of its targets where `few.yaml` has other ones, as overrides of that.

    One that names the teachers of `few.yaml` itself is trained as it is, from fewer views.
    """
    config = read_yaml((ROOT / "configs" / f"{stem}.yaml").read_text(), stem)
    if config["data"]["train"].endswith("/data/few"):
        return (f"cache.views={PRESET_EPOCHS}",)
    longer = PRESET_EPOCHS / config["train"]["epochs"]
    for term in config["loss"].get("terms", []):
        if "epochs" in term:  # a stage of training keeps its share
            term["epochs"] = [None if edge is None else round(edge * longer) for edge in term["epochs"]]
    sets = tuple(
        f"loss.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config["loss"].items()
    )
    codecs, cache = config["cache"]["codecs"], Path(config["cache"]["path"]).name
    if codecs == ["envelope"]:
        return sets
    folder = results_folder() / "caches" / cache.replace("cifar10", "few")
    return (*sets, f"cache.codecs={json.dumps(codecs)}", f"cache.path={folder}", f"cache.views={PRESET_EPOCHS}")


def all_runs() -> list[StudentRun]:
    """Every run of the sweep, in the order in which they are trained: paired seeds of the main methods first."""
    runs = [
        *(_main(StudentRun("few", m, s, rank=s)) for s in range(5) for m in MAIN),
        *(StudentRun("few", m, s, rank=s) for s in range(3) for m in METHODS if m not in MAIN),
        *(_views(v) for v in (1, 3, 9)),
        *(StudentRun("few-plain", m, s, sets=PLAIN, rank=2 + s) for s in range(2) for m in MAIN),
        *(_short(online) for online in (False, True)),
        *(StudentRun("all", m, s, "all.yaml", rank=3 + 3 * s) for s in range(3) for m in MAIN),
        *(StudentRun("all", m, 0, "all.yaml", rank=6) for m in METHODS if m not in MAIN and "soft" not in m),
        *(_preset(m, s) for s in range(3) for m in ("none", *PRESETS)),
        *(StudentRun("all-plain", m, 0, "all.yaml", sets=PLAIN, rank=7) for m in MAIN),
    ]
    return sorted(runs, key=lambda run: run.rank)


def _views(count: int) -> StudentRun:
    """CSKD from the first `count` views of the cache: each is used again and again."""
    return StudentRun(f"few-views{count}", "cskd-linear", 0, sets=(f"train.views={count}",), rank=2)


def _preset(method: str, seed: int) -> StudentRun:
    """Half the epochs and views of `few`."""
    sets = (f"train.epochs={PRESET_EPOCHS}", "train.warmup_epochs=2", f"train.views={PRESET_EPOCHS}")
    config = "../../configs/cifar10_civt.yaml" if method == "civt" else "few.yaml"
    return StudentRun("presets", method, seed, config, sets, rank=1 + seed)


def _main(run: StudentRun) -> StudentRun:
    """Seed 0 keeps the states of all epochs, for benchmarks.results.analysis."""
    return run if run.seed else replace(run, sets=("train.keep=1000",))


def _short(online: bool) -> StudentRun:
    return StudentRun(
        "few-short", "cskd-linear", 0, sets=("train.epochs=4", "train.eval_every=4"), online=online, rank=2
    )
