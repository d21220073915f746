"""The rules of the house as tests: floors, lightness, size, and that every shipped file is used."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ray_vlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"cli"},
    {"demo", "tune"},
    {"train"},
    {"evaluate"},
    {"methods"},
    {"engines"},
    {"data"},
    {"tasks", "models", "cluster"},
    {"config"},
    {"runs"},
    {"storage"},
    {"hub_system"},
    {"errors", "logs", "machine", "distributed"},
]
PLAIN_DATA = {"ray_vlm.models.families", "ray_vlm.data.records"}  # readable from every floor
HEAVY = ("torch", "ray", "trl", "transformers", "matplotlib")
TESTS_OF_BENCHMARKS = {"gpu"}  # folders of tests/
LIGHT = [
    *("config.load", "tasks", "runs.manifest", "runs.console", "cli", "errors", "storage"),
    *("models.families", "data.records"),
]


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int | None:
    room = module.split(".")[1] if "." in module else ""
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def _imports(path: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray_vlm"):
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.startswith("ray_vlm")}
    names = {_name(p) for p in MODULES}
    return {name for name in imported if name in names}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    own = _floor(_name(path))
    if own is None:
        return
    room = _name(path).split(".")[1]
    for module in _imports(path) - PLAIN_DATA:
        other = _floor(module)
        same_room = module.split(".")[1:2] == [room]
        assert other is None or same_room or other > own, f"{_name(path)} imports {module}, which is not below it"


def _import_in_turn(modules: list[str], heavy: tuple[str, ...]) -> dict[str, list[str]]:
    """Which of `heavy` a fresh process holds after each of these modules was imported, one after the other."""
    code = "import importlib, json, sys; found = {}\n"
    code += f"for name in {modules!r}:\n    importlib.import_module(f'ray_vlm.{{name}}')\n"
    code += f"    found[name] = [m for m in {heavy!r} if m in sys.modules]\n"
    out = subprocess.run([sys.executable, "-c", f"{code}print(json.dumps(found))"], capture_output=True, check=True)
    return json.loads(out.stdout)


def test_light_modules_import_nothing_heavy() -> None:
    assert _import_in_turn(LIGHT, HEAVY) == {module: [] for module in LIGHT}


def test_what_runs_before_the_rows_are_read_or_before_a_process_has_its_environment_is_light() -> None:
    """Libraries read their environment when they load, and Ray imports these modules before it is applied."""
    modules = ["train.driver", "train.launch", "train.start", "train.validators", "data.stream", "evaluate.actors"]
    heavy = ("torch", "transformers", "trl", "datasets", "huggingface_hub", "ray")
    assert _import_in_turn(modules, heavy) == {module: [] for module in modules}


def test_methods_and_models_import_without_ray() -> None:
    modules = ["methods.sft", "methods.dpo", "methods.grpo", "engines.sampling", "models.load", "models.lora"]
    assert _import_in_turn(modules, ("ray",)) == {module: [] for module in modules}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_size_and_purpose(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(tree), "a module opens with its purpose"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            recipe = text.splitlines()[node.lineno - 1].endswith("# recipe")
            assert length <= (120 if recipe else 60), f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_public_functions_have_docstrings(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} says nothing of itself"


def test_tests_do_not_stand_on_benchmarks() -> None:
    """What both use is in `tests/support`; only the tests of a benchmark itself import it."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.relative_to(ROOT / "tests").parts[0] in TESTS_OF_BENCHMARKS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "benchmarks" not in {name.partition(".")[0] for name in names}, path


def test_no_forbidden_names() -> None:
    names = {path.name for path in MODULES}
    assert not names & {"utils.py", "helpers.py", "misc.py", "common.py"}


def test_no_empty_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [p for p in tracked.splitlines() if (ROOT / p).exists() and (ROOT / p).stat().st_size == 0] == []


@pytest.mark.parametrize(
    "path", sorted(set((ROOT / "jobs").glob("*_*.yaml")) - {ROOT / "jobs" / "runtime_env.yaml"}), ids=lambda p: p.name
)
def test_shipped_jobs_load_and_open_with_how_to_run_them(path: Path) -> None:
    from ray_vlm.config.load import load_job

    load_job(path)
    first = path.read_text().splitlines()[:3]
    assert first[0].startswith("# ")
    assert any(re.search(rf"Run: ray-vlm \w+ jobs/{path.name}", line) for line in first)


def test_method_section_task_folder_words_agree() -> None:
    from ray_vlm.config.check_method import TASK_METRICS
    from ray_vlm.config.method import METHOD_METRICS, Method
    from ray_vlm.config.task import Task
    from ray_vlm.methods.options import CHOICES
    from ray_vlm.tasks import TASKS

    methods, tasks = (
        {section.model_fields["name"].default for section in get_args(get_args(union)[0])} for union in (Method, Task)
    )
    assert set(CHOICES) == methods == set(METHOD_METRICS)
    assert set(TASKS) == tasks == set(TASK_METRICS)


def test_help_is_quick_and_light() -> None:
    code = "import sys; from ray_vlm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print([m for m in {(*HEAVY, 'pydantic', 'numpy')!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")


def test_job_reference_is_up_to_date() -> None:
    from ray_vlm.config.docs import write_reference

    assert (ROOT / "docs" / "jobs.md").read_text() == write_reference() + "\n", "run `make docs`"


def test_nothing_of_ours_runs_inside_ray_s_controller() -> None:
    """An exception in a `UserCallback` ends the run, and a checkpoint given to `report` can be lost: we use neither."""
    for path in MODULES:
        text = path.read_text()
        assert "UserCallback" not in text, path
        assert not re.search(r"train\.report\([^)]*checkpoint", text), path


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_fit_a_job_and_open_with_how_to_run_them(path: Path, tmp_path: Path) -> None:
    from ray_vlm.tune.space import load_space

    source = {"dpo": "data/train.jsonl, format: preference", "grpo": "data/train.json"}.get(path.stem, "data/train.csv")
    task = "classification" if path.stem == "rare_classes" else "detection"
    form = ", format: image_csv" if task == "classification" else ""
    method = path.stem if path.stem in ("dpo", "grpo") else "sft"
    job = tmp_path / "job.yaml"
    job.write_text(
        f"method: {method}\ntask: {task}\nmodel: {{name: x}}\ndata: {{train: {{path: {source}{form}}}, eval: 0.1}}\n"
        "lora: {rank: 16}\ntrain: {global_batch_size: 16}\n"
    )
    load_space(path, ROOT / "jobs/demo_tune.yaml" if path.stem == "demo" else job, [])
    assert any("Run: ray-vlm tune " in line and path.name in line for line in path.read_text().splitlines()[:4])


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside functions count too; the package itself, which everybody may ask for its version, does not."""
    graph = {_name(path): _imports(path) - {"ray_vlm"} for path in MODULES}
    while graph:
        leaves = {name for name, imported in graph.items() if not imported & graph.keys() - {name}}
        assert leaves, f"these import one another in a circle, or what does: {sorted(graph)}"
        graph = {name: imported for name, imported in graph.items() if name not in leaves}


_BUILT = {"trainer", "callback", "callbacks", "model", "base", "backbone", "monitor", "validator"}


def _assigned(node: ast.AST) -> list[ast.expr]:
    """The objects whose attributes a statement sets."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
        return [node.args[0]]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    parts = [part for target in targets for part in getattr(target, "elts", [target])]
    return [part.value for part in parts if isinstance(part, ast.Attribute)]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if _name(p).split(".")[1:2] in (["train"], ["methods"], ["evaluate"])], ids=_name
)
def test_nothing_is_set_from_outside_on_what_was_built(path: Path) -> None:
    """Trainers, callbacks and models get everything in their constructors; `models/surgery.py` changes forwards."""
    for node in ast.walk(ast.parse(path.read_text())):
        for built in _assigned(node):
            name = built.attr if isinstance(built, ast.Attribute) else getattr(built, "id", "")
            assert name.lstrip("_") not in _BUILT, f"line {node.lineno}: {ast.unparse(node)}"


def test_tests_of_a_file_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist keeps together what has the same suffix. Without it, Ray clusters of several processes run at
    once."""
    shared_out = request.config.getoption("loadgroup", default=False)
    assert request.node.nodeid.endswith("@rules/test_house.py") == shared_out
