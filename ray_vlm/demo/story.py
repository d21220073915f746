"""The demo's stages: evaluate the base, fine-tune it by the shipped job, evaluate again, report both.

`ray-vlm demo` writes `<output_dir>/demo/`: `summary.json`, `report.html`, the scenes, the evaluations and the run. With
`--all` it continues with DPO and GRPO (`road.py`).
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.shapes import RARE_CLASS
from ray_vlm.demo.steps import Step, find_job, measure_step, train_step
from ray_vlm.runs.paths import write_json

JOB = "demo_sft.yaml"
# Seconds into the demo at which each stage starts; only used to estimate the remaining time.
_STAGES = {"draw scenes": 0.0, "zero-shot": 7.0, "fine-tune": 11.0, "evaluate": 122.0}
_ROAD = {"pairs": 130.0, "DPO": 155.0, "GRPO": 184.0}
_REPORT_S = 5.0
_END_S = {False: 130.0, True: 241.0}  # by: with DPO and GRPO?


def demo_job(output_dir: Path, overrides: list[str] | None = None) -> JobConfig:
    """Load the shipped demo job with every path under `output_dir`."""
    folder = output_dir / "demo"
    splits = ("train", "eval", "test")
    paths = [f"data.{split}.path={json.dumps(str(folder / 'data/site' / split) + '.json')}" for split in splits]
    run = [f"run.output_dir={json.dumps(str(folder))}", "run.name=sft"]
    return load_job(find_job(JOB), [*paths, *run, *(overrides or [])])


def run_demo(output_dir: Path, overrides: list[str] | None = None, whole: bool = False) -> int:
    """Run all stages, with `whole` also DPO and GRPO; return the exit code."""
    output_dir = output_dir.absolute()
    started = time.monotonic()
    say = _progress(started, whole)
    job = demo_job(output_dir, overrides)
    folder = output_dir / "demo"
    say("draw scenes")
    draw_scenes(job)
    say("zero-shot")
    steps = [measure_step("zero_shot", "zero-shot", job, folder)]
    say("fine-tune")
    run = train_step(job, JOB)
    say("evaluate")
    steps.append(measure_step("sft", "SFT" if whole else "fine-tuned", job, folder, run))
    if whole:
        from ray_vlm.demo.road import walk_road

        steps += walk_road(folder, job, run, say)
    say("report")
    _report(folder, steps)
    wall = round(time.monotonic() - started, 1)
    stages = [{"name": step.name, "metrics": _summary(step)} for step in steps]
    write_json(folder / "summary.json", {"wall_s": wall, "stages": stages})
    _tell(folder, steps, wall)
    return 0


def _progress(started: float, whole: bool) -> Callable[[str], None]:
    end = _END_S[whole]
    starts = {**_STAGES, **(_ROAD if whole else {}), "report": end - _REPORT_S}

    def say(stage: str) -> None:
        spent = time.monotonic() - started
        left = (end - starts[stage]) * (spent / starts[stage] if starts[stage] > 60 else 1.0)
        number = list(starts).index(stage) + 1
        print(f"\n[{number}/{len(starts)}] {stage}  (about {max(left, 1):.0f} s left)", flush=True)

    return say


def draw_scenes(job: JobConfig) -> None:
    """Draw the scenes of all splits. A second process draws the training scenes while this one draws the others and
    imports the libraries of the next stage: each keeps one core busy for several seconds."""
    from concurrent.futures import ProcessPoolExecutor

    from ray_vlm.data.source import prepare_source

    assert job.data.train is not None
    with ProcessPoolExecutor(max_workers=1) as pool:
        drawing = pool.submit(prepare_source, job.data.train)
        for source in (job.data.eval, job.data.test):
            assert source is not None
            prepare_source(source)
        _import_libraries(job)
        drawing.result()


def _import_libraries(job: JobConfig) -> None:
    """Import the libraries of evaluation early; most of them are imported only when a model is loaded."""
    import ray_vlm.evaluate.run  # noqa: F401
    from ray_vlm.models.libraries import quiet_libraries
    from ray_vlm.models.load import load_model
    from ray_vlm.models.processor import load_processor

    quiet_libraries()
    load_processor(job.model)
    load_model(job.model, job.train.precision)


def _report(folder: Path, steps: Sequence[Step]) -> None:
    from ray_vlm.evaluate.pictures import EvalResult
    from ray_vlm.evaluate.report import write_report
    from ray_vlm.evaluate.run import read_predictions

    results = [EvalResult(s.title, s.metrics, read_predictions(s.folder)) for s in steps]
    runs = {s.title: s.run / "metrics.jsonl" for s in steps if s.run is not None}
    notes = [
        "A Qwen3-VL of 2.2 million weights, trained on filled shapes, meets hollow, worn ones on concrete and brick.",
        f"4-bit LoRA on a CPU. '{RARE_CLASS}' is a class that it had never seen, and a rare one.",
    ]
    write_report(folder / "report.html", "ray_vlm demo", results, runs, notes)


def _summary(step: Step) -> dict[str, float]:
    overall = step.metrics["overall"]
    rare = step.metrics["per_class"].get(RARE_CLASS, {}).get("recall_50", 0.0)
    summary = {k: overall[k] for k in ("f1_50", "map", "mean_iou", "parse_rate")} | {"recall_rare": rare}
    return summary | _validated(step)


_JUDGED_BY = {"dpo": "preference_accuracy", "grpo": "sampled_reward"}


def _validated(step: Step) -> dict[str, float]:
    """Return the validation metric of DPO and GRPO before the first step and at its best; empty for other stages."""
    from ray_vlm.runs.monitor import current_lines, read_metrics

    key = _JUDGED_BY.get(step.name)
    if key is None or step.run is None:
        return {}
    values = [line[key] for line in current_lines(read_metrics(step.run / "metrics.jsonl")) if line["kind"] == "eval"]
    return {f"{key}_before": values[0], key: max(values)}


def _tell(folder: Path, steps: Sequence[Step], wall: float) -> None:
    names = {"f1_50": "F1 at IoU 0.5", "map": "mAP", "mean_iou": "mean IoU", "recall_rare": "recall of the rare class"}
    names["parse_rate"] = "answers that parse"
    print(f"\n{'':<26}" + "".join(f"{step.title:>12}" for step in steps))
    for key, title in names.items():
        print(f"{title:<26}" + "".join(f"{_summary(step)[key]:>12.3f}" for step in steps))
    for step in steps:
        if judged := _JUDGED_BY.get(step.name):
            now = _validated(step)
            print(
                f"{step.title}, held out: {judged.replace('_', ' ')} {now[judged + '_before']:.3f} -> {now[judged]:.3f}"
            )
    report = os.path.relpath(folder / "report.html")
    print(f"\ndone in {wall:.0f} s; open {report} to see it", flush=True)
