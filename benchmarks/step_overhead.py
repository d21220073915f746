"""The overhead of Ray Train, the data path and logging on a training step of stock TRL.

The peer is `trl.SFTTrainer` in a plain script, with a dataloader worker of its own, so that both arms read images
beside the training process. One torch thread each, the same model, rows, batch and options; runs alternate, and the
figure is the median of the ratios of each pair's median step time (the first steps are left out).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.demo.shapes import draw
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.runs.monitor import Monitor, read_metrics
from ray_vlm.train.driver import train
from ray_vlm.train.prepare import prepare

BATCH = 16
WARM_UP = 5


def make_job(folder: Path, steps: int, name: str) -> JobConfig:
    """Build a LoRA job on a tiny Qwen3-VL, with batches of 16 in one micro-batch, float32."""
    options = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "max_steps": steps, "learning_rate": 1e-3}
    return load_resolved(
        {
            "model": {"name": str(folder / "model"), "load_in_4bit": False},
            "data": {"train": {"path": str(folder / "data/train.json")}, "shuffle": False},
            "train": options | {"precision": "fp32", "gradient_checkpointing": False, "log_every_steps": 1000},
            "cluster": {"num_workers": 1, "cpus_per_worker": 1},
            "run": {"name": name, "output_dir": str(folder / "runs")},
        }
    )


def ray_arm(folder: Path, steps: int, name: str) -> list[float]:
    """Return the seconds of each step through Ray Train with one worker."""
    paths = train(make_job(folder, steps, name), "", overwrite=True)
    return [line["step_s"] for line in read_metrics(paths.metrics) if line["kind"] == "train"]


def plain_arm(folder: Path, steps: int) -> list[float]:
    """Return the seconds of each step of the stock trainer in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step_overhead", "--plain", str(folder), str(steps)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def run_plain(folder: Path, steps: int) -> None:
    """Run the plain script: stock TRL with its users' usual options. Print the step times as JSON."""
    import datasets
    import torch
    from peft import get_peft_model
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.load import load_model
    from ray_vlm.models.lora import lora_config

    torch.set_num_threads(1)
    job = make_job(folder, steps, "plain")
    prepared = prepare(job)
    builder = load_sample_builder(prepared.spec)
    rows: dict[str, list[Any]] = {"images": [], "prompt": [], "completion": []}
    for record in prepared.train.records:
        rows["images"].append(list(record.images))
        rows["prompt"].append([{"role": "user", "content": builder.turns(record)[-1][1].removeprefix("<image>")}])
        rows["completion"].append([{"role": "assistant", "content": builder.answer(record).text}])
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    times: list[float] = []

    class Clock(TrainerCallback):
        last = time.monotonic()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                times.append(time.monotonic() - self.last)
                self.last = time.monotonic()

    base = load_model(job.model, precision="fp32")
    assert job.lora is not None
    args = SFTConfig(
        output_dir=str(folder / "plain"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], logging_steps=1, disable_tqdm=True,
        max_length=None, dataloader_num_workers=1, dataloader_persistent_workers=True, save_strategy="no",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    model = get_peft_model(base, lora_config(job.lora, FAMILIES["qwen3_vl"]))
    SFTTrainer(
        model=model, args=args, processing_class=builder.processor, train_dataset=dataset, callbacks=[Clock()]
    ).train()
    print(json.dumps(times))


def logging_cost_s(folder: Path, calls: int = 500) -> float:
    """Return the seconds of one step's logging: the callback and its line in `metrics.jsonl`."""
    from types import SimpleNamespace

    from ray_vlm.distributed import DistributedContext
    from ray_vlm.methods.sft import WeightedSFTTrainer
    from ray_vlm.runs.paths import RunPaths
    from ray_vlm.train.attempt import Attempt
    from ray_vlm.train.callbacks.metrics import MetricsCallback, StepTimer
    from ray_vlm.train.run_context import Progress, RunContext

    monitor = Monitor(folder / "cost.jsonl", attempt=1)
    norms, nonfinite = SimpleNamespace(norms={"language": 0.5}), SimpleNamespace(skipped=False)
    usage: Any = SimpleNamespace(take=lambda: {"data_s": 0.1, "forward_s": 0.1, "backward_s": 0.1})
    stop: Any = SimpleNamespace(stopped=False)
    plan, weights = Plan(8, 1, 1, 1), None
    run = RunContext(RunPaths(folder), Attempt(1, "a"), plan, DistributedContext(), weights, Progress(), monitor)  # type: ignore[arg-type]
    callback = MetricsCallback(run, WeightedSFTTrainer.logged, StepTimer(), usage, norms, nonfinite, stop, 10, True)  # type: ignore[arg-type]
    logs = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 0.5, "num_tokens": 1000.0, "mean_token_accuracy": 0.5}
    started = time.perf_counter()
    for step in range(calls):
        callback.on_log(None, SimpleNamespace(global_step=step, epoch=0.1), None, logs=dict(logs))
    return (time.perf_counter() - started) / calls


def help_s() -> float:
    """Return the seconds of `ray-vlm --help`, the best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ray_vlm", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return all figures."""
    steps, pairs = (20, 1) if quick else (40, 3)
    ratios, own, stock = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_untrained(folder / "model")
        draw(folder / "data", "studio", "train", BATCH * 10)
        for pair in range(pairs):
            plain = statistics.median(plain_arm(folder, steps)[WARM_UP:])
            through_ray = statistics.median(ray_arm(folder, steps, f"pair_{pair}")[WARM_UP:])
            ratios.append(through_ray / plain)
            own.append(through_ray)
            stock.append(plain)
        cost = logging_cost_s(folder)
    return [
        figure("step.plain_trl", statistics.median(stock), "s"),
        figure("step.ray_train_1_worker", statistics.median(own), "s"),
        figure("step.ratio", statistics.median(ratios), "x", 1.10),
        figure("step.ratio_min", min(ratios), "x"),
        figure("step.ratio_max", max(ratios), "x"),
        figure("logging.per_step", cost, "s", 1e-3),
        figure("cli.help", help_s(), "s", 0.7),
    ]


if __name__ == "__main__":
    if "--plain" in sys.argv:
        run_plain(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        report(measure)
