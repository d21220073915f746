"""DPO and GRPO from the demo's SFT adapter, with the shipped jobs (4-bit LoRA on 2 cores, through Ray Train), over
seeds.

The adapter is trained once, by `demo_sft.yaml`. Each seed then samples its own pairs from that adapter and trains
`demo_dpo.yaml` on them, with a quarter of the pairs held out; it also trains `demo_grpo.yaml`. The bar on the reward
applies to answers sampled as the job samples them. They are measured together with F1, before and after training, on
the demo's test images, which no training has used. The reward of greedy answers has no bar; it is the validation's, on
the eval images. One seed takes about eleven minutes; `--full` runs three.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from benchmarks.rare_class import run
from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig

SFT, DPO, GRPO = (f"jobs/demo_{name}.yaml" for name in ("sft", "dpo", "grpo"))
NUM_ROWS = 1_000  # whose answers are sampled for pairs
ANSWERS = 16  # sampled to each test image: with 4 the mean shakes by 0.02, nearly half the bar


def places(folder: Path, *splits: str) -> list[str]:
    """Return overrides that point to the demo's scenes under `folder`; `more` holds GRPO's own training scenes."""
    return [f"data.{split.replace('more', 'train')}.path={folder / 'site' / split}.json" for split in splits]


def mean_reward(job: JobConfig, adapter: Path, seed: int) -> float:
    """Return the mean reward of answers to the test images, sampled as the GRPO job samples them."""
    from ray_vlm.data.parts import load_parts
    from ray_vlm.data.preprocessing import read_preprocessing
    from ray_vlm.data.spec import sample_spec
    from ray_vlm.evaluate.actors import InferenceJob
    from ray_vlm.evaluate.pairs import plan_prompts, sample_answers

    method = job.method
    sampled = {
        "temperature": method.temperature,
        "top_p": method.top_p,
        "num_samples": ANSWERS,
        "rewards": method.rewards,
    }
    job = job.model_copy(
        update={
            "seed": seed,
            "pairs": job.pairs.model_copy(update=sampled),
            "evaluate": job.evaluate.model_copy(
                update={"batch_size": 120 * ANSWERS, "max_new_tokens": method.max_completion_tokens}
            ),
        }
    )
    parts = load_parts(job, ["test"], read_preprocessing(adapter, sample_spec(job, [])))
    assert parts.test is not None
    prompts = plan_prompts(len(parts.test), job.evaluate.batch_size, job.pairs.num_samples)
    inference = InferenceJob(job, parts.spec, parts.test.records, str(adapter), prompts)
    batches = sample_answers(inference, num_actors=0)
    rewards = [sample.reward for batch in batches for samples in batch for sample in samples]
    return statistics.fmean(rewards)


def f1(job: str, folder: Path, adapter: Path, name: str) -> float:
    """Return F1 at IoU 0.5 of greedy answers to the test images."""
    out = folder / "evaluate" / name
    run("evaluate", job, *places(folder, "test"), "--adapter", str(adapter), "--output", str(out))
    return json.loads((out / "metrics.json").read_text())["overall"]["f1_50"]


def validations(run_folder: Path, key: str) -> list[float]:
    """Return the values of a run's validations; the first comes before any training step."""
    from ray_vlm.runs.monitor import read_metrics

    return [line[key] for line in read_metrics(run_folder / "metrics.jsonl") if line["kind"] == "eval"]


def train_dpo(folder: Path, adapter: Path, seed: int, changes: Sequence[str]) -> dict[str, float]:
    """Sample pairs, train DPO on them, and return the metrics."""
    started, name, pairs = time.monotonic(), f"dpo_{seed}", folder / f"pairs_{seed}.jsonl"
    rows = [*places(folder, "train"), f"data.train.max_rows={NUM_ROWS}", f"seed={seed}"]
    rows += ["evaluate.batch_size=450", "cluster.num_workers=0"]
    run("pairs", SFT, *rows, "--adapter", str(adapter), "--output", str(pairs), "--overwrite")
    sources = [f"data.train.path={pairs}", f"data.train.image_root={folder / 'site/train'}", *places(folder, "test")]
    names = [f"run.output_dir={folder}", f"run.name={name}", f"seed={seed}", f"model.adapter={adapter}"]
    run("train", DPO, *sources, *names, *changes, "--overwrite")
    wall = time.monotonic() - started
    accuracies = validations(folder / name, "preference_accuracy")
    after = f1(SFT, folder, folder / name / "best", name)
    return {"dpo.preferred.before": accuracies[0], "dpo.preferred": max(accuracies), "dpo.f1": after, "dpo.wall": wall}


def train_grpo(folder: Path, adapter: Path, seed: int, changes: Sequence[str]) -> dict[str, float]:
    """Train GRPO and return the metrics."""
    started, name = time.monotonic(), f"grpo_{seed}"
    sources = places(folder, "more", "eval", "test")
    names = [f"run.output_dir={folder}", f"run.name={name}", f"seed={seed}", f"model.adapter={adapter}"]
    run("train", GRPO, *sources, *names, *changes, "--overwrite")
    wall = time.monotonic() - started
    job = load_job(GRPO, [*sources, *names])
    greedy = validations(folder / name, "reward")
    metrics = {
        "grpo.reward.before": mean_reward(job, adapter, seed),
        "grpo.reward": mean_reward(job, folder / name / "best", seed),
        "grpo.greedy_reward_on_eval.before": greedy[0],
        "grpo.greedy_reward_on_eval": greedy[-1],
    }
    return metrics | {"grpo.f1": f1(SFT, folder, folder / name / "best", name), "grpo.wall": wall}


def measure_seeds(seeds: Sequence[int], changes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return all figures over these seeds; `changes` are overrides that shorten the jobs."""
    measurements: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(
            "train", SFT, *places(folder, "train", "eval", "test"), f"run.output_dir={folder}", "run.name=sft", *changes
        )
        adapter = folder / "sft/best"
        start = f1(SFT, folder, adapter, "sft")
        for seed in seeds:
            values = train_dpo(folder, adapter, seed, changes) | train_grpo(folder, adapter, seed, changes)
            for name, value in values.items():
                measurements.setdefault(name, []).append(value)
                print(f"seed {seed}: {name} {value:.4f}", file=sys.stderr, flush=True)
    return figures(measurements, start)


def figures(measurements: dict[str, list[float]], start: float) -> list[dict[str, Any]]:
    """Return the means over seeds, and the worst seeds against the bars. `start`: F1 of the SFT adapter."""
    gains = [b - a for a, b in zip(measurements["grpo.reward.before"], measurements["grpo.reward"], strict=True)]
    return [
        *(figure(f"{name}.mean", statistics.fmean(values), "") for name, values in measurements.items()),
        figure("sft.f1", start, ""),
        figure("dpo.preferred.before.worst", max(measurements["dpo.preferred.before"]), "", 0.60),
        figure("dpo.preferred.worst", min(measurements["dpo.preferred"]), "", 0.80, most=False),
        figure("dpo.wall.worst", max(measurements["dpo.wall"]), "s", 300),
        figure("grpo.reward_gain.worst", min(gains), "", 0.05, most=False),
        figure("grpo.f1_change.worst", min(measurements["grpo.f1"]) - start, "", 0.0, most=False),
        figure("grpo.wall.worst", max(measurements["grpo.wall"]), "s", 300),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Measure one seed; `quick` trains a few steps, to check that everything runs."""
    return measure_seeds([0], ("train.max_steps=4", "evaluate.every_steps=4") if quick else ())


if __name__ == "__main__":
    report(measure, full=lambda: measure_seeds([0, 1, 2]))
