"""What we know of each model family: plain data, readable from every floor.

Module patterns are regular expressions over full module names, matched whole; they hold for transformers 5.23, where
both families keep the tower in `model.visual` and the language model in `model.language_model`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One model type. `linear` maps a part of the model to the pattern of the linear layers that LoRA may adapt.

    `prefixes` maps a part to module-name prefixes, for counting weights; the longest match wins. `codec` is how the
    family writes boxes, by its name in `tasks/boxes.py`.
    """

    model_type: str
    codec: str
    linear: dict[str, str]
    prefixes: dict[str, tuple[str, ...]]
    image_token: str = "<|image_pad|>"
    unquantised: tuple[str, ...] = ("model.visual", "lm_head")  # the tower is a few percent of the bytes


_LANGUAGE = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
_PARTS = {"vision": ("model.visual",), "language": ("model.language_model", "lm_head")}

FAMILIES = {
    "qwen3_vl": Family(
        model_type="qwen3_vl",
        codec="qwen3_vl",
        linear={
            "language": _LANGUAGE,
            "connector": r"(.*\.)?visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
            "vision": r"(.*\.)?visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        },
        prefixes=_PARTS | {"connector": ("model.visual.merger", "model.visual.deepstack_merger_list")},
    ),
    "qwen2_5_vl": Family(
        model_type="qwen2_5_vl",
        codec="qwen2_5_vl",
        linear={
            "language": _LANGUAGE,
            "connector": r"(.*\.)?visual\.merger\.mlp\.[02]",
            "vision": r"(.*\.)?visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        },
        prefixes=_PARTS | {"connector": ("model.visual.merger",)},
    ),
}


def part_of(family: Family, name: str) -> str:
    """The part of the model that parameter `name` belongs to: language, connector or vision."""
    name = name.removeprefix("base_model.model.")
    matches = [(len(p), part) for part, prefixes in family.prefixes.items() for p in prefixes if name.startswith(p)]
    return max(matches)[1] if matches else "language"
