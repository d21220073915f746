"""Equality with TRL: SFT, DPO and GRPO losses and LoRA gradients against the stock trainers, and loss curves on 0-3
workers.

Dropout 0, CPU, every comparison in float64 and in float32; curves of 20 steps in float32, with a bar of 1e-4. All bars
are relative. `tests/support/parity.py` has what is compared, and where the other bars come from.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.demo.tiny import write_untrained
from tests.support.parity import BARS, compare_with_stock, curves, make_method_job

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
METHODS = (("sft", 0.0), ("dpo", 0.1), ("dpo", 0.5), ("grpo", 0.0), ("grpo", 0.04))  # with beta; SFT has none


def _compared(folder: Path, family: str, model: str, method: str, beta: float) -> list[dict[str, Any]]:
    """The figures of one method and family, in float64 and float32."""
    job, answers = make_method_job(folder, model, method, beta)
    name = f"sft.{family}" if method == "sft" else f"{method}.beta_{beta}.{family}"
    figures = []
    for dtype, bar in BARS.items():
        loss, gradients = compare_with_stock(job, 2 if answers else 6, answers, dtype)
        kind = str(dtype).removeprefix("torch.")
        figures.append(figure(f"{name}.loss_vs_trl.{kind}", loss, "relative", bar))
        figures.append(figure(f"{name}.lora_gradients_vs_trl.{kind}", gradients, "relative", bar))
    return figures


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures; `quick` leaves out the runs on 2 and 3 workers."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {family: str(write_untrained(folder / family, family)) for family in FAMILIES}
        for family, model in models.items():
            for method, beta in METHODS:
                figures += _compared(folder / "data", family, model, method, beta)
        curves_by_workers = curves(folder / "data", models["qwen3_vl"], 20, (0, 1) if quick else (0, 1, 2, 3))
        for number, losses in curves_by_workers.items():
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, curves_by_workers[0], strict=True))
            figures.append(figure(f"curve.{number}_workers_vs_in_process", worst, "relative", 1e-4))
    return figures


if __name__ == "__main__":
    report(measure)
