"""Effects of random failures: workers killed at random moments of DPO and GRPO, goodput under a kill every 30 s,
memory.

Run: python -m benchmarks.chaos [--quick] [--full] [--json PATH]. Moments and victims come from a seed. Runs use two
workers of one thread each on a tiny random Qwen3-VL in float32, in one Ray cluster. The default takes 12 minutes,
`--quick` (one kill of DPO) 1, `--full` 73. `benchmarks/endurance.py` measures goodput and memory;
`tests/support/lost_nodes.py` loses nodes, for which root needs network namespaces on the machine.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.endurance import goodput, soak
from benchmarks.figures import figure, report
from tests.support import hosts, killing, lost_nodes
from tests.support.killing import notes_of, write_job, write_method_job


def kill_runs(path: Path, method: str, count: int, notes: Path | None = None) -> list[dict[str, Any]]:
    """Run a method several times with one kill each, and compare with the same run undisturbed."""
    runs = killing.kill_runs(path, method, count, notes)
    figures = [
        figure(
            f"{method.upper()}, {count} runs with a killed worker: kills that hit", runs.hit, "runs", count, most=False
        ),
        figure("  runs that ended by themselves", runs.ended, "runs", count, most=False),
        figure("  most steps done again", runs.steps_again, "steps", killing.EVERY),
    ]
    if notes is None:
        return [*figures, figure("  final adapters equal bit for bit", runs.equal, "runs", count, most=False)]
    return [
        *figures,
        figure("  runs with another number of steps", runs.other_num_steps, "runs", 0),
        figure("  steps that asked other prompts", runs.other_prompts, "steps", 0),
        figure("  final adapters equal bit for bit", runs.equal, "runs"),
    ]


def start_cluster() -> None:
    """Start one Ray cluster in this process for all runs, with one loader for each worker."""
    from ray_vlm.cluster.connect import SETTINGS

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    ray.init(num_cpus=4, include_dashboard=True, log_to_driver=False, logging_level="ERROR")


def _measure(dpo: int, grpo: int, kills_s: float, soak_s: float) -> list[dict[str, Any]]:
    """All figures: runs killed, and how long the two long ones are, 0 for none."""
    import ray

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = write_job(folder)
        start_cluster()
        figures = kill_runs(write_method_job(folder, path, "dpo"), "dpo", dpo)
        if grpo:
            figures += kill_runs(write_method_job(folder, path, "grpo"), "grpo", grpo, notes_of(folder))
        if kills_s:
            figures += goodput(path, kills_s)
        if soak_s:
            figures += soak(path, soak_s)
        ray.shutdown()
    return figures


def measure(quick: bool) -> list[dict[str, Any]]:
    """Measure one run of each method with a kill, two minutes of kills, and three of memory; `quick`: only one DPO
    run."""
    return _measure(1, 0, 0, 0) if quick else _measure(1, 1, 120, 180)


def lose_nodes(folder: Path) -> list[dict[str, Any]]:
    """Run all scenes, each in a folder of its own; return nothing if this machine cannot run hosts."""
    if reason := hosts.why_not():
        print(f"lost nodes are left out: {reason}", flush=True)
        return []
    figures = []
    for scene in lost_nodes.SCENES:
        own, title = folder / scene.__name__, scene.__name__.replace("_", " ")
        own.mkdir()
        result = scene(own)
        if "went_on_s" in result:
            figures.append(figure(f"{title}: detected, then training again", result["went_on_s"], "s", 60))
        if "saved_s" in result:
            figures.append(figure(f"{title}: notice of 15 s, then a checkpoint", result["saved_s"], "s", 15))
            figures.append(figure("  steps that it was behind", result["steps_old"], "steps", 10))
        figures.append(figure(f"{title}: most steps done again", max(result["lost_steps"]), "steps", lost_nodes.EVERY))
        if scene is lost_nodes.cut_briefly:
            figures.append(figure("  restarts", len(result["status"]) - 1, "", 0))
        figures.append(
            figure("  every step and image once", int(result["steps_once"] and result["images"]), "", 1, most=False)
        )
        figures.append(figure("  losses apart from one process alone", result["apart"], "", 1e-5))
    return figures


def full() -> list[dict[str, Any]]:
    """Measure ten runs of each method, five minutes of kills, half an hour of memory, and lost nodes."""
    with tempfile.TemporaryDirectory() as temporary:
        return lose_nodes(Path(temporary)) + _measure(10, 10, 300, 1800)


if __name__ == "__main__":
    report(measure, full=full)
