"""Direct preference optimisation: TRL's `DPOTrainer` (Rafailov et al. 2023, arXiv:2305.18290) on pairs of answers.

The reference is the base with the adapter off, or the adapter that training starts from, as a second adapter and never
a second model. Beyond TRL, both answers of a pair share one copy of its images, and the reference's log-probabilities
may be computed in advance (`train/reference.py`), which TRL refuses for images.
"""

from collections.abc import Mapping
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.collate import collate_pairs
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.errors import ConfigError
from ray_vlm.methods.options import check_trl_options

EXAMPLE_ROW = {"images": [], "prompt": "", "chosen": "", "rejected": ""}
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
_LOGGED = {
    **{name: name for name in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy")},
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}


def collate(rows: list[Sample], builder: SampleBuilder, device: str) -> dict[str, Any]:
    """Return a micro-batch as TRL's loss takes it, with `numbers`, the numbers of its pairs."""
    return collate_pairs(rows, builder, device) | {"numbers": [row.number for row in rows]}


def heaviest(trainer: Any, rows: list[Sample], device: str) -> dict[str, Any]:
    """Return the batch of these pairs, for which the reference is always computed."""
    return collate_pairs(rows, trainer.builder, device) | {"numbers": [-1]}


def trainer_class(job: JobConfig) -> type:
    """Return TRL's trainer, which takes the reference's log-probabilities from `reference` if they are there."""
    import torch
    from trl import DPOTrainer

    class PairedDPOTrainer(DPOTrainer):
        reference: Any = None  # float32 [rows, 2]: the reference's log-probabilities of each pair, or None
        recent: Any = None  # `models.frozen_encoder.StepFeatureCache`

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if job.model.adapter is None:  # the reference is the base; TRL would keep a copy of the new adapter
                kwargs["model"].delete_adapter("ref")
            self.precompute_ref_logps = True  # they are always in the batch: `refer` adds them

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, self.refer(inputs), *args, **kwargs)

        def refer(self, inputs: dict[str, Any]) -> dict[str, Any]:
            """Return the batch with the reference's `ref_chosen_logps` and `ref_rejected_logps`, `[pairs]`."""
            inputs = dict(inputs)
            numbers = inputs.pop("numbers")
            if self.reference is not None and min(numbers) >= 0:
                logps = torch.as_tensor(self.reference[numbers], device=inputs["input_ids"].device)
                chosen, rejected = logps.unbind(dim=1)
            else:
                self.recent.start(len(inputs.get("image_grid_thw", ())))  # the trained model sees the same images
                chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
            return inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    return PairedDPOTrainer


def check_options(job: JobConfig) -> None:
    """Raise `ConfigError` for a loss that TRL does not have, and for options that its `DPOConfig` does not take."""
    loss_type = job.method.loss_type or []
    if unknown := [loss for loss in ([loss_type] if isinstance(loss_type, str) else loss_type) if loss not in LOSSES]:
        known = ", ".join(LOSSES)
        raise ConfigError(f"method.loss_type={loss_type!r}: TRL's DPO has no {unknown[0]!r}. It has: {known}.")
    if job.method.trl:
        from trl import DPOConfig

        check_trl_options(job, DPOConfig)


def extras(job: JobConfig) -> dict[str, Any]:
    """Return no further arguments."""
    return {}


def build_args(job: JobConfig, shared: dict[str, Any]) -> Any:
    """Build TRL's `DPOConfig`: `shared` (the options that all methods have), then the job's."""
    from trl import DPOConfig

    own: dict[str, Any] = {"max_length": None, "beta": 0.1 if job.method.beta is None else job.method.beta}
    if job.method.loss_type is not None:
        own["loss_type"] = job.method.loss_type
    return DPOConfig(**{**shared, **own, **job.method.trl})


def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a step that are logged, under this package's names."""
    return {name: logs[trl_name] for trl_name, name in _LOGGED.items() if trl_name in logs}
