"""Answers that were written down are not made again, whatever stopped the first try; any other input makes new ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.cli import main
from ray_vlm.evaluate import generate
from ray_vlm.evaluate.generate import ANSWERS, plan_batches


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Ids of the rows of each batch that a model answered."""
    seen: list[list[str]] = []
    real = generate.generate_answers

    def counted(model: Any, records: Any, *rest: Any) -> list[str]:
        if len(seen) == calls_before_death[0]:
            calls_before_death[0] = -1
            raise KeyboardInterrupt
        seen.append([record.id for record in records])
        return real(model, records, *rest)

    calls_before_death = [-1]
    monkeypatch.setattr(generate, "generate_answers", counted)
    seen_list = seen
    counted.die_at = calls_before_death  # type: ignore[attr-defined]
    return seen_list


def _job(job_file: Any, scenes: Path) -> str:
    data = {split: {"path": str(scenes / f"{split}.json")} for split in ("train", "test")}
    return str(job_file(data=data, evaluate={"max_new_tokens": 4, "batch_size": 5}))


def test_a_killed_evaluation_goes_on_and_makes_no_answer_twice(
    job_file, scenes: Path, tmp_path: Path, calls: list, capsys
) -> None:
    job = _job(job_file, scenes)
    assert main(["evaluate", job, "--output", str(tmp_path / "whole")]) == 0
    first_calls = [sorted(batch) for batch in calls]
    assert [len(batch) for batch in first_calls] == [5, 5, 2]
    calls.clear()
    generate.generate_answers.die_at[0] = 2  # type: ignore[attr-defined]
    assert main(["evaluate", job, "--output", str(tmp_path / "killed")]) == 130
    assert not (tmp_path / "killed" / "metrics.json").exists()
    with open(tmp_path / "killed" / ANSWERS, "a") as file:
        file.write('{"batch": 2, "answ')  # the line that death cut off
    assert main(["evaluate", job, "--output", str(tmp_path / "killed")]) == 0
    assert "10 of 12 answers were there already" in capsys.readouterr().out
    assert [sorted(batch) for batch in calls] == first_calls
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1]


def test_other_inputs_are_answered_anew(job_file, scenes: Path, tmp_path: Path, calls: list) -> None:
    """One change after another: each is answered anew, and once."""
    job, expected = _job(job_file, scenes), 0
    for change in ([], ["evaluate.max_new_tokens=5"], ["model.load_in_4bit=true"], ["data.max_pixels=9216"]):
        expected += 3
        for _ in range(2):
            assert main(["evaluate", job, *change, "--output", str(tmp_path / "out")]) == 0
            assert len(calls) == expected, change


def test_another_adapter_is_asked_anew_and_a_copy_is_not(job_file, scenes: Path, tmp_path: Path, calls: list) -> None:
    import shutil

    job, out = _job(job_file, scenes), ["--output", str(tmp_path / "out")]
    assert main(["train", job]) == 0
    final = tmp_path / "runs" / "run" / "final"
    shutil.copytree(final, tmp_path / "copy")
    for adapter, expected in ((final, 3), (tmp_path / "copy", 3)):
        assert main(["evaluate", job, "--adapter", str(adapter), *out]) == 0
        assert len(calls) == expected
    assert main(["train", job, "--overwrite", "train.learning_rate=0.1"]) == 0
    assert main(["evaluate", job, "--adapter", str(final), *out]) == 0
    assert len(calls) == 6


def test_base_unquantised_base_and_adapters_in_one_report(job_file, scenes: Path, tmp_path: Path, capsys) -> None:
    job = _job(job_file, scenes)
    assert main(["train", job, "model.load_in_4bit=true"]) == 0
    run = tmp_path / "runs" / "run"
    words = ["--adapter", str(run / "final"), "--base", "--base-unquantised", "--output", str(tmp_path / "all")]
    assert main(["evaluate", job, "model.load_in_4bit=true", *words]) == 0
    folders = {p.name for p in (tmp_path / "all").iterdir() if p.is_dir()}
    assert folders == {"base-unquantised", "base", "1-run-final"}
    html = (tmp_path / "all" / "report.html").read_text()
    for title in ("base, not quantised", "base, 4 bit", "run/final"):
        assert f">{title}<" in html
    compared = json.loads((tmp_path / "all" / "comparison.json").read_text())
    assert (compared["of"], compared["against"]) == ("run/final", "base, not quantised")


def test_batches_are_a_function_of_the_rows_alone() -> None:
    assert plan_batches([3, 9, 1, 9, 5], 2) == ((1, 3), (4, 0), (2,))
    assert plan_batches([], 4) == ()
    many = plan_batches([7.0] * 10, 3)
    assert [i for batch in many for i in batch] == list(range(10))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]\n",
        b'{"key": {"rows": "other"}}\n{"batch": 0, "answers": ["a", "b"]}\n',
        b'{"batch": 0, "answers": ["a", "b"]}\n',
    ],
)
def test_a_file_of_other_answers_is_not_taken(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ANSWERS).write_bytes(text)
    assert generate._read_answers(tmp_path / ANSWERS, {"rows": "mine"}, ((0, 1), (2,))) == {}


def test_lines_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    lines = [
        {"key": {"rows": "mine"}},
        {"batch": 0, "answers": ["a"]},
        {"batch": 7, "answers": ["a"]},
        {"batch": "1", "answers": ["a"]},
        {"batch": 1, "answers": [3]},
        {"batch": 1},
        [],
        {"batch": 1, "answers": ["good"]},
    ]
    (tmp_path / ANSWERS).write_text("\n".join(map(json.dumps, lines)))
    assert generate._read_answers(tmp_path / ANSWERS, {"rows": "mine"}, ((0, 1), (2,))) == {1: ["good"]}
