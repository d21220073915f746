"""The output of `runs show` (one screen on a run), `runs list` (a line for each run) and `runs export` (a table)."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from ray_vlm.runs.compare import test_of
from ray_vlm.runs.monitor import NOT_MEASURES
from ray_vlm.runs.plot import main_key, points_of, spark
from ray_vlm.runs.read import Run, is_number, setting
from ray_vlm.runs.text import format_date, format_duration, format_number, format_table, plain_text, plural

_MOST_VALIDATIONS = 8  # lines of the table
_ENDS = 10  # steps at each end of a curve whose mean is shown
# Shown for a run whose own metric is not in its evaluations.
_HEADLINES = ("f1_50", "accuracy", "step_success", "normalised")
_VERSIONS = ("torch", "transformers", "trl", "peft", "ray")


def describe_runs(runs: Sequence[Run], here: str = "") -> str:
    """Return a line for each run, the newest first; the prefix `here` is removed from their addresses."""
    head = ["run", "status", "method", "task", "model", "steps", "best", "on test", "started", "time"]
    newest = sorted(runs, key=lambda run: run.started or 0.0, reverse=True)
    return format_table([head, *(_line(run, here) for run in newest)])


def _line(run: Run, here: str) -> list[str]:
    steps = str(run.step) if run.num_steps in (None, run.step) else f"{run.step}/{run.num_steps}"
    overall = test_of(run)[1].get("overall", {})
    headline = next((name for name in (run.metric, *_HEADLINES) if is_number(overall.get(name))), None)
    kind = [str(setting(run.job, key) or "?") for key in ("method.name", "task.name", "model.name")]
    best = f"{run.metric} {format_number(run.best[run.metric])}" if run.best else "-"
    tested = f"{headline} {format_number(overall[headline])}" if headline else "-"
    status = f"{run.status}!" if run.faults else run.status
    return [
        run.address.removeprefix(here),
        status,
        *kind,
        steps,
        best,
        tested,
        format_date(run.started),
        format_duration(run.wall_s),
    ]


def describe_run(run: Run) -> str:
    """Return one screen on a run: its job, training, validations, evaluations and folders."""
    blocks = [_head(run), _training(run), _validations(run), _evaluations(run), _places(run)]
    blocks.append([f"note: {fault}" for fault in run.faults])
    text = "\n\n".join("\n".join(block) for block in blocks if block)
    return "\n".join(map(plain_text, text.split("\n")))


def _head(run: Run) -> list[str]:
    job = run.job
    rank, parts = setting(job, "lora.rank") or "?", setting(job, "lora.target") or "?"
    how = f"LoRA of rank {rank} on {', '.join(parts)}" if setting(job, "lora") else "all weights"
    bits = ", 4 bit" if setting(job, "model.load_in_4bit") else ""
    workers, samplers = setting(job, "cluster.num_workers"), setting(job, "method.samplers")
    cards = setting(job, "cluster.gpus_per_worker") or 0
    cpus = setting(job, "cluster.cpus_per_worker")
    each = f"{cards:g} GPU" if cards else f"{cpus or 1:g} CPU"
    versions, memory = run.section("versions"), run.section("hardware").get("memory_gib")
    libraries = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)
    commit = str(run.about.get("git_commit") or "")[:12]
    at_commit = f" at {commit}" if commit else ""
    return [
        f"{run.address}: {run.status}",
        f"{setting(job, 'method.name')} of {setting(job, 'task.name')} on {setting(job, 'model.name')}{bits}; {how}",
        f"{format_date(run.started)}, {format_duration(run.wall_s)}, {plural(run.num_attempts, 'attempt')}, "
        + (f"{_tell_count(workers, 'worker')} with {each} each" if workers else "in one process")
        + (f", {_tell_count(samplers, 'sampler')}" if samplers else "")
        + (f", {memory} GiB of memory" if memory else ""),
        *([] if run.log else [f"ray_vlm {versions.get('ray-vlm', '?')}{at_commit}; {libraries}"]),
    ]


def _tell_count(count: int | list[int], what: str) -> str:
    return f"{count[0]} to {count[1]} {what}s" if isinstance(count, list) else plural(count, what)


def _training(run: Run) -> list[str]:
    lines = []
    for key in dict.fromkeys([main_key(run.current), "loss"]):
        points = points_of(run.current, "train", key)
        if points:
            first, last, label = compare_ends([value for _, value in points])
            lines.append(
                f"{key:<20} {format_number(first):>8} -> {format_number(last):<8} {spark(points)}  "
                f"{plural(run.step, 'step')} ({label})"
            )
    for error in [a["error"] for a in run.attempts if a.get("error")]:
        lines.append(f"error: {str(error).strip().splitlines()[-1][:300]}")
    return lines


def compare_ends(values: Sequence[float]) -> tuple[float, float, str]:
    """Return comparable numbers for the start and the end of a curve, and what they are.

    These are means of up to `_ENDS` steps each, or the first and the last value of a short run.
    """
    count = min(_ENDS, len(values) // 4)
    if count < 2:
        return values[0], values[-1], "first -> last"
    return fmean(values[:count]), fmean(values[-count:]), f"mean of the first {count} -> mean of the last {count}"


def _validations(run: Run) -> list[str]:
    validations = run.of_kind("eval")
    if not validations:
        return []
    shown = validations[-_MOST_VALIDATIONS:]
    if run.best is not None and run.best not in shown:
        shown = [run.best, *shown[1:]]
    names = [k for k in dict.fromkeys(k for line in shown for k in line) if k not in NOT_MEASURES]
    names = [run.metric, *(k for k in names if k != run.metric)][:9] if run.metric in names else names[:9]
    rows = [
        [str(line["step"]) + ("*" if line is run.best else ""), *(_cell(line.get(k)) for k in names)] for line in shown
    ]
    left = f", the last {len(shown)} of {len(validations)}" if len(validations) > len(shown) else ""
    title = f"validation, * the best by {run.metric}{left}" if run.best else f"validation{left}"
    return [title, format_table([["step", *names], *rows])]


def _evaluations(run: Run) -> list[str]:
    if not run.evaluations:
        return []
    names = list(dict.fromkeys(k for metrics in run.evaluations.values() for k in metrics["overall"]))[:9]
    rows = [
        [name, str(metrics.get("num_rows", "?")), *(_cell(metrics["overall"].get(k)) for k in names)]
        for name, metrics in run.evaluations.items()
    ]
    chose = any(metrics.get("rows_chose_best") for metrics in run.evaluations.values())
    title = "on data.eval, whose rows also chose best/" if chose else "on data.test"
    return [title, format_table([["evaluation", "rows", *names], *rows])]


def _places(run: Run) -> list[str]:
    if run.log:
        return [
            f"a training log without its run's folder, of the run {run.log}: weights and evaluations are in that folder"
        ]
    checkpoints = [name for name in run.folders if name.startswith("checkpoint-")]
    contents = [f"{name}/" for name in run.folders if not name.startswith("checkpoint-")]
    contents += [plural(len(checkpoints), "checkpoint")] if checkpoints else []
    return [f"contents: {', '.join(contents) or 'no weights'}"]


def _cell(value: object) -> str:
    return format_number(value) if is_number(value) else "-"


_FIRST = ("kind", "attempt", "step", "epoch", "time")
_KINDS = ("train", "epoch", "eval", "checkpoint")


def write_table(run: Run) -> str:
    """Return a run's numbers as CSV: a row for each current line of `metrics.jsonl`, a column for each number.

    Cells of missing and non-finite numbers are empty.
    """
    lines = [line for line in run.current if line["kind"] in _KINDS]
    names = [*_FIRST, *sorted({key for line in lines for key in line} - set(_FIRST))]
    out = io.StringIO()
    table = csv.DictWriter(out, names, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return out.getvalue()
