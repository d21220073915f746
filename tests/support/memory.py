"""Memory of a step on tiny models, as it is measured and as it is predicted.

A tiny job trains two steps through this package's trainer on a CPU, with every tensor counted when torch allocates and
frees it; the prediction uses the job, the model's configuration and the index's token counts.
"""

from pathlib import Path
from typing import Any

from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.live import LiveBytes
from ray_vlm.models.load import load_config
from ray_vlm.models.memory import RowSize, estimate, merge_of, micro_sizes
from ray_vlm.models.rehearse import Rehearsal
from ray_vlm.train.worker_spec import WorkerSpec
from tests.support.parity import write_pairs


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
    from ray_vlm.methods.prefix_sharing import plan_folding
    from ray_vlm.train.attempt import Attempt
    from ray_vlm.train.planned_trainer import open_stream
    from ray_vlm.train.prepare import prepare
    from ray_vlm.train.trainer import build_args, build_context, build_trainer, load_adapted, prepare_process

    prepared = prepare(job)
    prepare_process(job, False)
    builder, context = load_sample_builder(prepared.spec), build_context(job, False)
    task = WorkerSpec(dump_job(job), job.run.output_dir, prepared.spec, prepared.plan, prepared.train.records, None)
    args, model = build_args(job, task, Attempt(1, "measured")), load_adapted(job, builder.family, context)
    trainer = build_trainer(job, task, args, model, builder, context, 0, open_stream(job, task, context, 0))
    trainer.write_checkpoint = lambda: None
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer.train()
    config, index = load_config(job.model), prepared.train
    rehearsal = Rehearsal(config, job, builder.family)
    merge, folding = merge_of(config), plan_folding(job, builder.family, config)
    weights = rehearsal.weights()
    loaded = weights.quantised + weights.plain
    peaks = []
    for number in range(prepared.plan.num_steps * prepared.plan.accumulation):
        rows = prepared.plan.micro_batch(number, 0).rows
        if job.method.name == "grpo":
            rows = rows[: len(micro_sizes(job, RowSize(0, 0, 0)))]
        longest = [max(map(len, builder.row(index.records[row]).completions), default=0) for row in rows]
        counts = (index.image_tokens[list(rows)], index.prompt_tokens[list(rows)], index.answer_tokens[list(rows)])
        sizes = [RowSize(int(i), int(p), int(a), most) for i, p, a, most in zip(*counts, longest, strict=True)]
        peak = estimate(rehearsal, sizes, merge, folding).peak
        first = number < prepared.plan.accumulation  # Adam has no moments yet
        peaks.append(peak - loaded - (3 if first else 1) * weights.trained)
    return live.peak, max(peaks), 3 * loaded
