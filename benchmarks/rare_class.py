"""The classification and the GUI demo in several seeds, and what oversampling and weights do for a rare class.

Each seed trains three jobs as they ship (4-bit LoRA on 2 cores) and measures them on the test rows:
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
    """One `ray-vlm` command; its output is shown if it fails."""
    out = subprocess.run([sys.executable, "-m", "ray_vlm", *words], capture_output=True, text=True, cwd=ROOT)
    if out.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {out.returncode}:\n{out.stdout[-2000:]}\n{out.stderr[-2000:]}")


def measure_job(job: str, folder: Path, adapter: Path | None) -> dict[str, Any]:
    """`metrics.json` of the base or an adapter on the job's test rows."""
    out = folder / ("base" if adapter is None else f"{adapter.parent.name}-{adapter.name}")
    given = ["--adapter", str(adapter)] if adapter is not None else []
    run("evaluate", job, *given, "--output", str(out), "evaluate.batch_size=60")
    return json.loads((out / "metrics.json").read_text())


def train_job(job: str, folder: Path, name: str, seed: int, *changes: str) -> tuple[dict[str, Any], float]:
    """Metrics of `best/` and the seconds that training took, start-up included."""
    started = time.monotonic()
    run("train", job, f"run.name={name}", f"run.output_dir={folder}", f"seed={seed}", *changes)
    wall = time.monotonic() - started
    return measure_job(job, folder, folder / name / "best"), wall


def measure_seeds(seeds: list[int], changes: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """All figures over these seeds; `changes` shorten the jobs."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
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
    return figures(found, base[drains]["accuracy"], base[screens]["step_success"])


def figures(found: dict[str, list[float]], accuracy: float, success: float) -> list[dict[str, Any]]:
    """Worst seeds against the bars, and means."""
    gains = [a - b for a, b in zip(found["rare_class.recall_on"], found["rare_class.recall_off"], strict=True)]
    losses = [b - a for a, b in zip(found["rare_class.precision_on"], found["rare_class.precision_off"], strict=True)]
    means = [figure(f"{name}.mean", statistics.mean(values), "") for name, values in found.items()]
    return [
        *means,
        figure("classification.accuracy_zero_shot", accuracy, ""),
        figure("classification.accuracy.worst", min(found["classification.accuracy"]), "", 0.90, most=False),
        figure("classification.wall.worst", max(found["classification.wall"]), "s", 240),
        figure("gui.step_success_zero_shot", success, ""),
        figure("gui.gain.worst", min(found["gui.step_success"]) - success, "", 0.30, most=False),
        figure("gui.wall.worst", max(found["gui.wall"]), "s", 240),
        figure("rare_class.recall_gain.worst", min(gains), "", 1e-9, most=False),
        figure("rare_class.recall_gain.mean", statistics.mean(gains), "", 0.10, most=False),
        figure("rare_class.precision_loss.worst", max(losses), "", 0.05),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """One seed; `quick` trains a tenth of it, to see that everything runs."""
    return measure_seeds([0], ("train.max_steps=30", "evaluate.every_steps=30") if quick else ())


if __name__ == "__main__":
    report(measure, full=lambda: measure_seeds([0, 1, 2]))
