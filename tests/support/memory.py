"""Memory of a step on tiny models, as it is measured and as it is predicted.

A tiny job trains two steps through this package's trainer on a CPU, with every tensor counted when torch allocates and
frees it; the prediction uses the job, the model's configuration and the index's token counts.
"""

from pathlib import Path
from typing import Any

from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.models.memory import RowSize, micro_sizes
from ray_vlm.models.rehearse import LiveBytes, estimate
from ray_vlm.train.memory_plan import build_rehearsal
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

    from ray_vlm.data.rows import ListedRows
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.data.stream import StreamSpec, stream_local
    from ray_vlm.distributed import DistributedContext
    from ray_vlm.methods import load_method
    from ray_vlm.models.libraries import prepare_process
    from ray_vlm.train.build import build_args, build_inputs, load_base
    from ray_vlm.train.prepare import prepare

    prepared = prepare(job)
    plan, records = prepared.plan, prepared.train.records
    prepare_process(job.seed, job.cluster.cpus_per_worker, in_ray=False)
    builder, context = load_sample_builder(prepared.spec), DistributedContext()
    spec = WorkerSpec(dump_job(job), job.run.output_dir, prepared.spec, plan, records, None)
    args, model = build_args(job, spec), load_base(job, builder, context)
    last = plan.num_steps * plan.accumulation
    stream = stream_local(StreamSpec(ListedRows(records), prepared.spec, plan, 0, 0, last, 4e6, False))
    trainer = load_method(job.method.name)(model, args, build_inputs(job, spec, model, args, builder, context, stream))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer.train()
    index = prepared.train
    rehearsal = build_rehearsal(job, builder.family)
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
