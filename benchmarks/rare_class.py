"""The classification and the GUI demo over several seeds, and the effect of oversampling and weights on a rare class.

Each seed trains three shipped jobs (4-bit LoRA on 2 cores) and measures them on the test rows:
`demo_classification.yaml`, the same with oversampling and weights off, and `demo_gui_steps.yaml`. One seed takes about
ten minutes; `--full` runs three. The rare class is 3 % of the training rows, the rare condition 8 %.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report

OFF = ["data.oversample=null", "data.class_weights=null", "data.condition_weights=null"]
RARE, CONDITION = "object=star", "condition=blocked"
ROOT = Path(__file__).parents[1]


def run(*words: str) -> None:
    """Run one `ray-vlm` command; print its output if it fails."""
    out = subprocess.run([sys.executable, "-m", "ray_vlm", *words], capture_output=True, text=True, cwd=ROOT)
    if out.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {out.returncode}:\n{out.stdout[-2000:]}\n{out.stderr[-2000:]}")


def measure_job(job: str, folder: Path, adapter: Path | None) -> dict[str, Any]:
    """Return `metrics.json` of the base or an adapter on the job's test rows."""
    out = folder / ("base" if adapter is None else f"{adapter.parent.name}-{adapter.name}")
    adapter_options = ["--adapter", str(adapter)] if adapter is not None else []
    run("evaluate", job, *adapter_options, "--output", str(out), "evaluate.batch_size=60")
    return json.loads((out / "metrics.json").read_text())


def train_job(job: str, folder: Path, name: str, seed: int, *changes: str) -> tuple[dict[str, Any], float]:
    """Return the metrics of `best/` and the seconds of training, start-up included."""
    started = time.monotonic()
    run("train", job, f"run.name={name}", f"run.output_dir={folder}", f"seed={seed}", *changes)
    wall = time.monotonic() - started
    return measure_job(job, folder, folder / name / "best"), wall


def measure_seeds(seeds: list[int], changes: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return all figures over these seeds; `changes` are overrides that shorten the jobs."""
    measurements: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measurements.setdefault(name, []).append(value)
        print(f"seed {seed}: {name} {value:.3f}", file=sys.stderr, flush=True)

    drains, screens = "jobs/demo_classification.yaml", "jobs/demo_gui_steps.yaml"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = {job: measure_job(job, folder / Path(job).stem, None)["overall"] for job in (drains, screens)}
        for seed in seeds:
            on, wall = train_job(drains, folder, f"on_{seed}", seed, *changes)
            note("classification.accuracy", on["overall"]["accuracy"])
            note("classification.wall", wall)
            off, _ = train_job(drains, folder, f"off_{seed}", seed, *OFF, *changes)
            note("classification.accuracy_off", off["overall"]["accuracy"])
            for tag, name in ((RARE, "rare_class"), (CONDITION, "rare_condition")):
                for key in ("recall", "precision"):
                    note(f"{name}.{key}_on", on["per_class"][tag][key])
                    note(f"{name}.{key}_off", off["per_class"][tag][key])
            gui, wall = train_job(screens, folder, f"gui_{seed}", seed, *changes)
            note("gui.step_success", gui["overall"]["step_success"])
            note("gui.task_success", gui["overall"]["task_success"])
            note("gui.wall", wall)
    return figures(measurements, base[drains]["accuracy"], base[screens]["step_success"])


def figures(measurements: dict[str, list[float]], accuracy: float, success: float) -> list[dict[str, Any]]:
    """Return the means over seeds, and the worst seeds against the bars."""
    gains = [
        a - b for a, b in zip(measurements["rare_class.recall_on"], measurements["rare_class.recall_off"], strict=True)
    ]
    losses = [
        b - a
        for a, b in zip(measurements["rare_class.precision_on"], measurements["rare_class.precision_off"], strict=True)
    ]
    means = [figure(f"{name}.mean", statistics.mean(values), "") for name, values in measurements.items()]
    return [
        *means,
        figure("classification.accuracy_zero_shot", accuracy, ""),
        figure("classification.accuracy.worst", min(measurements["classification.accuracy"]), "", 0.90, most=False),
        figure("classification.wall.worst", max(measurements["classification.wall"]), "s", 240),
        figure("gui.step_success_zero_shot", success, ""),
        figure("gui.gain.worst", min(measurements["gui.step_success"]) - success, "", 0.30, most=False),
        figure("gui.wall.worst", max(measurements["gui.wall"]), "s", 240),
        figure("rare_class.recall_gain.worst", min(gains), "", 1e-9, most=False),
        figure("rare_class.recall_gain.mean", statistics.mean(gains), "", 0.10, most=False),
        figure("rare_class.precision_loss.worst", max(losses), "", 0.05),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Measure one seed; `quick` trains a tenth of it, to check that everything runs."""
    return measure_seeds([0], ("train.max_steps=30", "evaluate.every_steps=30") if quick else ())


if __name__ == "__main__":
    report(measure, full=lambda: measure_seeds([0, 1, 2]))
