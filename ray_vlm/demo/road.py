"""The stages after SFT: `ray-vlm demo --all` makes pairs of the fine-tuned model's own answers, trains on them by DPO,
and then on rewards by GRPO. Each stage starts from the adapter of the previous one; all are measured on the same rows.
"""

import json
from collections.abc import Callable
from pathlib import Path

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.demo.steps import Step, find_job, measure_step, train_step

PAIRS = "pairs.jsonl"
NUM_ROWS = 600  # rows whose answers are sampled for pairs
NUM_STEPS = {"dpo": 32, "grpo": 48}  # fewer than in the shipped jobs: a demo should end soon


def walk_road(folder: Path, sft_job: JobConfig, sft_run: Path, say: Callable[[str], None]) -> list[Step]:
    """Run the stages after SFT in order and return their results. `folder`: the demo's; `say` announces a stage."""
    say("pairs")
    make_pairs(folder, sft_job, sft_run / "best")
    steps: list[Step] = []
    adapter = sft_run / "best"
    for name, title in (("dpo", "DPO"), ("grpo", "GRPO")):
        say(title)
        run = train_step(road_job(folder, name, adapter), f"demo_{name}.yaml")
        adapter = run / "best"
        steps.append(measure_step(name, title, sft_job, folder, run))
    return steps


def make_pairs(folder: Path, sft_job: JobConfig, adapter: Path) -> None:
    """Write `<folder>/pairs.jsonl`: the best and the worst of the model's own answers to each training row."""
    from ray_vlm.evaluate.pairs import make_pairs as make

    data = sft_job.data
    assert data.train is not None
    fewer = data.model_copy(update={"train": data.train.model_copy(update={"max_rows": NUM_ROWS})})
    many = sft_job.evaluate.model_copy(update={"batch_size": 450})  # 75 rows at a time
    here = sft_job.cluster.model_copy(update={"num_workers": 0})
    job = sft_job.model_copy(update={"data": fewer, "evaluate": many, "cluster": here})
    make(job, str(adapter), "train", str(folder / PAIRS), lambda text: print(f"  {text}", flush=True), overwrite=True)


def road_job(folder: Path, name: str, adapter: Path) -> JobConfig:
    """Load the shipped job of a method, shortened, with its paths under `folder` and the adapter to start from."""
    site = folder / "data/site"
    settings = {
        "model.adapter": adapter,
        "data.train.path": folder / PAIRS if name == "dpo" else site / "more.json",
        "data.test.path": site / "test.json",
        "run.output_dir": folder,
        **({"data.train.image_root": site / "train"} if name == "dpo" else {"data.eval.path": site / "eval.json"}),
    }
    paths = [f"{key}={json.dumps(str(path))}" for key, path in settings.items()]
    fewer = [f"train.max_steps={NUM_STEPS[name]}", f"evaluate.every_steps={NUM_STEPS[name]}"]
    here = "cluster.num_workers=0"  # starting Ray for two more stages would take a minute
    return load_job(find_job(f"demo_{name}.yaml"), [*paths, f"run.name={name}", here, *fewer])
