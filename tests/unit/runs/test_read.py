"""Run folders, also damaged ones, are read, shown, exported, drawn and compared."""

import csv
import io
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ray_vlm.cli import main
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.runs import plot
from ray_vlm.runs.compare import best_of, compare_runs, describe_comparison, run_titles
from ray_vlm.runs.plot import COLOURS, default_keys, overlay, plot_runs, smooth, spark, thin
from ray_vlm.runs.read import find_runs, is_number, read_run
from ray_vlm.runs.show import compare_ends, describe_run, describe_runs, write_table
from ray_vlm.runs.text import format_duration, format_number, format_table, plain_text

EVIL = "<script>\x1b[31m"


def write_run(folder: Path, learning_rate: float = 1e-4, task: str = "detection", **about: Any) -> Path:
    """A run of two steps with a validation, as training writes it."""
    folder.mkdir(parents=True)
    job = {
        "method": {"name": "sft"},
        "task": {"name": task},
        "model": {"name": "tiny", "load_in_4bit": True},
        "lora": {"rank": 8, "target": ["language"]},
        "train": {"learning_rate": learning_rate},
        "evaluate": {"metric": "f1_50"},
        "cluster": {"num_workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 2},
        "run": {"name": folder.name},
    }
    (folder / "resolved.json").write_text(json.dumps(job))
    attempt = {"attempt": 1, "started": 1000.0, "ended": 1090.0, "status": "finished"}
    run = {"status": "finished", "attempts": [attempt], "result": {"num_steps": 2}, "versions": {"ray-vlm": "0.1.0"}}
    (folder / "run.json").write_text(json.dumps(run | about))
    line = {"attempt": 1, "time": 1010.0, "epoch": 0.5}
    lines = [
        {"kind": "start", "step": 0, "trainable": {}},
        {"kind": "train", "step": 1, "loss": 3.0, "learning_rate": learning_rate, "tokens_per_s": 100.0},
        {"kind": "train", "step": 2, "loss": None, "learning_rate": learning_rate, "tokens_per_s": 300.0},
        {"kind": "eval", "step": 2, "loss": 2.0, "f1_50": learning_rate * 1000, "validation_s": 9.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | one) + "\n" for one in lines))
    return folder


def write_evaluation(run: Path, name: str, f1: float | None, test: str = "test.json") -> None:
    folder = run / "evaluate" / name
    folder.mkdir(parents=True)
    metrics = {"task": "detection", "overall": {"f1_50": f1, "map": 0.5}, "num_rows": 4, "test": test, "per_class": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    write_evaluation(write_run(tmp_path / "a"), "best", 0.4)
    (tmp_path / "a" / "checkpoint-2-a1-ff").mkdir()
    run = read_run(str(tmp_path / "a"))
    assert (run.name, run.status, run.step, run.num_steps, run.num_attempts) == ("a", "finished", 2, 2, 1)
    assert (run.wall_s, run.started, run.metric, run.folders) == (90.0, 1000.0, "f1_50", ("checkpoint-2-a1-ff",))
    assert run.best is not None
    assert run.best["step"] == 2
    assert run.evaluations["best"]["overall"]["f1_50"] == 0.4
    assert run.faults == ()


def test_the_best_validation_is_the_one_whose_weights_are_kept(tmp_path: Path) -> None:
    """Among equals the lower loss wins, then the later step, as in training's choice of `best/`."""
    with open(write_run(tmp_path / "a") / "metrics.jsonl", "a") as file:
        for step, f1, loss in ((3, 0.1, 2.5), (4, 0.1, 1.5), (5, 0.1, 1.5), (6, 0.1, None), (7, 0.05, 0.5)):
            line = {"kind": "eval", "attempt": 1, "step": step, "f1_50": f1, "loss": loss, "time": 1010.0, "epoch": 1.0}
            file.write(json.dumps(line) + "\n")
    best = read_run(str(tmp_path / "a")).best
    assert best is not None
    assert best["step"] == 5


@pytest.mark.parametrize("name", ["resolved.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["missing", "empty", "torn", "null", "list", "zeros"])
def test_what_is_missing_or_torn_is_reported_and_never_fatal(
    tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture
) -> None:
    """After a crash, a full disk or a manual change the rest is still shown."""
    folder, intact = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    file = folder / name
    content = {"empty": b"", "torn": file.read_bytes()[:-9], "null": b"null", "list": b"[1, 2]", "zeros": b"\0" * 50}
    file.unlink()
    if how != "missing":
        file.write_bytes(content[how])
    run = read_run(str(folder))
    assert (name in "".join(run.faults)) == (how != "empty" or name != "metrics.jsonl")
    for words in (["list", str(tmp_path)], ["show", str(folder)], ["compare", str(folder), str(intact), "--html"]):
        assert main(["runs", *words]) == 0
    assert main(["runs", "plot", str(folder), str(intact)]) == 0
    assert main(["runs", "export", str(folder), "--csv", "-"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "odd",
    [
        {"attempts": None},
        {"attempts": [None, 3]},
        {"attempts": [{"started": "yesterday"}]},
        {"attempts": [{"started": math.nan, "ended": "x", "error": EVIL}]},
        {"result": "fine"},
        {"hardware": 3, "versions": []},
        {"status": None},
        {"status": "running", "attempts": [{"driver": {}}]},
    ],
)
def test_odd_values_are_shown_as_they_are(tmp_path: Path, odd: dict) -> None:
    run = read_run(str(write_run(tmp_path / "a", **odd)))
    assert "\x1b" not in describe_run(run) + describe_runs([run])
    assert compare_runs([run, run]).titles[0] != compare_runs([run, run]).titles[1]


@pytest.mark.parametrize(
    ("workers", "samplers", "text"),
    [
        (0, 0, ", in one process"),
        (1, 2, ", 1 worker with 1 CPU each, 2 samplers"),
        ([1, 2], [1, 4], ", 1 to 2 workers with 1 CPU each, 1 to 4 samplers"),
    ],
)
def test_a_run_s_processes_are_shown(tmp_path: Path, workers: object, samplers: object, text: str) -> None:
    folder = write_run(tmp_path / "a")
    job = json.loads((folder / "resolved.json").read_text())
    job |= {"method": {"name": "grpo", "samplers": samplers}, "cluster": {"num_workers": workers}}
    (folder / "resolved.json").write_text(json.dumps(job))
    (line,) = (line for line in describe_run(read_run(str(folder))).splitlines() if text in line)
    assert line.endswith(text) or f"{text}, " in line


def test_no_run_is_an_error_that_names_every_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run here"):
        read_run(str(tmp_path / "empty"))
    assert main(["runs", "compare", str(tmp_path / "empty"), str(tmp_path / "nowhere")]) == 1
    message = capsys.readouterr().err
    assert "empty" in message
    assert "nowhere" in message


def test_runs_are_found_in_folders_of_folders_but_not_inside_runs(tmp_path: Path) -> None:
    for name in ("a", "deep/b", "deep/er/c"):
        write_run(tmp_path / name)
    write_run(tmp_path / "a" / "evaluate" / "copy")
    addresses = [Path(address).relative_to(tmp_path).as_posix() for address in find_runs(str(tmp_path))]
    assert addresses == ["a", "deep/b", "deep/er/c"]
    assert find_runs(str(tmp_path / "nowhere")) == []


def test_a_driver_that_is_gone_leaves_a_run_that_died(tmp_path: Path) -> None:
    here = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    attempt = {"attempt": 1, "started": 1000.0, "driver": here}
    living = write_run(tmp_path / "a", status="running", attempts=[attempt])
    gone = write_run(tmp_path / "b", status="running", attempts=[attempt | {"driver": here | {"started": 1.0}}])
    far = write_run(tmp_path / "c", status="running", attempts=[attempt | {"driver": here | {"host": "elsewhere"}}])
    assert [read_run(str(run)).status for run in (living, gone, far)] == ["running", "died", "running"]


def test_attempts_that_went_over_the_same_steps_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    again = [
        {"kind": "start", "attempt": 2, "step": 1, "time": 1100.0},
        {"kind": "train", "attempt": 2, "step": 2, "time": 1101.0, "loss": 1.5},
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    rows = list(csv.DictReader(io.StringIO(write_table(read_run(str(folder))))))
    assert [(row["kind"], row["step"], row["loss"]) for row in rows] == [("train", "1", "3.0"), ("train", "2", "1.5")]


def test_settings_and_metrics_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 1e-4), write_run(tmp_path / "b", 3e-4)]
    for run, f1 in zip(runs, (0.4, 0.6), strict=True):
        write_evaluation(run, "best", f1)
    comparison = compare_runs([read_run(str(run)) for run in runs])
    settings, test = comparison.sections["settings that differ"], comparison.sections["on data.test"]
    assert [(line.title, line.values) for line in settings] == [("train.learning_rate", ("0.0001", "0.0003"))]
    assert [(line.title, line.best) for line in test] == [("f1_50", (1,)), ("map", ())]
    validated = {line.title: line.best for line in comparison.sections["validation at the step of best/"]}
    assert validated == {"loss": (), "f1_50": (1,)}
    table = describe_comparison(comparison)
    assert "0.600*" in table
    assert "0.400*" not in table
    assert comparison.notes == ()


def test_a_section_that_some_run_lacks_is_one_setting(tmp_path: Path) -> None:
    runs = []
    for name, section in (("a", None), ("b", {"path": "b.json", "format": "coco"})):
        folder = write_run(tmp_path / name)
        job = json.loads((folder / "resolved.json").read_text()) | {"data": {"eval": section}}
        (folder / "resolved.json").write_text(json.dumps(job))
        runs.append(read_run(str(folder)))
    settings = compare_runs(runs).sections["settings that differ"]
    assert [(line.title, line.values) for line in settings] == [("data.eval", ("null", "b.json"))]


def test_what_is_not_comparable_is_reported_and_not_marked(tmp_path: Path) -> None:
    a, b, c = (
        write_run(tmp_path / n, r, task=t)
        for n, r, t in (("a", 1e-4, "detection"), ("b", 3e-4, "chat"), ("c", 5e-4, "chat"))
    )
    write_evaluation(b, "best", 0.4)
    write_evaluation(c, "other", 0.6, test="another.json")
    comparison = compare_runs([read_run(str(run)) for run in (a, b, c)])
    assert not any(line.best for lines in comparison.sections.values() for line in lines)
    notes = " ".join(comparison.notes)
    for words in ("different tasks (chat, detection)", "Test rows differ", "a has no evaluation", "evaluate/other"):
        assert words in notes


def test_losses_fall_and_everything_else_rises() -> None:
    assert best_of("loss", [3.0, 1.0, None]) == (1,)
    assert best_of("f1_50", [0.3, None, 0.7, 0.7]) == (2, 3)
    assert best_of("f1_50", [0.7, 0.7]) == best_of("f1_50", [None, 0.7]) == ()


def test_titles_tell_runs_apart(tmp_path: Path) -> None:
    runs = [read_run(str(write_run(tmp_path / name))) for name in ("x/a", "y/a", "b")]
    assert run_titles(runs[:1]) == ("a",)
    assert run_titles(runs[1:]) == ("a", "b")
    assert run_titles(runs[:2]) == ("x/a", "y/a")


def test_page_is_escaped_and_alone(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}{EVIL}", 1e-4 * i, status=EVIL) for i in (1, 2)]
    for run in runs:
        write_evaluation(run, EVIL.replace("\x1b", ""), math.nan)
        line = {"id": EVIL, "images": [str(tmp_path / "gone.png")], "sizes": [[9, 9]], "answer": EVIL}
        line |= {"truth": {"answer": EVIL}, "found": {"answer": EVIL}, "score": {"normalised": False}}
        (run / "evaluate" / EVIL.replace("\x1b", "") / "predictions.jsonl").write_text(json.dumps(line) + '\n{"id')
    assert main(["runs", "compare", *map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http://" not in html
    assert "<svg" in html


def test_settings_that_an_earlier_version_wrote_are_no_difference(tmp_path: Path, capsys) -> None:
    """It wrote the settings of all methods, and lacked those that came later."""
    runs = [write_run(tmp_path / name) for name in ("old", "new")]
    job = dump_job(load_resolved({"model": {"name": "tiny"}, "data": {"train": {"path": "/a.json"}}}))
    old = job | {"method": job["method"] | {"beta": None, "num_generations": 8}, "train": {}}
    for run, values in zip(runs, (old, job), strict=True):
        (run / "resolved.json").write_text(json.dumps(values))
    assert main(["runs", "compare", *map(str, runs)]) == 0
    output = capsys.readouterr().out
    assert "method." not in output
    assert "train." not in output


def test_pictures_of_one_and_of_many(tmp_path: Path) -> None:
    runs = [read_run(str(write_run(tmp_path / f"_{i} $5_b$", 1e-4 * (i + 1)))) for i in range(20)]
    assert default_keys(runs) == ["loss", "f1_50", "learning_rate"]
    assert plot_runs(runs, run_titles(runs)).startswith(b"\x89PNG")
    one = plot_runs(runs[:1], run_titles(runs[:1]), ["loss", "f1_50"], "svg")
    assert one == plot_runs(runs[:1], run_titles(runs[:1]), ["loss", "f1_50"], "svg"), "the same run, the same file"
    with pytest.raises(ConfigError, match=r"--metric nonsense: no run has it. Lines of .* have: .*loss"):
        plot_runs(runs, run_titles(runs), ["nonsense"])
    assert main(["runs", "plot", runs[0].address, "--output", str(tmp_path / "x.gif")]) == 2


def test_curves_keep_their_ends() -> None:
    points = [(float(i), float(i % 7)) for i in range(1, 1001)]
    thinned = thin(points, 50)
    assert (len(thinned), thinned[0], thinned[-1]) == (50, points[0], points[-1])
    assert thin(points[:50], 50) == points[:50]
    assert smooth([(1, 2.0), (2, 2.0)]) == [(1, 2.0), (2, 2.0)]
    assert smooth([]) == []
    assert smooth([(1, 4.0), (2, 2.0)])[1][1] == pytest.approx((0.9 * 4 + 2) / 1.9), "without a bias to the first"
    assert (len(spark(points)), spark([]), spark([(1, 5.0)])) == (40, "", "▁")


def test_the_ends_of_a_curve_are_comparable() -> None:
    assert compare_ends([3.59, 3.0, 2.5, 1.95]) == (3.59, 1.95, "first -> last")
    falling = [float(i) for i in range(12, 0, -1)]
    assert compare_ends(falling) == (11.0, 2.0, "mean of the first 3 -> mean of the last 3")
    assert compare_ends(falling * 10)[2] == "mean of the first 10 -> mean of the last 10"


@pytest.mark.parametrize("last", [10, 1])
def test_axes_have_whole_steps_and_begin_at_zero(tmp_path: Path, last: int) -> None:
    """Few steps have no ticks between them; a share that is always 0 has no axis around 0."""
    from matplotlib.figure import Figure

    folder = write_run(tmp_path / "a")
    line = {"kind": "eval", "attempt": 1, "time": 1010.0, "epoch": 0.5, "zero": 0.0}
    lines = [
        line | {"step": step, "rising": step / 10, "signed": step - 5.0, "flat": 0.75}
        for step in range(min(3, last), last + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(str(folder))
    panels = Figure().subplots(4)
    for panel, key in zip(panels, ("zero", "rising", "signed", "flat"), strict=True):
        plot._draw(panel, key, [run.current])
        assert all(float(tick).is_integer() for tick in panel.get_xticks())
        assert len(set(panel.get_xticks())) == len(panel.get_xticks())
    assert panels[0].get_ylim() == (0, 1)
    assert panels[1].get_ylim()[0] >= 0
    assert panels[2].get_ylim()[0] < (-2 if last > 1 else -4)
    assert panels[3].get_ylim() == (0, 1), "a share that never changes has the axis of all shares"


def test_a_number_that_no_run_has_makes_no_chart(tmp_path: Path) -> None:
    runs = [read_run(str(write_run(tmp_path / "a")))]
    assert overlay(runs, ["a"], "train", "reward", "x") is None
    chart = overlay(runs, ["a"], "train", "loss", "x")
    assert chart is not None
    assert chart.lines == ((COLOURS[0], "solid", "a"),)


def test_text_that_came_from_files_cannot_drive_the_terminal() -> None:
    assert plain_text("a\x1b[31mb\n\u202ec") == "a?[31mb??c"
    table = format_table([["a\nb", "1"], ["long" * 30, "22"]])
    assert len(table.splitlines()) == 2
    assert max(map(len, table.splitlines())) < 60


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.000"), (0.12345, "0.123"), (3e-5, "3.0e-05"), (12345.6, "12,346"), (7, "7")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_times_are_short() -> None:
    assert [format_duration(s) for s in (0.4, 59.4, 61, 3600, 90000)] == [
        "0 s",
        "59 s",
        "1:01 min",
        "1:00 h",
        "25:00 h",
    ]


def test_init_writes_jobs_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["init", str(tmp_path / "new")]) == 0
    jobs = tmp_path / "new" / "jobs"
    assert f"    cd {tmp_path / 'new'}\n" in capsys.readouterr().out
    assert main(["config", str(jobs / "demo_sft.yaml")]) == 0
    (jobs / "demo_sft.yaml").write_text("mine")
    (jobs / "demo_dpo.yaml").unlink()
    assert main(["init", str(tmp_path / "new")]) == 1
    assert (jobs / "demo_sft.yaml").read_text() == "mine"
    assert not (jobs / "demo_dpo.yaml").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_verbs(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("evaluate", "compare", "--metric"))


def test_what_counts_as_a_number() -> None:
    numbers = [0.0, -1.5, 3, np.float64(0.5)]
    others = [math.nan, math.inf, -math.inf, np.float64("nan"), True, None, "1", [1]]
    assert all(is_number(value) for value in numbers)
    assert not any(is_number(value) for value in others)
