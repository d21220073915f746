"""Check the options of a method that are passed on to TRL, before anything is loaded.

Options are checked with TRL's own configuration classes, for unknown names and for values that TRL refuses.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_vlm.config.method import DpoMethod, GrpoMethod, Method, SftMethod
from ray_vlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Values that TRL checks only when it trains; a test checks that TRL has each of them.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sft": {"loss_type": ("nll", "dft", "chunked_nll")},
    "dpo": {},
    "grpo": {
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none", True, False),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    },
}
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Names from papers and other programs for what TRL calls otherwise.
_ALSO = {
    "gspo": "GSPO is loss_type grpo with method.trl.importance_sampling_level: sequence.",
    "dr-grpo": "TRL writes dr_grpo.",
}


def check_options(method: Method) -> None:
    """Raise `ConfigError` for losses and for keys and values of `method.trl` that TRL does not take."""
    if isinstance(method, DpoMethod):
        losses = [method.loss_type] if isinstance(method.loss_type, str) else method.loss_type or []
        if unknown := [loss for loss in losses if loss not in DPO_LOSSES]:
            known = ", ".join(DPO_LOSSES)
            raise ConfigError(
                f"method.loss_type={method.loss_type!r}: TRL's DPO has no {unknown[0]!r}. It has: {known}."
            )
    if method.trl or (isinstance(method, GrpoMethod) and method.loss_type is not None):
        import trl

        configs = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}
        check_trl_options(method, configs[method.name], CHOICES[method.name])


def check_trl_options(
    method: Method, config: "type[TrainingArguments]", choices: Mapping[str, Sequence[object]]
) -> None:
    """Raise `ConfigError` for keys and values of `method.trl` that TRL's `config` class does not take.

    `choices`: by option, the allowed values, for options that TRL checks only when it trains."""
    options = method.trl
    unknown = [key for key in options if key not in config.__dataclass_fields__]
    if unknown:
        name = config.__name__
        raise ConfigError([f"method.trl.{key}: TRL's {name} has no such option. Remove it." for key in unknown])
    loss_type = None if isinstance(method, SftMethod) else method.loss_type
    loss = {} if loss_type is None else {"loss_type": loss_type}  # some options refer to it
    wrong = {key: value for key, value in (loss | options).items() if key in choices and value not in choices[key]}
    if wrong:
        raise ConfigError([_describe(key, value, choices[key], key in options) for key, value in wrong.items()])
    given: dict[str, Any] = loss | options
    try:
        config(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method.trl: TRL refuses these options ({error}). Mend or remove them.") from None


def _describe(key: str, value: object, known: Sequence[object], passed: bool) -> str:
    also = f" {_ALSO[value]}" if isinstance(value, str) and value in _ALSO else ""
    where = f"method.{'trl.' if passed else ''}{key}={value}"
    return f"{where}: TRL has no such {key}.{also} Use one of: {', '.join(map(str, known))}."
