"""What is known of a model without its weights: presets of known models, and the family of any model.

`presets.json` has configurations by hub name, so that memory can be planned without a download; `parameters` is the
count that the publisher gives, if any, and a test compares the configuration with it.

A family that is not in `FAMILIES` is described from its modules, which are built on the meta device: any
`AutoModelForImageTextToText` of transformers. Its decoder is the language part, its image encoder the vision part, and
all other modules the connector. Its own processor handles images and their placeholders in the text.
"""

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.errors import ModelError
from ray_vlm.models.families import CODEC_OF, FAMILIES, STATE, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Last names of layers that choose experts: neither adapted nor quantised.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_PLAIN = "its own processor lays out the images, and their order in a packed row is not planned"


@cache
def read_presets() -> dict[str, dict[str, Any]]:
    """Return `{hub name: {"model_type", "parameters", "config"}}`."""
    return json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8"))


def load_preset(name: str) -> "PreTrainedConfig":
    """Return the transformers configuration of a model by its hub name, or by the last part of it.

    Raise `ModelError`, with the nearest names, if there is none.
    """
    from transformers import AutoConfig

    presets = read_presets()
    preset = presets.get(name) or next((p for n, p in presets.items() if n.rpartition("/")[2] == name), None)
    if preset is None:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.3) or list(presets)
        raise ModelError(f"{name!r} is no preset. The nearest: {', '.join(near)}.")
    return AutoConfig.for_model(preset["model_type"], **preset["config"])


def choose_attention(config: "PreTrainedConfig") -> str | dict[str, str]:
    """Return the attention of a model: sdpa, but eager for an audio encoder, of which no family here has another."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if not any("audio" in name for name in parts):
        return "sdpa"
    return {"": "sdpa", **{name: "eager" if "audio" in name else "sdpa" for name in parts}}


def build_empty(config: "PreTrainedConfig") -> Any:
    """Build the model of a configuration on the meta device: shapes and names, no weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"), _without_zero3():
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Let transformers build models in the body as it does without ZeRO-3: under it, weights are initialised as they
    are partitioned, and there are none on the meta device."""
    from transformers.integrations import deepspeed

    reference: Any = deepspeed._hf_deepspeed_config_weak_ref
    held = reference() if deepspeed.is_deepspeed_zero3_enabled() else None
    if held is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if held is not None:
            deepspeed.set_hf_deepspeed_config(held)


def family_of(config: "PreTrainedConfig") -> Family:
    """Return the family of a configuration, from `FAMILIES` or described from the model's modules.

    Raise `ModelError` if it is not a vision-language model."""
    return FAMILIES.get(config.model_type) or _describe(config)


def _describe(config: "PreTrainedConfig") -> Family:
    """Describe a family from its modules.

    Raise `ModelError` if transformers has no model for it that reads images and writes text, or if its language model
    or its image encoder cannot be identified.
    """
    try:
        model = build_empty(config)
    except ValueError:
        raise ModelError(
            f"model type {config.model_type!r} does not read images and write text, or this transformers has no such "
            "model. Use a vision-language model, such as a Qwen3-VL."
        ) from None
    names = {id(module): name for name, module in model.named_modules()}
    decoder, encoder = model.get_decoder(), model.get_encoder(modality="image")
    if names.get(id(decoder), "") == "" or names.get(id(encoder), "") == "":
        raise ModelError(
            f"model type {config.model_type!r}: its language model or its image encoder could not be identified. "
            "Use one of the families in ray_vlm/models/families.py."
        )
    language, vision = names[id(decoder)], names[id(encoder)]
    linear: dict[str, set[str]] = {"language": set(), "vision": set(), "connector": set()}
    connectors, experts = set(), set()
    head = names.get(id(model.get_output_embeddings()), "lm_head")
    for name, module in model.named_modules():
        if not hasattr(module, "in_features") or name == head or name.rpartition(".")[2] in _ROUTERS:
            continue
        part = next((p for p, prefix in (("language", language), ("vision", vision)) if _inside(name, prefix)), None)
        # The numbers of layers become a pattern, and the layers of a part become one.
        linear[part or "connector"].add(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)))
    both = zip(language.split("."), vision.split("."), strict=False)
    depth = sum(1 for _ in takewhile(lambda names: names[0] == names[1], both))  # of the module that holds all parts
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.dim() == 3 and _inside(name, language):
            experts.add(".".join(name.split(".")[-3:]))  # such as mlp.experts.down_proj
        if not any(_inside(name, prefix) for prefix in (language, vision, head)):
            connectors.add(".".join(name.split(".")[: depth + 1]))
    patterns = {part: r"(.*\.)?(" + "|".join(sorted(layers)) + ")" for part, layers in linear.items() if layers}
    prefixes = {"language": (language, head), "vision": (vision,), "connector": tuple(sorted(connectors))}
    reason = STATE if "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()) else _PLAIN
    return Family(
        model_type=config.model_type,
        codec=CODEC_OF.get(config.model_type, "qwen3_vl"),  # 0-1000 in JSON
        linear=patterns,
        prefixes={part: modules for part, modules in prefixes.items() if modules},
        unquantised=(vision, *prefixes["connector"], head, *_ROUTERS),
        experts=tuple(sorted(experts)),
        stock_images=True,
        cannot=dict.fromkeys(("method.share_prefixes", "train.packing"), reason),
    )


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
