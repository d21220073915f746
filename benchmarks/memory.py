"""Accuracy of the planner: predicted against measured memory of a step on tiny models, then predictions for real
models.

Each tiny job trains two steps through this package's trainer on a CPU, with every tensor counted when torch allocates
and frees it; the prediction uses the job, the model's configuration and the index's token counts. Bytes are those above
the loaded model. For comparison there is the rule of `accelerate estimate-memory`: four times the weights. Then come
predictions for 4-bit jobs of real models, with images of 1,024 tokens, on cards of 40 GiB.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from benchmarks.parity import write_pairs
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.shapes import draw
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.models.architectures import family_of, load_preset
from ray_vlm.models.load import load_adapted
from ray_vlm.models.memory import GIB, RowSize, micro_sizes
from ray_vlm.models.rehearse import LiveBytes, estimate
from ray_vlm.train.memory_plan import build_rehearsal
from ray_vlm.train.worker_spec import WorkerSpec

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


def tiny_job(folder: Path, family: str, case: tuple) -> JobConfig:
    """Build one of the tiny jobs."""
    method, rank, checkpointing, rows, parts, sizes = case
    data: dict[str, Any] = {"train": {"path": str(folder / "scenes" / "train.json")}, **sizes}
    if method == "dpo":
        data["train"] = {"path": str(write_pairs(folder, str(folder / family))), "format": "preference"}
    method_section: dict[str, Any] = {"name": method}
    if method == "grpo":
        method_section |= {"num_generations": 4, "max_completion_tokens": 16}
    return load_resolved(
        {
            "method": method_section,
            "model": {"name": str(folder / family)},
            "lora": {"rank": rank, "target": parts},
            "data": data,
            "train": {"global_batch_size": rows, "micro_batch_size": rows, "max_steps": 2, "precision": "fp32"}
            | {"gradient_checkpointing": checkpointing},
            "cluster": {"num_workers": 0},
            "run": {"output_dir": str(folder / "runs")},
        }
    )


def compare(job: JobConfig) -> tuple[float, float, float]:
    """Return bytes above the loaded model: measured, predicted, and by four times the weights."""

    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.train.attempt import Attempt
    from ray_vlm.train.planned_trainer import open_stream
    from ray_vlm.train.prepare import prepare
    from ray_vlm.train.trainer import build_args, build_context, build_trainer, prepare_process

    prepared = prepare(job)
    prepare_process(job, False)
    builder, context = load_sample_builder(prepared.spec), build_context(job, False)
    task = WorkerSpec(dump_job(job), job.run.output_dir, prepared.spec, prepared.plan, prepared.train.records, None)
    args = build_args(job, task, Attempt(1, "measured"))
    model = load_adapted(job.model, job.lora, job.train, builder.family, context.device, job.seed)
    trainer = build_trainer(job, task, args, model, builder, context, 0, open_stream(job, task, context, 0))
    trainer.write_checkpoint = lambda: None
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer.train()
    index, rehearsal = prepared.train, build_rehearsal(job, builder.family)
    weights = rehearsal.weights()
    loaded = weights.quantised + weights.plain
    peaks = []
    for number in range(prepared.plan.num_steps * prepared.plan.accumulation):
        rows = prepared.plan.micro_batch(number, 0).rows
        if job.method.name == "grpo":
            rows = rows[: len(micro_sizes(job.method, job.train, RowSize(0, 0, 0)))]
        longest = [max(map(len, builder.row(index.records[row]).completions), default=0) for row in rows]
        counts = (index.image_tokens[list(rows)], index.prompt_tokens[list(rows)], index.answer_tokens[list(rows)])
        sizes = [RowSize(int(i), int(p), int(a), most) for i, p, a, most in zip(*counts, longest, strict=True)]
        peak = estimate(rehearsal, sizes).peak
        first = number < prepared.plan.accumulation  # Adam has no moments yet
        peaks.append(peak - loaded - (3 if first else 1) * weights.trained)
    return live.peak, max(peaks), 3 * loaded


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

    figures = []
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
            figures.append(figure(f"memory.{method}.{config.model_type}", prediction.peak / GIB, "GiB", 40.0))
    return figures


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    import torch

    torch.set_num_threads(1)
    return tiny_figures(quick) + real_figures()


if __name__ == "__main__":
    report(measure)
