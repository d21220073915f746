"""The known model families, as plain data that every layer of the package may import.

Module patterns are regular expressions that match full module names; they hold for transformers 5.23. A model type that
is not here is described from its modules (`models/architectures.py`).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One model type. `linear` maps a part of the model to the pattern of the linear layers that LoRA may adapt.

    `prefixes` maps a part to prefixes of module names, to count weights; the longest match applies. `codec` names the
    family's format of boxes in `tasks/boxes.py`. `stock_images`: the family's own processor converts images and writes
    their placeholders; otherwise this package does, which knows Qwen's. `cannot` maps a dotted key of a job to the
    reason why the family does not support it.
    """

    model_type: str
    codec: str
    linear: dict[str, str]
    prefixes: dict[str, tuple[str, ...]]
    unquantised: tuple[str, ...] = ("model.visual", "lm_head")  # the tower is a few percent of the bytes
    stock_images: bool = False
    cannot: dict[str, str] = field(default_factory=dict)


def _qwen(model_type: str, mlp: str, connector: str, mergers: tuple[str, ...]) -> Family:
    """Build a Qwen family: its tower is `model.visual`, whose MLP has the layers `mlp`; `mergers` are its connector."""
    linear = {
        "language": r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        "connector": rf"(.*\.)?visual\.{connector}",
        "vision": rf"(.*\.)?visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.{mlp})",
    }
    prefixes = {"vision": ("model.visual",), "language": ("model.language_model", "lm_head"), "connector": mergers}
    return Family(model_type, model_type, linear, prefixes)


_MERGER = "model.visual.merger"
FAMILIES = {
    "qwen3_vl": _qwen(
        "qwen3_vl",
        "linear_fc[12]",
        r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
        (_MERGER, "model.visual.deepstack_merger_list"),
    ),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "(gate|up|down)_proj", r"merger\.mlp\.[02]", (_MERGER,)),
    "qwen2_vl": _qwen("qwen2_vl", "fc[12]", r"merger\.mlp\.[02]", (_MERGER,)),
    "llama4": Family(
        model_type="llama4",
        codec="qwen3_vl",
        linear={
            "language": r"(.*\.)?language_model\.model\.layers\.\d+\."
            r"(self_attn\.(q|k|v|o)_proj|feed_forward\.(shared_expert\.)?(gate|up|down)_proj)",
            "connector": r"(.*\.)?(multi_modal_projector\.linear_1|vision_model\.vision_adapter\.mlp\.fc[12])",
            "vision": r"(.*\.)?vision_model\.model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.fc[12])",
        },
        prefixes={
            "vision": ("vision_model",),
            "language": ("language_model",),
            "connector": ("multi_modal_projector", "vision_model.vision_adapter"),
        },
        unquantised=("vision_model", "multi_modal_projector", "lm_head", "router"),
        stock_images=True,
        cannot={"method.share_prefixes": "some of its layers attend within chunks of the row, so a branch would move"},
    ),
}


def part_of(family: Family, name: str) -> str:
    """Return the part of the model that parameter `name` belongs to: language, connector or vision."""
    name = name.removeprefix("base_model.model.")
    matches = [(len(p), part) for part, prefixes in family.prefixes.items() for p in prefixes if name.startswith(p)]
    return max(matches)[1] if matches else "language"
