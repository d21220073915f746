"""LoRA adapters: on new layers, which of their weights train and how many, and from a folder, checked.

PEFT asks the hub for a file that is missing, reads a pickle where there are no safetensors, allocates whatever rank the
configuration gives, and skips weights that match no layer with a warning. Here each of these is a `ModelError`.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.paths import describe_search
from ray_vlm.config.schema import Lora
from ray_vlm.config.train import LoraPart, Part
from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family, part_of
from ray_vlm.models.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

_EXPERTS = re.compile(r"\.experts\.(base_layer\.)*lora_")  # in the names of adapters of fused experts
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # in the names of weights that PEFT adds to the base's
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_USE = "Give a run's best/ or final/."
_NOT_READ = ("megatron_config", "alora_invocation_tokens")  # an import of what a file names; another forward
_LARGEST_RANK = 4096  # of a rank in the configuration that no weight has
_LARGEST_WEIGHT = _LARGEST_ALPHA = 1e6  # a flipped bit mostly makes a number far larger
# Errors that PEFT and safetensors raise for values that they cannot use, collected by `benchmarks.fuzz`.
_REFUSALS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, OSError, ImportError),
    *(AssertionError, re.error),
)


def lora_config(lora: Lora, family: Family) -> "LoraConfig":
    """Return PEFT's configuration for the job's `lora` section on this family.

    Raise `ModelError` if a target part has no linear layers in this family, or if it has no experts.
    """
    from peft import LoraConfig

    patterns: dict[str, str] = dict(family.linear)
    if family.experts:
        patterns["experts"] = "|".join(rf"(?:.*\.{re.escape(name)})" for name in family.experts)
    if absent := [part for part in lora.target if part not in patterns]:
        what = "fused experts" if absent[0] == "experts" else f"linear layers in its {absent[0]}"
        raise ModelError(
            f"lora.target={lora.target}: {family.model_type} has no {what}. Name others: {', '.join(patterns)}."
        )
    ranks = {patterns[part]: rank for part, rank in (lora.ranks or {}).items()}
    linear = [patterns[part] for part in lora.target if part != "experts"]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=ranks,
        alpha_pattern={pattern: lora.alpha * rank / lora.rank for pattern, rank in ranks.items()},
        lora_dropout=lora.dropout,
        target_modules="|".join(f"(?:{pattern})" for pattern in linear) if linear else [],
        target_parameters=list(family.experts) if "experts" in lora.target else None,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    return _adapt_experts(config)


def _adapt_experts(config: "LoraConfig") -> "LoraConfig":
    """Let a configuration that adapts fused experts do so where they are in 4 bit, and return it."""
    if not config.target_parameters:
        return config
    from ray_vlm.models.expert_adapters import adapt_experts

    return adapt_experts(config)


def adapter_part(family: Family, name: str) -> LoraPart:
    """Return the part of `lora.target` that a weight of an adapter belongs to."""
    return "experts" if _EXPERTS.search(name) else part_of(family, name)  # type: ignore[return-value]


def trains_images(lora: Lora | None) -> bool:
    """Return whether weights are trained that only images reach: those of the image encoder or the connector."""
    return lora is None or not {"vision", "connector"}.isdisjoint(lora.target)


def check_modules(model: "Module", names: Sequence[str]) -> None:
    """Raise `ModelError` for names with which no module's name ends, and suggest the nearest."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
    wrong = [name for name in names if name.rpartition(".")[2] not in known]
    if wrong:
        near = difflib.get_close_matches(wrong[0], known, n=3) or sorted(known)[:3]
        raise ModelError(f"lora.modules_to_save: the model has no {wrong[0]!r}. The nearest: {', '.join(near)}.")


def freeze_parts(model: "Module", parts: Sequence[str], family: Family) -> "Module":
    """Freeze these parts of `model`, and return it."""
    for name, parameter in model.named_parameters():
        if part_of(family, name) in parts:
            parameter.requires_grad_(False)
    return model


def split_rates(
    optimizer: "Optimizer", named: Iterable[tuple[str, "Tensor"]], family: Family, rates: Mapping[Part, float]
) -> None:
    """Give the weights of parts in `rates` (part: peak learning rate) groups of their own in `optimizer`."""
    part = {id(parameter): part_of(family, name) for name, parameter in named}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for key in (None, *rates):  # weights without a rate of their own stay first, in their order
            parameters = [p for p in group["params"] if (part[id(p)] if part[id(p)] in rates else None) == key]
            if parameters:
                groups.append(group | {"params": parameters} | ({"lr": rates[key]} if key else {}))
    optimizer.param_groups[:] = groups


def train_parts(model: "PeftModel", lora: Lora, family: Family) -> "PeftModel":
    """Freeze the weights of a loaded adapter outside the parts in `lora.target`, and return `model`.

    Raise `ModelError` if the adapter has none of these parts.
    """
    adapted: set[str] = set()
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = adapter_part(family, name)
            adapted.add(part)
            if part not in lora.target:
                frozen.append(parameter.requires_grad_(False))
    switch = model.set_adapter

    def set_adapter(*args: Any, **kwargs: Any) -> None:
        switch(*args, **kwargs)  # PEFT makes the whole adapter trainable when it is switched back from the reference
        for parameter in frozen:
            parameter.requires_grad_(False)

    model.set_adapter = set_adapter  # type: ignore[method-assign]
    if not adapted & set(lora.target):
        raise ModelError(
            f"model.adapter adapts {', '.join(sorted(adapted))} and lora.target={lora.target} names none of these, so "
            "nothing would learn. Name at least one."
        )
    return model


def num_weights(parameter: "Tensor") -> int:
    """Return the weights of a parameter: 4-bit weights unpacked, and under ZeRO-3 those of all slices."""
    stored = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * stored if type(parameter).__name__ == "Params4bit" else stored  # two 4-bit weights in each byte


def count_trainable(model: "Module", family: Family) -> dict[str, dict[str, int]]:
    """Count weights by part of the model: `{"language": {"trainable": n, "total": n, "in_4bit": n}, ...}`.

    `total` and `in_4bit` count the base alone, without adapters and without the layers that PEFT copies to train them
    in full. Every 4-bit weight counts as one.
    """
    counts = {part: {"trainable": 0, "total": 0, "in_4bit": 0} for part in family.prefixes}
    for name, parameter in model.named_parameters():
        size, part = num_weights(parameter), part_of(family, name)
        if type(parameter).__name__ == "Params4bit":
            counts[part]["in_4bit"] += size
        counts[part]["total"] += 0 if _ADDED.search(name) else size
        counts[part]["trainable"] += size if parameter.requires_grad else 0
    return counts


def is_whole_model(folder: str) -> bool:
    """Return whether a folder holds a whole model, as full fine-tuning and merging write it, and not an adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / CONFIG).is_file()


def named_base(folder: str) -> str | None:
    """Return the base that an adapter's folder names: a hub name, a folder where it was trained, or None."""
    base = _read_config(Path(folder) / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _last_name(base: str) -> str:
    """Return a base's name without its folder; for a snapshot in the hub's cache, its name on the hub."""
    path = Path(base)
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return cached.rpartition("--")[2] if cached and "snapshots" in path.parts else path.name


def check_adapter(folder: str, base: str, job_name: str) -> None:
    """Raise `ModelError` unless the folder holds an undamaged LoRA adapter of `base`, a hub name or folder.

    `job_name`: the base as the job names it, for messages."""
    path = Path(folder)
    if is_whole_model(folder):
        raise ModelError(f"{folder} is a whole model, not an adapter. Name it as the base: model.name={folder}")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ModelError(f"{folder}: no adapter here ({name} is missing). {_USE}{describe_search(folder)}")
    config = _read_config(path / CONFIG)
    trained_on = config.get("base_model_name_or_path")
    if trained_on and (not isinstance(trained_on, str) or _last_name(trained_on) != _last_name(base)):
        raise ModelError(f"{folder}: trained on {trained_on!r}, but model.name is {job_name!r}. Use that base.")
    _check_ranks(path, config, _read_weights(path / WEIGHTS))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}). {_USE}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(f"{path}: peft_type is {kind!r}, and only LORA is loaded. {_USE}")
    for name in _NOT_READ:
        if config.get(name) is not None:
            raise ModelError(f"{path}: {name} is not null, and such adapters are not loaded. {_USE}")
    return config


def _read_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor. Raise `ModelError` for a damaged file, and for NaN, infinite or huge values."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not (tensor.float().abs() < _LARGEST_WEIGHT).all():  # nor is NaN
                    raise ModelError(f"{path}: {name} holds numbers that are not finite or above 1e6. {_USE}")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: not readable as safetensors ({error}). Copy it again, or: {_USE}") from None
    if not shapes:
        raise ModelError(f"{path}: holds no weights. {_USE}")
    return shapes


def _check_ranks(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `ModelError` unless the configuration's ranks are those of the weights: PEFT allocates the former before
    it reads the latter."""
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
        raise ModelError(f"{path / CONFIG}: lora_alpha {alpha!r} is not a number that weights can be scaled by. {_USE}")
    weight_ranks = {shape[0] for name, shape in shapes.items() if re.search("lora_(embedding_)?A", name) and shape}
    patterns = config.get("rank_pattern") or {}
    pattern_ranks = [*patterns.values()] if isinstance(patterns, dict) else [patterns]
    for rank in (config.get("r"), *pattern_ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ModelError(f"{path / CONFIG}: the rank {rank!r} is not a whole number above 0. {_USE}")
        # With patterns no layer may have rank `r`; of fused experts, A has the ranks of all experts in one dimension.
        lenient = pattern_ranks or config.get("target_parameters")
        if weight_ranks and rank not in weight_ranks and (not lenient or rank > _LARGEST_RANK):
            ranks = ", ".join(map(str, sorted(weight_ranks)))
            raise ModelError(f"{path / CONFIG}: its rank is {rank}, and that of the weights beside it {ranks}. {_USE}")


def put_adapter(model: "Module", folder: str, trainable: bool) -> "PeftModel":
    """Put the adapter of a checked folder on `model`. Raise `ModelError` unless every weight belongs to a layer.

    An out-of-memory error of a GPU passes through."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        config = _adapt_experts(LoraConfig.from_pretrained(folder))
        adapted = PeftModel.from_pretrained(model, folder, config=config, is_trainable=trainable)
    except (SafetensorError, *_REFUSALS) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{folder}: the adapter does not go on this base ({reason}). {_USE}") from error
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        saved = set(file.keys())
    loaded = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, what in ((saved - loaded, "the base has no place for"), (loaded - saved, "its weights lack")):
        unmatched = sorted(names - set(adapted.state_dict()))  # whole layers of the base may be saved beside the LoRA
        if unmatched:
            more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            raise ModelError(f"{folder}: {what} {unmatched[0]}{more}, unlike its {CONFIG}. {_USE}")
    return adapted


def read_lora_config(folder: str) -> "LoraConfig":
    """Return the configuration of an adapter to be trained further: PEFT saves every adapter as one that is not."""
    from peft import LoraConfig

    config = _adapt_experts(LoraConfig.from_pretrained(folder))
    config.inference_mode, config.base_model_name_or_path = False, None  # PEFT warns where the base lies elsewhere
    return config


def fill_adapter(model: "Module", folder: str) -> None:
    """Set the adapter of `model`, whose base may have no weights, to that in a folder. Raise `ModelError` if the folder
    lacks one of its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(Path(folder) / WEIGHTS)
    for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if weight.is_meta:  # of the base
            continue
        if name not in saved or saved[name].shape != weight.shape:
            raise ModelError(f"{folder}: the adapter is of another run, for its weights lack {name}. {_USE}")
        weight.copy_(saved[name])
