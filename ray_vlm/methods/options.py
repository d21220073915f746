"""`method.trl` against TRL's own configuration classes: unknown options and values that it refuses."""

from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError


def check_trl_options(job: JobConfig, config: Any) -> None:
    """Raises `ConfigError` for keys and values of `method.trl` that TRL's `config` class does not take."""
    given = job.method.trl
    name = config.__name__
    unknown = [key for key in given if key not in config.__dataclass_fields__]
    if unknown:
        raise ConfigError([f"method.trl.{key}: TRL's {name} has no such option. Remove it." for key in unknown])
    loss = {} if job.method.loss_type is None else {"loss_type": job.method.loss_type}  # some options refer to it
    try:
        config(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **loss, **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method.trl: TRL refuses these options ({error}). Mend or remove them.") from None
