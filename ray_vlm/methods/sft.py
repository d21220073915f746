"""Supervised fine-tuning: TRL's `SFTTrainer` imitates the answers in the data."""

from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError

# What TRL needs to see of a dataset to know that it holds images; the rows themselves come from our feed.
EXAMPLE_ROW = {"images": [], "prompt": "", "completion": ""}


def build_trainer(base: type | None = None) -> type:
    """TRL's trainer class for this method."""
    from trl import SFTTrainer

    return base or SFTTrainer


def build_args(job: JobConfig, shared: dict[str, Any]) -> Any:
    """TRL's `SFTConfig`: `shared` (the options that all methods have), then the job's `method.trl`.

    Raises `ConfigError` for a key that TRL does not know.
    """
    from trl import SFTConfig

    known = SFTConfig.__dataclass_fields__
    unknown = [key for key in job.method.trl if key not in known]
    if unknown:
        raise ConfigError([f"method.trl.{key}: TRL's SFTConfig has no such option. Remove it." for key in unknown])
    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**{**shared, **own, **job.method.trl})
