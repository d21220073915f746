"""The package's memory plan of a card for each case, computed on the CPU while the card works.

Steps are rehearsed with fake tensors, which takes one core half a minute or more; the card does not wait for it.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import REAL, SMALL, Scale
from benchmarks.gpu.cases import OTHER, SHIPPED, Case, build_job, chosen_name, planned
from ray_vlm.runs.paths import write_json


def plan_all(folder: Path, path: Path, scale: Scale) -> None:
    """Write `{case: plan}` to `path`, again after every case."""
    plans: dict[str, Any] = {}
    for case in planned(scale):
        plans[case.name] = plan_case(folder, case, scale)
        if case in (SHIPPED, OTHER):
            plans[chosen_name(case)] = plan_choice(folder, case, scale)
        write_json(path, plans)


def plan_case(folder: Path, case: Case, scale: Scale) -> dict[str, float]:
    """Return bytes at the peak of a step (`allocated`), and including CUDA's own (`peak`)."""
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.models.memory import CUDA_CONTEXT
    from ray_vlm.train.memory_plan import build_rehearsal, estimate_memory, heaviest_rows
    from ray_vlm.train.prepare import prepare

    prepared = prepare(build_job(folder, case, scale))
    rows = heaviest_rows(prepared.job.method, prepared.job.train, prepared.plan, prepared.train)
    builder = load_sample_builder(prepared.spec)
    prediction = estimate_memory(build_rehearsal(prepared.job, builder.family), prepared.train, rows, builder)
    own = (CUDA_CONTEXT + prediction.parts.get("fragmentation", 0.0)) if prepared.job.cluster.gpus_per_worker else 0.0
    return {"peak": prediction.peak, "allocated": prediction.peak - own}


def plan_choice(folder: Path, case: Case, scale: Scale) -> dict[str, Any]:
    """Return what `train.memory: auto` chooses for the job of a case: `micro`, `recompute`, and their plan."""
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.train.memory_plan import build_rehearsal, choose_micro_batch
    from ray_vlm.train.prepare import prepare

    job = build_job(folder, case, scale, global_batch_size=16)
    prepared = prepare(job)
    builder = load_sample_builder(prepared.spec)
    train, _ = choose_micro_batch(build_rehearsal(prepared.job, builder.family), prepared.train, builder)
    chosen: dict[str, Any] = {"micro": train.micro_batch_size, "recompute": train.gradient_checkpointing}
    return chosen | plan_case(folder, dataclasses.replace(case, **chosen), scale)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for configurations and rows")
    parser.add_argument("--output", type=Path, required=True, help="the file of plans")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    plan_all(args.folder, args.output, SMALL if args.rehearse else REAL)
