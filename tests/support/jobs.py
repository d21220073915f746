"""The small job that most tests train."""

from pathlib import Path
from typing import Any

import yaml

from ray_vlm.cluster.preflight import build_demand
from ray_vlm.config.data import Data
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.parts import Indexer, build_indexer
from ray_vlm.data.spec import SampleSpec, sample_spec


def write_job(folder: Path, scenes: Path, model: str, /, **sections: Any) -> Path:
    """Write `job.yaml` to `folder`: three steps of LoRA on drawn scenes in this process, runs under `folder/runs`.

    `sections` are merged over the defaults; what is no mapping takes the place of its section.
    """
    job: dict[str, Any] = {
        "model": {"name": model, "load_in_4bit": False},
        "lora": {"rank": 4, "alpha": 8},
        # Of itself a worker takes as many loaders as there are CPUs, each a process that imports torch for a few rows.
        "data": {"train": {"path": str(scenes / "train.json")}, "num_loaders": 1, "loaders": "ray_data"},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 3, "precision": "fp32"},
        "cluster": {"num_workers": 0},
        "run": {"name": "run", "output_dir": str(folder / "runs")},
    }
    job["train"] |= {"gradient_checkpointing": False, "learning_rate": 1e-3}
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def check_inputs(job: JobConfig) -> tuple[Data, SampleSpec, Indexer]:
    """What `check_sources` takes of a job."""
    indexer = build_indexer(job.data, job.run.output_dir, job.task.name, build_demand(job))
    return job.data, sample_spec(job), indexer
