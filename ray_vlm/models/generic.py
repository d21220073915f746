"""Describe a family that is not in `FAMILIES` from its modules: any `AutoModelForImageTextToText` of transformers.

The model is built on the meta device, without weights. Its decoder is the language part, its image encoder the vision
part, and all other modules the connector. Its own processor handles images and their placeholders in the text.
"""

import re
from itertools import takewhile
from typing import Any

from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family
from ray_vlm.models.presets import build_empty

_ROUTERS = ("gate", "router")  # last names of layers that choose experts: neither adapted nor quantised
_PLAIN = "whether its branches stay exact has not been proved"


def describe(config: Any) -> Family:
    """Return the family of `config`, a transformers configuration.

    Raise `ModelError` if transformers has no model for it that reads images and writes text, or if its language model
    or its image encoder cannot be identified.
    """
    model = _build(config)
    names = {id(module): name for name, module in model.named_modules()}
    decoder, tower = model.get_decoder(), model.get_encoder(modality="image")
    if names.get(id(decoder), "") == "" or names.get(id(tower), "") == "":
        raise ModelError(
            f"model type {config.model_type!r}: its language model or its image encoder could not be identified. "
            "Use one of the families in ray_vlm/models/families.py."
        )
    language, vision = names[id(decoder)], names[id(tower)]
    linear: dict[str, set[str]] = {"language": set(), "vision": set(), "connector": set()}
    connectors = set()
    head = names.get(id(model.get_output_embeddings()), "lm_head")
    for name, module in model.named_modules():
        if not hasattr(module, "in_features") or name == head or name.rpartition(".")[2] in _ROUTERS:
            continue
        part = next((p for p, prefix in (("language", language), ("vision", vision)) if _inside(name, prefix)), None)
        linear[part or "connector"].add(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)))
    both = zip(language.split("."), vision.split("."), strict=False)
    depth = sum(1 for _ in takewhile(lambda names: names[0] == names[1], both))  # of the module that holds all parts
    for name, _ in model.named_parameters():
        if not any(_inside(name, prefix) for prefix in (language, vision, head)):
            connectors.add(".".join(name.split(".")[: depth + 1]))
    patterns = {part: r"(.*\.)?(" + "|".join(sorted(layers)) + ")" for part, layers in linear.items() if layers}
    prefixes = {"language": (language, head), "vision": (vision,), "connector": tuple(sorted(connectors))}
    return Family(
        model_type=config.model_type,
        codec="qwen3_vl",  # 0-1000 in JSON
        linear=patterns,
        prefixes={part: modules for part, modules in prefixes.items() if modules},
        unquantised=(vision, *prefixes["connector"], head, *_ROUTERS),
        stock_images=True,
        cannot={"method.share_prefixes": _PLAIN},
    )


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _build(config: Any) -> Any:
    try:
        return build_empty(config)
    except ValueError:
        raise ModelError(
            f"model type {config.model_type!r} does not read images and write text, or this transformers has no such "
            "model. Use a vision-language model, such as a Qwen3-VL."
        ) from None
