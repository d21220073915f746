"""GRPO's image processing before the model, per distinct image of an optimizer step: TRL's and this package's.

Eight prompts with a 1024 x 768 photo each, eight answers, accumulation 8. TRL: its own data loader (one worker), which
fetches and decodes each image for every answer and micro-batch, and its own processing of the prompts, once to generate
and once to train; answers are injected. This package: decode, resize, tokenise; then pixels for sampling and training.
"""

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import figure
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.methods.grpo import PlannedGRPOTrainer
from ray_vlm.train.prepare import prepare
from tests.support.stock import arguments, build_model, token_reward

PROMPTS, GROUP, ACCUMULATION = 8, 8, 8


def photo_job(folder: Path, model: str) -> JobConfig:
    """Build a GRPO job on JPEGs that the processor reduces in size."""
    from PIL import Image

    (folder / "photos").mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(PROMPTS):
        small = Image.fromarray(rng.integers(0, 255, (96, 128, 3), np.uint8))
        small.resize((1024, 768), Image.Resampling.BICUBIC).save(folder / "photos" / f"{number}.jpg", quality=90)
        rows.append({"prompt": "<image>What is shown?", "images": [f"{number}.jpg"]})
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(folder / "photos.jsonl"), "format": "prompt", "image_root": str(folder / "photos")}
    size = PROMPTS * GROUP
    return load_resolved(
        {
            "method": {"name": "grpo", "num_generations": GROUP, "rewards": {"tests.support.stock:token_reward": 1.0}},
            "task": "chat",
            "model": {"name": model, "load_in_4bit": False},
            "lora": {"rank": 8, "alpha": 16},
            "data": {"train": data},
            "train": {"global_batch_size": size, "micro_batch_size": size // ACCUMULATION, "precision": "fp32"},
            "cluster": {"num_workers": 0},
        }
    )


def stock_step(job: JobConfig) -> Any:
    """Build a function that runs one optimizer step's images through stock TRL, without the model."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    prepared = prepare(job)
    builder = load_sample_builder(prepared.spec)
    prompt = [{"role": "user", "content": "What is shown?"}]
    rows = [{"prompt": prompt, "images": [str(record.images[0])]} for record in prepared.train.records]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    processor = copy.deepcopy(builder.processor)
    processor.tokenizer.padding_side = "left"
    options: dict[str, Any] = {"num_generations": GROUP, "per_device_train_batch_size": GROUP}
    options |= {"gradient_accumulation_steps": ACCUMULATION, "dataloader_num_workers": 1}
    trainer = GRPOTrainer(
        model=build_model(job),
        args=GRPOConfig(**{**arguments(job), **options}),
        processing_class=processor,
        train_dataset=table,
        reward_funcs=[token_reward],
    )
    answers = [[20, 21, 22] for _ in range(PROMPTS * GROUP)]
    trainer._generate_single_turn = lambda *_, **__: (answers, None)
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    trainer.model.train()

    def step() -> int:
        """Return the number of answers whose images were processed; the loader's later fetches are discarded, as in
        TRL."""
        count = 0
        for number, batch in enumerate(trainer.get_train_dataloader()):
            if number == 0:
                count = len(trainer._generate_and_score_completions(batch)["prompt_ids"])
        assert number == ACCUMULATION - 1
        return count

    return step


def our_step(job: JobConfig) -> Any:
    """Build the same function for this package."""
    from types import SimpleNamespace

    prepared = prepare(job)
    builder, records = load_sample_builder(prepared.spec), prepared.train.records

    def step() -> int:
        trainer = SimpleNamespace(pixels={}, builder=builder, args=SimpleNamespace(device="cpu"))
        rows = [builder.row(record) for record in records]
        for _ in ("sampling", "training"):
            for row in rows:
                PlannedGRPOTrainer.prompt_pixels(trainer, row)
        return len(rows) * GROUP

    return step


def image_path(folder: Path, model: str, family: str, pairs: int = 3) -> list[dict[str, Any]]:
    """Return the ratio of the two arms' times, which alternate."""
    job = photo_job(folder, model)
    own, stock = our_step(job), stock_step(job)
    ratios, own_s = [], 0.0
    for number in range(pairs + 1):
        times = []
        for step in (own, stock):
            started = time.perf_counter()
            assert step() == PROMPTS * GROUP
            times.append(time.perf_counter() - started)
        if number:
            ratios.append(times[1] / times[0])
            own_s = times[0]
    name = f"grpo, image path, {family}"
    figures = [figure(f"{name}: TRL against ours", statistics.median(ratios), "x", 10.0, most=False)]
    return [*figures, figure(f"{name}: ours, per distinct image", 1e3 * own_s / PROMPTS, "ms")]
