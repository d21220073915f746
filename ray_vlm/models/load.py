"""Load a base model, in 4 bit or not, alone or kept in the process; with a trained adapter, or with what is to be
trained.

bitsandbytes 0.50 on CPUs with AVX512_BF16 repacks every 4-bit layer at the first evaluation and from then on gives
wrong gradients without an error; `load_model` turns that off (the packed path has no autograd).
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.train import Precision, Train
from ray_vlm.errors import ModelError
from ray_vlm.models.architectures import choose_attention, family_of
from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.card_memory import set_allocator
from ray_vlm.models.checkpoint_version import advise_version
from ray_vlm.models.families import Family
from ray_vlm.models.lora import (
    CONFIG,
    WEIGHTS,
    check_adapter,
    check_modules,
    fill_adapter,
    freeze_parts,
    is_whole_model,
    lora_config,
    put_adapter,
    read_lora_config,
    train_parts,
)
from ray_vlm.models.out_of_memory import is_out_of_memory
from ray_vlm.models.precision import dtype_of, multiply_in_tf32
from ray_vlm.models.vision_inputs import use_image_plans
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.console import lasting

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

_DEVICE_MARKS = ("CUDA", "HIP error", "NVIDIA", "NCCL", "gloo")  # in errors of devices and of collective operations

_GIVE_BASE = (
    "Give a folder with a config.json, or a hub name; for a private or gated model accept its licence on the hub and "
    "set HF_TOKEN."
)
_FETCH_AGAIN = "Fetch all files of the base again."
# The ends of names on the hub by which publishers mark a quantised copy of a model.
_PUBLISHED = re.compile(r"[-_](awq|gptq|fp8|nvfp4|mxfp4|int[48]|w4a16|w8a8|quantized)\b.*$", re.IGNORECASE)
_OTHER_SHAPES = "the shapes of its tensors are not those of its config.json"
_SIZES = (("out_features", "in_features"), ("num_embeddings", "embedding_dim"))  # of layers with a matrix
_KEPT: dict[tuple, "PreTrainedModel"] = {}  # the base that stays in this process, by what it was loaded with


def resolve_name(name: str) -> str:
    """Return the folder or hub name of a base: `tiny` is the model that ships with the demo."""
    return str(Path(__file__).parents[1] / "demo" / "weights") if name == "tiny" else name


def load_config(spec: Model) -> "PreTrainedConfig":
    """Return the base's transformers configuration. Raise `ModelError` if there is none that can be read."""
    from transformers import AutoConfig

    name = resolve_name(spec.name)
    _check_folder(spec, name)
    try:
        return AutoConfig.from_pretrained(name, revision=spec.revision)
    except Exception as error:  # transformers' configuration classes raise many types
        if advice := advise_version(name, spec.revision):
            raise ModelError(f"model.name={spec.name!r} cannot be loaded: {advice}") from None
        if Path(name).is_dir():
            what, fix = ": its config.json", "Fetch config.json of the base again, or give another base."
        else:
            what, fix = "", advise_hub(error) or _GIVE_BASE
        raise ModelError(f"model.name={spec.name!r}{what} cannot be loaded ({first_line(error)}). {fix}") from None


def _check_folder(spec: Model, name: str) -> None:
    """Raise `ModelError` for a path without a base: transformers would ask the hub for it, and report the hub's
    errors."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name={spec.name!r}: the folder holds no config.json. Give the folder of a base.")
    elif path.exists():
        raise ModelError(f"model.name={spec.name!r} is a file. Give the folder of a base, or a hub name.")
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:  # a hub name is `name` or `owner/name`
        raise ModelError(
            f"model.name={spec.name!r}: there is no such folder. Give one with a base in it, or a hub name."
        )
    elif "/" in name and path.parent.is_dir() and not _is_cached(name, spec.revision):
        raise ModelError(
            f"model.name={spec.name!r}: there is no folder {path.name!r} in the folder {str(path.parent)!r}. Give the "
            "folder of a base. A base of that name on the hub can be loaded by the absolute path of its folder in the "
            "hub's cache, or from another working directory."
        )


def _is_cached(name: str, revision: str | None) -> bool:
    """Return whether the hub's cache holds the configuration of a base."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except ValueError:  # not a name that the hub allows
        return False


def advise_hub(error: BaseException | None) -> str | None:
    """Return the fix for an error that the hub's client raised, or that was raised because of one; None for others."""
    kinds = set()
    while error is not None:
        kinds |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    if "GatedRepoError" in kinds:
        return "It is gated: accept its licence on its hub page, and set HF_TOKEN to a token of that account."
    if "RevisionNotFoundError" in kinds:
        return "The base has no such model.revision. Give a commit, a tag or a branch of it."
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            "The hub cannot be reached (offline mode, or no network) and the base is not in the cache. Unset "
            "HF_HUB_OFFLINE, set HF_HOME to a cache that has it, or give a folder."
        )
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with the next if the first ends in a colon; its type if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _check_unquantised(spec: Model, config: "PreTrainedConfig") -> None:
    """Raise `ModelError` for a base that was published quantised by another method than bitsandbytes'."""
    about = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    if method is not None and "bitsandbytes" not in (name := str(getattr(method, "value", method))):
        unquantised = _PUBLISHED.sub("", spec.name)
        example = f", such as {unquantised}" if unquantised != spec.name else ""
        raise ModelError(
            f"model.name={spec.name!r} was published quantised ({name}), and cannot be quantised again to 4 bit. Give "
            f"the unquantised base{example}; model.load_in_4bit quantises that as it is loaded."
        )


def load_model(spec: Model, precision: Precision, device: str = "cpu") -> "PreTrainedModel":
    """Load the base onto `device`, in NF4 with double quantisation if `spec.load_in_4bit`.

    `precision` is the dtype of unquantised weights and of the arithmetic. In 4 bit the vision tower, the embeddings and
    the head stay unquantised. Raise `ModelError` if the weights cannot be loaded; out-of-memory errors and other
    failures of a device or of a connection between workers pass through.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    config = load_config(spec)
    family, dtype = family_of(config), dtype_of(precision)
    multiply_in_tf32(device)
    if spec.load_in_4bit:
        _check_unquantised(spec, config)
    attention = choose_attention(config)
    options: dict[str, Any] = {"dtype": dtype, "revision": spec.revision, "attn_implementation": attention}
    if spec.load_in_4bit:
        from ray_vlm.models.four_bit_loading import FourBitConfig

        options["quantization_config"] = FourBitConfig(dtype, list(family.unquantised))
    if not is_deepspeed_zero3_enabled():  # which places weights itself
        options["device_map"] = {"": device}
    name = resolve_name(spec.name)
    try:
        with lasting(f"loading {spec.name}", lambda: describe_download(name)):
            # With this option it returns a pair, which its annotation does not say.
            loaded: Any = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
    except ModelError as error:  # experts of an unknown layout
        raise ModelError(f"model.name={spec.name!r}: {error}") from None
    except Exception as error:  # transformers, safetensors and bitsandbytes raise many types
        if _is_device_failure(error, device):
            raise
        raise _explain_weights(spec, error) from error
    model, info = loaded
    _check_complete(spec, model, info["missing_keys"])
    if spec.load_in_4bit:
        _check_shapes(spec, model)
    if is_deepspeed_zero3_enabled():
        _forget_renamings(model)
    keep_4bit_differentiable(model)
    if spec.load_in_4bit:
        check_4bit(model, family, spec.name)
    if family.stock_images:
        cast_pixels(model)
        scale_logits(model)
    return model


def _check_complete(spec: Model, model: "Module", missing: Iterable[str]) -> None:
    """Raise `ModelError` if weights are not in the base's files: transformers gives them random values and goes on."""
    weights = sorted(set(missing) & {weight for weight, _ in model.named_parameters()})
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        advice = advise_version(resolve_name(spec.name), spec.revision)
        raise ModelError(
            f"model.name={spec.name!r}: its files do not hold the weights {weights[0]}{more}, which would be random. "
            f"{f'Perhaps they have other names: {advice}' if advice else _FETCH_AGAIN}"
        )


def _check_shapes(spec: Model, model: "Module") -> None:
    """Raise `ModelError` if a weight has another shape than its layer: while it quantises, transformers compares no
    shapes, or only those of weights that stay as they are."""
    for name, module in model.named_modules():
        for key, shape in getattr(module, "expert_shapes", {}).items():
            _check_shape(spec, f"{name}.{key}", getattr(module, key), shape)
        sizes = [(getattr(module, a, None), getattr(module, b, None)) for a, b in _SIZES]
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or not (known := [size for size in sizes if None not in size]):
            continue
        _check_shape(spec, f"{name}.weight", weight, *known)


def _check_shape(spec: Model, name: str, weight: "Tensor", *known: tuple[int | None, ...]) -> None:
    """Raise `ModelError` unless a weight, before it was quantised, had one of these shapes."""
    shape = tuple(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))
    if shape not in known:
        raise ModelError(
            f"model.name={spec.name!r}: its weights cannot be loaded ({_OTHER_SHAPES}: {name} is {shape} and not "
            f"{known[0]}). {_FETCH_AGAIN}"
        )


def _is_device_failure(error: Exception, device: str) -> bool:
    """Return whether a device, its memory or a connection failed, and not a file of the base."""
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # While it quantises, transformers replaces every error by one without the cause (`log_conversion_errors` in
    # core_model_loading.py). On a GPU the cause may be its memory.
    unknown = device != "cpu" and "conversion of the weights" in str(error)
    return unknown or any(mark in str(error) for mark in _DEVICE_MARKS)


def _explain_weights(spec: Model, error: Exception) -> ModelError:
    """Return the error for weights that cannot be loaded, with the reason and the fix."""
    reason, fix = first_line(error), "A file of the base may be cut off: fetch it again."
    if not isinstance(error, OSError | ValueError | RuntimeError):
        reason = f"{type(error).__name__}: {reason}"  # of a KeyError the text is the key alone
    if "ignore_mismatched_sizes" in reason:  # transformers' text names an option that jobs do not have
        reason, fix = _OTHER_SHAPES, _FETCH_AGAIN
    elif isinstance(error, ImportError):
        fix = "Install the package that is missing."
    fix = advise_hub(error) or advise_version(resolve_name(spec.name), spec.revision) or fix
    return ModelError(f"model.name={spec.name!r}: its weights cannot be loaded ({reason}). {fix}")


def describe_download(name: str) -> str:
    """Describe how many GiB of a hub model are in the cache, and of how many if that is known; empty for a folder."""
    if Path(name).is_dir():
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    try:
        downloaded = sum(file.stat().st_size for file in blobs.glob("*"))
        index = try_to_load_from_cache(name, "model.safetensors.index.json")
        total = json.loads(Path(index).read_bytes())["metadata"]["total_size"] if isinstance(index, str) else 0
    except (OSError, ValueError, KeyError, TypeError):  # files come and go while they are fetched
        return ""
    return f"{downloaded / 2**30:.1f}{f' of {total / 2**30:.1f}' if total else ''} GiB in the cache"


def _forget_renamings(model: "PreTrainedModel") -> None:
    """Let the model save its weights under its own names.

    Under ZeRO-3 transformers 5.23 assumes that every renaming that it knows for the family was applied when the weights
    were read (`integrations/deepspeed.py`), and would undo it when it saves them."""
    from transformers.core_model_loading import WeightRenaming

    known = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [change for change in known if not isinstance(change, WeightRenaming)]  # type: ignore[assignment]


def cast_pixels(model: "PreTrainedModel") -> None:
    """Cast pixels to the image encoder's dtype: some processors return bfloat16, others float32."""
    import torch

    def cast(module: "PreTrainedModel", args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def fit(value: object) -> object:
            return value.to(module.dtype) if torch.is_tensor(value) and value.is_floating_point() else value

        return tuple(fit(value) for value in args), {name: fit(value) for name, value in kwargs.items()}

    model.get_encoder(modality="image").register_forward_pre_hook(cast, with_kwargs=True)


def scale_logits(model: "PreTrainedModel") -> None:
    """Let the head return logits as the language model was trained with them.

    Cohere's language models multiply logits by `logit_scale`. TRL's head and vLLM do; in transformers 5.23 the classes
    of Aya Vision and Command A Vision leave it out, so answers would be sampled from other probabilities than those
    that are trained."""
    scale = getattr(model.config.get_text_config(), "logit_scale", None)
    forward = inspect.unwrap(type(model).forward)
    if scale is not None and "logit_scale" not in forward.__code__.co_names:
        model.get_output_embeddings().register_forward_hook(lambda head, args, logits: logits * scale)


def check_4bit(model: "PreTrainedModel", family: Family, name: str) -> None:
    """Raise `ModelError` if most weights of the language layers are not in 4 bit, as in models with fused experts."""
    prefix = {id(m): n for n, m in model.named_modules()}[id(model.get_decoder())] + "."
    in_4bit, others = 0, {}
    for weight, parameter in model.named_parameters():
        if weight.startswith(prefix) and parameter.dim() > 1 and "embed" not in weight and "lm_head" not in weight:
            if type(parameter).__name__ == "Params4bit":
                in_4bit += 2 * parameter.numel()  # each byte holds two weights
            else:
                others[weight] = parameter.numel()
    if in_4bit < sum(others.values()):
        share = in_4bit / max(1, in_4bit + sum(others.values()))
        largest = max(others, key=lambda weight: others[weight])
        raise ModelError(
            f"model.name={name!r}: bitsandbytes puts only {share:.0%} of the weights of its language layers in 4 bit; "
            f"{family.model_type}'s {largest} and others like it are fused parameters, which it leaves as they are. "
            "Set model.load_in_4bit=false and use a card that holds them, or another base."
        )


def keep_4bit_differentiable(model: "Module") -> None:
    """Stop bitsandbytes from repacking 4-bit layers for CPU inference (`bitsandbytes/nn/modules.py`, Linear4bit)."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def load_adapter(model: "Module", folder: str, spec: Model, trainable: bool = False) -> "PeftModel":
    """Put the adapter in `folder` on `model`. Raise `ModelError` if it is damaged or was trained on another base."""
    folder = fetch_folder(folder)
    check_adapter(folder, resolve_name(spec.name), spec.name)
    return put_adapter(model, folder, trainable)


def load_trained(spec: Model, precision: Precision, weights: str | None, device: str = "cpu") -> Any:
    """Load the base with an adapter from the folder `weights`, or the whole model that the folder holds instead.

    A whole model is loaded as it was saved, without quantisation. None loads the base alone. The image encoder attends
    as in training. Raise `ModelError` if the weights were trained on another base.
    """
    if device.startswith("cuda"):
        set_allocator()
    folder = fetch_folder(weights) if weights is not None else None
    if folder is not None and is_whole_model(folder):
        model: Any = load_model(whole_model(spec, folder), precision, device)
    else:
        model = load_model(spec, precision, device)
        model = model if folder is None else load_adapter(model, folder, spec)
    attend_at_once(model)
    use_image_plans(model)
    return model


def load_adapted(
    spec: Model, lora: Lora | None, train: Train, family: Family, device: str, seed: int, resident: bool = False
) -> Any:
    """Load the base with what is trained: a new adapter, the job's adapter (`spec.adapter`), or, without `lora`, all
    weights.

    `seed`: of a new adapter's weights. `resident`: use the base that stays in this process (`load_resident`).
    """
    import torch
    from peft import get_peft_model

    model = (load_resident if resident else load_model)(spec, train.precision, device)
    if lora is None:
        return freeze_parts(model, train.freeze or (), family)
    if spec.adapter is not None:
        return train_parts(load_adapter(model, spec.adapter, spec, trainable=True), lora, family)
    check_modules(model, lora.modules_to_save or ())
    torch.manual_seed(seed)  # every rank and every restart starts from the same adapter
    return get_peft_model(model, lora_config(lora, family))


def build_adapter_alone(spec: Model, lora: Lora, family: Family) -> Any:
    """Return the base without weights, and on it the adapter that `load_adapted` trains, in float32 on the CPU.

    A new adapter is 0 everywhere; that of `spec.adapter` has its values, also in parts that are not trained further."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    start = fetch_folder(spec.adapter) if spec.adapter is not None else None
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(load_config(spec))
        model: Any = get_peft_model(base, lora_config(lora, family) if start is None else read_lora_config(start))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                module.register_parameter(name, torch.nn.Parameter(torch.zeros(parameter.shape)))
    if start is None:
        return model
    fill_adapter(model, start)
    return train_parts(model, lora, family)


def load_resident(spec: Model, precision: Precision, device: str = "cpu") -> "PreTrainedModel":
    """Return the base as `load_model` does, but read weights only once in this process. They must not be changed.

    A trainer changes the module tree: adapters replace layers, forwards are wrapped, hooks are registered. So each run
    gets a module tree of its own, and only the frozen weights are shared.
    """
    key = (spec.name, spec.revision, spec.load_in_4bit, precision, device)
    if key not in _KEPT:
        _KEPT.clear()  # a GPU holds one base
        _KEPT[key] = load_model(spec, precision, device)
    return share_weights(_KEPT[key])


def keep_resident(spec: Model, precision: Precision, device: str, model: "PreTrainedModel") -> None:
    """Let `load_resident` return `model`, which was built in this process, for `spec`."""
    _KEPT.clear()
    _KEPT[spec.name, spec.revision, spec.load_in_4bit, precision, device] = model


def share_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy of the module tree with the same tensors. Quantisation states are shared too."""
    same: list[Any] = list(chain(model.parameters(), model.buffers()))
    same += [state for m in model.modules() if (state := getattr(m, "quant_state", None)) is not None]
    # `deepcopy` takes what its memo has under an object's id for the copy of that object.
    return copy.deepcopy(model, {id(value): value for value in same})


def whole_model(spec: Model, folder: str) -> Model:
    """Return the `model` section that loads a whole model trained from the base. Raise `ModelError` if its model type
    is not that of the base."""
    section = Model(name=folder, load_in_4bit=False)
    kind, base = load_config(section).model_type, load_config(spec).model_type
    if kind != base:
        raise ModelError(f"{folder} is a {kind}, and model.name={spec.name!r} is a {base}. Use a job of that base.")
    return section


def fetch_from_hub(name: str) -> str:
    """Download the configuration and preprocessing of `name` from the hub, and its weights if it is an adapter.

    Return the folder in the hub's cache. Raise `ModelError` if that fails.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "config.json", "preprocessing.json"])
    except Exception as error:  # the hub's client raises many types
        fix = advise_hub(error) or _GIVE_BASE
        raise ModelError(
            f"{name} is no folder here, and cannot be loaded from the hub ({first_line(error)}). {fix}"
        ) from None
