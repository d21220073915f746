"""Supervised fine-tuning: TRL's `SFTTrainer` learns the answers in the data.

Beyond TRL, the loss is divided by the trained tokens of the *global* batch, and tokens may have weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.collate import collate as collate
from ray_vlm.data.spec import Sample
from ray_vlm.errors import DataError
from ray_vlm.methods.options import check_trl_options

# A row by which TRL recognises a dataset with images; the real rows come from this package's data loader.
EXAMPLE_ROW = {"images": [], "prompt": "", "completion": ""}
_LOGGED = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy")


def heaviest(trainer: Any, rows: list[Sample], device: str) -> dict[str, Any]:
    """Return the batch of these rows."""
    return collate(rows, trainer.builder, device)


def trainer_class(job: JobConfig) -> type:
    """Return TRL's trainer, with the loss over the global batch and weights of tokens."""
    import torch
    from trl import SFTTrainer

    class WeightedSFTTrainer(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            # Qwen's forwards do not declare it, but TRL's loss divides by num_items_in_batch when it is passed.
            self.model_accepts_loss_kwargs = True

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
            batches, trained_tokens = super().get_batch_samples(*args, **kwargs)
            if trained_tokens is not None and batches and "loss_weights" in batches[0]:
                total_weight = torch.stack([batch["loss_weights"][:, 1:].sum() for batch in batches]).sum()
                trained_tokens = self.accelerator.gather(total_weight).sum()
            if trained_tokens is not None and int(trained_tokens) == 0:  # summed over all ranks, so all of them raise
                raise DataError(
                    f"step {self.state.global_step + 1}: not one token of the global batch is trained, so its loss "
                    "would be 0. Look at the rows with `ray-vlm train JOB --dry-run`."
                )
            return batches, trained_tokens

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            weights = inputs.pop("loss_weights", None)
            if weights is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return super().compute_loss(weigh(model, weights), inputs, *args, **kwargs)

    return WeightedSFTTrainer


def weigh(model: Any, weights: Any) -> Callable[..., Any]:
    """Return a forward of `model` that multiplies the log-probability of each token by its weight.

    TRL's loss is the sum of these log-probabilities divided by `num_items_in_batch`, here the sum of weights: the
    weighted mean over the global batch. TRL's metrics (entropy, accuracy) stay unweighted.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        outputs.log_probs = outputs.log_probs * weights[:, 1:]
        return outputs

    return forward


def check_options(job: JobConfig) -> None:
    """Raise `ConfigError` for keys and values of `method.trl` that TRL's `SFTConfig` does not take."""
    if job.method.trl:
        from trl import SFTConfig

        check_trl_options(job, SFTConfig, {"loss_type": ("nll", "dft", "chunked_nll")})


def extras(job: JobConfig) -> dict[str, Any]:
    """Return no further arguments."""
    return {}


def build_args(job: JobConfig, shared: dict[str, Any]) -> Any:
    """Build TRL's `SFTConfig`: `shared` (the options that all methods have), then the job's `method.trl`."""
    from trl import SFTConfig

    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**{**shared, **own, **job.method.trl})


def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a step that are logged."""
    return {name: logs[name] for name in _LOGGED if name in logs}
