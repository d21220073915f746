"""A TRL trainer that takes its batches from the plan's stream and is validated by this package.

The losses are TRL's. Only the source of batches changes, and the adapter keeps float32 weights: TRL casts it to
bfloat16 on 4-bit bases, where a relative update of 1e-4 is rounded away.
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
    """Return this rank's rows from micro-batch `first` to the end of the plan. Under Ray the loaders start at once."""
    last = task.plan.num_steps * task.plan.accumulation
    fill_in = job.data.on_bad_row == "quarantine"
    spec = StreamSpec(task.train, task.spec, task.plan, context.rank, first, last, task.row_bytes, fill_in)
    if not context.ray or first >= last:
        return stream_local(spec)
    return StartedStream(stream_ray(spec, task.num_loaders, task.cpus_per_loader, task.environment))


class PlannedBatches:
    """The train dataloader for TRL: one stream over the whole run, iterated an epoch at a time.

    `build` collates rows of the stream into a batch. `first`: number of the stream's first micro-batch; an epoch that
    is resumed midway yields only its rest. `accumulation`: batches per optimizer step, as the trainer counts them.
    `clock` measures the wait for rows. `num_images`: images so far; `number`: of the next micro-batch.
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
        self.lost: list[tuple[int, int]] = []  # (row that could not be read, row in its place)
        self._rank = rank
        self.number = first
        self._stream = stream
        self._plan = plan
        self._build = build
        self._accumulation = accumulation

    def __len__(self) -> int:
        return self._plan.steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[Any]:
        per_epoch = self._plan.steps_per_epoch * self._plan.accumulation
        for _ in range(per_epoch - self.number % per_epoch):
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
        """Close the stream, also before its end."""
        self._stream.close()


def _restore(model: Any, exact: dict[str, Any]) -> None:
    """Restore in float32 the trained weights that TRL has cast."""
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name].to(parameter.device).float()


def align_learning_rates(scheduler: Any) -> None:
    """Set the learning rate of each parameter group to the value of the job's own schedule at the restored step.

    A checkpoint restores the rates themselves, and the optimizer uses them until the next `scheduler.step()`. If the
    job now has more steps, these are rates of the earlier, shorter schedule. With the same number of steps nothing
    changes, to the bit.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate wraps it under DeepSpeed
    if not hasattr(scheduler, "lr_lambdas"):
        return
    factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # what the Trainer logs


class LeftOut:
    """Methods of TRL's trainers that are disabled."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the estimate is not used, and it would iterate over all weights for each micro-batch."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the export writes a model card of its own (`runs/card.py`)."""


def feed_trainer(trainer_class: type) -> type:
    """Return a subclass of a TRL trainer that reads `PlannedBatches` and validates by its attribute `validate`."""

    class PlannedTrainer(LeftOut, trainer_class):
        planned_batches: PlannedBatches
        control: Any
        validate: Callable[[Any], dict[str, float]] | None = None
        write_checkpoint: Callable[[], None]
        skips_nonfinite = False
        rates: tuple[Any, dict[str, float]] = (None, {})  # the model family, and learning rates of its parts

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

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                align_learning_rates(self.lr_scheduler)

        def get_train_dataloader(self) -> PlannedBatches:
            return self.planned_batches

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
            with self.clock.phase("batch"):
                return super().get_batch_samples(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.clock.phase("step"):
                loss = super().training_step(*args, **kwargs)
            self.losses.keep(loss)
            # The Trainer keeps a running sum of losses and subtracts it after logging, so a NaN would stay for ever.
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
    """Return the job's training options that all methods share, under the names of TRL's configs."""
    train, steps = job.train, plan.num_steps
    save_every = job.checkpoint.every_steps or plan.steps_per_epoch
    eval_every = job.evaluate.every_steps or plan.steps_per_epoch
    return {
        "output_dir": tempfile.gettempdir(),  # not used: all files go through the run's own store
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
        # a batch of text only gives the image encoder no gradient, and DDP would wait for it
        "ddp_find_unused_parameters": job.task.name == "chat" and (job.lora is None or job.lora.target != ["language"]),
        # Adapters do not train expert routers, and TRL reads an attribute that Llama 4's configuration lacks.
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
