"""What a command prints at its end: for people, or as one JSON object."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cskd.errors import printable
from cskd.machine.launch import launched


def print_report(report: Any, as_json: bool, render: Any) -> None:
    """By the first of several ranks. render: what shows it on a console of rich's."""
    if not launched().speaks:
        return
    if as_json:
        print(json.dumps(report.facts if hasattr(report, "facts") else dataclasses.asdict(report)))
    else:
        from rich.console import Console

        render(shown(report), Console())


def shown(value: Any) -> Any:
    """A report whose texts can be shown: names come from other people's files, and may hold what controls a terminal."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {shown(k): shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shown(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: shown(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
