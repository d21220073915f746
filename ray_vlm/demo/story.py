"""The demo's stages: look at the untouched model, fine-tune it by the shipped job, look again, put both in a report.

`ray-vlm demo` writes `<output_dir>/demo/`: `summary.json`, `report.html`, the scenes, both evaluations and the run.
"""

import json
import os
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.shapes import RARE_CLASS
from ray_vlm.runs.paths import write_json

JOB = "demo_sft.yaml"
# Rough share of the wall time until the start of each stage; only used to say how long is left.
_STAGES = (("draw scenes", 0.0), ("zero-shot", 0.05), ("fine-tune", 0.2), ("evaluate", 0.85), ("report", 0.98))
_GUESS_S = 200.0


def find_job(name: str) -> Path:
    """A shipped job file: from the installed package, or from the checkout that this code runs in."""
    installed = Path(str(resources.files("ray_vlm"))) / "starter" / "jobs" / name
    return installed if installed.is_file() else Path(__file__).parents[2] / "jobs" / name


def demo_job(output_dir: Path, overrides: list[str] | None = None) -> JobConfig:
    """The shipped demo job with every path under `output_dir`."""
    folder = output_dir / "demo"
    splits = ("train", "eval", "test")
    places = [f"data.{split}.path={json.dumps(str(folder / 'data/site' / split) + '.json')}" for split in splits]
    run = [f"run.output_dir={json.dumps(str(folder))}", "run.name=sft"]
    return load_job(find_job(JOB), [*places, *run, *(overrides or [])])


def run_demo(output_dir: Path, overrides: list[str] | None = None) -> int:
    """All stages; returns the exit code."""
    output_dir = output_dir.absolute()
    started = time.monotonic()
    say = _progress(started)
    job = demo_job(output_dir, overrides)
    folder = output_dir / "demo"
    say("draw scenes")
    for source in (job.data.train, job.data.eval, job.data.test):
        _draw(source)
    say("zero-shot")
    before = _evaluate(job, None, folder / "evaluate" / "zero_shot")
    say("fine-tune")
    run = _train(job)
    say("evaluate")
    after = _evaluate(job, str(run / "best"), folder / "evaluate" / "sft")
    say("report")
    _report(folder, run, before, after)
    wall = round(time.monotonic() - started, 1)
    stages = [{"name": "zero_shot", "metrics": _summary(before)}, {"name": "sft", "metrics": _summary(after)}]
    write_json(folder / "summary.json", {"wall_s": wall, "stages": stages})
    _tell(folder, before, after, wall)
    return 0


def _progress(started: float) -> Callable[[str], None]:
    def say(stage: str) -> None:
        names = [name for name, _ in _STAGES]
        number = names.index(stage)
        spent = time.monotonic() - started
        share = _STAGES[number][1]
        whole = _GUESS_S if share < 0.1 else spent / share
        print(f"\n[{number + 1}/{len(names)}] {stage}  (about {max(whole - spent, 1):.0f} s left)", flush=True)

    return say


def _draw(source: Any) -> None:
    from ray_vlm.data.source import prepare_source

    prepare_source(source)


def _evaluate(job: JobConfig, adapter: str | None, folder: Path) -> dict[str, Any]:
    from ray_vlm.evaluate.run import evaluate

    return evaluate(job, adapter, folder, say=lambda text: print(f"  {text}", flush=True))


def _train(job: JobConfig) -> Path:
    from ray_vlm.train.driver import train

    paths = train(job, find_job(JOB).read_text(encoding="utf-8"), overwrite=True)
    return paths.root


def _report(folder: Path, run: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    from ray_vlm.evaluate.report import Stage, write_report
    from ray_vlm.evaluate.run import read_predictions

    stages = [
        Stage("zero-shot", before, read_predictions(folder / "evaluate" / "zero_shot")),
        Stage("fine-tuned", after, read_predictions(folder / "evaluate" / "sft")),
    ]
    notes = [
        "A Qwen3-VL of 2.2 million weights, trained on filled shapes, meets hollow, worn ones on concrete and brick.",
        f"4-bit LoRA on a CPU, run by Ray Train. '{RARE_CLASS}' is a class that it had never seen, and a rare one.",
    ]
    write_report(folder / "report.html", "ray_vlm demo", stages, run / "metrics.jsonl", notes)


def _summary(metrics: dict[str, Any]) -> dict[str, float]:
    overall = metrics["overall"]
    rare = metrics["per_class"].get(RARE_CLASS, {}).get("recall_50", 0.0)
    return {k: overall[k] for k in ("f1_50", "map", "mean_iou", "parse_rate")} | {"recall_rare": rare}


def _tell(folder: Path, before: dict[str, Any], after: dict[str, Any], wall: float) -> None:
    old, new = _summary(before), _summary(after)
    names = {"f1_50": "F1 at IoU 0.5", "map": "mAP", "mean_iou": "mean IoU", "recall_rare": "recall of the rare class"}
    names["parse_rate"] = "answers that parse"
    print(f"\n{'':<26}{'zero-shot':>10}{'fine-tuned':>12}")
    for key, title in names.items():
        print(f"{title:<26}{old[key]:>10.3f}{new[key]:>12.3f}")
    report = os.path.relpath(folder / "report.html")
    print(f"\ndone in {wall:.0f} s; open {report} to see it", flush=True)
