"""A corpus of altered run folders: invalid values are ignored and reported, and the rest is shown as before."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.evaluate.compare import write_comparison
from ray_vlm.evaluate.predictor import Predictor
from ray_vlm.runs.card import write_card
from ray_vlm.runs.compare import compare_runs, describe_comparison
from ray_vlm.runs.compute import measure_compute, sum_compute, write_markdown
from ray_vlm.runs.manifest import find_run
from ray_vlm.runs.read import Run, read_run
from ray_vlm.runs.schema import is_number
from ray_vlm.runs.show import describe_run, describe_runs, write_table

LINE = {"attempt": 1, "time": 1010.0, "epoch": 0.5}
HUGE = 10**400
HERE = {"host": platform.node(), "pid": 1, "started": 1.0}


def _write(folder: Path, **change: Any) -> Path:
    """A run of two steps. `change`: of a file's values, by the start of its name; a list is of lines that are added."""
    (folder / "evaluate" / "best").mkdir(parents=True)
    source = {"path": "a.json"}
    job = load_resolved({"model": {"name": "tiny", "load_in_4bit": False}, "data": {"train": source, "eval": source}})
    attempt = {"attempt": 1, "started": 1000.0, "ended": 1090.0, "status": "finished"}
    run = {"status": "finished", "attempts": [attempt], "result": {"num_steps": 2}}
    scores = {"task": "detection", "overall": {"f1_50": 0.5}, "num_rows": 4, "test": "t.json", "per_class": {}}
    (folder / "resolved.json").write_text(json.dumps(dump_job(job) | change.get("resolved", {})))
    (folder / "run.json").write_text(json.dumps(run | change.get("run", {})))
    (folder / "evaluate" / "best" / "metrics.json").write_text(json.dumps(scores | change.get("scores", {})))
    start = {"kind": "start", "step": 0, "trainable": {"language": {"trainable": 1, "total": 2}}, "device": "A100"}
    lines = [start, {"kind": "train", "step": 1, "loss": 3.0, "step_s": 1.0, "tokens_per_s": 9.0}]
    lines += [{"kind": "eval", "step": 2, "loss": 2.0}]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(LINE | line) + "\n" for line in [*lines, *change.get("lines", [])])
    )
    return folder


def _tell(run: Run) -> str:
    """Return all text that is shown of a run."""
    costs = [measure_compute(run)] * 2
    comparison = compare_runs([run, run])
    outputs = [describe_run(run), describe_runs([run]), describe_comparison(comparison), write_table(run)]
    outputs += [write_comparison([run, run], comparison), write_card(run, "adapter", "best")]
    outputs += [write_markdown(["a", "b", "all"], [*costs, sum_compute([run, run], costs)]), json.dumps(costs)]
    return "\n".join(outputs).encode().decode()


ALTERED: list[tuple[str, Any, str]] = [
    ("resolved", {"method": {"name": {"a": 1}}}, "resolved.json: method.name is {'a': 1}, which is not valid"),
    ("resolved", {"task": {"name": ["x"]}}, "task.name is"),
    ("resolved", {"lora": 3}, "lora is 3"),
    ("resolved", {"lora": {"rank": {}, "target": "language"}}, "lora.target is 'language'"),
    ("resolved", {"lora": {"target": [1]}}, "lora.target is"),
    ("resolved", {"cluster": {"num_workers": "two"}}, "cluster.num_workers is 'two'"),
    ("resolved", {"cluster": {"num_workers": HUGE}}, "cluster.num_workers is 1000"),
    ("resolved", {"cluster": {"gpus_per_worker": [1]}}, "cluster.gpus_per_worker is"),
    ("resolved", {"data": {"eval": {"path": ["a"], "ratio": {}}}}, "data.eval.path is"),
    ("run", {"status": ["x"]}, "run.json: status is"),
    ("run", {"status": "running", "attempts": [{"driver": "x"}]}, "driver is 'x'"),
    ("run", {"status": "running", "attempts": [{"driver": {"host": 3, "pid": "x"}}]}, "driver is {'host': 3"),
    ("run", {"status": "running", "attempts": [{"driver": {"host": platform.node()}}]}, "driver is {'host':"),
    ("run", {"status": "running", "attempts": [{"driver": HERE | {"pid": 2**40}}]}, "driver is {'host':"),
    ("run", {"status": "running", "attempts": [3]}, "1 of 1 attempts are altered"),
    ("run", {"attempts": "many"}, "attempts is 'many'"),
    ("run", {"attempts": [{"started": HUGE, "ended": "x"}]}, "started is 1000"),
    ("run", {"result": {"num_steps": "x"}}, "result.num_steps is 'x'"),
    ("run", {"hardware": {"memory_gib": []}}, "hardware.memory_gib is"),
    ("scores", {"overall": {"f1_50": "good", "map": [1]}}, "evaluate/best/metrics.json: f1_50 is no number"),
    ("scores", {"num_rows": {}}, "num_rows is {}"),
    ("scores", {"test": ["x"]}, "test is"),
    ("scores", {"overall": {"\ud800": 1.0}}, ""),
    ("run", {"git_commit": "\udc00", "versions": {"torch": "\ud800"}}, ""),
    ("lines", [{"kind": "train", "step": HUGE}], "1 of 4 lines of metrics.jsonl"),
    ("lines", [{"kind": "train", "step": -1}], "1 of 4 lines"),
    ("lines", [{"kind": "start", "step": 0, "trainable": 3}], "1 of 4 lines"),
    ("lines", [{"kind": "start", "step": 0, "trainable": {"language": {"total": "x"}}}], "1 of 4 lines"),
    ("lines", [{"kind": "start", "step": 0, "device": ["x"]}], "1 of 4 lines"),
    ("lines", [{"kind": "train", "step": 2, "loss": HUGE, "step_s": "x", "images": HUGE, "data_s": [1]}], ""),
    ("lines", [{"kind": "eval", "step": 2, "loss": 1e308}, {"kind": "eval", "step": 2, "loss": -1e308}], ""),
    ("lines", [{"kind": "energy", "step": 2, "energy_kwh": "x"}, {"kind": "note", "step": 2, "text": "\ud800"}], ""),
]


@pytest.mark.parametrize(("file", "change", "words"), ALTERED, ids=range(len(ALTERED)))
def test_what_no_run_writes_is_left_out_and_reported(tmp_path: Path, file: str, change: Any, words: str) -> None:
    run = read_run(str(_write(tmp_path / "a", **{file: change})))
    assert words in "\n".join(run.faults)
    assert bool(run.faults) == bool(words)
    assert "tiny" in _tell(run)


def test_files_nested_without_end_are_reported(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a")
    deep = b"[" * 100_000
    for name in ("resolved.json", "run.json"):
        (folder / name).write_bytes(deep)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + deep)
    run = read_run(str(folder))
    assert len(run.faults) == 3
    assert run.step == 2
    assert _tell(run)


def test_a_job_that_was_altered_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", resolved={"evaluate": {"batch_size": "x"}})
    (folder / "best").mkdir()
    with pytest.raises(ConfigError, match=r"`evaluate.batch_size` is 'x'"):
        Predictor.from_run(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("run.json", "{}", "its attempts are not numbered"),
        ("run.json", "[]", "run.json holds no object"),
        ("run.json", '{"attempts": 3}', "attempts is 3"),
        ("run.json", '{"attempts": [3]}', "1 of 1 attempts are altered"),
        ("run.json", '{"attempts": [{}]}', "its attempts are not numbered"),
        ("run.json", '{"attempts": [{"attempt": "x"}]}', "attempt is 'x'"),
        ("run.json", '{"attempts": [{"attempt": 1, "driver": {"host": 3}}]}', "driver is"),
        ("run.json", "[" * 100_000, "run.json is missing or cut off"),
        ("resolved.json", "null", "resolved.json holds no object"),
        ("resolved.json", '{"lora": 3}', "lora is 3"),
    ],
)
def test_an_altered_run_is_not_gone_on_with(tmp_path: Path, file: str, content: str, words: str) -> None:
    folder = _write(tmp_path / "a")
    assert find_run(str(tmp_path), "a", "x") is not None
    (folder / file).write_text(content)
    with pytest.raises(RunError, match=rf"--resume: .*is incomplete \(.*{words}"):
        find_run(str(tmp_path), "a", "x")


def test_what_counts_as_a_number() -> None:
    assert all(map(is_number, (0, -1, 1.5, 10**18, -1e200)))
    assert not any(map(is_number, (True, None, "1", float("nan"), float("inf"), HUGE, 1e308, [1])))
