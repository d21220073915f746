"""Plan and stream -> TRL: a TRL trainer that takes its batches from our feed and is validated by our evaluation.

The losses stay TRL's. What changes: where batches come from, and that the adapter keeps float32 weights (TRL casts it
to bfloat16 on 4-bit bases, where a step of 1e-4 of a weight is lost).
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import StartedStream, Stream, StreamSpec, stream_local, stream_ray
from ray_vlm.models.lora import split_rates
from ray_vlm.train.clock import Clock
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.deepspeed import deepspeed_config
from ray_vlm.train.loss_scale import StepLosses
from ray_vlm.train.worker_spec import WorkerSpec


def open_stream(job: JobConfig, task: WorkerSpec, context: DistributedContext, first: int) -> Stream:
    """What this rank trains on, from micro-batch `first` to the plan's end. Under Ray its loaders start at once."""
    last = task.plan.num_steps * task.plan.accumulation
    fill_in = job.data.on_bad_row == "quarantine"
    feed = StreamSpec(task.train, task.spec, task.plan, context.rank, first, last, task.row_bytes, fill_in)
    if not context.ray or first >= last:
        return stream_local(feed)
    return StartedStream(stream_ray(feed, task.num_loaders, task.cpus_per_loader, task.environment))


class PlannedBatches:
    """The train dataloader that TRL sees: one stream over the whole run, handed out an epoch at a time.

    `build` makes what the trainer takes of the stream's rows. `first`: number of the stream's first micro-batch. In an
    epoch that is resumed midway only the rest comes. `accumulation`: what the trainer counts as batches of one step.
    `clock` is told how long rows were waited for; `num_images` counts what came; `number` is that of the micro-batch
    to come. `rank`: whose micro-batches they are.
    """

    def __init__(
        self,
        stream: Stream,
        plan: Plan,
        build: Callable[[list[Sample]], Any],
        accumulation: int,
        first: int = 0,
        clock: Clock | None = None,
        rank: int = 0,
    ):
        self.clock = clock or Clock("cpu")
        self.num_images = 0
        self.lost: list[tuple[int, int]] = []  # rows that could not be read, with those in their place
        self._rank = rank
        self.number = first
        self._stream = stream
        self._plan = plan
        self._build = build
        self._accumulation = accumulation

    def __len__(self) -> int:
        return self._plan.steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[Any]:
        whole = self._plan.steps_per_epoch * self._plan.accumulation
        for _ in range(whole - self.number % whole):
            with self.clock.phase("data", host=True):
                rows = next(self._stream, None)
            if rows is None:
                return
            planned = self._plan.micro_batch(self.number, self._rank).rows
            self.lost += [(i, row.number) for i, row in zip(planned, rows, strict=True) if row.number != i]
            self.number += 1
            self.num_images += sum(len(row.images) for row in rows)
            with self.clock.phase("collate"):
                batch = self._build(rows)
            yield batch

    def close(self) -> None:
        """End the stream, also where training stopped before its end."""
        self._stream.close()


def _restore(model: Any, exact: dict[str, Any]) -> None:
    """Put back the trained weights that TRL has cast, in float32."""
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name].to(parameter.device).float()


class LeftOut:
    """What a fed trainer does not do of what TRL's do."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Left out: no one reads this estimate, and the Trainer walks through the model for each micro-batch."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left out: TRL's card names its own defaults; ours comes with the export."""


def feed_trainer(trainer_class: type) -> type:
    """A subclass of a TRL trainer that is fed by `PlannedBatches` and validated by a function of ours."""

    class PlannedTrainer(LeftOut, trainer_class):
        planned_batches: PlannedBatches
        control: Any
        validate: Callable[[Any], dict[str, float]] | None = None
        write_checkpoint: Callable[[], None]
        skips_nonfinite = False
        rates: tuple[Any, dict[str, float]] = (None, {})  # the family, and learning rates of its parts

        def __init__(self, *args: Any, **kwargs: Any):
            named = kwargs["model"].named_parameters()
            exact = {name: p.data for name, p in named if p.requires_grad and not hasattr(p, "ds_id")}
            super().__init__(*args, **kwargs)
            self.losses = StepLosses(self.accelerator, self.args.gradient_accumulation_steps)
            self.clock = Clock(str(self.args.device))
            _restore(self.model, exact)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer, (family, rates) = super().create_optimizer(*args, **kwargs), self.rates
            if rates:
                split_rates(optimizer, self.model.named_parameters(), family, rates)
            return optimizer

        def get_train_dataloader(self) -> PlannedBatches:
            return self.planned_batches

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
            with self.clock.phase("batch"):
                return super().get_batch_samples(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.clock.phase("step"):
                loss = super().training_step(*args, **kwargs)
            self.losses.keep(loss)
            # The Trainer sums losses up, and takes the sum off after logging: NaN would stay in it.
            return loss.nan_to_num(0.0, 0.0, 0.0) if self.skips_nonfinite else loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with self.clock.phase("forward"):
                return super().compute_loss(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            with self.clock.phase("validation", host=True):
                metrics = self.validate(self) if self.validate else {}
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with self.clock.phase("checkpoint", host=True):
                self.write_checkpoint()

    PlannedTrainer.__name__ = trainer_class.__name__
    return PlannedTrainer


def shared_options(job: Any, plan: Plan, has_eval: bool) -> dict[str, Any]:
    """The training options that all methods have, from the job; TRL's configs take them by these names."""
    train, steps = job.train, plan.num_steps
    save_every = job.checkpoint.every_steps or plan.steps_per_epoch
    eval_every = job.evaluate.every_steps or plan.steps_per_epoch
    return {
        "output_dir": tempfile.gettempdir(),  # not used: what is written goes through the run's own store
        "ignore_data_skip": True,  # the stream already starts at the next unseen row
        "max_steps": steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": train.min_lr_ratio},
        "warmup_steps": math.ceil(train.warmup_ratio * steps),
        "optim": "adamw_torch",
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": bool(train.gradient_checkpointing),
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "deepspeed": deepspeed_config(job),
        "use_cpu": job.cluster.gpus_per_worker == 0,
        # text alone leaves the tower's weights without a gradient
        "ddp_find_unused_parameters": job.task.name == "chat" and (job.lora is None or job.lora.target != ["language"]),
        # An adapter leaves routers of experts alone; and TRL asks Llama-4's configuration for what it does not have.
        "router_aux_loss_coef": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": save_every,
        "eval_strategy": "steps" if has_eval else "no",
        "eval_steps": eval_every if has_eval else None,
        "seed": job.seed,
    }
