"""Bases of real shape with random weights, built and quantised on the card: no hub, no weights on a disk.

Only a configuration and a processor are written, because jobs name a base by its folder. The processor is the family's
own with the tokenizer of the tiny models; images are cut into patches of the real size.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import FAMILY_OF, Scale


def base_folder(folder: Path, model: str) -> Path:
    """Return the folder with the configuration of a base."""
    return folder / model.rpartition("/")[2]


def write_shape(folder: Path, model: str, scale: Scale) -> Path:
    """Write the configuration and the processor of a base; in a rehearsal, those of a tiny base of its family."""
    from ray_vlm.demo.tiny import build_config, build_processor
    from ray_vlm.models.architectures import load_preset

    output_dir, family = base_folder(folder, model), FAMILY_OF[model]
    if (output_dir / "config.json").exists():
        return output_dir
    processor = build_processor(family)
    config = build_config(processor.tokenizer, family) if scale.rehearse else load_preset(model)
    ids = processor.tokenizer.convert_tokens_to_ids
    for kind in ("image", "video"):
        setattr(config, f"{kind}_token_id", ids(f"<|{kind}_pad|>"))
    for end in ("start", "end"):
        setattr(config, f"vision_{end}_token_id", ids(f"<|vision_{end}|>"))
    images = processor.image_processor
    images.patch_size = config.vision_config.patch_size
    images.size = {"shortest_edge": 64**2, "longest_edge": 4096**2}
    processor.save_pretrained(output_dir)
    config.save_pretrained(output_dir)
    return output_dir


def image_side(folder: Path, model: str, scale: Scale) -> int:
    """Return the pixels along a side of an image that is `scale.side` tokens wide and tall."""
    from transformers import AutoConfig

    vision = AutoConfig.from_pretrained(write_shape(folder, model, scale)).vision_config
    return scale.side * vision.spatial_merge_size * vision.patch_size


def build_base(folder: Path, model: str, scale: Scale) -> Any:
    """Build the base with random weights, its language layers in NF4 as `load_model` has them."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from ray_vlm.demo.tiny import build_tokenizer
    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.load import keep_4bit_differentiable

    config = AutoConfig.from_pretrained(write_shape(folder, model, scale))
    torch.manual_seed(0)
    with torch.device(scale.device):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.requires_grad_(False)
    quantise_layers(base, FAMILIES[FAMILY_OF[model]].linear["language"], scale.device)
    keep_4bit_differentiable(base)
    base.eval()
    ids: Any = build_tokenizer().convert_tokens_to_ids
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = ids(["<|im_end|>", "<|endoftext|>"])
    return base


def quantise_layers(base: Any, pattern: str, device: str) -> None:
    """Quantise the linear layers whose names match to NF4 with double quantisation, one by one, in place."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in [name for name, _ in base.named_modules() if re.fullmatch(pattern, name)]:
        layer = base.get_submodule(name)
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight: Any = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        small.weight = weight.to(device)
        small.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, small)
    base.is_loaded_in_4bit = True  # what PEFT, TRL and accelerate ask
    base.hf_device_map = {"": torch.device(device)}
