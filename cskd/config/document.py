"""docs/CONFIG.md, from the schema: every key with its type, bounds, default, unit and meaning.

python -m cskd.config.document > docs/CONFIG.md     write the page
python -m cskd.config.document --check docs/CONFIG.md     exit status 1 when it is not what the schema says
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import sys
import typing
from pathlib import Path
from typing import Any

from cskd.config.bounds import bound_of, fields, unit_of
from cskd.config.load import describe
from cskd.config.schema import Config

_HEAD = """# Config keys

This page is generated from [cskd/config/schema.py](../cskd/config/schema.py); change it there, then run
`python -m cskd.config.document > docs/CONFIG.md`. A key is written in YAML in its section, or as `--set section.key=value`. A
value outside its bounds is refused before anything is read or written. Conditions over several keys are refused in the same
way; the message names them.
"""
_COLUMNS = ("key", "type", "bounds", "default", "unit", "meaning")


def page() -> str:
    """The whole page, as Markdown."""
    sections = {name: kind for name, kind in fields(Config).items() if dataclasses.is_dataclass(kind)}
    pages = [_HEAD]
    for name, kind in sections.items():
        pages.append(_section(name, typing.cast(type, kind)))
        for key, of in typing.get_type_hints(kind).items():
            if typing.get_origin(of) is list and dataclasses.is_dataclass(item := typing.get_args(of)[0]):
                pages.append(_section(f"{name}.{key}[]", typing.cast(type, item)))
    return "\n".join(pages)


def _section(name: str, section: type) -> str:
    lines = [f"## {name}", "", inspect.getdoc(section) or "", "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    plain, default, meaning = typing.get_type_hints(section), section(), meanings(section)
    for key, kind in fields(section).items():
        shown = json.dumps(getattr(default, key))
        lines.append(
            _row([f"`{name}.{key}`", describe(plain[key]), bound_of(kind), f"`{shown}`", unit_of(kind), meaning[key]])
        )
    return "\n".join([*lines, ""])


def meanings(section: type) -> dict[str, str]:
    """The text below each field of a section, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(section)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _row(cells: Any) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(page(), end="")
        return 0
    flag, path = arguments
    if flag == "--check" and Path(path).read_text(encoding="utf-8") == page():
        return 0
    print(f"{path} is not what the schema says; run: python -m cskd.config.document > {path}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
