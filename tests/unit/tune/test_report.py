"""The sweep's page: the best first, who mattered, and nothing from files becomes markup."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.runs.plot import COLOURS
from ray_vlm.runs.read import read_run
from ray_vlm.tune.report import describe_cost, draw_settings, measure_importance, place_values, write_report
from ray_vlm.tune.space import Setting, Space
from ray_vlm.tune.trials import Trial, rank_trials, read_trials

SPACE = Space(
    (
        Setting("train.learning_rate", "loguniform", (1e-5, 1e-1)),
        Setting("lora.rank", "choice", (8, 16)),
        Setting("data.oversample", "choice", (None, {"<b>x</b>": 2.0})),
    )
)


def _trial(name: str, rate: float, rank: int, score: float | None, **changes: Any) -> Trial:
    values = {"train.learning_rate": rate, "lora.rank": rank, "data.oversample": None}
    metrics = {} if score is None else {"f1_50": score, "map": 1 - score}
    curve = () if score is None else ((10, score / 2), (20, score))
    fields: dict[str, Any] = {"status": "finished", "step": 20, "num_steps": 20, "best_step": 20, "wall_s": 5.0}
    return Trial(name, values, metric="f1_50", metrics=metrics, **(fields | {"curve": curve} | changes))


def test_points_lie_at_their_values() -> None:
    from matplotlib.figure import Figure

    rate, size, oversample = SPACE.searched
    panel = Figure().subplots()
    assert place_values(panel, rate, [1e-5, 1e-1]) == [1e-5, 1e-1]
    assert panel.get_xscale() == "log"
    panel = Figure().subplots()
    assert place_values(panel, size, [16, 8, 16]) == [1, 0, 1]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["8", "16"]
    assert place_values(panel, oversample, [{"<b>x</b>": 2.0}, None]) == [1, 0]
    trials = [_trial("001", 1e-1, 16, 0.6), _trial("000", 1e-5, 8, 0.2)]
    drawing = draw_settings(SPACE, trials, "f1_50")
    assert all(name in drawing for name in ("train.learning_rate", "lora.rank", "data.oversample", "f1_50"))
    assert "<b>" not in drawing
    assert draw_settings(SPACE, trials[:1], "f1_50") == ""


def test_what_decides_is_found_and_what_does_not_is_not() -> None:
    trials = [
        _trial(f"{i:03d}", 10 ** -(1 + i % 5), 8 if i % 2 else 16, 0.1 + 0.8 * (1 + i % 5) / 5, step=20)
        for i in range(20)
    ]
    shares, step = measure_importance(SPACE, trials)
    assert step == 20
    assert next(iter(shares)) == "train.learning_rate"
    assert shares["train.learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "data.oversample" not in shares, "it was the same in all"
    assert measure_importance(SPACE, trials[:5]) == ({}, None)
    ended = [*trials[:19], _trial("099", 1e-2, 8, 0.3, curve=((10, 0.3),))]
    assert measure_importance(SPACE, ended)[1] == 10, "where all of them came to"


def _write_run(folder: Path, rate: float, scores: list[float], status: str = "finished") -> None:
    folder.mkdir(parents=True)
    job = {
        "model": {"name": "tiny"},
        "train": {"learning_rate": rate},
        "lora": {"rank": 8},
        "data": {"oversample": {"<b>x</b>": 2.0}},
        "evaluate": {"metric": "f1_50"},
        "task": {"name": "detection"},
        "method": {"name": "sft"},
        "cluster": {"cpus_per_worker": 2, "num_workers": 0},
    }
    (folder / "resolved.json").write_text(json.dumps(job))
    attempt = {"attempt": 1, "started": 100.0, "ended": 160.0, "status": status}
    (folder / "run.json").write_text(json.dumps({"status": status, "attempts": [attempt], "result": None}))
    lines: list[dict[str, Any]] = [{"kind": "start", "attempt": 1, "step": 0, "time": 100.0, "num_steps": 20}]
    for i, score in enumerate(scores):
        value = score if math.isfinite(score) else None
        lines.append({"kind": "eval", "attempt": 1, "step": 10 * (i + 1), "time": 110.0, "f1_50": value, "loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_from_folders(tmp_path: Path) -> None:
    for i, (scores, status) in enumerate(
        [([0.1, 0.3], "finished"), ([0.2, 0.5], "finished"), ([0.05], "pruned"), ([float("nan")], "failed")]
    ):
        _write_run(tmp_path / "trials" / f"{i:03d}", 10.0 ** -(i + 1), scores, status)
    (tmp_path / "trials" / "junk").mkdir()
    trials = read_trials(str(tmp_path), SPACE)
    assert [t.name for t in trials] == ["000", "001", "002", "003"]
    assert rank_trials(trials) == [1, 0, 2]
    assert trials[2].num_steps == 20
    runs = [read_run(str(tmp_path / "trials" / t.name)) for t in trials]
    page = write_report("Sweep <i>", SPACE, ["f1_50", "loss"], trials, runs, ["a note"])
    assert page.index(">001") < page.index(">000") < page.index(">002") < page.index(">003")
    assert "pruned at step 10" in page
    assert "<b>x</b>" not in page
    assert "Sweep &lt;i&gt;" in page
    curves = page[page.index("f1_50, validation") :]
    drawn = [curves.index(f"stroke: {COLOURS[number]}") for number in (2, 1, 0)]
    assert drawn == sorted(drawn), "the best trial is drawn last"
    assert f'style="color: {COLOURS[0]}; border-top-style: solid"></span>trial 001' in curves
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing from elsewhere"
    cost = dict(describe_cost(trials, runs))
    assert cost["trials"] == "2 finished, 1 pruned, 1 failed"
    assert float(cost["CPU-hours"]) == pytest.approx(4 * 60 * 2 / 3600, abs=1e-3)
    assert float(cost["hours of unfinished runs"]) == pytest.approx(2 * 60 * 2 / 3600, abs=1e-3)
