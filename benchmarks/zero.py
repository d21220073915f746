"""The effect of DeepSpeed on the numbers: loss curves and final adapters of two workers under each value of
`cluster.deepspeed` against the same job without it, in float32 and on a 4-bit base.

Tiny random Qwen3-VL, LoRA on every part, 10 steps, 2 CPU workers of a real Ray cluster. Bar: losses equal to 1e-4.
DeepSpeed compiles an operation once, which takes over a minute.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmarks.figures import figure, report
from ray_vlm.config.cluster import Cluster
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import train
from tests.support.parity import make_job

STEPS = 10
PRESETS = [name for of in get_args(Cluster.model_fields["deepspeed"].annotation) for name in get_args(of)]


def run(folder: Path, model: str, in_4bit: bool, preset: str | None, **changes: Any) -> dict[str, Any]:
    """Return losses, seconds of a step (median) and the final adapter of one run on two workers."""
    from safetensors.torch import load_file

    job = dump_job(make_job(folder, model, STEPS, 2))
    job["model"]["load_in_4bit"] = in_4bit
    job["cluster"] |= {"deepspeed": preset, "max_failures": 0}
    for section, values in changes.items():
        job[section] |= values
    paths = train(load_resolved(job), json.dumps(job), overwrite=True)
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    seconds = sorted(line["step_s"] for line in lines)[len(lines) // 2]
    adapter = load_file(str(paths.final / "adapter_model.safetensors"))
    return {"losses": [line["loss"] for line in lines], "step_s": seconds, "adapter": adapter}


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and the difference of the adapters relative to their norm."""
    assert len(one["losses"]) == len(other["losses"]) > 0
    assert one["adapter"].keys() == other["adapter"].keys()
    losses = max(abs(a - b) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True))
    square = sum(float(w.float().square().sum()) for w in one["adapter"].values())
    there = other["adapter"]
    apart = sum(float((w.float() - there[name].float()).square().sum()) for name, w in one["adapter"].items())
    return losses, (apart / square) ** 0.5


def measure(quick: bool) -> list[dict[str, Any]]:
    """Measure every preset on a base in float32 and in 4 bit; `quick`: two presets in 4 bit."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = str(write_untrained(folder / "model"))
        for in_4bit in (True,) if quick else (False, True):
            plain = run(folder, model, in_4bit, None)
            for preset in ("zero2", "zero3") if quick else PRESETS:
                here = run(folder, model, in_4bit, preset)
                losses, adapter = compare(plain, here)
                name = f"{preset}, {'NF4' if in_4bit else 'float32'}"
                figures.append(figure(f"{name}: losses apart from none's", losses, "relative", 1e-4))
                figures.append(figure(f"{name}: final adapter apart from none's", adapter, "relative"))
                figures.append(figure(f"{name}: a step takes", here["step_s"] / plain["step_s"], "x"))
    return figures


if __name__ == "__main__":
    report(measure)
