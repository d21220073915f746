"""From an empty folder to a trained run and predictions, by the words that `ray-vlm init` prints."""

import csv
import shlex
from pathlib import Path

import pytest

from ray_vlm.cli import main
from ray_vlm.cli.starter import _FIRST_STEPS
from ray_vlm.demo.shapes import draw

QUICK = ("train.max_steps=1", "cluster.num_workers=0", "evaluate.num_samples=2", "evaluate.max_new_tokens=4")


@pytest.mark.slow
def test_init_leads_to_a_run_and_its_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    output = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", "tune_spaces"}
    for split in ("train", "eval", "test"):  # or the job would draw hundreds of scenes
        draw(Path("outputs/demo/data/site"), "site", split, 24 if split == "train" else 4)
    for step in _FIRST_STEPS:
        assert step in output
        verb, *words = shlex.split(step)[1:]
        assert main([verb, *words, *(QUICK if verb in ("train", "evaluate") else ())]) == 0, step
    with open("found.csv", newline="") as file:
        assert list(csv.reader(file))
    assert list(Path("drawn").iterdir())


def test_init_says_where_to_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my project"]) == 0
    output = capsys.readouterr().out
    assert "cd 'my project'" in output
    quickstart = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    for step in _FIRST_STEPS:
        assert step in output
        assert step in quickstart
