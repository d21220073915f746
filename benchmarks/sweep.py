"""The shipped demo sweep: its duration, and whether its export is at least as good as the job that it started from.

Eight trials of `jobs/demo_tune.yaml` over `tune_spaces/demo.yaml`, by the command line; then the job itself, alone, for
as many steps as the longest trial had, measured on the same test rows.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report

ROOT = Path(__file__).parents[1]
JOB, SPACE = "jobs/demo_tune.yaml", "tune_spaces/demo.yaml"


def run(*words: str) -> float:
    """Run one `ray-vlm` command and return its seconds; print its output if it fails."""
    started = time.monotonic()
    out = subprocess.run([sys.executable, "-m", "ray_vlm", *words], capture_output=True, text=True, cwd=ROOT)
    if out.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {out.returncode}:\n{out.stdout[-2000:]}\n{out.stderr[-2000:]}")
    print(out.stdout, file=sys.stderr)
    return time.monotonic() - started


def loads(folder: Path) -> bool:
    """Return whether plain `peft` and `transformers` load the export."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(name), folder)
    return any(bool(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick` runs three trials of 6 steps, and the bars do not apply to its figures."""
    few = ["train.max_steps=6", "evaluate.every_steps=2", "tune.num_trials=3"] if quick else []
    with tempfile.TemporaryDirectory() as temporary:
        out = f"run.output_dir={temporary}"
        wall = run("tune", JOB, "--space", SPACE, out, *few)
        sweep = Path(temporary) / "demo_tune-demo"
        summary = json.loads((sweep / "sweep.json").read_text())
        best = sweep / "trials" / summary["best"] / "evaluate" / "best" / "metrics.json"
        steps = max(trial["step"] for trial in summary["trials"])
        run("train", JOB, out, "run.name=default", *few[1:2], f"train.max_steps={steps}")
        run("evaluate", JOB, "--adapter", f"{temporary}/default/best", "--output", f"{temporary}/default/test")
        f1 = json.loads(best.read_text())["overall"]["f1_50"]
        alone = json.loads((Path(temporary) / "default" / "test" / "metrics.json").read_text())["overall"]["f1_50"]
        statuses = [trial["status"] for trial in summary["trials"]]
        fine = loads(sweep / "export" / "adapter")
    return [
        figure("sweep.wall", wall, "s", None if quick else 360.0),
        figure("sweep.trials", len(statuses), ""),
        figure("sweep.pruned", statuses.count("pruned"), ""),
        figure("sweep.best_f1", f1, ""),
        figure("sweep.default_f1", alone, ""),
        figure("sweep.gain", f1 - alone, "", None if quick else 0.0, most=False),
        figure("sweep.loads_with_peft", int(fine), "", 1, most=False),
    ]


if __name__ == "__main__":
    report(measure)
