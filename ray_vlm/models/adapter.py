"""An adapter's folder, looked at before PEFT reads it, and what PEFT made of it.

PEFT asks the hub for a file that is missing, reads a pickle where there are no safetensors, allocates whatever rank the
configuration says, and leaves weights out that fit nowhere with a warning. Here each of these is a `ModelError`.
"""

import json
import re
from pathlib import Path
from typing import Any

from ray_vlm.config.paths import describe_search
from ray_vlm.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_USE = "Give a run's best/ or final/."
_NOT_READ = ("megatron_config", "alora_invocation_tokens")  # an import of what a file names; another forward
_LARGEST_RANK = 4096  # that the configuration may name beside the ranks of the weights
_LARGEST_WEIGHT = _LARGEST_ALPHA = 1e6  # what a flipped bit makes is mostly far larger
# What PEFT and safetensors raise on values that they cannot use, as `benchmarks.fuzz` found.
_REFUSALS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, OSError, ImportError),
    *(AssertionError, re.error),
)


def is_whole_model(folder: str) -> bool:
    """Whether a folder holds a whole model, as full fine-tuning and merging write it, and not an adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / CONFIG).is_file()


def named_base(folder: str) -> str | None:
    """The base that an adapter's folder names, a hub name or a folder of where it was trained; None where none is."""
    found = _read_config(Path(folder) / CONFIG).get("base_model_name_or_path")
    return found if isinstance(found, str) and found else None


def _last_name(base: str) -> str:
    """What a base is called wherever it lies; a snapshot in the hub's cache is called as on the hub."""
    path = Path(base)
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return cached.rpartition("--")[2] if cached and "snapshots" in path.parts else path.name


def check_adapter(folder: str, base: str, told: str) -> None:
    """Raise `ModelError` where the folder holds no LoRA of `base` (a hub name or folder; `told`: as the job has it)
    whose weights are whole."""
    path = Path(folder)
    if is_whole_model(folder):
        raise ModelError(f"{folder} is a whole model, not an adapter. Name it as the base: model.name={folder}")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ModelError(f"{folder}: no adapter here ({name} is missing). {_USE}{describe_search(folder)}")
    config = _read_config(path / CONFIG)
    trained_on = config.get("base_model_name_or_path")
    if trained_on and (not isinstance(trained_on, str) or _last_name(trained_on) != _last_name(base)):
        raise ModelError(f"{folder}: trained on {trained_on!r}, but model.name is {told!r}. Use that base.")
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
    """The shape of every tensor. Raises `ModelError` for a file that is none, and for numbers that are no weights."""
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
    """What the configuration says of ranks is allocated before the weights are looked at, so it has to be theirs."""
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
        raise ModelError(f"{path / CONFIG}: lora_alpha {alpha!r} is not a number that weights can be scaled by. {_USE}")
    there = {shape[0] for name, shape in shapes.items() if re.search("lora_(embedding_)?A", name) and shape}
    patterns = config.get("rank_pattern") or {}
    of_parts = [*patterns.values()] if isinstance(patterns, dict) else [patterns]
    for rank in (config.get("r"), *of_parts):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ModelError(f"{path / CONFIG}: the rank {rank!r} is not a whole number above 0. {_USE}")
        free = of_parts or config.get("target_parameters")  # `r` may be nobody's; of fused experts A has that of all
        if there and rank not in there and (not free or rank > _LARGEST_RANK):
            found = ", ".join(map(str, sorted(there)))
            raise ModelError(f"{path / CONFIG}: its rank is {rank}, and that of the weights beside it {found}. {_USE}")


def put_adapter(model: Any, folder: str, trainable: bool) -> Any:
    """`model` with the adapter of a checked folder on it. Raises `ModelError` unless all weights found their place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (SafetensorError, *_REFUSALS) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{folder}: the adapter does not go on this base ({reason}). {_USE}") from error
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        saved = set(file.keys())
    made = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, what in ((saved - made, "the base has no place for"), (made - saved, "its weights lack")):
        left = sorted(names - set(adapted.state_dict()))  # whole layers of the base may be saved beside the LoRA
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(f"{folder}: {what} {left[0]}{more}, which its {CONFIG} asks for otherwise. {_USE}")
    return adapted
