"""Some hundreds of the benchmark's mutations: nothing but our own errors, nothing lost, no hang."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_vlm.data.inspect.check import check_sources
from ray_vlm.data.sources.formats import read_rows
from tests.support.fuzz.attempts import KINDS, run_kind
from tests.support.fuzz.exports import TOOLS, write_images
from tests.support.fuzz.inputs import make_job, write_base
from tests.support.fuzz.mutations import break_bytes, break_tree
from tests.support.jobs import check_inputs

COUNTS = {"rows": 100, "jobs": 150, "spaces": 50, "completions": 60, "images": 100, "adapters": 20, "exif": 100}


@pytest.mark.parametrize("share", [0.4, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_finds_anything(kind: str, share: float, capsys: pytest.CaptureFixture) -> None:
    counts = run_kind(kind, round(share * COUNTS.get(kind, 40)))
    assert counts["others"] == counts["lost"] == 0, capsys.readouterr().err


def test_a_seed_gives_the_same_mutations() -> None:
    tree = {"a": [1, "x", {"b": None}], "c": 2.5}
    made = [
        [(repr(break_tree(tree, rng)), break_bytes(b"some bytes", rng)) for _ in range(300)]
        for rng in (np.random.default_rng(0), np.random.default_rng(0))
    ]
    assert made[0] == made[1]
    assert len(set(map(str, made[0]))) > 250
    assert tree == {"a": [1, "x", {"b": None}], "c": 2.5}


def test_a_find_is_told_with_what_makes_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def attempt(rng: np.random.Generator) -> int:
        if rng.random() < 0.5:
            return 2
        raise KeyError("x")

    monkeypatch.setitem(KINDS, "rows", (lambda folder: attempt, 1))
    counts = run_kind("rows", 20)
    assert counts["others"] + counts["lost"] // 2 == 20
    assert "rows 0: " in (errors := capsys.readouterr().err)
    assert "KeyError: 'x' at test_fuzz.py" in errors
    assert "2 lost without a word" in errors


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_writes_is_whole(tool: str, tmp_path: Path) -> None:
    model = write_base(tmp_path)
    write_images(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(TOOLS[tool]()))
    job = make_job(model, "coco", {"path": str(tmp_path / "rows.json"), "format": "coco"})
    (check,) = check_sources(*check_inputs(job))
    assert (check.usable, check.bad, check.problems) == (4, (), ())
    assert all("crowd" in note for note in check.notes)
    assert job.data.train is not None
    rows, labels = read_rows(job.data.train)
    assert set(labels) == {"dog", "cat"}
    assert sum(len(row.truth["boxes"]) for row in rows) == (3 if tool == "cvat" else 4)  # one of CVAT's is a crowd
    corners = {tuple(round(v) for v in box) for row in rows for box in row.truth["boxes"]}
    assert corners <= {(10, 20, 40, 60), (10, 20, 41, 60)}
