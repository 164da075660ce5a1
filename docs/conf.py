"""Sphinx: `sphinx-build -W docs OUT` makes the site. Pages are Markdown; the README is its first page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from cskd.cli import app

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
project = "cskd"
author = copyright = "the authors of cskd"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "cskd"
html_show_sourcelink = False
exclude_patterns = ["**/tally.jsonl", "results/analysis/*.json"]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True


PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}  # files of the root


def _read_source(app: Any, name: str, source: list[str]) -> None:
    """A page as the site has it: files of the root where their place is marked, and links that stay inside the site."""
    page = re.sub(r"<!-- file (\S+) -->", lambda m: _linked((ROOT / m[1]).read_text(encoding="utf-8"), ROOT), source[0])
    page = page.replace("<!-- commands -->", _commands())
    if name == "decisions/README":
        page += "\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```\n"
    source[0] = _linked(page, (DOCS / name).parent)


def _linked(text: str, folder: Path) -> str:
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#|/)([^)#\s]+)(#[^)]*)?\)", lambda m: _link(m, folder), text)


def _link(link: re.Match[str], folder: Path) -> str:
    """One link of a file in `folder`, from the root of the site; to a file that is no page, its name."""
    words, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
    if target.is_relative_to(DOCS):
        return f"[{words}](/{target.relative_to(DOCS).as_posix()}{anchor})"
    if target.parent == ROOT and target.name in PAGES:
        return f"[{words}](/{PAGES[target.name]}.md{anchor})"
    if not target.exists():
        return link[0]  # and Sphinx warns of it
    return f"`{target.relative_to(ROOT).as_posix()}`"


def _commands() -> str:
    """Every command with its options, in the words of `cskd COMMAND --help`."""
    group: Any = typer.main.get_command(app)
    return "\n".join(_command(name, command) for name, command in sorted(group.commands.items()))


def _command(name: str, command: Any) -> str:
    context = command.make_context(f"cskd {name}", [], resilient_parsing=True)
    options = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    rows = "".join(f"| `{names}` | {_cell(text)} |\n" for names, text in options)
    usage = " ".join([f"cskd {name}", *command.collect_usage_pieces(context)])
    return f"## {name}\n\n{command.help or ''}\n\n```text\n{usage}\n```\n\n| option | |\n|---|---|\n{rows}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def _paragraphs(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings say `Args:    text` with the text's next lines below it: each such part is a paragraph here."""
    out: list[str] = []
    in_part = False
    for line in lines:
        if part := re.match(r"(Args|Returns|Raises|Source|Shapes): +(?=\S)", line):
            out += ["", f"**{part[1]}.** {line[part.end() :]}"]
            in_part = True
        elif in_part and line.startswith(" "):
            out.append(line.strip())
        else:
            in_part = False
            out.append(line)
    lines[:] = out


def setup(app: Any) -> None:
    app.connect("source-read", _read_source)
    app.connect("autodoc-process-docstring", _paragraphs)
