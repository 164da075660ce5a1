"""Promises about the source itself: which way imports flow, what loads what, nothing unsafe, nothing undeclared."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

from tests.documents import DOCUMENTS, blocks

ROOT = Path(__file__).resolve().parent.parent
LINKS = {
    "cli.py": "../cli.py",
    "configs": "../configs",
    "pipeline": "../pipeline",
}  # in cskd/, for what lies at the root
SOURCES = sorted(p for top in ("cskd", "pipeline") for p in (ROOT / top).rglob("*.py") if not p.is_symlink())
SOURCES.append(ROOT / "cli.py")
SCRIPTS = sorted(p for top in ("benchmarks", "examples", "tests") for p in (ROOT / top).rglob("*.py"))
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "annotated_types": "annotated-types",
    "google_crc32c": "google-crc32c",
    "huggingface_hub": "huggingface-hub",
    "importlinter": "import-linter",
    "sklearn": "scikit-learn",
}
PROGRAMS = {
    "furo",
    "mypy",
    "myst-parser",
    "pytest-xdist",
    "ruff",
    "sphinx",
    "types-pyyaml",
}  # of the dev extra: run, never imported
BELOW = {"accelerate", "matplotlib"}  # of the examples extra: imported by another library, or in a notebook
LONGEST = 550  # lines: the ceiling of a spine


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@cache
def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at its top or inside functions."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_imports_keep_to_the_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The contracts stand in pyproject.toml; `lint-imports` says the same."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_no_module_takes_from_the_top_of_the_package_more_than_its_version() -> None:
    """The contracts leave out what `cskd` offers, which may be of any floor."""
    taken = set()
    for path in SOURCES:
        whole = any(isinstance(n, ast.Import) and any(a.name == "cskd" for a in n.names) for n in nodes(path))
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module == "cskd":
                taken |= {f"{named(path)}: {alias.name}" for alias in node.names}
            elif whole and isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cskd":
                taken.add(f"{named(path)}: {node.attr}")
    assert {one for one in taken if not one.endswith(": __version__")} == set()


@pytest.mark.parametrize("module", ["cskd", "cskd.config", "cskd.errors", "cskd.dataset.inventory", "cskd.seeds"])
def test_light_modules_load_no_torch(module: str) -> None:
    run_python(f"import {module}, sys; assert not {{'torch', 'timm', 'zarr'}} & set(sys.modules)")


def test_what_the_package_offers_is_listed_without_loading_it() -> None:
    run_python(
        "import cskd, sys; dir(cskd), cskd.__all__, cskd.CskdError; assert not {'torch', 'numpy'} & set(sys.modules)"
    )


def test_help_loads_no_torch() -> None:
    run_python(
        """
        import sys
        sys.argv = ["cskd", "--help"]
        from cskd import cli
        try:
            cli.main()
        except SystemExit as e:
            assert not e.code, e.code
        assert not {"torch", "timm", "zarr", "numpy"} & set(sys.modules)
        """
    )


def run_python(code: str) -> None:
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    script = "\n".join(line[indent:] for line in lines)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def calls(path: Path) -> Iterator[tuple[int, str, dict[str | None, ast.expr]]]:
    """(line, dotted name of what is called, keyword arguments) of each call in a file."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func), {k.arg: k.value for k in node.keywords}


def dotted(name: ast.expr) -> str:
    """`a.b.c`, without what is no name: `ast.unparse` of every call takes seconds."""
    if isinstance(name, ast.Attribute):
        return f"{dotted(name.value)}.{name.attr}"
    return name.id if isinstance(name, ast.Name) else ""


def is_constant(value: ast.expr | None, expected: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is expected


def unsafe(path: Path) -> Iterator[str]:
    """What in a file could run code that a data file brings, or hand text to a shell."""
    for module in sorted(imports(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}):
        text = ast.unparse(tree(path)).replace("pickle.UnpicklingError", "").replace("import pickle\n", "")
        if re.search(rf"\b{module}\b", text):  # naming the error by which a refused file shows itself is fine
            yield f"{named(path)}: uses {module}"
    for line, name, keywords in calls(path):
        at = f"{named(path)}:{line}: {name}"
        if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
            yield at
        if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            yield f"{at} without weights_only=True"
        if name in ("np.load", "numpy.load") and not is_constant(keywords.get("allow_pickle"), False):
            yield f"{at} without allow_pickle=False"
        for argument, safe in (("allow_pickle", False), ("weights_only", True), ("shell", False)):
            if argument in keywords and not is_constant(keywords[argument], safe):
                yield f"{at} with {argument}={ast.unparse(keywords[argument])}"


def test_no_file_loads_pickles_or_calls_a_shell() -> None:
    assert [finding for path in SOURCES + SCRIPTS for finding in unsafe(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(data)",
        "import pickle as p\np.loads(data)",
        "from pickle import loads",
        "import joblib",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_search_for_unsafe_loading_finds_it(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(unsafe(path))


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by it."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_no_file_is_too_long_to_be_read_in_one_go() -> None:
    lengths = {named(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES + SCRIPTS}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_no_shipped_text_holds_a_path_of_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.$}])/(home|root|Users|tmp|work|mnt)/\w")
    texts = [*SOURCES, *SCRIPTS, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.yaml")]
    texts += ROOT.glob("examples/*.ipynb")
    found = [
        f"{named(path)}:{i}: {line.strip()}"
        for path in texts
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []


def test_every_module_that_a_document_names_exists() -> None:
    modules = ["/" + named(path) for path in SOURCES + SCRIPTS] + [
        "/path/to/file.py",
        "/path/to/model.py",
        "/cskd/cli.py",
    ]
    modules += [f"/{block.saved_as}" for document in DOCUMENTS for block in blocks(document) if block.saved_as]
    gone = [
        f"{named(path)}:{i}: {name}"
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for name in re.findall(r"(?<![\w/.~])[\w/]*\w\.py\b", line)
        if not any(module.endswith("/" + name) for module in modules)
    ]
    assert gone == []


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", r)[0].lower() for r in requirements}


def optional() -> set[str]:
    """What users may install in addition: everything but what is for development."""
    extras = project()["project"]["optional-dependencies"]
    return distributions([r for name, requirements in extras.items() if name != "dev" for r in requirements])


def test_what_the_code_imports_is_declared_and_what_is_declared_is_imported() -> None:
    modules = {module for path in SOURCES for module in imports(path)}
    third_party = modules - set(sys.stdlib_module_names) - {"cskd"}
    used = {DISTRIBUTIONS.get(module, module) for module in third_party}
    declared = distributions(project()["project"]["dependencies"])
    assert used - declared - optional() == set()
    assert declared - used == set()


def test_what_tests_benchmarks_examples_and_documents_import_is_declared_for_development_and_no_more() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    blocks = re.findall(r"```python\n(.*?)```", "".join(d.read_text(encoding="utf-8") for d in documents), re.DOTALL)
    modules = {module for path in SCRIPTS for module in imports(path)}
    modules |= {name for block in blocks for name in re.findall(r"^(?:import|from) (\w+)", block, re.M)}
    third_party = modules - set(sys.stdlib_module_names) - {"cskd", "tests", "benchmarks", "examples"}
    used = {DISTRIBUTIONS.get(module, module) for module in third_party}
    declared = distributions(project()["project"]["dependencies"]) | optional()
    extras = project()["project"]["optional-dependencies"]
    dev, shown = distributions(extras["dev"]), distributions(extras["examples"])
    assert used - declared - dev == set()
    assert dev - used - PROGRAMS == {"cskd"} and shown - used <= BELOW


def test_what_is_installed_lies_under_the_name_cskd() -> None:
    setuptools = project()["tool"]["setuptools"]
    assert setuptools["packages"]["find"] == {"include": ["cskd*"]}
    assert "py-modules" not in setuptools and "package-dir" not in setuptools
    assert project()["project"]["scripts"] == {"cskd": "cskd.cli:main"}
    links = {p.name: os.readlink(p) for p in (ROOT / "cskd").iterdir() if p.is_symlink()}
    assert links == LINKS, "links in cskd/ are missing; on Windows, clone with `git -c core.symlinks=true clone`"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {p.parent for p in SOURCES} - {ROOT}
    assert [named(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    "code",
    [
        "import sys; from cskd.cli import main; sys.argv = ['cskd', '--help']; main()",
        "import cskd.cli, cskd.pipeline.show.progress, importlib.util as u; print(u.find_spec('cskd.pipeline.train').origin)",
    ],
)
def test_a_users_own_cli_and_pipeline_that_come_first_do_not_get_in_the_way(code: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    for foreign in ("cli.py", "pipeline/__init__.py", "pipeline/train.py"):
        (tmp_path / foreign).write_text("raise SystemExit('foreign')")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cskd" in done.stdout and "foreign" not in done.stdout + done.stderr


def test_every_dependency_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("dependencies", "demo", "examples", "dev"):
        block = re.search(rf"^{name} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        assert block
        assert [line for line in block[1].splitlines() if not re.search(r'",\s+# \w', line)] == []


def test_ci_runs_a_command_that_the_readme_shows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^<!-- checks -->\n+```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md needs a code block after the line '<!-- checks -->'"
    assert "-m tests" in block[1]
