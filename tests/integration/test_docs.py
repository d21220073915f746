"""Every command in the documents is one that the command line takes, and those that need no cluster are run."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import ray_vlm
from ray_vlm.cli import build_parser, main
from ray_vlm.config.load import load_job

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "jobs/README.md", "benchmarks/README.md", "benchmarks/RESULTS.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {  # run by other tests, or on what a test machine is not
    "--address": "needs a cluster; tests/cluster/test_submit.py",
    "ray-vlm submit": "needs a cluster; tests/cluster/test_submit.py",
    "ray-vlm jobs": "needs a cluster; tests/cluster/test_submit.py",
    "cluster.num_workers=": "tests/cluster",
    "jobs/demo_": "minutes; the demos themselves",
    "ray-vlm demo": "minutes; the demos themselves",
    "--resume": "tests/integration/test_resume.py",
    "ray-vlm memory jobs/": "tests/unit/models/test_job_heads.py",
    "ray-vlm tune": "tests/cluster/test_sweep.py",
    "NAME-SPACE": "tests/cluster/test_sweep.py",
    "shelves": "needs the files of the quickstart; test_the_quickstart_is_run",
    "BUCKET": "needs a bucket; tests/integration/test_resume.py",
}


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of the page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """Commands in the page's shell blocks, with comments cut off and lines that go on joined."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def commands(page: Path) -> list[str]:
    """The commands of `ray-vlm` in the page's code blocks."""
    indented = re.findall(r"^    (ray-vlm [a-z][^\n`]*)$", page.read_text(), re.MULTILINE)
    return [line for line in (*shell_lines(page), *indented) if line.startswith("ray-vlm ")]


def mentions(page: Path) -> list[str]:
    """The commands of `ray-vlm` within the page's sentences."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(text.split()) for text in re.findall(r"`(ray-vlm [a-z][^`]*)`", prose)]


def _words(command: str) -> list[str]:
    """The command as words, the stand-ins of the documents as something that can be taken."""
    words = shlex.split(command.replace("...", "X").replace("VERB", "train"))[1:]
    return [word for word in words if not word.startswith("[")]


def _refusal(words: list[str]) -> str:
    """What the parser says against the words; empty if it takes them."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            args, rest = build_parser().parse_known_args(words)
    except SystemExit as end:
        return error.getvalue() if end.code else ""
    unknown = [word for word in rest if "=" not in word or word.startswith("-") or not hasattr(args, "overrides")]
    return f"unknown: {unknown}" if unknown else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_are_taken(page: Path) -> None:
    assert {command: why for command in commands(page) if (why := _refusal(_words(command)))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_within_sentences_are_taken(page: Path) -> None:
    """They may leave arguments out, but name no verb or option that is not there."""
    refused = {command: why for command in mentions(page) if (why := _refusal(_words(command)))}
    assert {command: why for command, why in refused.items() if "arguments are required" not in why} == {}


def _is_there(line: str) -> bool:
    """Whether a command of another program than `ray-vlm` can be given in a checkout."""
    match shlex.split(line):
        case ["make", *targets]:
            made = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return set(targets) <= {name for names in made for name in names.split()}
        case [".venv/bin/python" | "python", "-m", "pytest", *paths]:
            return all((ROOT / path).exists() for path in paths)
        case [".venv/bin/python" | "python", "-m", module, *_]:
            return find_spec(module) is not None
        case ["cp", source, _]:
            return (ROOT / source).is_file()
        case ["pip", "install", package]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            return re.sub(r"^(ray-vlm|\.)|[\[\]]", "", package) in {"", *extras}
        case ["ray", *words]:
            return _ray_takes(words)
    return line.startswith("ray-vlm ")


def _ray_takes(words: list[str]) -> bool:
    """Whether Ray's own command line has the verb with these options."""
    import click
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    try:
        return not isinstance(command, click.Group) and bool(command.make_context("ray", list(words)))
    except click.UsageError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_of_other_programs_are_there(page: Path) -> None:
    assert [line for line in shell_lines(page) if not _is_there(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_settings_in_yaml_are_those_of_a_job(page: Path, tmp_path: Path) -> None:
    """A block that is part of a job is loaded over the shortest job; a search space has a test of its own."""
    for text in blocks(page, "yaml"):
        part = yaml.safe_load(text)
        if any("." in key for key in part):
            continue
        rows = {"train": {"path": "rows.json"}}
        job = {
            key: {**rows, **part.get(key, {})} if key == "data" else part.get(key, {"name": "base"})
            for key in ("data", "model")
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(part | job))
        load_job(tmp_path / "job.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_compiles(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_names_in_python_are_imported_on_their_page(page: Path) -> None:
    text = "\n".join(blocks(page, "python"))
    imported = re.findall(r"^from (ray_vlm[\w.]*) import (.+)$", text, re.MULTILINE)
    names = {name.strip(): module for module, names_imported in imported for name in names_imported.split(",")}
    assert all(hasattr(importlib.import_module(module), name) for name, module in names.items())
    assert {name for name in ray_vlm.__all__ if re.search(rf"\b{name}\b[(.]", text)} <= set(names)


def test_there_are_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_commands_that_need_no_cluster_are_run(
    job_file, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the documents, in a folder where `my_job.yaml` and the runs of their examples are there."""
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "eval", "test")}
    job = job_file(data=data, evaluate={"max_new_tokens": 4}, run={"name": "NAME", "output_dir": "outputs"})
    job.rename(tmp_path / "my_job.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "my_job.yaml"]) == 0
    assert main(["evaluate", "my_job.yaml", "--output", "outputs/evaluate/MODEL-TEST"]) == 0
    for name in ("A", "B", "C", "demo_sft"):
        shutil.copytree("outputs/NAME", f"outputs/{name}")
    shutil.copytree(scenes / "test", "photos")
    shutil.copytree(scenes / "test", "outputs/demo/data/site/test")
    done = set()
    for command in (command for page in PAGES for command in commands(page)):
        words = _words(command)
        if any(mark in command for mark in ELSEWHERE) or command in done or set(words) & {"JOB", "RUN"}:
            continue
        done.add(command)
        again = ["--overwrite"] if words[0] == "train" and "--dry-run" not in words else []
        assert main([*words, *again]) == 0, command
    assert len(done) >= 12


@pytest.mark.slow
def test_the_quickstart_is_run(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's job on the page's files, with the tiny model on a CPU and few steps; then each of its commands."""
    page = ROOT / "docs/quickstart.md"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes / "train", "shelves/images")
    Path("shelves/annotations.json").write_text((scenes / "train.json").read_text().replace("train/", ""))
    job = yaml.safe_load(next(text for text in blocks(page, "yaml") if "shelves" in text))
    few = {
        "train": {"num_epochs": 1, "max_steps": 2, "precision": "fp32"},
        "cluster": {"gpus_per_worker": 0, "num_workers": 0},
    }
    few |= {"evaluate": {"num_samples": 2, "max_new_tokens": 4, "every_steps": 1}, "model": {"name": "tiny"}}
    job |= {name: {**job.get(name, {}), **section} for name, section in few.items()}
    Path("shelves.yaml").write_text(yaml.safe_dump(job))
    done = [command for command in commands(page) if "shelves" in command]
    for command in done:
        assert main(_words(command)) == 0, command
    assert {command.split()[1] for command in done} >= {
        "data",
        "memory",
        "train",
        "runs",
        "evaluate",
        "predict",
        "export",
    }
    assert Path("found.csv").is_file()
