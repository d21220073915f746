"""A step whose gradient is not finite changes nothing and is recorded; the run ends or continues. Jumps of the loss are
reported.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.data.plan import Plan
from ray_vlm.errors import RunError
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.callbacks.metrics import Spikes
from ray_vlm.train.callbacks.nonfinite import describe_step, explain, is_finite
from ray_vlm.train.driver import train


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of the micro-batches whose numbers (from 0) are put into the list become infinite."""
    from ray_vlm.methods.sft import WeightedSFTTrainer

    steps: list[int] = []
    seen: list[int] = []
    complete = WeightedSFTTrainer.complete

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        batch = complete(*args, **kwargs)
        if len(seen) in steps:
            batch["pixel_values"] = batch["pixel_values"] * math.inf
        seen.append(1)
        return batch

    monkeypatch.setattr(WeightedSFTTrainer, "complete", staticmethod(spoiled))
    return steps


def _train(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    return train(load_job(path, overrides), path.read_text(), resume=resume)


def _bad_steps(paths: RunPaths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.bad_steps.read_text().splitlines()]


def test_a_run_stops_before_the_step_and_goes_on_without_it(job_file: Any, poisoned: list[int], tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2}}
    path = job_file(**sections, checkpoint={"every_steps": 1})
    poisoned.append(5)  # the second half of the third step
    with pytest.raises(RunError, match=r"step 3: the gradient is not finite. Rows: .*train.nonfinite=skip"):
        _train(path, "run.name=stopped")
    paths = RunPaths(tmp_path / "runs" / "stopped")
    bad_steps = _bad_steps(paths)
    assert [line["step"] for line in bad_steps] == [3]
    assert [len(batch) for batches in bad_steps[0]["rows"] for batch in batches] == [2, 2]
    assert not paths.final.exists()
    poisoned.clear()
    poisoned.append(7)  # five were made before; the third step's two come again
    again = _train(path, "run.name=stopped", "train.nonfinite=skip", resume=True)
    lines = [line for line in read_metrics(again.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines][-2:] == [3, 4]
    assert lines[-2]["loss"] is None
    assert math.isfinite(lines[-1]["loss"])
    assert math.isfinite(lines[-1]["grad_norm"])
    assert again.final.is_dir()
    assert [line["step"] for line in _bad_steps(again)] == [3], "written once"


def test_a_skipped_step_changes_no_weight(job_file: Any, poisoned: list[int]) -> None:
    """The second of two steps is skipped: the adapter is the one after the first."""
    from safetensors.numpy import load_file

    path = job_file(
        train={"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 2}, checkpoint={"every_steps": 1}
    )
    poisoned.append(1)
    paths = _train(path, "train.nonfinite=skip")
    first = next(paths.root.glob("checkpoint-1-*"))
    after = load_file(paths.final / "adapter_model.safetensors")
    before = load_file(next(first.rglob("adapter_model.safetensors")))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def test_what_is_written_of_a_step() -> None:
    plan = Plan(12, 4, 1, 2, shuffle=False)
    bad_step = describe_step(plan, 1, lambda row: f"r{row}")
    assert bad_step == {"step": 2, "rows": [[["r4"], ["r5"]], [["r6"], ["r7"]]]}
    assert explain(bad_step, "skip").endswith("Rows: r4, r5, r6, r7. The step is skipped; see bad_steps.jsonl")
    many = bad_step | {"rows": [[[str(n) for n in range(20)]]]}
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in explain(many, "skip")
    assert is_finite({"a": 1.0})
    assert not is_finite({"a": 1.0, "b": math.inf})


def test_jumps_of_the_loss() -> None:
    spikes = Spikes()
    assert [spikes.look(step, 1.0 + 0.01 * (step % 5)) for step in range(30)] == [None] * 30
    assert spikes.look(30, 1.2) is None, "far above what is usual, but not half as much again"
    assert spikes.look(31, 2.5) == "step 31: loss 2.5, where the median of the last 31 is 1.02"
    assert spikes.look(32, math.nan) is None
    assert Spikes().look(1, 99.0) is None


def test_a_rewound_run_trains_nothing_from_its_checkpoint_to_the_step(
    job_file: Any, poisoned: list[int], capsys: pytest.CaptureFixture
) -> None:
    """Steps 3 and 4 come after the checkpoint of step 2, and 4 fails: both are skipped, by the same command."""
    from safetensors.numpy import load_file

    sections = {"train": {"max_steps": 5, "global_batch_size": 2, "micro_batch_size": 2, "nonfinite": "rewind"}}
    path = job_file(**sections, checkpoint={"every_steps": 2, "keep": 5})
    poisoned.append(3)
    paths = _train(path)
    adapters = {
        p.name.split("-")[1]: next(p.rglob("adapter_model.safetensors")) for p in paths.root.glob("checkpoint-*")
    }
    second, fourth, fifth = (load_file(adapters[step]) for step in ("2", "4", "5"))
    assert all((second[name] == fourth[name]).all() for name in second)
    assert any((fourth[name] != fifth[name]).any() for name in fourth)
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (2, 5)]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, True, False]
    attempts = json.loads(paths.run.read_text())["attempts"]
    assert [(a["status"], a.get("lost_steps")) for a in attempts] == [("failed", 1), ("finished", None)]
    output = capsys.readouterr().out
    assert "the gradient of step 4 was not finite: the steps from 3 to it are skipped" in output
    assert "2 attempts: step 4: the gradient is not finite" in output
