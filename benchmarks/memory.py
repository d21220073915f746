"""Accuracy of the planner: predicted against measured memory of a step on tiny models, then predictions for real
models.

`tests/support/memory.py` measures a tiny job and predicts its memory. Bytes are those above the loaded model. For
comparison there is the rule of `accelerate estimate-memory`: four times the weights. Then come predictions for 4-bit
jobs of real models, with images of 1,024 tokens, on cards of 40 GB, of which `train.memory: auto` plans with 92 %.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.shapes import draw
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.models.architectures import load_preset
from ray_vlm.models.card_memory import TARGET, usable_gib
from ray_vlm.models.load import family_of
from ray_vlm.models.memory import GIB, RowSize, micro_sizes
from ray_vlm.models.rehearse import estimate
from ray_vlm.train.memory_plan import build_rehearsal
from tests.support.memory import compare, tiny_job

SMALL, LARGE = {"max_pixels": 8192}, {"min_pixels": 30000, "max_pixels": 40000}
# (method, rank, checkpointing, rows at a time, parts, image sizes)
TINY = [
    *(("sft", rank, gc, rows, ["language"], {}) for rank in (4, 64) for gc in (True, False) for rows in (1, 4)),
    ("sft", 8, False, 4, ["language", "connector", "vision"], LARGE),
    ("sft", 8, True, 2, ["language", "connector", "vision"], SMALL),
    *(("dpo", rank, gc, 2, ["language"], {}) for rank in (4, 64) for gc in (True, False)),
    ("dpo", 8, False, 1, ["language", "vision"], LARGE),
    *(("grpo", rank, gc, 4, ["language"], {}) for rank, gc in ((4, True), (64, False))),
]
REAL = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")


def tiny_figures(quick: bool) -> list[dict[str, Any]]:
    """Return the errors over all tiny jobs."""
    errors, stock = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw(folder / "scenes", "studio", "train", 24)
        for family in ("qwen3_vl", "qwen2_5_vl"):
            write_untrained(folder / family, family)
            for case in TINY[:: 5 if quick else 1]:
                real, predicted, four = compare(tiny_job(folder, family, case))
                errors.append(abs(predicted / real - 1))
                stock.append(abs(four / real - 1))
                print(
                    f"{family} {case}: {real / 1e6:.2f} MB, predicted {predicted / 1e6:.2f} "
                    f"({predicted / real - 1:+.1%})"
                )
    return [
        figure("memory.jobs", len(errors), ""),
        figure("memory.error.median", statistics.median(errors), "relative", 0.05),
        figure("memory.error.worst", max(errors), "relative", 0.12),
        figure("memory.accelerate_error.median", statistics.median(stock), "relative"),
    ]


def real_figures() -> list[dict[str, Any]]:
    """Return the predicted memory of 4-bit jobs of real models, with one row or group at a time."""

    figures, bar = [], TARGET * usable_gib(40)
    for name in REAL:
        config = load_preset(name)
        for method in ("sft", "dpo", "grpo"):
            job = JobConfig.model_validate(
                {
                    "method": method if method != "grpo" else {"name": "grpo", "num_generations": 8},
                    "model": {"name": name},
                    "data": {"train": {"path": "x"}},
                    "train": {"micro_batch_size": 8 if method == "grpo" else 1, "global_batch_size": 16},
                    "cluster": {"gpus_per_worker": 1},
                }
            )
            family = family_of(config)
            size = RowSize(1024, 128, 256)
            rehearsal = build_rehearsal(job, family, config)
            prediction = estimate(rehearsal, micro_sizes(job.method, job.train, size))
            figures.append(figure(f"memory.{method}.{config.model_type}", prediction.peak / GIB, "GiB", bar))
    return figures


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    import torch

    torch.set_num_threads(1)
    return tiny_figures(quick) + real_figures()


if __name__ == "__main__":
    report(measure)
