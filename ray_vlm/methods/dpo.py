"""Direct preference optimisation: TRL's `DPOTrainer` (Rafailov et al. 2023, arXiv:2305.18290) on pairs of answers.

The reference is the base with the adapter off, or the adapter that training starts from, as a second adapter and never
a second model. Beyond TRL, both answers of a pair share one copy of its images, and the reference's log-probabilities
may be computed in advance (`reference.py`), which TRL refuses for images.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from ray_vlm.config.method import DpoMethod, Method
from ray_vlm.data.collate import collate_pairs, host_pairs, upload
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.methods.rewards import Rewards
from ray_vlm.methods.trainer import PlannedTrainer, TrainerInputs
from ray_vlm.models.backbone import evaluation_mode
from ray_vlm.models.layouts import LayoutPlanner

_LOGGED = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy")},
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
PAIR_METRICS = {  # of a validation: this package's name, then TRL's
    "loss": "loss",
    "preference_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # keys of a batch, float32 [pairs]


class PairedDPOTrainer(PlannedTrainer, DPOTrainer):
    """TRL's trainer, which takes the reference's log-probabilities from a `ReferenceCache` if the job has one."""

    EXAMPLE_ROW = MappingProxyType({"images": [], "prompt": "", "chosen": "", "rejected": ""})

    def __init__(self, model: PreTrainedModel, args: DPOConfig, inputs: TrainerInputs):
        super().__init__(model, args, inputs)
        self.precompute_ref_logps = True  # they are always in the batch: `refer` adds them
        self.reference: np.ndarray | None = None  # float64 [pairs, 2]: of the chosen and the rejected answers

    @classmethod
    def build_args(cls, method: Method, shared: Mapping[str, Any], plan: Plan, rewards: Rewards | None) -> DPOConfig:
        assert isinstance(method, DpoMethod)
        own: dict[str, Any] = {"max_length": None, "beta": 0.1 if method.beta is None else method.beta}
        if method.loss_type is not None:
            own["loss_type"] = method.loss_type
        return DPOConfig(**{**shared, **own, **method.trl})

    @staticmethod
    def collate(rows: list[Sample], builder: SampleBuilder, planner: LayoutPlanner | None) -> dict[str, Any]:
        """Return a micro-batch on the host for TRL's loss, with `numbers`, the numbers of its pairs."""
        return host_pairs(rows, builder, planner) | {"numbers": [row.number for row in rows]}

    @staticmethod
    def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: logs[trl_name] for trl_name, name in _LOGGED.items() if trl_name in logs}

    def heaviest_batch(self, rows: list[Sample]) -> dict[str, Any]:
        """Return the batch of these pairs, for which the reference is always computed."""
        return collate_pairs(rows, self.builder, str(self.args.device), self.inputs.planner) | {"numbers": [-1]}

    def prepare_training(self) -> None:
        """Read or compute the reference's log-probabilities of all pairs, if the job asks for it."""
        if self.inputs.reference is None:
            return
        with evaluation_mode(self.model):
            self.reference = self.inputs.reference.find(self.inputs.rows, self.builder, self._ask_reference)

    def method_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().method_loss(model, self.refer(inputs), *args, **kwargs)

    def refer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with the reference's log-probabilities, `ref_chosen_logps` and `ref_rejected_logps`."""
        inputs = dict(inputs)
        numbers = inputs.pop("numbers", [-1])
        if all(name in inputs for name in _REFERENCE):
            return inputs
        if self.reference is not None and min(numbers) >= 0:
            values = {"logps": torch.from_numpy(self.reference[numbers])}
            chosen, rejected = upload(values, str(inputs["input_ids"].device))["logps"].unbind(dim=1)
        else:
            self.recent.start(len(inputs.get("image_grid_thw", ())))  # the trained model sees the same images
            chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        return inputs | dict(zip(_REFERENCE, (chosen, rejected), strict=True))

    def _ask_reference(self, rows: list[Sample]) -> torch.Tensor:
        """Return the reference's log-probabilities of these pairs' answers, `[pairs, 2]`."""
        batch = collate_pairs(rows, self.builder, str(self.args.device), self.inputs.planner)
        return torch.stack(self.compute_ref_log_probs(self.model, batch), dim=1)

    def measure_pairs(self, rows: list[Sample], reference: dict[str, torch.Tensor] | None) -> tuple[dict, dict]:
        """Return means over a batch of pairs by TRL's own loss, named as `PAIR_METRICS`, and the reference's values.

        `reference`: those of an earlier call with the same pairs, because the reference never changes.
        """
        batch = collate_pairs(rows, self.builder, str(self.args.device), self.inputs.planner) | {"numbers": [-1]}
        with torch.no_grad(), self.compute_loss_context_manager(), self._without_gathering():
            batch = batch | reference if reference else self.refer(batch)
            loss = float(self.compute_loss(self.model, batch))
        metrics = {name: values[-1] for name, values in self._metrics["eval"].items()} | {"loss": loss}
        self._metrics["eval"].clear()
        return {name: float(metrics[trl_name]) for name, trl_name in PAIR_METRICS.items()}, {
            name: batch[name] for name in _REFERENCE
        }

    @contextmanager
    def _without_gathering(self) -> Iterator[None]:
        """Keep TRL from gathering its metrics from all ranks at every batch: the batches of ranks differ here."""
        accelerator = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda values: values
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics
