"""The demo's stages: evaluate the base, fine-tune it by the shipped job, evaluate again, report both.

`ray-vlm demo` writes `<output_dir>/demo/`: `summary.json`, `report.html`, the scenes, the evaluations and the run. With
`--all` it continues after SFT: it makes pairs of the fine-tuned model's own answers, trains on them by DPO, and then on
rewards by GRPO. Each stage starts from the adapter of the previous one; all are measured on the same rows.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ray_vlm.config.data import Data
from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.config.train import Precision
from ray_vlm.demo.shapes import RARE_CLASS
from ray_vlm.runs.paths import write_json
from ray_vlm.runs.text import format_table

logger = logging.getLogger(__name__)
JOB = "demo_sft.yaml"
PAIRS = "pairs.jsonl"
NUM_ROWS = 600  # rows whose answers are sampled for pairs
NUM_STEPS = {"dpo": 32, "grpo": 48}  # fewer than in the shipped jobs: a demo should end soon
# Seconds into the demo at which each stage starts; only used to estimate the remaining time.
_STAGES = {"draw scenes": 0.0, "zero-shot": 7.0, "fine-tune": 11.0, "evaluate": 122.0}
_LATER_STAGES = {"pairs": 130.0, "DPO": 155.0, "GRPO": 184.0}
_REPORT_S = 5.0
_END_S = {False: 130.0, True: 241.0}  # by: with DPO and GRPO?
_HERE = "cluster.num_workers=0"  # starting Ray for each of the stages after SFT would take a minute


@dataclass(frozen=True)
class Step:
    """A measured stage: its name in `summary.json`, its title, its metrics and their folder, and its run, if any."""

    name: str
    title: str
    metrics: dict[str, Any]
    folder: Path
    run: Path | None = None


def find_job(name: str) -> Path:
    """Return the path of a shipped job file: in the installed package, or in the checkout of this code."""
    installed = Path(str(resources.files("ray_vlm"))) / "starter" / "jobs" / name
    return installed if installed.is_file() else Path(__file__).parents[2] / "jobs" / name


def demo_job(output_dir: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Load the shipped demo job with every path under `output_dir`."""
    folder = output_dir / "demo"
    splits = ("train", "eval", "test")
    paths = [f"data.{split}.path={json.dumps(str(folder / 'data/site' / split) + '.json')}" for split in splits]
    run = [f"run.output_dir={json.dumps(str(folder))}", "run.name=sft"]
    return load_job(find_job(JOB), [*paths, *run, *overrides])


def stage_job(folder: Path, name: str, adapter: Path) -> JobConfig:
    """Load the shipped job of a method, shortened, with its paths under `folder` and the adapter to start from."""
    site = folder / "data/site"
    settings = {
        "model.adapter": adapter,
        "data.train.path": folder / PAIRS if name == "dpo" else site / "more.json",
        "data.test.path": site / "test.json",
        "run.output_dir": folder,
        **({"data.train.image_root": site / "train"} if name == "dpo" else {"data.eval.path": site / "eval.json"}),
    }
    paths = [f"{key}={json.dumps(str(path))}" for key, path in settings.items()]
    fewer = [f"train.max_steps={NUM_STEPS[name]}", f"evaluate.every_steps={NUM_STEPS[name]}"]
    return load_job(find_job(f"demo_{name}.yaml"), [*paths, f"run.name={name}", _HERE, *fewer])


def run_demo(output_dir: Path, whole: bool = False) -> int:
    """Run all stages, with `whole` also DPO and GRPO; return the exit code."""
    output_dir = output_dir.absolute()
    started = time.monotonic()
    announce = _progress(started, whole)
    job = demo_job(output_dir)
    folder = output_dir / "demo"
    announce("draw scenes")
    draw_scenes(job.data, lambda: _import_libraries(job.model, job.train.precision))
    announce("zero-shot")
    steps = [measure_step("zero_shot", "zero-shot", job, folder)]
    announce("fine-tune")
    from ray_vlm.train.driver import train  # heavy, and imported in part while scenes are drawn

    run = train(job, find_job(JOB).read_text(encoding="utf-8"), overwrite=True).root
    announce("evaluate")
    steps.append(measure_step("sft", "SFT" if whole else "fine-tuned", job, folder, run))
    if whole:
        announce("pairs")
        make_pairs(output_dir, run / "best")
        for name, title in (("dpo", "DPO"), ("grpo", "GRPO")):
            announce(title)
            text = find_job(f"demo_{name}.yaml").read_text(encoding="utf-8")
            run = train(stage_job(folder, name, run / "best"), text, overwrite=True).root
            steps.append(measure_step(name, title, job, folder, run))
    announce("report")
    _report(folder, steps)
    wall = round(time.monotonic() - started, 1)
    stages = [{"name": step.name, "metrics": _summary(step)} for step in steps]
    write_json(folder / "summary.json", {"wall_s": wall, "stages": stages})
    _log_scores(folder, steps, wall)
    return 0


def _progress(started: float, whole: bool) -> Callable[[str], None]:
    end = _END_S[whole]
    starts = {**_STAGES, **(_LATER_STAGES if whole else {}), "report": end - _REPORT_S}

    def announce(stage: str) -> None:
        spent = time.monotonic() - started
        left = (end - starts[stage]) * (spent / starts[stage] if starts[stage] > 60 else 1.0)
        number = list(starts).index(stage) + 1
        logger.info(f"\n[{number}/{len(starts)}] {stage}  (about {max(left, 1):.0f} s left)")

    return announce


def draw_scenes(data: Data, meanwhile: Callable[[], None]) -> None:
    """Draw the scenes of all splits. A second process draws the training scenes while this one draws the others and
    calls `meanwhile`, which imports the libraries of the next stage: each keeps one core busy for several seconds."""
    from concurrent.futures import ProcessPoolExecutor

    from ray_vlm.data.sources.creation import prepare_source

    assert data.train is not None
    with ProcessPoolExecutor(max_workers=1) as pool:
        drawing = pool.submit(prepare_source, data.train)
        for source in (data.eval, data.test):
            assert source is not None
            prepare_source(source)
        meanwhile()
        drawing.result()


def _import_libraries(model: Model, precision: Precision) -> None:
    """Import the libraries of evaluation early; most of them are imported only when a model is loaded."""
    import ray_vlm.evaluate.run  # noqa: F401
    from ray_vlm.models.libraries import quiet_libraries
    from ray_vlm.models.load import load_model
    from ray_vlm.models.processor import load_processor

    quiet_libraries()
    load_processor(model)
    load_model(model, precision)


def measure_step(name: str, title: str, job: JobConfig, folder: Path, run: Path | None = None) -> Step:
    """Evaluate a run's best adapter on the job's test rows, into the run's folder; or the base, into `folder`."""
    from ray_vlm.evaluate.run import evaluate

    adapter = None if run is None else str(run / "best")
    output_dir = folder / "evaluate" / name if run is None else run / "evaluate/best"
    metrics = evaluate(job, adapter, output_dir)
    return Step(name, title, metrics, output_dir, run)


def make_pairs(output_dir: Path, adapter: Path) -> None:
    """Write `<output_dir>/demo/pairs.jsonl`: the best and the worst of the model's own answers to each training row."""
    from ray_vlm.evaluate.pairs import make_pairs as make

    # 450 answers are 75 rows at a time.
    job = demo_job(output_dir, [f"data.train.max_rows={NUM_ROWS}", "evaluate.batch_size=450", _HERE])
    make(job, str(adapter), "train", str(output_dir / "demo" / PAIRS), overwrite=True)


def _report(folder: Path, steps: Sequence[Step]) -> None:
    from ray_vlm.evaluate.report import EvalResult, write_report
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


def _log_scores(folder: Path, steps: Sequence[Step], wall: float) -> None:
    names = {"f1_50": "F1 at IoU 0.5", "map": "mAP", "mean_iou": "mean IoU", "recall_rare": "recall of the rare class"}
    names["parse_rate"] = "answers that parse"
    rows = [[title, *(f"{_summary(step)[key]:.3f}" for step in steps)] for key, title in names.items()]
    logger.info(f"\n{format_table([['', *(step.title for step in steps)], *rows])}")
    for step in steps:
        if judged := _JUDGED_BY.get(step.name):
            now = _validated(step)
            logger.info(
                f"{step.title}, held out: {judged.replace('_', ' ')} {now[judged + '_before']:.3f} -> {now[judged]:.3f}"
            )
    report = os.path.relpath(folder / "report.html")
    logger.info(f"\ndone in {wall:.0f} s; open {report} to see it")
