"""The golden cases: short runs, and the description of their numbers and files that is stored.

They use only the command line and files, so that they do not depend on names in the code.
"""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_vlm.cli import main
from tests.support.jobs import write_job

METHODS = ("sft", "dpo", "grpo")
HERE = Path(__file__).parent
GOLDEN, OLD_RUNS = HERE / "golden.json", HERE / "old_runs.tar.xz"
_SMALL = {"rank": 1, "alpha": 2, "target": ["connector"]}  # its checkpoints are a few kilobytes
_OF_LIBRARIES = ("adapter_config.json", "trainer_state.json")  # their keys are those of PEFT and transformers
_TIMES = ("_s", "_seconds", "_gib", "memory", "per_second")  # suffixes of names whose values differ from run to run


def draw_data(folder: Path) -> Path:
    """Draw the scenes that the runs train on, and pairs about them, into `folder`."""
    from ray_vlm.demo.shapes import draw

    for split, count in (("train", 12), ("eval", 4), ("test", 4)):
        draw(folder, "studio", split, count)
    images = json.loads((folder / "train.json").read_text())["images"]
    pairs = [
        {"image": image["file_name"], "prompt": "What is shown?", "chosen": f"{i} shapes", "rejected": "A dog."}
        for i, image in enumerate(images)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def job_of(method: str, folder: Path, data: Path) -> Path:
    """Write the job of one run: three steps of the shipped tiny base, two validations, a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Any] = {name: {"path": str(data / f"{name}.json")} for name in ("train", "eval", "test")}
    options: dict[str, Any] = {"name": method}
    if method == "dpo":
        sources = {"train": {"path": str(data / "pairs.jsonl"), "format": "preference"}, "eval": {"ratio": 0.25}}
    elif method == "grpo":
        options |= {"num_generations": 2, "max_completion_tokens": 24}
    return write_job(
        folder,
        data,
        "tiny",
        method=options,
        lora=_SMALL,
        data=sources,
        train={"global_batch_size": 4, "micro_batch_size": 2},
        evaluate={"every_steps": 2, "max_new_tokens": 24},
        checkpoint={"every_steps": 2, "keep": 1},
        run={"name": method},
    )


def train(method: str, folder: Path, data: Path, overrides: Sequence[str] = ()) -> Path:
    """Train a method's run in `folder`; returns the run's folder."""
    assert main(["train", str(job_of(method, folder, data)), *overrides]) == 0
    return folder / "runs" / method


def sweep(folder: Path, data: Path) -> Path:
    """Run a sweep of two trials on the Ray cluster of this process, or one of its own; returns the sweep's folder."""
    job = job_of("sft", folder, data)
    (folder / "space.yaml").write_text("train.learning_rate: {grid: [1.0e-3, 1.0e-5]}\n")
    options = ["run.name=null", "tune.num_trials=2", "tune.scheduler=none", "tune.default_first=false"]
    assert main(["tune", str(job), "--space", str(folder / "space.yaml"), *options, "evaluate.metric=loss"]) == 0
    return next(path.parent for path in (folder / "runs").glob("*/sweep.json"))


def describe_sweep(folder: Path) -> dict[str, Any]:
    """The numbers of each trial in the order of their rates, and all files of the sweep by name and keys."""
    trials = [path.parent for path in folder.glob("trials/*/resolved.json")]
    rates = {json.loads((t / "resolved.json").read_text())["train"]["learning_rate"]: t for t in trials}
    files = {name: keys for name, keys in describe_files(folder).items() if not name.startswith("trials/")}
    return {"trials": [describe_run(rates[rate]) for rate in sorted(rates)], "files": files}


def describe_run(run: Path) -> dict[str, Any]:
    """The numbers of a run, hashes of its weights, and its files by name and keys."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in line.items() if _is_kept(key, value)} for line in lines]
    return {
        "numbers": [line for line in numbers if line["kind"] in ("train", "eval")],
        "weights": {
            path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.rglob("adapter_model.safetensors"))
            if not path.relative_to(run).parts[0].startswith("checkpoint-")
        },
        "files": describe_files(run),
    }


def _is_kept(key: str, value: Any) -> bool:
    return not key.endswith(_TIMES) and key not in ("time", "token") and isinstance(value, int | float | str | None)


def describe_files(folder: Path) -> dict[str, Any]:
    """Return the names of all files, of checkpoints without their tokens, with the top-level keys of JSON files."""
    contents: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = "/".join(_without_token(part) for part in path.relative_to(folder).parts)
            contents[name] = _keys(path)
    return contents


def _without_token(part: str) -> str:
    return "-".join(part.split("-")[:3]) if part.startswith("checkpoint-") else part


def _keys(path: Path) -> list[str] | None:
    """Return the keys of a JSON object, or of all lines of a JSONL file together; None for other files."""
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            # A slow machine has lines on the progress of loading.
            return sorted({key for line in lines if line.get("kind") != "progress" for key in line})
        is_own = path.suffix == ".json" and path.name not in _OF_LIBRARIES
        value = json.loads(path.read_text()) if is_own else None
    except (ValueError, UnicodeDecodeError):
        return None
    return sorted(value) if isinstance(value, dict) else None


def this_machine() -> str:
    """Return what rounding depends on: processor, versions of torch and transformers, and number of threads."""
    from importlib import metadata

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return f"{cpu.partition(': ')[2] or platform.processor()}, {versions}, {threads} threads"
