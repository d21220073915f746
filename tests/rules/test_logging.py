"""Modules log, and only the command line and the terminal's handler print; nothing takes a function that prints."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ray_vlm"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli" and path.name != "logs.py")
CALLBACKS = {"say", "tell"}
OTHERS_LOGGERS = {"ray_vlm/cluster/submit.py", "ray_vlm/models/libraries.py"}  # that lower the level of a library's


def _faults(text: str) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id="print"):
                faults.append(f"line {node.lineno}: print")
            case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"):
                faults.append(f"line {node.lineno}: sys.{node.attr}")
            case ast.arg(arg=name, annotation=kind):
                if name in CALLBACKS or (kind is not None and "Callable[[str], None]" in ast.unparse(kind)):
                    faults.append(f"line {node.lineno}: parameter {name}")
            case ast.FunctionDef(name=name) if name in CALLBACKS:
                faults.append(f"line {node.lineno}: function {name}")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_prints_or_takes_a_function_that_does(path: Path) -> None:
    assert _faults(path.read_text()) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_logger_has_the_name_of_its_module(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in OTHERS_LOGGERS:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loggers = [call for call in calls if ast.unparse(call.func).endswith("getLogger")]
    assert {ast.unparse(call.args[0]) for call in loggers} <= {"__name__"}


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "f(write=print)",
        "sys.stdout.write('x')",
        "def f(say): ...",
        "def f(*, tell=None): ...",
        "def f(write: Callable[[str], None]): ...",
        "def f(write: 'Callable[[str], None] | None' = None): ...",
        "def tell(text): ...",
    ],
)
def test_every_fault_is_seen(text: str) -> None:
    assert len(_faults(text)) == 1
