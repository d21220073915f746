"""Effects of random failures: workers killed at random moments of DPO and GRPO, goodput under a kill every 30 s,
memory.

Run: python -m benchmarks.chaos [--quick] [--full] [--json PATH]. Moments and victims come from a seed. Runs use two
workers of one thread each on a tiny random Qwen3-VL in float32, in one Ray cluster. The default takes 12 minutes,
`--quick` (one kill of DPO) 1, `--full` 73. `benchmarks/endurance.py` measures goodput and memory;
`benchmarks/lost_nodes.py` measures lost nodes, for which root needs network namespaces on the machine.
"""

import json
import os
import random
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.endurance import goodput, soak
from benchmarks.figures import figure, report
from benchmarks.recovery import STEPS, kill_process, steps_of, train_job, weights_of, write_job
from ray_vlm.errors import RayVlmError
from ray_vlm.runs.monitor import read_metrics, whole_lines
from ray_vlm.runs.paths import RunPaths

EVERY = 3  # steps between checkpoints of the runs that are killed once
SEED = 1


def noted_reward(
    completion_ids: list[list[int]], row_id: Sequence[str], notes: Sequence[str] = (), **columns: Any
) -> list[float]:
    """Return the share of even token ids; write the rows and a hash of each answer to the folder `notes[0]`."""
    if notes:
        asked = [[row, zlib.crc32(repr(list(ids)).encode())] for row, ids in zip(row_id, completion_ids, strict=True)]
        with open(Path(notes[0]) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps({"time": time.time(), "asked": asked}) + "\n")
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def write_method_job(folder: Path, base: Path, method: str) -> Path:
    """Write a DPO job (with validations) or a GRPO job (with noted prompts) made from the folder's SFT job `base`."""
    from benchmarks.parity import write_pairs

    job, scenes = yaml.safe_load(base.read_text()), folder / "scenes"
    job["train"] |= {"learning_rate": 1e-3}
    job["checkpoint"] = {"every_steps": EVERY}
    if method == "dpo":
        pairs = write_pairs(scenes, job["model"]["name"])
        job |= {"method": "dpo", "data": {"train": {"path": str(pairs), "format": "preference"}}}
        job["data"]["eval"] = {"ratio": 0.2}
        job["evaluate"] = {"every_steps": 4, "metric": "preference_accuracy"}
    else:
        notes = notes_of(folder)
        notes.mkdir(exist_ok=True)
        names = [image["file_name"] for image in json.loads((scenes / "train.json").read_text())["images"]]
        lines = [{"prompt": "<image>What is shown?", "images": [name], "notes": str(notes)} for name in names]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = {"path": str(folder / "prompts.jsonl"), "format": "prompt", "image_root": str(scenes)}
        job["data"] = {"train": source}
        job["train"] |= {"global_batch_size": 16, "micro_batch_size": 8}
        job["method"] = {"name": "grpo", "num_generations": 4, "max_completion_tokens": 10, "beta": 0.05}
        job["method"]["rewards"] = {"benchmarks.chaos:noted_reward": 1.0}
    job["data"]["num_loaders"] = 1
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def notes_of(folder: Path) -> Path:
    """Return the folder where GRPO's reward notes its rows."""
    return folder / "notes"


def asked_of(run: RunPaths, notes: Path) -> dict[int, list]:
    """Return, for each step that counts, the rows that GRPO sampled and a hash of each answer, over all workers.

    A worker's calls are in the order of its steps, and belong to the attempt that was running at the time.
    """
    rows_by_step: dict[int, list] = {}
    calls = [whole_lines(file.read_bytes()) for file in notes.glob("*.jsonl")]
    for attempt in json.loads(run.run.read_text())["attempts"]:
        if "from_step" not in attempt:  # it did not get so far
            continue
        first, attempt_rows = attempt["from_step"], defaultdict(list)
        for process_calls in calls:
            in_time = [call for call in process_calls if attempt["started"] <= call["time"] <= attempt["ended"]]
            for number, call in enumerate(in_time, first + 1):
                attempt_rows[number] += call["asked"]
        rows_by_step = {step: requests for step, requests in rows_by_step.items() if step <= first}
        rows_by_step |= {step: sorted(requests) for step, requests in attempt_rows.items()}
    return rows_by_step


def kill_once(path: Path, run: RunPaths, moments: random.Random) -> dict[str, Any]:
    """Kill one of the two workers of a run at a random moment; return whether the run finished by itself, and how many
    steps were repeated."""
    step, rank, late = moments.randrange(1, STEPS - 1), moments.randrange(2), moments.uniform(0, 0.3)

    over = threading.Event()

    def kill() -> None:
        while not any(line["kind"] == "train" and line["step"] >= step for line in read_metrics(run.metrics)):
            if over.wait(0.02):
                return
        time.sleep(late)  # anywhere within a step, a checkpoint or a validation
        kill_process("RayTrainWorker", rank)

    threading.Thread(target=kill, daemon=True).start()
    try:
        train_job(path, f"run.name={run.name}")
    except RayVlmError as error:
        print(f"{run.name}: {error}", flush=True)
    finally:
        over.set()
    record = json.loads(run.run.read_text())
    trained = sum(line["kind"] == "train" for line in read_metrics(run.metrics))
    outcome = {"ended": record["status"] == "finished", "hit": len(record["attempts"]) > 1}
    return outcome | {"again": trained - len(steps_of(run)), "steps": len(steps_of(run))}


def kill_runs(path: Path, method: str, count: int, notes: Path | None = None) -> list[dict[str, Any]]:
    """Run a method several times with one kill each, and compare with the same run undisturbed."""
    whole = train_job(path, f"run.name={method}-whole")
    moments, outcomes, equal, others = random.Random(SEED), [], 0, 0
    for number in range(count):
        run = RunPaths(whole.root.parent / f"{method}-killed-{number}")
        outcomes.append(kill_once(path, run, moments))
        if outcomes[-1]["ended"]:
            equal += weights_of(run) == weights_of(whole) and steps_of(run) == steps_of(whole)
            if notes is not None:
                others += _differ(asked_of(whole, notes), asked_of(run, notes))
    ended, hit = sum(one["ended"] for one in outcomes), sum(one["hit"] for one in outcomes)
    figures = [
        figure(f"{method.upper()}, {count} runs with a killed worker: kills that hit", hit, "runs", count, most=False),
        figure("  runs that ended by themselves", ended, "runs", count, most=False),
        figure("  most steps done again", max(one["again"] for one in outcomes), "steps", EVERY),
    ]
    if notes is None:
        return [*figures, figure("  final adapters equal bit for bit", equal, "runs", count, most=False)]
    wrong = sum(one["steps"] != STEPS for one in outcomes)
    return [
        *figures,
        figure("  runs with another number of steps", wrong, "runs", 0),
        figure("  steps that asked other prompts", others, "steps", 0),
        figure("  final adapters equal bit for bit", equal, "runs"),
    ]


def _differ(one: dict[int, list], other: dict[int, list]) -> int:
    """Steps whose prompts are not the same; where there are none at all, nothing was noted, and that differs too."""
    rows = [{step: [row for row, _ in requests] for step, requests in run_rows.items()} for run_rows in (one, other)]
    assert len(one) == STEPS, "the reward did not note what it was asked"
    return sum(rows[0].get(step) != rows[1].get(step) for step in range(1, STEPS + 1))


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


def full() -> list[dict[str, Any]]:
    """Measure ten runs of each method, five minutes of kills, half an hour of memory, and lost nodes."""
    from benchmarks.lost_nodes import measure as lose_nodes

    with tempfile.TemporaryDirectory() as temporary:
        return lose_nodes(Path(temporary)) + _measure(10, 10, 300, 1800)


if __name__ == "__main__":
    report(measure, full=full)
