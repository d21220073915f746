"""Lower bounds, constraints files, `tests/versions.txt` and the documented sets say the same versions."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def _pins(name: str) -> dict[str, Version]:
    lines = [line.split("==") for line in (ROOT / name).read_text().split()]
    return {canonicalize_name(package): Version(version) for package, version in lines}


def test_oldest_pins_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = _pins("constraints-oldest.txt"), _pins("constraints.txt")
    for needed in map(Requirement, project["dependencies"]):
        (bound,) = [Version(part.version) for part in needed.specifier if part.operator == ">="]
        name = canonicalize_name(needed.name)
        assert oldest[name] == bound, f"{name}: pyproject.toml allows {bound}, but {oldest[name]} is what is tested"
        assert newest[name] in needed.specifier


def test_documented_sets_are_the_tested_ones() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text().partition("## Versions")[2]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    oldest, newest = _pins("constraints-oldest.txt"), _pins("constraints.txt")
    makefile = (ROOT / "Makefile").read_text()
    assert {"Python", "torch", "transformers", "trl", "peft", "ray"} <= {row[0] for row in rows}
    for name, low, high in rows:
        if name == "Python":
            assert f"PYTHON_OLDEST ?= python{low}\n" in makefile
            assert f"PYTHON_NEWEST ?= python{high}\n" in makefile
        else:
            assert (Version(low), Version(high)) == (oldest[canonicalize_name(name)], newest[canonicalize_name(name)])


def test_every_test_of_the_subset_exists() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "tests" / "versions.txt").read_text().splitlines()]
    chosen = [line for line in lines if line]
    assert len(chosen) > 10
    for line in chosen:
        path, _, name = line.partition("::")
        assert (ROOT / path).exists(), f"tests/versions.txt names {path}, which does not exist"
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_the_sets_for_vllm_are_ones_that_the_project_allows() -> None:
    """`constraints-vllm.txt` is for GPUs; `constraints-vllm-cpu.txt` is what `tests/vllm` is run with."""
    from ray_vlm.engines.vllm_start import TRIED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = [Requirement(line) for line in project["optional-dependencies"]["vllm"]]
    on_gpus, on_cpus = _pins("constraints-vllm.txt"), _pins("constraints-vllm-cpu.txt")
    assert on_gpus["vllm"] in vllm.specifier
    assert on_cpus["vllm-cpu"] in vllm.specifier
    assert str(on_cpus["vllm-cpu"]) in TRIED
    for needed in map(Requirement, project["dependencies"]):
        name = canonicalize_name(needed.name)
        assert on_gpus[name] in needed.specifier
        assert name not in on_cpus or on_cpus[name] in needed.specifier
