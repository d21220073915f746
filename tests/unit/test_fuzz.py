"""Some hundreds of the benchmark's mutations: nothing but our own errors, nothing lost, no hang."""

import numpy as np
import pytest

from benchmarks.fuzz import KINDS, run_kind
from benchmarks.mutations import break_bytes, break_tree

COUNTS = {"rows": 100, "jobs": 150, "spaces": 50, "completions": 60, "images": 100, "adapters": 20}


@pytest.mark.parametrize("share", [0.4, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_finds_anything(kind: str, share: float, capsys: pytest.CaptureFixture) -> None:
    told = run_kind(kind, round(share * COUNTS.get(kind, 40)))
    assert told["others"] == told["lost"] == 0, capsys.readouterr().err


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
    told = run_kind("rows", 20)
    assert told["others"] + told["lost"] // 2 == 20
    assert "rows 0: " in (found := capsys.readouterr().err)
    assert "KeyError: 'x' at test_fuzz.py" in found
    assert "2 lost without a word" in found
