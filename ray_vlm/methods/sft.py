"""Supervised fine-tuning: TRL's `SFTTrainer` learns the answers in the data.

Beyond TRL, the loss is divided by the trained tokens of the *global* batch, and tokens may have weights.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ray_vlm.config.method import Method
from ray_vlm.data.collate import host_batch
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, Sample
from ray_vlm.errors import DataError
from ray_vlm.methods.rewards import Rewards
from ray_vlm.methods.trainer import PlannedTrainer, TrainerInputs
from ray_vlm.models.layouts import LayoutPlanner

_LOGGED = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy")


class WeightedSFTTrainer(PlannedTrainer, SFTTrainer):
    """TRL's trainer, with the loss over the global batch and weights of tokens."""

    EXAMPLE_ROW = MappingProxyType({"images": [], "prompt": "", "completion": ""})

    def __init__(self, model: PreTrainedModel, args: SFTConfig, inputs: TrainerInputs):
        super().__init__(model, args, inputs)
        # Qwen's forwards do not declare it, but TRL's loss divides by num_items_in_batch when it is passed.
        self.model_accepts_loss_kwargs = True

    @classmethod
    def build_args(cls, method: Method, shared: Mapping[str, Any], plan: Plan, rewards: Rewards | None) -> SFTConfig:
        own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTConfig(**{**shared, **own, **method.trl})

    @staticmethod
    def collate(rows: list[Sample], builder: SampleBuilder, planner: LayoutPlanner | None) -> dict[str, Any]:
        """Return a micro-batch on the host, with `trained`: the weight of all its trained tokens, a number."""
        batch = host_batch(rows, builder, planner=planner)
        weights = batch["loss_weights"] if "loss_weights" in batch else batch["labels"] != IGNORED
        return batch | {"trained": float(weights[:, 1:].sum())}

    @staticmethod
    def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: logs[name] for name in _LOGGED if name in logs}

    def heaviest_batch(self, rows: list[Sample]) -> dict[str, Any]:
        return self.collate_here(rows)

    def next_batches(self, *args: Any, **kwargs: Any) -> tuple:
        batches, trained_tokens = super().next_batches(*args, **kwargs)
        if trained_tokens is not None and batches and "loss_weights" in batches[0]:
            total_weight = torch.stack([batch["loss_weights"][:, 1:].sum() for batch in batches]).sum()
            trained_tokens = self.accelerator.gather(total_weight).sum()
        trained_here = sum(batch.get("trained", 0.0) for batch in batches)
        # The sum over all ranks, for which one waits for the device, is read only where it may be below 1, the least by
        # which TRL divides. If it is, all ranks raise.
        if trained_tokens is not None and trained_here < 1 and int(trained_tokens) == 0:
            raise DataError(
                f"step {self.state.global_step + 1}: not one token of the global batch is trained, so its loss "
                "would be 0. Look at the rows with `ray-vlm train JOB --dry-run`."
            )
        return batches, trained_tokens

    def method_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("trained", None)
        weights = inputs.pop("loss_weights", None)
        if weights is None:
            return super().method_loss(model, inputs, *args, **kwargs)
        return super().method_loss(weigh(model, weights), inputs, *args, **kwargs)  # type: ignore[arg-type]


def weigh(model: torch.nn.Module, weights: torch.Tensor) -> Callable[..., Any]:
    """Return a forward of `model` that multiplies the log-probability of each token by its weight, `[rows, tokens]`.

    TRL's loss is the sum of these log-probabilities divided by `num_items_in_batch`, here the sum of weights: the
    weighted mean over the global batch. TRL's metrics (entropy, accuracy) stay unweighted.
    """

    def forward(*args: object, **kwargs: object) -> Any:
        outputs = model(*args, **kwargs)
        outputs.log_probs = outputs.log_probs * weights[:, 1:]
        return outputs

    return forward
