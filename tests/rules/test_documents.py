"""What a document names is there: files, modules, and the functions and classes that stand beside a module."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.rules.test_house import FLOORS

ROOT = Path(__file__).parents[2]
HISTORIES = {"docs/dev/LOG.md", "CHANGELOG.md"}  # they name what was there
FORBIDDEN = {"utils.py"}  # named by CONTRIBUTING.md because it must not be there
RUN_FOLDERS = {"best/", "final/"}
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = [ROOT / name for name in TRACKED if name.endswith(".md") and name not in HISTORIES]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "ray_vlm").rglob("*.py")))

# A measured figure stands beside its machine and its commit.
_FIGURE = re.compile(r"Intel Xeon|AMD EPYC|\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7}\b")
_MODULE = re.compile(r"(?<![\w./-])((?:[\w-]+/)*\w+\.py)\b")
_PATH = re.compile(r"(?<![\w./-])((?:ray_vlm|tests|benchmarks|jobs|tune_spaces|docs)/[\w./-]*\w/?)")
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
_DOTTED = re.compile(r"(?<![\w./-])((?:ray_vlm|benchmarks|tests)(?:\.[a-z]\w*)+)(?![\w/])")
_BESIDE = (  # `room/module.py` (`name`, `name`) and (`room/module.py`, `name`)
    re.compile(r"`([\w/]+\.py)`\s+\((`\w+`(?:,\s+`\w+`)*)\)"),
    re.compile(r"\(`([\w/]+\.py)`,\s+(`\w+`(?:,\s+`\w+`)*)\)"),
)


def _find(name: str, folder: Path | None = None) -> Path | None:
    """Return the file or folder of a name, as it stands there, within the package, or in `folder`."""
    folders = [ROOT, ROOT / "ray_vlm", *([folder] if folder else [])]
    return next((place / name for place in folders if (place / name).exists()), None)


@cache
def _defined(path: Path) -> frozenset[str]:
    """Return the names that a module defines, and the methods of its classes."""
    names: set[str] = set()
    body = ast.parse(path.read_text()).body
    members = [member for node in body if isinstance(node, ast.ClassDef) for member in node.body]
    for node in [*body, *members]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _missing_modules(text: str) -> list[str]:
    """A name without a folder is in the folder of the module named before it on the line, if there is one."""
    missing = []
    for line in text.splitlines():
        folder: Path | None = None
        for name in _MODULE.findall(line):
            path = _find(name, folder)
            if path is None and "/" not in name and folder is None and any(n.endswith(f"/{name}") for n in TRACKED):
                continue
            missing += [name] if path is None and name not in FORBIDDEN else []
            folder = path.parent if path else folder
    return missing


def _missing_names(text: str) -> list[str]:
    missing = []
    for name, beside in (pair for pattern in _BESIDE for pair in pattern.findall(text)):
        path = _find(name)
        defined = _defined(path) if path else frozenset()
        missing += [f"{name}: {each}" for each in re.findall(r"\w+", beside) if each not in defined]
    for dotted in _DOTTED.findall(text):
        module, _, name = dotted.replace(".", "/").rpartition("/")
        if _find(f"{module}/{name}.py") or _find(f"{module}/{name}"):
            continue
        path = _find(f"{module}.py") or _find(f"{module}/__init__.py")
        missing += [] if path and name in _defined(path) else [dotted]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert _missing_modules(text) == []
    assert [name for name in _PATH.findall(text) if not _find(name)] == []
    assert [name for name in _LINK.findall(text) if not (page.parent / name).exists()] == []
    assert _missing_names(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_figures_are_in_the_benchmarks_alone(page: Path) -> None:
    """Other pages link there."""
    if page.parent.name not in ("benchmarks", "weights"):
        assert _FIGURE.findall(page.read_text()) == []


def test_the_floors_of_the_architecture_are_those_that_the_rules_hold() -> None:
    rows = re.findall(r"^\| ((?:`\w+` )+)\|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == FLOORS


def test_continuous_integration_runs_the_script_and_hooks_need_no_network() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_every_page_of_docs_is_on_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    shown = set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))
    assert {name for name in TRACKED if name.startswith("docs/") and name.endswith(".md")} <= shown


def test_the_folders_of_the_architecture_are_there() -> None:
    folders = set(re.findall(r"[`(]([a-z]\w*(?:/\w+)*/)[`)]", (ROOT / "docs/architecture.md").read_text()))
    assert len(folders) > 5
    assert sorted(name for name in folders - RUN_FOLDERS if not _find(name)) == []


def test_the_identifiers_of_the_architecture_and_of_the_glossary_are_in_the_package() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    text = "\n".join([(ROOT / "docs/architecture.md").read_text(), *rows])
    names = {name for name in re.findall(r"`(\w+)(?:\(\))?`", text) if re.search(r"[A-Z_]", name)}
    modules = {Path(name).stem for name in TRACKED if name.endswith(".py")}
    words = set(re.findall(r"\w+", SOURCE)) | modules
    assert len(names) > 50
    assert sorted(names - words) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`data/index.py`, `gone.py`", ["gone.py"]),
        ("`gone/index.py`", ["gone/index.py"]),
        ("`data/index.py`, `plan.py`; `train/worker.py`", []),
    ],
)
def test_a_module_that_is_gone_is_seen(text: str, missing: list[str]) -> None:
    assert _missing_modules(text) == missing


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`data/index.py` (`join_rows`, `gone`)", ["data/index.py: gone"]),
        ("(`data/index.py`,\n  `gone`)", ["data/index.py: gone"]),
        ("`ray_vlm.data.index.join_rows`, `ray_vlm.data.gone`", ["ray_vlm.data.gone"]),
    ],
)
def test_a_name_that_is_gone_is_seen(text: str, missing: list[str]) -> None:
    assert _missing_names(text) == missing
