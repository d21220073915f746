"""Load a base model, in 4 bit or not; put a trained adapter on it.

bitsandbytes 0.50 on CPUs with AVX512_BF16 repacks every 4-bit layer at the first evaluation and from then on gives
wrong gradients without an error; `load_model` turns that off (the packed path has no autograd).
"""

import json
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError
from ray_vlm.models.adapter import CONFIG, WEIGHTS, check_adapter, is_whole_model, put_adapter
from ray_vlm.models.families import FAMILIES, Family
from ray_vlm.models.generic import describe
from ray_vlm.models.precision import dtype_of
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.progress import lasting


def resolve_name(name: str) -> str:
    """`tiny` names the weights that ship with the demo; any other name stays as it is."""
    return str(Path(__file__).parents[1] / "demo" / "weights") if name == "tiny" else name


def load_config(spec: Model) -> Any:
    """The base's transformers configuration. Raises `ModelError` where there is none."""
    from transformers import AutoConfig

    name = resolve_name(spec.name)
    _check_folder(spec.name, name)
    try:
        return AutoConfig.from_pretrained(name, revision=spec.revision)
    except Exception as error:  # transformers' configuration classes raise what they like
        raise ModelError(f"model.name={spec.name!r} cannot be loaded ({first_line(error)}). {_advice(error)}") from None


def _check_folder(told: str, name: str) -> None:
    """Raise `ModelError` for a path where no base is: transformers would look for it on the hub and speak of that."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name={told!r}: the folder holds no config.json. Give the folder of a base.")
    elif path.exists():
        raise ModelError(f"model.name={told!r} is a file. Give the folder of a base, or a hub name.")
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:  # a hub name is `name` or `owner/name`
        raise ModelError(f"model.name={told!r}: there is no such folder. Give one with a base in it, or a hub name.")


def _advice(error: BaseException | None) -> str:
    """What to do about a base that does not load, from what the hub's client raised underneath."""
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
            "The hub is not reached (offline mode, or no network) and the base is not in the cache. Unset "
            "HF_HUB_OFFLINE, set HF_HOME to a cache that has it, or give a folder."
        )
    return (
        "Give a folder with a config.json, or a hub name; for a private or gated model accept its licence on the hub "
        "and set HF_TOKEN."
    )


def first_line(error: Exception) -> str:
    """The first line of what an error says, and the next where that is announced; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def family_of(config: Any) -> Family:
    """The family of a loaded configuration: ours, or found by looking at the model's modules.

    Raises `ModelError` for one that is no vision-language model."""
    return FAMILIES.get(config.model_type) or describe(config)


def _check_unquantised(spec: Model, config: Any) -> None:
    """Raise `ModelError` for a base that was published quantised by another method than bitsandbytes'."""
    about = getattr(config, "quantization_config", None) or {}
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    if method is not None and "bitsandbytes" not in (name := str(getattr(method, "value", method))):
        raise ModelError(
            f"model.name={spec.name!r} was published quantised ({name}), and cannot be quantised again to 4 bit. Give "
            "the unquantised base; model.load_in_4bit quantises that as it is loaded."
        )


def load_model(spec: Model, precision: Precision, device: str = "cpu") -> Any:
    """The base on `device`, frozen state as loaded; NF4 with double quantisation where `spec.load_in_4bit`.

    Compute is what `precision` says. In 4 bit the vision tower, the embeddings and the head stay unquantised.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    config = load_config(spec)
    family, dtype = family_of(config), dtype_of(precision)
    if spec.load_in_4bit:
        _check_unquantised(spec, config)
    options: dict[str, Any] = {"dtype": dtype, "revision": spec.revision, "attn_implementation": "sdpa"}
    if spec.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(family.unquantised),
        )
    if not is_deepspeed_zero3_enabled():  # which places weights itself
        options["device_map"] = {"": device}
    name = resolve_name(spec.name)
    try:
        with lasting(f"loading {spec.name}", lambda: describe_download(name)):
            model = AutoModelForImageTextToText.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ModelError(f"model.name={spec.name!r}: its weights cannot be loaded ({first_line(error)}).") from error
    if is_deepspeed_zero3_enabled():
        _forget_renamings(model)
    keep_4bit_differentiable(model)
    if spec.load_in_4bit:
        check_4bit(model, family, spec.name)
    if family.stock_images:
        cast_pixels(model)
    return model


def describe_download(name: str) -> str:
    """How much of a hub model's weights has come into the cache, and of how much where that is known; nothing of a
    folder's."""
    if Path(name).is_dir():
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    try:
        there = sum(file.stat().st_size for file in blobs.glob("*"))
        index = try_to_load_from_cache(name, "model.safetensors.index.json")
        total = json.loads(Path(index).read_bytes())["metadata"]["total_size"] if isinstance(index, str) else 0
    except (OSError, ValueError, KeyError, TypeError):  # files come and go while they are fetched
        return ""
    return f"{there / 2**30:.1f}{f' of {total / 2**30:.1f}' if total else ''} GiB in the cache"


def _forget_renamings(model: Any) -> None:
    """Save weights under the model's own names: under ZeRO-3 transformers 5.23 believes that every renaming which it
    knows for the family was applied as the weights were read (`integrations/deepspeed.py`), and would undo it."""
    from transformers.core_model_loading import WeightRenaming

    known = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [change for change in known if not isinstance(change, WeightRenaming)]


def cast_pixels(model: Any) -> None:
    """Hand pixels to the image encoder in its own dtype: some processors give bfloat16, others float32."""
    import torch

    def cast(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def fit(value: Any) -> Any:
            return value.to(module.dtype) if torch.is_tensor(value) and value.is_floating_point() else value

        return tuple(fit(value) for value in args), {name: fit(value) for name, value in kwargs.items()}

    model.get_encoder(modality="image").register_forward_pre_hook(cast, with_kwargs=True)


def check_4bit(model: Any, family: Family, name: str) -> None:
    """Raises `ModelError` where most of the language model's layers are not in 4 bit, as fused experts are not."""
    inside = {id(m): n for n, m in model.named_modules()}[id(model.get_decoder())] + "."
    small, large = 0, {}
    for of, parameter in model.named_parameters():
        if of.startswith(inside) and parameter.dim() > 1 and "embed" not in of and "lm_head" not in of:
            if type(parameter).__name__ == "Params4bit":
                small += 2 * parameter.numel()
            else:
                large[of] = parameter.numel()
    if small < sum(large.values()):
        share = small / max(1, small + sum(large.values()))
        worst = max(large, key=lambda of: large[of])
        raise ModelError(
            f"model.name={name!r}: bitsandbytes puts only {share:.0%} of the weights of its language layers in 4 bit; "
            f"{family.model_type}'s {worst} and others like it are fused parameters, which it leaves as they are. Set "
            "model.load_in_4bit=false and use a card that holds them, or another base."
        )


def keep_4bit_differentiable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit layers for CPU inference (`bitsandbytes/nn/modules.py`, Linear4bit)."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_adapter(model: Any, folder: str, spec: Model, trainable: bool = False) -> Any:
    """`model` with the adapter in `folder` on it. Raises `ModelError` if it is damaged or of another base."""
    folder = fetch_folder(folder)
    check_adapter(folder, resolve_name(spec.name), spec.name)
    return put_adapter(model, folder, trainable)


def load_trained(spec: Model, precision: Precision, weights: str | None, device: str = "cpu") -> Any:
    """The base with what was trained on it: an adapter, or the whole model that is in `weights` in its place.

    A whole model is loaded as it was written, without quantisation. None is the base alone. Raises `ModelError` where
    the weights are of another base.
    """
    folder = fetch_folder(weights) if weights is not None else None
    if folder is not None and is_whole_model(folder):
        return load_model(whole_model(spec, folder), precision, device)
    model = load_model(spec, precision, device)
    return model if folder is None else load_adapter(model, folder, spec)


def whole_model(spec: Model, folder: str) -> Model:
    """The section for a whole model that was trained from the base. Raises `ModelError` where it is of another kind."""
    whole = Model(name=folder, load_in_4bit=False)
    kind, base = load_config(whole).model_type, load_config(spec).model_type
    if kind != base:
        raise ModelError(f"{folder} is a {kind}, and model.name={spec.name!r} is a {base}. Use a job of that base.")
    return whole


def fetch_from_hub(name: str) -> str:
    """A folder of the hub's cache with what says what `name` on the hub is, and the weights where it is an adapter.

    Raises `ModelError` where it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "config.json", "preprocessing.json"])
    except Exception as error:  # the hub's client raises what it likes
        raise ModelError(
            f"{name} is no folder here, and cannot be loaded from the hub ({first_line(error)}). {_advice(error)}"
        ) from None
