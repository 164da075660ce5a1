"""`cskd check`: all that can be looked at before a config is worked with, each line with what was found; nothing is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from cskd.config import read_config
from cskd.config.pins import TEACHER, pinned
from cskd.errors import MOST, CskdError, counted, fitted, printable, shown
from cskd.files.hub import is_hub
from cskd.pipeline.outputs import use_own_node_cache
from cskd.pipeline.precheck import CHECKS, Finding, findings
from cskd.pipeline.setup import Setup, open_cached
from cskd.pipeline.show.progress import print_lines
from cskd.store.manifest import has_cache

_STYLES = {"ok": "green", "wrong": "bold red", "open": "dim"}


@dataclass(frozen=True)
class Row:
    """state: ok; wrong; open: not asked for by the config, or not to be looked at before something else is right."""

    name: str
    state: Literal["ok", "wrong", "open"]
    found: str  # or what is wrong, and the next step
    notes: list[str]


@dataclass(frozen=True)
class ConfigReport:
    """ok: no row is wrong."""

    ok: bool
    wrong: int
    folder: str  # that relative paths are of
    rows: list[Row]


def check_config(path: str | Path, overrides: list[str] | None = None) -> ConfigReport:
    """Look at a config as stage 1 and stage 2 will, on this machine, with its data, teacher and student. No cache is needed, nothing is
    made, and what is wrong with one line keeps no other from being looked at. The teacher is loaded, but its accuracy is not
    measured: stage 1 does that before the first unit."""
    try:
        config, wrong = read_config(path, overrides)
    except CskdError as e:
        return _report([Row("config", "wrong", shown(e), [])])
    rows = [Row("config", "wrong", shown(e), []) for e in wrong] or [Row("config", "ok", str(path), [])]
    try:
        use_own_node_cache(config)
    except CskdError as e:
        rows.append(Row("data.node_cache", "wrong", shown(e), []))
    try:
        config, _ = pinned(config, () if is_hub(config.cache.path) else TEACHER, config.cache.path or ".")
    except (CskdError, OSError) as e:
        return _report([*rows, Row("the hub", "wrong", shown(e), [])])
    setup = Setup(config)
    made = not config.teacher.model and has_cache(config.cache.path)
    if made or is_hub(config.cache.path):  # on the hub it can only be read
        try:
            setup = Setup(config, source=(cache := open_cached(config)))
            rows.append(
                Row(
                    "the cache",
                    "ok",
                    f"{config.cache.path}, {counted(cache.views, 'view')} of {cache.inventory.n:,} images",
                    [],
                )
            )
        except (CskdError, OSError) as e:
            return _report([*rows, Row("the cache", "wrong", shown(e), [])])
    named = [str(e).split(" ")[0].partition("[")[0].rstrip(":") for e in wrong]
    return _report([*rows, *(_row(found, named) for found in findings(CHECKS, setup))])


def _row(found: Finding, wrong_keys: list[str]) -> Row:
    """What was found of a key's default says nothing where the key that was written is wrong."""
    about = [key for key in wrong_keys if key and (key in found.text or key == found.check.name)]
    if about and found.state != "open":
        return Row(found.check.name, "open", f"can't be looked at before {about[0]} is right", [])
    return Row(found.check.name, found.state, fitted(found.text, MOST - 32), found.notes)


def _report(rows: list[Row]) -> ConfigReport:
    wrong = sum(row.state == "wrong" for row in rows)
    return ConfigReport(wrong == 0, wrong, str(Path.cwd()), rows)


def render(report: ConfigReport, console: Console) -> None:
    """The report, a line each, however wide: it is read by grep, too."""
    wide = max(len(row.name) for row in report.rows)
    for row in report.rows:
        mark = "-" if row.state == "open" else row.state
        line = Text(f"{mark:<6} ", _STYLES[row.state]).append(f"{row.name:<{wide}} {printable(row.found)}", "default")
        for text in (line, *(Text(f"{'':<{wide + 8}}note: {printable(note)}", "dim") for note in row.notes)):
            console.print(text, soft_wrap=True, highlight=False)
    verdict = "nothing is wrong" if report.ok else f"{counted(report.wrong, 'line')} to mend"
    print_lines(console, f"{verdict}; relative paths are of {report.folder}")
