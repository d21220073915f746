"""Every command in the documents is one that the command line takes, and those that need no cluster are run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

import ray_vlm
from ray_vlm.cli import build_parser, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "jobs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    "BUCKET": "needs a bucket; tests/integration/test_resume.py",
}


def commands(page: Path) -> list[str]:
    """Commands in the page's code blocks, with comments cut off."""
    lines = re.findall(r"^(?:    |\$ )?(ray-vlm [a-z][^\n`]*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"\s+#.*", "", text) for text in lines]


def _words(command: str) -> list[str]:
    """The command as words, the stand-ins of the documents as something that can be taken."""
    words = shlex.split(command.replace("...", "").replace("VERB", "train"))[1:]
    return [word for word in words if not word.startswith("[")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_taken(page: Path) -> None:
    for command in commands(page):
        args, rest = build_parser().parse_known_args(_words(command))
        assert args.verb, command
        assert not [word for word in rest if "=" not in word], command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_in_python_are_imported_on_their_page(page: Path) -> None:
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    imported = re.findall(r"^from (ray_vlm[\w.]*) import (.+)$", blocks, re.MULTILINE)
    names = {name.strip(): module for module, names_imported in imported for name in names_imported.split(",")}
    assert all(hasattr(importlib.import_module(module), name) for name, module in names.items())
    assert {name for name in ray_vlm.__all__ if re.search(rf"\b{name}\b[(.]", blocks)} <= set(names)


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
