"""The cost of a run, from its lines alone."""

import json
from pathlib import Path

import pytest

from ray_vlm.cli import main
from ray_vlm.runs.compute import PHASES, measure_compute, write_markdown
from ray_vlm.runs.read import read_run
from tests.unit.runs.test_read import write_run


def _lines(folder: Path, device: str = "NVIDIA A100-SXM4-40GB") -> None:
    weights = {"language": {"trainable": 10**6, "total": 10**9}, "vision": {"trainable": 0, "total": 10**8}}
    step = {"kind": "train", "attempt": 1, "time": 1020.0, "loss": 1.0, "step_s": 4.0, "tokens_per_s": 1000.0}
    step |= {"images": 16, "data_s": 0.5, "rollout_s": 0.0, "forward_s": 1.0, "backward_s": 2.0, "peak_memory_gib": 9.0}
    step |= {"model_tokens": 3000, "model_tflop": 12.0}
    lines = [
        {"kind": "start", "attempt": 1, "step": 0, "time": 1010.0, "trainable": weights, "device": device},
        *(step | {"step": i} for i in range(1, 6)),
        {"kind": "checkpoint", "attempt": 1, "step": 4, "time": 1030.0, "checkpoint_s": 3.0},
        {"kind": "start", "attempt": 2, "step": 4, "time": 1050.0, "trainable": weights, "device": device},
        *(step | {"step": i, "attempt": 2} for i in range(5, 11)),
        {"kind": "eval", "attempt": 2, "step": 10, "time": 1080.0, "loss": 2.0, "validation_s": 7.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_hours_tokens_and_where_the_time_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    _lines(folder)
    cost = measure_compute(read_run(str(folder)))
    assert (cost["tokens"], cost["images"], cost["tokens_per_s"], cost["images_per_s"]) == (
        40_000,
        160,
        1000.0,
        4.0,
    )
    assert cost["lost"] == {"steps": 1, "s": 4.0}
    times = cost["time_s"]
    assert {name: times[name] for name in PHASES} == {"data": 5.0, "rollout": 0.0, "forward": 10.0, "backward": 20.0}
    assert (times["optimizer"], times["validation"], times["checkpoint"], times["done_again"]) == (5.0, 7.0, 3.0, 4.0)
    assert sum(times.values()) == pytest.approx(cost["wall_s"]) == 90.0
    assert cost["cpu_hours"] == pytest.approx(90 / 3600 * 2)
    assert cost["gpu_hours"] == 0.0
    assert cost["mfu"] is None, "no peak is known of a CPU"


def test_several_runs_are_added_up_with_what_came_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, status in (("a", "finished"), ("b", "failed"), ("c", "interrupted")):
        folder = write_run(tmp_path / "all" / name)
        _lines(folder)
        about = json.loads((folder / "run.json").read_text()) | {"status": status}
        (folder / "run.json").write_text(json.dumps(about))
    with (tmp_path / "all" / "a" / "metrics.jsonl").open("a") as file:
        for attempt, kwh in ((1, 1.0), (1, 2.0), (2, 0.5)):
            line = {
                "kind": "energy",
                "attempt": attempt,
                "step": 4,
                "time": 1085.0,
                "energy_kwh": kwh,
                "co2_kg": kwh / 2,
            }
            file.write(json.dumps(line) + "\n")
    output = tmp_path / "cost.json"
    assert main(["runs", "compute", str(tmp_path / "all"), "--json", str(output)]) == 0
    assert "hours of unfinished runs" in capsys.readouterr().out
    costs = json.loads(output.read_text())
    assert list(costs) == ["a", "b", "c", "all"]
    assert costs["all"]["tokens"] == 120_000
    assert costs["all"]["wall_s"] == pytest.approx(sum(costs[name]["wall_s"] for name in "abc"))
    assert costs["all"]["unfinished_hours"] == pytest.approx(costs["b"]["cpu_hours"] + costs["c"]["cpu_hours"])
    assert (costs["a"]["energy_kwh"], costs["b"]["energy_kwh"], costs["all"]["energy_kwh"]) == (2.5, None, 2.5)
    assert costs["all"]["lost"]["steps"] == 3


def test_operations_are_those_that_the_run_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    _lines(folder)
    job = json.loads((folder / "resolved.json").read_text())
    job["train"]["gradient_checkpointing"] = True  # recomputed activations are no model FLOPs
    job["cluster"] |= {"num_workers": 2, "gpus_per_worker": 1}
    (folder / "resolved.json").write_text(json.dumps(job))
    cost = measure_compute(read_run(str(folder)))
    assert (cost["tflop"], cost["model_tokens"]) == (120.0, 30_000)
    assert cost["gpu_hours"] == pytest.approx(90 / 3600 * 2)
    assert cost["mfu"] == pytest.approx(120.0 / (40.0 * 2 * 312))


def test_a_run_of_a_version_that_counted_nothing_has_no_mfu(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    _lines(folder)
    lines = (folder / "metrics.jsonl").read_text().replace('"model_tflop"', '"other"')
    (folder / "metrics.jsonl").write_text(lines)
    cost = measure_compute(read_run(str(folder)))
    assert (cost["tflop"], cost["model_tokens"], cost["mfu"], cost["tokens"]) == (None, None, None, 40_000)


@pytest.mark.parametrize("name", ["metrics.jsonl", "resolved.json", "run.json"])
def test_what_cannot_be_known_is_left_open(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "a")
    _lines(folder, "Some | <b>Card</b>")
    (folder / name).unlink()
    cost = measure_compute(read_run(str(folder)))
    table = write_markdown(
        ["a|b"],
        [
            cost,
        ],
    )
    assert "| | a\\|b |" in table
    assert "<b>" not in table
    json.dumps(cost)


def test_a_table_has_a_column_for_each_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    [_lines(run) for run in runs]
    lines = write_markdown(["a", "b"], [measure_compute(read_run(str(run))) for run in runs]).splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert "| time: forward | 11.1% | 11.1% |" in lines


def test_where_the_time_of_samplers_and_workers_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    _lines(folder)
    plain = measure_compute(read_run(str(folder)))
    assert plain["overlap_gain"] is None
    assert "sampler" not in write_markdown(["a"], [plain])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"sampling_s": 3.0, "samplers_idle_s": 1.0, "waiting_s": 0.5}  # of steps of 4 s
    lines = [line | times if line["kind"] == "train" else line for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = json.loads((folder / "resolved.json").read_text())
    job["method"] = {"name": "grpo", "samplers": 2, "gpus_per_sampler": 1, "cpus_per_sampler": 3.0}
    (folder / "resolved.json").write_text(json.dumps(job))
    cost = measure_compute(read_run(str(folder)))
    shares = (cost["sampling_share"], cost["samplers_idle_share"], cost["waiting_share"])
    assert shares == (0.75, 0.25, 0.125)
    assert cost["overlap_gain"] == pytest.approx((4 - 0.5 + 3) / 4)
    assert cost["gpu_hours"] == pytest.approx(90 / 3600 * 2)
    assert cost["cpu_hours"] == pytest.approx(plain["cpu_hours"] + 90 / 3600 * 6)
    assert "| workers wait for samplers | 0.125 |" in write_markdown(["a"], [cost])
    for line in lines:
        if line["kind"] == "train":  # a step of 4 s with one sampler, and one of 1 s with six
            line |= {"samplers": 6.0, "step_s": 1.0} if line["step"] % 2 else {"samplers": 1.0, "step_s": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measure_compute(read_run(str(folder)))["gpu_hours"] == pytest.approx(90 / 3600 * 2), "a fixed number"
    job["method"]["samplers"] = [1, 6]
    (folder / "resolved.json").write_text(json.dumps(job))
    assert len(read_run(str(folder)).of_kind("train")) % 2 == 0
    cost = measure_compute(read_run(str(folder)))
    assert cost["gpu_hours"] == pytest.approx(90 / 3600 * 2)
    assert "| samplers | 2.000 |" in write_markdown(["a"], [cost])
