"""Supervised fine-tuning: TRL's `SFTTrainer` imitates the answers in the data."""

from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError

# What TRL needs to see of a dataset to know that it holds images; the rows themselves come from our feed.
EXAMPLE_ROW = {"images": [], "prompt": "", "completion": ""}


def trainer_class() -> type:
    """TRL's trainer for this method."""
    from trl import SFTTrainer

    return SFTTrainer


def check_options(job: JobConfig) -> None:
    """Raises `ConfigError` for keys and values of `method.trl` that TRL's `SFTConfig` does not take."""
    if not job.method.trl:
        return
    from trl import SFTConfig

    unknown = [key for key in job.method.trl if key not in SFTConfig.__dataclass_fields__]
    if unknown:
        raise ConfigError([f"method.trl.{key}: TRL's SFTConfig has no such option. Remove it." for key in unknown])
    try:
        SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **job.method.trl)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method.trl: TRL refuses these options ({error}). Mend or remove them.") from None


def build_args(job: JobConfig, shared: dict[str, Any]) -> Any:
    """TRL's `SFTConfig`: `shared` (the options that all methods have), then the job's `method.trl`."""
    from trl import SFTConfig

    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**{**shared, **own, **job.method.trl})
