"""Promises of docs/CONFIG.md: every key is on it, and it says what the schema says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from cskd.config import Config
from cskd.config.bounds import fields
from cskd.config.document import main, meanings, page

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    name: kind for name, kind in fields(Config).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def test_every_field_of_every_section_has_a_meaning() -> None:
    for section in SECTIONS.values():
        assert list(meanings(section)) == list(fields(section))


def test_the_page_of_config_keys_is_what_the_schema_says() -> None:
    path = ROOT / "docs/CONFIG.md"
    assert path.read_text(encoding="utf-8") == page(), f"python -m cskd.config.document > {path.relative_to(ROOT)}"
    assert main(["--check", str(path)]) == 0


def test_an_old_page_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "CONFIG.md"
    path.write_text(page().replace("65,536", "65,537"))
    assert main(["--check", str(path)]) == 1
    assert "python -m cskd.config.document >" in capsys.readouterr().err


def test_the_page_is_printed_without_torch() -> None:
    code = "import sys, cskd.config.document as d; d.main([]); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == page()
