"""The cost of a run: hours, tokens, floating-point operations, time by phase, repeated steps. Pure functions.

Floating-point operations are the model FLOPs that `models/operations.py` counts during training: those of the tokens
that went through the model, without recomputed activations. MFU is model FLOPs divided by the time of the steps and the
dense bf16 peak of the GPUs. Runs of earlier versions that did not count FLOPs have neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_vlm.runs.read import Run, is_number, setting
from ray_vlm.runs.schema import number_of
from ray_vlm.runs.text import format_duration, format_markdown, format_number

PHASES = ("data", "rollout", "forward", "backward")  # of a step; the rest of it is the optimizer and logging
# Dense bf16 peak in TFLOP/s by a part of the GPU's name; the first match counts (makers' data sheets).
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 150.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "T4": 65.0,
}


def _workers(run: Run) -> float:
    """Return the number of workers; if it changed, the mean over the current steps."""
    counts, configured = [], setting(run.job, "cluster.num_workers")
    now = max(configured) if isinstance(configured, list) else max(1, configured or 1)
    for line in run.current:
        now = number_of(line, "num_workers") or now
        counts += [now] if line["kind"] == "train" else []
    mean = sum(counts) / len(counts) if counts else now
    return round(mean, 2) if mean % 1 else int(mean)


def measure_compute(run: Run) -> dict[str, Any]:
    """Return everything that is known of a run's cost; unknown numbers are None."""
    steps = [line for line in run.of_kind("train") if is_number(line.get("step_s"))]
    train_s = _sum(steps, "step_s")
    tokens = sum(line["step_s"] * number_of(line, "tokens_per_s") for line in steps)
    images = round(_sum(steps, "images"))
    workers = _workers(run)
    processes = workers + bool(setting(run.job, "evaluate.asynchronous"))
    cards = float(setting(run.job, "cluster.gpus_per_worker") or 0)
    counted = any(is_number(line.get("model_tflop")) for line in steps)
    tflop = _sum(steps, "model_tflop") if counted else None
    name = next((line["device"] for line in run.lines if line["kind"] == "start" and line.get("device")), None)
    peak, lost = find_peak(name or ""), measure_lost(run)
    wall_h = run.wall_s / 3600
    samplers = _samplers(run)
    sampler_cpus, sampler_cards = _sampler_resources(run, samplers)
    return {
        "device": name,
        "num_workers": workers,
        "num_samplers": samplers or None,
        "wall_s": run.wall_s,
        "gpu_hours": wall_h * (processes * cards + sampler_cards),
        "cpu_hours": wall_h * (processes * float(setting(run.job, "cluster.cpus_per_worker") or 1) + sampler_cpus),
        "peak_memory_gib": max((n for line in steps if (n := number_of(line, "peak_memory_gib"))), default=None),
        "tokens": round(tokens),
        "images": images,
        "tokens_per_s": tokens / train_s if train_s else None,
        "images_per_s": images / train_s if train_s and images else None,
        "model_tokens": _sum(steps, "model_tokens") if counted else None,
        "tflop": tflop,
        "mfu": tflop / (train_s * workers * cards * peak) if tflop and train_s and cards and peak else None,
        **measure_energy(run),
        "time_s": split_wall(run, steps, lost["s"]),
        "lost": lost,
        **measure_sampling(steps),
    }


def _samplers(run: Run) -> float:
    """Return the number of samplers beside the workers; if it changed, the mean over the time of the steps."""
    configured = setting(run.job, "method.samplers") or 0
    count = float(configured[0] if isinstance(configured, list) else configured)
    steps = [line for line in run.of_kind("train") if is_number(line.get("samplers"))]
    if isinstance(configured, list) and (total := _sum(steps, "step_s")):
        count = sum(number_of(line, "samplers") * number_of(line, "step_s") for line in steps) / total
    return round(count, 2)


def _sampler_resources(run: Run, count: float) -> tuple[float, float]:
    """Return the CPUs and the GPUs of so many samplers of a run."""
    cpus, cards = setting(run.job, "method.cpus_per_sampler"), setting(run.job, "method.gpus_per_sampler")
    if cards is None:
        cards = float(bool(setting(run.job, "cluster.gpus_per_worker")))
    return count * float(cpus or setting(run.job, "cluster.cpus_per_worker") or 1), count * float(cards)


def measure_sampling(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the shares of the steps' time in which a sampler of GRPO sampled (`sampling_share`) or had nothing to do
    (`samplers_idle_share`) and in which the workers waited for answers (`waiting_share`), and `overlap_gain`: the time
    that the same work would take if samplers and workers never worked at once, as a multiple of the time that it took.
    All None for runs without samplers.
    """
    sampled = [line for line in steps if is_number(line.get("sampling_s"))]
    total = _sum(sampled, "step_s")
    if not total:
        return dict.fromkeys(("sampling_share", "samplers_idle_share", "waiting_share", "overlap_gain"))
    sampling, waiting = _sum(sampled, "sampling_s"), _sum(sampled, "waiting_s")
    return {
        "sampling_share": sampling / total,
        "samplers_idle_share": _sum(sampled, "samplers_idle_s") / total,
        "waiting_share": waiting / total,
        "overlap_gain": (total - waiting + sampling) / total,
    }


def measure_energy(run: Run) -> dict[str, float | None]:
    """Return `energy_kwh` and `co2_kg` of all attempts, each up to its last energy line; None without such lines."""
    last = {line["attempt"]: line for line in run.lines if line["kind"] == "energy"}
    names = ("energy_kwh", "co2_kg")
    return {name: _sum(last.values(), name) if last else None for name in names}


def split_wall(run: Run, steps: Sequence[Mapping[str, Any]], lost_s: float) -> dict[str, float]:
    """Return the seconds of the run by phase; `start_and_end` is the time that no line accounts for."""
    seconds = {name: _sum(steps, f"{name}_s") for name in PHASES}
    seconds["optimizer"] = max(0.0, _sum(steps, "step_s") - sum(seconds.values()))
    seconds["validation"] = _sum(run.of_kind("eval"), "validation_s")
    seconds["checkpoint"] = _sum(run.of_kind("checkpoint"), "checkpoint_s")
    seconds["done_again"] = lost_s
    seconds["start_and_end"] = max(0.0, run.wall_s - sum(seconds.values()))
    return seconds


def measure_lost(run: Run) -> dict[str, float]:
    """Return the number of steps that were lost in a failure and repeated, and their seconds."""
    current = {id(line) for line in run.current}
    lost = [line for line in run.lines if line["kind"] == "train" and id(line) not in current]
    return {"steps": len(lost), "s": _sum(lost, "step_s")}


def _sum(lines: Iterable[Mapping[str, Any]], key: str) -> float:
    return sum(number_of(line, key) for line in lines)


_UNFINISHED = ("failed", "died", "interrupted", "pruned")


def sum_compute(runs: Sequence[Run], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of the `costs` of several runs, such as a sweep.

    `unfinished_hours`: device hours of runs that failed, died, were stopped or pruned (CPU-hours if no run had a GPU).
    """
    hours = "gpu_hours" if any(cost["gpu_hours"] for cost in costs) else "cpu_hours"
    wasted = [cost[hours] for run, cost in zip(runs, costs, strict=True) if run.status in _UNFINISHED]
    added = ("wall_s", "gpu_hours", "cpu_hours", "tokens", "images", "model_tokens", "tflop", "energy_kwh", "co2_kg")
    phases = list(costs[0]["time_s"]) if costs else []
    return {
        "device": ", ".join(sorted({cost["device"] for cost in costs if cost["device"]})) or None,
        **{name: _add(cost[name] for cost in costs) for name in added},
        "peak_memory_gib": max((cost["peak_memory_gib"] or 0.0 for cost in costs), default=None) or None,
        "unfinished_hours": sum(wasted),
        "time_s": {phase: sum(cost["time_s"][phase] for cost in costs) for phase in phases},
        "lost": {name: sum(cost["lost"][name] for cost in costs) for name in ("steps", "s")},
    }


def _add(values: Iterable[float | None]) -> float | None:
    """Return the sum of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def find_peak(device: str) -> float | None:
    """Return the dense bf16 peak of a GPU in TFLOP/s by its name; None if it is not in `PEAKS`."""
    return next((peak for part, peak in PEAKS.items() if part.lower() in device.lower()), None)


_TITLES = {
    "device": "device",
    "num_workers": "workers",
    "num_samplers": "samplers",
    "gpu_hours": "GPU-hours",
    "cpu_hours": "CPU-hours",
    "peak_memory_gib": "peak memory (GiB)",
    "tokens": "tokens, as TRL counts them",
    "model_tokens": "tokens through the model",
    "images": "images",
    "tokens_per_s": "tokens/s",
    "images_per_s": "images/s",
    "tflop": "model TFLOP",
    "mfu": "MFU",
    "energy_kwh": "energy (kWh, estimate)",
    "co2_kg": "CO2 (kg, estimate)",
    "unfinished_hours": "hours of unfinished runs",
    "sampling_share": "a sampler samples (share of the steps)",
    "samplers_idle_share": "a sampler has nothing to do",
    "waiting_share": "workers wait for samplers",
    "overlap_gain": "sampling and training at once, against one after the other",
}


# Only of several runs together, and only of runs with samplers.
_SHARES = ("sampling_share", "samplers_idle_share", "waiting_share", "overlap_gain")
_RARE = ("unfinished_hours", "num_samplers", *_SHARES)


def write_markdown(titles: Sequence[str], costs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with one column for each run."""
    shown = {
        key: title
        for key, title in _TITLES.items()
        if key not in _RARE or any(cost.get(key) is not None for cost in costs)
    }
    rows = [["", *titles], *([title, *(_tell(cost.get(key)) for cost in costs)] for key, title in shown.items())]
    rows.append(["wall time", *(format_duration(cost["wall_s"]) for cost in costs)])
    for phase in costs[0]["time_s"] if costs else ():
        shares = [cost["time_s"].get(phase, 0.0) / max(cost["wall_s"], 1e-9) for cost in costs]
        rows.append([f"time: {phase.replace('_', ' ')}", *(f"{share:.1%}" for share in shares)])
    rows.append(["steps done again", *(str(cost["lost"]["steps"]) for cost in costs)])
    return format_markdown(rows, numbers=True) + "\n"


def describe_hours(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return titles and texts of a cost's hours, energy, CO2, and how samplers and workers shared the time, where they
    are known and not 0."""
    keys = ("gpu_hours", "cpu_hours", "unfinished_hours", "energy_kwh", "co2_kg", *_SHARES)
    return [(_TITLES[key], format_number(cost[key])) for key in keys if cost.get(key)]


def _tell(value: str | float | None) -> str:
    return value if isinstance(value, str) else format_number(value)
