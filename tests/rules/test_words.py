"""The glossary of CONTRIBUTING.md as a test: its barred words are not identifiers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("ray_vlm", "tests", "benchmarks")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
BARRED = {
    *("told", "found", "said", "mine", "ours", "theirs", "of_row"),
    *("Preparer", "preparer", "WorkerTask", "RowSpec", "Hosted"),
    *("FedTrainer", "ImitationTrainer", "PreferenceTrainer", "GroupTrainer"),
    *("plan_retry", "plan_pause", "fold_rows", "Folding", "folding", "Shelf", "Standing", "hosted", "filler"),
    *("Subject", "Subjects", "plan_subjects", "Stage", "Loaded", "Do", "Pace", "fill_in", "make_cells", "Measured"),
}
ALLOWED = {  # `Ask.told` and `Predictor.predict(..., **told)` are public
    ("ray_vlm/evaluate/predictor.py", "told"),
}


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every identifier with its line; strings, and so keys of files and of JSON, are none."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias():
                yield node.asname or node.name.rpartition(".")[2], node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, node.lineno
            case ast.MatchMapping(rest=str(name)):
                yield name, node.lineno
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                yield from ((name, node.lineno) for name in names)


def _barred(text: str, file: str) -> list[str]:
    hits = sorted({(line, name) for name, line in _identifiers(ast.parse(text)) if name in BARRED})
    return [f"{file}:{line} {name}" for line, name in hits if (file, name) not in ALLOWED]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_identifier_is_a_barred_word(folder: str) -> None:
    files = [(path, path.relative_to(ROOT).as_posix()) for path in MODULES if path.is_relative_to(ROOT / folder)]
    hits = [hit for path, file in files for hit in _barred(path.read_text(), file)]
    assert hits == [], "the glossary of CONTRIBUTING.md has the words to write instead"


def test_every_exception_is_still_needed() -> None:
    for file, name in ALLOWED:
        assert name in {identifier for identifier, _ in _identifiers(ast.parse((ROOT / file).read_text()))}, file


@pytest.mark.parametrize(
    "text",
    [
        "told = 1",
        "def f(found): ...",
        "f(said=1)",
        "def mine(): ...",
        "x.ours",
        "class Shelf: ...",
        "import a as theirs",
        "from a import plan_retry",
        "try: ...\nexcept E as found: ...",
        'f"{found}"',
        "match x:\n    case [*told]: ...",
    ],
)
def test_every_kind_of_identifier_is_seen(text: str) -> None:
    assert len(_barred(text, "x.py")) == 1
    assert _barred(text, "x.py")[0].split()[-1] in BARRED


def test_strings_and_longer_names_are_free() -> None:
    assert _barred('row["found"] = was_found = "told"  # said', "x.py") == []


def test_an_exception_holds_in_its_file_alone() -> None:
    file, name = min(ALLOWED)
    assert _barred(f"{name} = 1", file) == []
    assert len(_barred(f"{name} = 1", "ray_vlm/other.py")) == 1
