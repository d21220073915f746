"""The known model families, as plain data that every layer of the package may import.

Module patterns are regular expressions that match full module names; they hold for transformers 5.23. A model type that
is not here is described from its modules (`models/architectures.py`).
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """One model type. `linear` maps a part of the model to the pattern of the linear layers that LoRA may adapt.

    `prefixes` maps a part to prefixes of module names, to count weights; the longest match applies. `codec` names the
    family's format of boxes in `tasks/codecs.py`. `experts`: the ends of the names of the fused weights of experts.
    `stock_images`: the family's own processor converts images and writes their placeholders; otherwise this package
    does, which knows Qwen's. `cannot` maps a dotted key of a job to the reason why the family does not support it.
    """

    model_type: str
    codec: str
    linear: dict[str, str]
    prefixes: dict[str, tuple[str, ...]]
    unquantised: tuple[str, ...] = ("model.visual", "lm_head")  # the tower is a few percent of the bytes
    experts: tuple[str, ...] = ()
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


def _linear_qwen(model_type: str) -> Family:
    """Build a Qwen3.5, most of whose layers attend by a state that goes from token to token (a gated delta rule).

    The two projections that make the state's decay and its rate are a thousandth of the weights, and stay whole."""
    known = _qwen(model_type, "linear_fc[12]", r"merger\.linear_fc[12]", (_MERGER,))
    language = (
        r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|linear_attn\.(in_proj_(qkv|z)|out_proj)"
        r"|mlp\.(shared_expert\.)?(gate|up|down)_proj)"
    )
    whole = (*known.unquantised, "in_proj_a", "in_proj_b", "shared_expert_gate")
    return replace(
        known,
        codec="qwen3_vl",
        linear=known.linear | {"language": language},
        unquantised=whole,
        cannot={"method.share_prefixes": STATE, "train.packing": STATE},
    )


STATE = "its linear attention carries a state from token to token, which would go from one row into the next"
# Codecs of `tasks/codecs.py` for families that are described from their modules; the others use qwen3_vl.
CODEC_OF = {
    "gemma3": "gemma",
    "gemma4": "gemma",
    "paligemma": "paligemma",
    "internvl": "internvl",
    "molmo2": "molmo2",
}
_MERGER = "model.visual.merger"
_FUSED = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")  # all experts of a layer in one parameter
FAMILIES = {
    "qwen3_vl": _qwen(
        "qwen3_vl",
        "linear_fc[12]",
        r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
        (_MERGER, "model.visual.deepstack_merger_list"),
    ),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "(gate|up|down)_proj", r"merger\.mlp\.[02]", (_MERGER,)),
    "qwen2_vl": _qwen("qwen2_vl", "fc[12]", r"merger\.mlp\.[02]", (_MERGER,)),
    "qwen3_vl_moe": replace(
        _qwen(
            "qwen3_vl_moe",
            "linear_fc[12]",
            r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
            (_MERGER, "model.visual.deepstack_merger_list"),
        ),
        codec="qwen3_vl",
        experts=_FUSED,
    ),
    "qwen3_5": _linear_qwen("qwen3_5"),
    "qwen3_5_moe": replace(_linear_qwen("qwen3_5_moe"), experts=_FUSED),
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
        experts=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        stock_images=True,
        cannot=dict.fromkeys(
            ("method.share_prefixes", "train.packing"),
            "some of its layers attend within chunks of the row, so a row in another one would move",
        ),
    ),
}


def part_of(family: Family, name: str) -> str:
    """Return the part of the model that parameter `name` belongs to: language, connector or vision."""
    name = name.removeprefix("base_model.model.")
    matches = [(len(p), part) for part, prefixes in family.prefixes.items() for p in prefixes if name.startswith(p)]
    return max(matches)[1] if matches else "language"
