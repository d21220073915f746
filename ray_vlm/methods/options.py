"""Check `method.trl` with TRL's own configuration classes, for unknown options and for values that TRL refuses."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError

# Names from papers and other programs for what TRL calls otherwise.
_ALSO = {
    "gspo": "GSPO is loss_type grpo with method.trl.importance_sampling_level: sequence.",
    "dr-grpo": "TRL writes dr_grpo.",
}


def check_trl_options(job: JobConfig, config: Any, choices: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Raise `ConfigError` for keys and values of `method.trl` that TRL's `config` class does not take.

    `choices`: by option, the allowed values, for options that TRL checks only when it trains."""
    options = job.method.trl
    name = config.__name__
    unknown = [key for key in options if key not in config.__dataclass_fields__]
    if unknown:
        raise ConfigError([f"method.trl.{key}: TRL's {name} has no such option. Remove it." for key in unknown])
    chosen = ({} if job.method.loss_type is None else {"loss_type": job.method.loss_type}) | options
    wrong = {key: value for key, value in chosen.items() if choices and key in choices and value not in choices[key]}
    if wrong:
        raise ConfigError([_describe(key, value, (choices or {})[key], key in options) for key, value in wrong.items()])
    loss = {} if job.method.loss_type is None else {"loss_type": job.method.loss_type}  # some options refer to it
    try:
        config(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **loss, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method.trl: TRL refuses these options ({error}). Mend or remove them.") from None


def _describe(key: str, value: Any, known: Sequence[Any], passed: bool) -> str:
    also = f" {_ALSO[value]}" if isinstance(value, str) and value in _ALSO else ""
    where = f"method.{'trl.' if passed else ''}{key}={value}"
    return f"{where}: TRL has no such {key}.{also} Use one of: {', '.join(map(str, known))}."
