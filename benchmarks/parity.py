"""Are our numbers TRL's? SFT loss and LoRA gradients against stock `trl.SFTTrainer`, and loss curves on 0-3 workers.

float32, dropout 0, CPU. Bars: 1e-5 relative on loss and gradients, 1e-4 relative on curves of 20 steps.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.collate import collate
from ray_vlm.data.rows import load_preparer
from ray_vlm.demo.shapes import draw
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.train.driver import prepare, train

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


def make_job(folder: Path, model: str, steps: int, num_workers: int = 0, rows: int = 20) -> JobConfig:
    """A small float32 job on drawn scenes in `folder`, with LoRA on every part of the model."""
    if not (folder / "train.json").exists():
        draw(folder, "studio", "train", rows)
    train_options = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": steps, "learning_rate": 1e-3}
    return load_resolved(
        {
            "model": {"name": model, "load_in_4bit": False},
            "lora": {"rank": 4, "alpha": 8, "target": ["language", "connector", "vision"]},
            "data": {"train": {"path": str(folder / "train.json")}},
            "train": train_options | {"bf16": False, "gradient_checkpointing": False},
            "cluster": {"num_workers": num_workers},
            "run": {"name": f"workers_{num_workers}", "output_dir": str(folder / "runs")},
        }
    )


def compare_with_stock(job: JobConfig, num_rows: int = 6) -> tuple[float, float]:
    """Relative differences of (loss, LoRA gradients) between our trainer and stock TRL on the same rows."""
    ours, stock = _ours(job, num_rows), _stock(job, num_rows)
    loss = abs(ours["loss"] - stock["loss"]) / abs(stock["loss"])
    assert ours["grads"].keys() == stock["grads"].keys()
    assert len(stock["grads"]) > 0
    scale = max(float(g.norm()) for g in stock["grads"].values())
    assert scale > 0
    worst = max(
        float((ours["grads"][n] - g).norm()) / max(float(g.norm()), 1e-3 * scale) for n, g in stock["grads"].items()
    )
    return loss, worst


def _model(job: JobConfig) -> Any:
    """The base with an adapter whose B is not zero, so that every gradient has something to say."""
    import torch
    from peft import get_peft_model

    from ray_vlm.models.families import FAMILIES as KNOWN
    from ray_vlm.models.load import load_model
    from ray_vlm.models.lora import lora_config

    base = load_model(job.model, bf16=False)
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(job.lora, KNOWN[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _step(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of one training step's forward and backward, through the trainer's own code."""
    samples, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    loss = float(trainer.training_step(trainer.model, samples[0], num_items))
    parameters = trainer.model.named_parameters()
    return {"loss": loss, "grads": {n: p.grad.clone() for n, p in parameters if p.requires_grad}}


def _arguments(job: JobConfig) -> dict[str, Any]:
    folder = tempfile.mkdtemp()
    options = {"output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    return options | {"max_length": None, "max_steps": 1, "per_device_train_batch_size": job.train.global_batch_size}


def _ours(job: JobConfig, num_rows: int) -> dict[str, Any]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    from ray_vlm.methods import sft
    from ray_vlm.train.feed import feed_trainer

    prepared = prepare(job)
    preparer = load_preparer(prepared.spec)
    rows = [preparer.train_row(record) for record in prepared.train.records[:num_rows]]
    trainer = feed_trainer(SFTTrainer)(
        model=_model(job),
        args=SFTConfig(**_arguments(job)),
        processing_class=preparer.processor,
        train_dataset=datasets.Dataset.from_list([sft.EXAMPLE_ROW]),
        data_collator=list,
    )
    return _step(trainer, collate(rows, preparer))


def _stock(job: JobConfig, num_rows: int) -> dict[str, Any]:
    import datasets
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    prepared = prepare(job)
    preparer = load_preparer(prepared.spec)
    rows = []
    for record in prepared.train.records[:num_rows]:
        prompt = [{"role": "user", "content": preparer.turns(record)[-1][1].removeprefix("<image>")}]
        completion = [{"role": "assistant", "content": preparer.answer(record).text}]
        rows.append({"images": [Image.open(record.images[0])], "prompt": prompt, "completion": completion})
    trainer = SFTTrainer(
        model=_model(job),
        args=SFTConfig(**_arguments(job)),
        processing_class=copy.deepcopy(preparer.processor),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    return _step(trainer, trainer.data_collator(rows))


def curves(folder: Path, model: str, steps: int, workers: Sequence[int]) -> dict[int, list[float]]:
    """The training loss of every step, by number of workers; 0 is in-process."""
    found = {}
    for number in workers:
        paths = train(make_job(folder, model, steps, number), "", overwrite=True)
        found[number] = [line["loss"] for line in read_metrics(paths.metrics) if line["kind"] == "train"]
        assert len(found[number]) == steps
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    """All figures; `quick` leaves out the runs on 2 and 3 workers."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {family: str(write_untrained(folder / family, family)) for family in FAMILIES}
        for family, model in models.items():
            loss, grads = compare_with_stock(make_job(folder / "data", model, 1))
            figures.append(figure(f"sft.{family}.loss_vs_trl", loss, "relative", 1e-5))
            figures.append(figure(f"sft.{family}.lora_gradients_vs_trl", grads, "relative", 1e-5))
        found = curves(folder / "data", models["qwen3_vl"], 20, (0, 1) if quick else (0, 1, 2, 3))
        for number, losses in found.items():
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, found[0], strict=True))
            figures.append(figure(f"curve.{number}_workers_vs_in_process", worst, "relative", 1e-4))
    return figures


if __name__ == "__main__":
    report(measure)
