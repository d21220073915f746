"""Small jobs, their runs, and workers and writers that are killed at random moments.

Two workers of one thread each train a tiny random Qwen3-VL in float32; a disturbed run is compared with the same run
undisturbed. Moments and victims come from a seed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_vlm.config.load import load_job
from ray_vlm.errors import RayVlmError
from ray_vlm.runs.checkpoints import open_newest, sweep
from ray_vlm.runs.monitor import current_lines, read_metrics, whole_lines
from ray_vlm.runs.paths import RunPaths
from ray_vlm.storage import Store
from tests.support.ray_processes import kill_process

STEPS = 12  # of 6 rows each, over 30 rows: more than two epochs
EVERY = 3  # steps between checkpoints of the runs that are killed once
SEED = 1
_WRITER = """
import os, sys
from pathlib import Path
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, write_part
from ray_vlm.storage import Store
store, attempt = Store(sys.argv[1]), int(sys.argv[2])
def fill(folder):
    for i in range(4):
        (folder / f"{i}.bin").write_bytes(os.urandom(50_000))
for step in range(attempt * 1000, attempt * 1000 + 999):
    name = checkpoint_name(step, attempt, f"{attempt:04x}")
    commit(store, name, write_part(store, name, "rank0", fill), step, attempt=attempt)
    print(step, flush=True)
    prune(store, keep=2, keep_best=0)
"""


def kill_writers(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill a writer at `count` moments; after each, the newest complete checkpoint must be at least the last one that
    the writer reported. Return how many were lost or torn, and how many kills hit an unfinished one."""
    moments, store = random.Random(seed), Store(folder)
    lost, torn, hit, last = 0, 0, 0, -1
    for attempt in range(1, count + 1):
        command = [sys.executable, "-c", _WRITER, str(folder), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.03))
            os.kill(writer.pid, signal.SIGKILL)
            written = [int(line) for line in (first + writer.stdout.read()).split()]
        last = max([last, *written])
        newest = open_newest(store)
        if newest is None or newest[0].step < last:
            lost += 1
        else:
            torn += any(len((newest[1] / f"{i}.bin").read_bytes()) != 50_000 for i in range(4))
        before = len(store.names())
        sweep(store)
        hit += len(store.names()) < before
    return {"lost": lost, "torn": torn, "unfinished": hit}


def write_job(folder: Path) -> Path:
    """Write a small job over drawn scenes, on a tiny random model."""
    from ray_vlm.demo.shapes import draw
    from ray_vlm.demo.tiny import write_untrained

    draw(folder / "scenes", "studio", "train", 30)
    job = {
        "model": {"name": str(write_untrained(folder / "model", "qwen3_vl")), "load_in_4bit": False},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": {"path": str(folder / "scenes" / "train.json")}},
        "train": {"global_batch_size": 6, "micro_batch_size": 3, "max_steps": STEPS, "precision": "fp32"},
        "checkpoint": {"every_steps": 3},
        "cluster": {"num_workers": 2},
        "run": {"output_dir": str(folder / "runs")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def write_method_job(folder: Path, base: Path, method: str) -> Path:
    """Write a DPO job (with validations) or a GRPO job (with noted prompts) made from the folder's SFT job `base`."""
    from tests.support.parity import write_pairs

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
        job["method"]["rewards"] = {"tests.support.killing:noted_reward": 1.0}
    job["data"]["num_loaders"], job["data"]["loaders"] = 1, "ray_data"
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def noted_reward(
    completion_ids: list[list[int]], row_id: Sequence[str], notes: Sequence[str] = (), **columns: Any
) -> list[float]:
    """Return the share of even token ids; write the rows and a hash of each answer to the folder `notes[0]`."""
    if notes:
        asked = [[row, zlib.crc32(repr(list(ids)).encode())] for row, ids in zip(row_id, completion_ids, strict=True)]
        with open(Path(notes[0]) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps({"time": time.time(), "asked": asked}) + "\n")
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


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


def train_job(path: Path, *overrides: str, resume: bool = False) -> RunPaths:
    """Train the job in this process's Ray cluster."""
    from ray_vlm.train.driver import train

    return train(load_job(path, overrides), path.read_text(), resume=resume)


def at_step(run: RunPaths, step: int, do: Callable[[], Any]) -> threading.Thread:
    """Call `do` in a thread as soon as `metrics.jsonl` has that step."""

    def wait() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            if any(line["kind"] == "train" and line["step"] >= step for line in read_metrics(run.metrics)):
                return do()
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def steps_of(run: RunPaths) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step that counts."""
    lines = current_lines(read_metrics(run.metrics))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def weights_of(run: RunPaths) -> bytes:
    """Return the weights of the final adapter."""
    return (run.final / "adapter_model.safetensors").read_bytes()


@dataclass(frozen=True)
class KilledRuns:
    """What became of several runs with a killed worker each, beside the same run undisturbed."""

    hit: int  # runs whose worker was killed before they were over
    ended: int  # runs that finished by themselves
    steps_again: int  # most steps that one of them did again
    other_num_steps: int  # runs with another number of steps that count
    other_prompts: int  # steps of GRPO that asked other prompts
    equal: int  # runs whose final adapter is the same, bit for bit


def kill_runs(path: Path, method: str, count: int, notes: Path | None = None) -> KilledRuns:
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
    return KilledRuns(
        hit=sum(one["hit"] for one in outcomes),
        ended=sum(one["ended"] for one in outcomes),
        steps_again=max(one["again"] for one in outcomes),
        other_num_steps=sum(one["steps"] != STEPS for one in outcomes),
        other_prompts=others,
        equal=equal,
    )


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


def _differ(one: dict[int, list], other: dict[int, list]) -> int:
    """Steps whose prompts are not the same; where there are none at all, nothing was noted, and that differs too."""
    rows = [{step: [row for row, _ in requests] for step, requests in run_rows.items()} for run_rows in (one, other)]
    assert len(one) == STEPS, "the reward did not note what it was asked"
    return sum(rows[0].get(step) != rows[1].get(step) for step in range(1, STEPS + 1))
