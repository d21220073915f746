"""What the trainers of all methods have in common: a TRL trainer that takes its batches from the plan's stream.

The losses are TRL's. Only the source of batches changes, and the adapter keeps float32 weights: TRL casts it to
bfloat16 on 4-bit bases, where a relative update of 1e-4 is rounded away. Validation and checkpoints are this package's.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ray_vlm.config.method import Method
from ray_vlm.config.train import Part, Precision
from ray_vlm.data.collate import add_pixels, upload
from ray_vlm.data.feed import Feed
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import Rows
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import Stream
from ray_vlm.engines.interface import Engine
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.methods.reference import ReferenceCache
from ray_vlm.methods.rewards import Rewards
from ray_vlm.models.backbone import recompute
from ray_vlm.models.card_memory import release_memory
from ray_vlm.models.frozen_encoder import StepFeatureCache
from ray_vlm.models.layouts import LayoutPlanner
from ray_vlm.models.lora import split_rates
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.precision import autocast
from ray_vlm.models.surgery import ForwardOptions, change_forward, prepare_forward

logger = logging.getLogger(__name__)
_SHOWN = 20  # replaced rows that the user sees one by one; the run's last lines count all
_FP16_SCALE = 2.0**10  # of the loss: gradients that float16 would round to zero
_COUNTERS = ("_metrics", "_total_train_tokens", "_step")  # that TRL updates in `compute_loss`


class PlannedBatches:
    """The train dataloader for TRL: one stream over the whole run, iterated an epoch at a time.

    `feed` makes the batches of the rows of the stream, some of them ahead; what is counted here is what was taken.
    `first`: number of the stream's first micro-batch; an epoch that is resumed midway yields only its rest.
    `accumulation`: batches per optimizer step, as the trainer counts them. `clock` measures the wait for rows, then for
    their batch. `num_images`: images so far; `number`: of the next micro-batch.
    """

    def __init__(
        self,
        stream: Stream,
        feed: Feed[list[Sample]],
        plan: Plan,
        accumulation: int,
        clock: Clock,
        first: int = 0,
        rank: int = 0,
    ):
        self.clock = clock
        self.num_images = 0
        self.lost: list[tuple[int, int]] = []  # (row that could not be read, row in its place)
        self._rank = rank
        self.number = first
        self._stream, self._feed = stream, feed
        self._plan = plan
        self._accumulation = accumulation

    def __len__(self) -> int:
        return self._plan.steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[object]:
        per_epoch = self._plan.steps_per_epoch * self._plan.accumulation
        for _ in range(per_epoch - self.number % per_epoch):
            with self.clock.phase("data", host=True):
                rows = self._feed.take_item()
            if rows is None:
                return
            with self.clock.phase("collate"):
                batch = self._feed.take_batch()
            self._count(rows)
            yield batch

    def peek(self) -> list[Sample] | None:
        """Return the rows of the next micro-batch, which stays in the stream, or None behind the last. Waits for
        them."""
        with self.clock.phase("data", host=True):
            return self._feed.take_item()

    def _count(self, rows: Sequence[Sample]) -> None:
        """Count a micro-batch that was taken, and log those of its rows that replace others."""
        planned = self._plan.micro_batch(self.number, self._rank).rows
        for i, row in zip(planned, rows, strict=True):
            if row.number != i:
                level = logging.INFO if len(self.lost) < _SHOWN else logging.DEBUG
                logger.log(level, f"row {i} of data.train cannot be read any more; row {row.number} replaces it")
                self.lost.append((i, row.number))
        self.number += 1
        self.num_images += sum(len(row.images) for row in rows)

    def close(self) -> None:
        """Close the feed, then the stream, also before its end. A stream that still makes rows after a minute cannot be
        closed, and ends with its process."""
        if self._feed.close():
            self._stream.close()


@dataclass(frozen=True)
class TrainerInputs:
    """Everything that a `PlannedTrainer` is built from, beside the model and TRL's options.

    `method`: the job's section. `rows`: of training, by the plan's numbers. `learning_rates`: of
    parts of the model that differ from the others. `planner`: plans the layouts of batches; None for a family with
    its own processor. `adapter_is_reference`: the reference of DPO and GRPO is the adapter
    that training starts from, not the base. `tolerates_nonfinite`: the run goes on after a step whose loss is not
    finite. `validate` and `write_checkpoint` are called by the trainer when they are due. Of GRPO: `rewards` and
    `engine`, which samples (None: the package's own loop). `reference`: of DPO, where its log-probabilities are
    computed in advance.
    """

    method: Method
    builder: SampleBuilder
    batches: PlannedBatches
    rows: Rows
    forwards: ForwardOptions
    clock: Clock
    loss_scale: LossScale
    operations: OperationCounter
    planner: LayoutPlanner | None = None
    seed: int = 0
    learning_rates: Mapping[Part, float] = field(default_factory=dict)
    adapter_is_reference: bool = False
    tolerates_nonfinite: bool = False
    has_eval: bool = False
    callbacks: Sequence[TrainerCallback] = ()
    validate: "Callable[[PlannedTrainer], dict[str, float]] | None" = None
    write_checkpoint: "Callable[[PlannedTrainer], None] | None" = None
    rewards: Rewards | None = None
    engine: Engine | None = None
    reference: ReferenceCache | None = None

    def row_id(self, row: int) -> str:
        """Return the id of a training row by its position."""
        return str(self.rows[row].id)


class PlannedTrainer(Trainer, ABC):
    """A mixin that reads `PlannedBatches`. A training method is a subclass of it and of a trainer of TRL.

    In such a subclass `super()` is TRL's trainer here, so `method_loss` ends in TRL's `compute_loss`.

    `EXAMPLE_ROW`: a row by which TRL recognises the method's datasets with images; the real rows come from the plan.
    """

    EXAMPLE_ROW: ClassVar[Mapping[str, object]]
    model: PreTrainedModel  # or PEFT's, which has the same methods

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, inputs: TrainerInputs, **further: Any):
        """`further`: arguments of the method's TRL trainer."""
        self.inputs, self.builder, self.clock = inputs, inputs.builder, inputs.clock
        prepare_forward(model, inputs.forwards)
        # Under ZeRO-3 (`ds_id`) a weight is a slice that DeepSpeed manages.
        exact = {n: p.data for n, p in model.named_parameters() if p.requires_grad and not hasattr(p, "ds_id")}
        example = datasets.Dataset.from_list([dict(self.EXAMPLE_ROW)])
        super().__init__(
            model=model,
            args=args,
            train_dataset=example,
            eval_dataset=example if inputs.has_eval else None,
            processing_class=inputs.builder.processor,
            callbacks=list(inputs.callbacks),
            **further,
        )
        self.remove_callback(PrinterCallback)
        if not inputs.adapter_is_reference and "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # TRL copies the new adapter; the base is the reference
        inputs.loss_scale.attach(self.accelerator)
        _restore(self.model, exact)
        self.recent = StepFeatureCache()
        change_forward(self.model, inputs.forwards, self.recent, inputs.operations)

    @classmethod
    @abstractmethod
    def build_args(
        cls, method: Method, shared: Mapping[str, Any], plan: Plan, rewards: Rewards | None
    ) -> TrainingArguments:
        """Build TRL's options: `shared`, which all methods have, then those of the job's `method` section."""

    @staticmethod
    @abstractmethod
    def collate(rows: list[Sample], builder: SampleBuilder, planner: LayoutPlanner | None) -> object:
        """Return a micro-batch of these rows on the host (`data/collate.py`): no device is read. `planner`: plans its
        layout. `get_batch_samples` takes it when it is uploaded, and `complete` makes of it what `compute_loss`
        takes."""

    @staticmethod
    def complete(batch: Any, builder: SampleBuilder) -> Any:
        """Return a micro-batch, which is on the device now, with what is made there."""
        return add_pixels(batch, builder)

    def collate_here(self, rows: list[Sample]) -> Any:
        """Return a micro-batch of these rows as `compute_loss` takes it."""
        batch = upload(self.collate(rows, self.builder, self.inputs.planner), str(self.args.device))
        return self.complete(batch, self.builder)

    @staticmethod
    @abstractmethod
    def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of a step that are logged, under this package's names."""

    @abstractmethod
    def heaviest_batch(self, rows: list[Sample]) -> dict[str, Any]:
        """Return the batch of these rows that takes the most memory, as `compute_loss` takes it."""

    def try_rollout(self, rows: list[Sample], precision: Precision) -> int | None:
        """Sample answers to the longest of these rows as a step does, for its memory. Return how many prompts are
        sampled at a time; None for a method that samples nothing on this device."""
        return None

    def prepare_training(self) -> None:
        """Do what the method needs before the first step, on all ranks together."""

    def next_batches(self, *args: Any, **kwargs: Any) -> tuple:
        """Return the micro-batches of a step and the number by which its loss is divided, as `get_batch_samples`."""
        return super().get_batch_samples(*args, **kwargs)

    def method_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a micro-batch, as `compute_loss` does."""
        return super().compute_loss(model, inputs, *args, **kwargs)

    def try_heaviest_batch(
        self,
        rows: list[Sample],
        precision: Precision,
        look: Callable[[torch.Tensor], None] = lambda loss: None,
    ) -> None:
        """Run the forward and the backward of the heaviest batch of these rows as in training, without a step.

        `look` is called with the loss while the gradients are there (of float16, those of a scaled loss). Gradients,
        TRL's counters and the random state are restored afterwards.
        """
        saved = {name: copy.deepcopy(getattr(self, name)) for name in _COUNTERS if hasattr(self, name)}
        model, device, was_training = self.model, str(self.args.device), self.model.training
        if self.args.gradient_checkpointing:
            recompute(model, dict(self.args.gradient_checkpointing_kwargs or {}) or None)  # type: ignore[arg-type]
        model.train()
        try:
            with torch.random.fork_rng([device] if device.startswith("cuda") else []):
                batch = self.heaviest_batch(rows)
                with autocast(precision, device):
                    loss = self.compute_loss(model, batch)
                    (loss * _FP16_SCALE if precision == "fp16" else loss).backward()
                look(loss)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            self.clock.take()
            self.inputs.operations.take()
            for name, value in saved.items():
                setattr(self, name, value)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, with the learning rates of the model's parts."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.inputs.learning_rates:
            split_rates(optimizer, self.model.named_parameters(), self.builder.family, self.inputs.learning_rates)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            align_learning_rates(self.lr_scheduler)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint."""
        self._load_from_checkpoint(str(folder))

    def save_training_state(self, folder: Path) -> None:
        """Write optimizer, scheduler, loss scale and this rank's random state. Every rank must call it."""
        self._save_rng_state(str(folder))
        self._save_optimizer_and_scheduler(str(folder))  # by rank 0; under DeepSpeed each rank writes its part
        self._save_scaler(str(folder))  # by rank 0, for float16 only

    def get_train_dataloader(self) -> PlannedBatches:  # type: ignore[override]
        """Return the stream of the plan."""
        return self.inputs.batches

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
        """Measure the time of `next_batches`."""
        with self.clock.phase("batch"):
            return self.next_batches(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Complete a micro-batch, measure the time of its forward and backward, and keep its loss."""
        with self.clock.phase("pixels"):  # here, so that the card holds floats of one micro-batch's pixels at a time
            inputs = self.complete(inputs, self.builder)
        with self.clock.phase("step"):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.inputs.loss_scale.keep(loss)
        # The Trainer keeps a running sum of losses and subtracts it after logging, so a NaN would stay for ever.
        return loss.nan_to_num(0.0, 0.0, 0.0) if self.inputs.tolerates_nonfinite else loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the time of `method_loss`."""
        with self.clock.phase("forward"):
            return self.method_loss(*args, **kwargs)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Validate by this package's `validate`."""
        with self.clock.phase("validation", host=True):
            metrics = self.inputs.validate(self) if self.inputs.validate else {}
            release_memory()  # caches of generated answers
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        if self.inputs.write_checkpoint is not None:
            with self.clock.phase("checkpoint", host=True):
                self.inputs.write_checkpoint(self)

    def floating_point_ops(self, inputs: object) -> int:
        """Return 0: the estimate is not used, and it would iterate over all weights for each micro-batch."""
        return 0

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the export writes a model card of its own (`runs/card.py`)."""


def _restore(model: torch.nn.Module, exact: Mapping[str, torch.Tensor]) -> None:
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
