"""Plan and stream -> TRL: a TRL trainer that takes its batches from our feed and is validated by our evaluation.

The losses stay TRL's. What changes: where batches come from, that the loss is divided by the trained tokens of the
*global* batch, and that the adapter keeps float32 weights (TRL casts it to bfloat16 on 4-bit bases, where a step of
1e-4 of a weight is lost).
"""

import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ray_vlm.data.collate import collate
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import Preparer, Row
from ray_vlm.errors import DataError


class PlannedBatches:
    """The train dataloader that TRL sees: one stream over the whole run, handed out an epoch at a time.

    `first`: number of the stream's first micro-batch. In an epoch that is resumed midway only the rest comes.
    """

    def __init__(self, stream: Generator[list[Row]], plan: Plan, preparer: Preparer, device: str, first: int = 0):
        self._next = first
        self._stream = stream
        self._plan = plan
        self._preparer = preparer
        self._device = device

    def __len__(self) -> int:
        return self._plan.steps_per_epoch * self._plan.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self) - self._next % len(self)):
            rows = next(self._stream, None)
            if rows is None:
                return
            self._next += 1
            yield collate(rows, self._preparer, self._device)

    def close(self) -> None:
        """End the stream, also where training stopped before its end."""
        self._stream.close()


def feed_trainer(trainer_class: type) -> type:
    """A subclass of a TRL trainer that is fed by `PlannedBatches` and validated by a function of ours."""

    import torch

    class FedTrainer(trainer_class):
        planned_batches: PlannedBatches
        control: Any
        validate: Callable[[Any], dict[str, float]] | None = None
        write_checkpoint: Callable[[], None]

        accelerator: Any

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            # Qwen's forwards do not announce it, but TRL's loss divides by num_items_in_batch when it is given.
            self.model_accepts_loss_kwargs = True
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

        def get_train_dataloader(self) -> PlannedBatches:
            return self.planned_batches

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = self.validate(self) if self.validate else {}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
            batches, trained_tokens = super().get_batch_samples(*args, **kwargs)
            if trained_tokens is not None and batches and "loss_weights" in batches[0]:
                whole = torch.stack([batch["loss_weights"][:, 1:].sum() for batch in batches]).sum()
                trained_tokens = self.accelerator.gather(whole).sum()
            if trained_tokens is not None and int(trained_tokens) == 0:  # of all ranks, so all of them raise
                raise DataError(
                    f"step {self.state.global_step + 1}: not one token of the global batch is trained, so its loss "
                    "would be 0 without meaning it. Look at the rows with `ray-vlm train JOB --dry-run`."
                )
            return batches, trained_tokens

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            weights = inputs.pop("loss_weights", None)
            if weights is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return super().compute_loss(weigh(model, weights), inputs, *args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.write_checkpoint()

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Left out: TRL's card names its own defaults; ours comes with the export."""

    FedTrainer.__name__ = trainer_class.__name__
    return FedTrainer


def weigh(model: Any, weights: Any) -> Callable[..., Any]:
    """`model`, with the log-probability of each token times its weight.

    TRL's loss is the sum of what this gives over the `num_items_in_batch` that it is handed, here the sum of weights:
    so the weighted mean over the global batch. Its own metrics (entropy, accuracy) stay unweighted.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        outputs.log_probs = outputs.log_probs * weights[:, 1:]
        return outputs

    return forward


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
        "gradient_checkpointing": train.gradient_checkpointing,
        "bf16": train.bf16,
        "use_cpu": job.cluster.gpus_per_worker == 0,
        # text alone leaves the tower's weights without a gradient
        "ddp_find_unused_parameters": job.task.name == "chat" and (job.lora is None or job.lora.target != ["language"]),
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
