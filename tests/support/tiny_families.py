"""Tiny random checkpoints of families whose own processor does the images: Llama-4, and two that are in no table."""

from pathlib import Path
from typing import Any

from ray_vlm.demo.tiny import build_tokenizer

TILE = 56  # side of a tile in pixels
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def _tokenizer(*special: str, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    plain = build_tokenizer()
    inner = plain.backend_tokenizer
    inner.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens=names,
    )


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _llama4() -> tuple[Any, Any]:
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    marks = ("image", "image_start", "image_end", "patch", "tile_x_separator", "tile_y_separator")
    tokenizer = _tokenizer(*(f"<|{mark}|>" for mark in marks))
    images = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4)
    template = TEMPLATE.replace("IMAGE", "<|image|>")
    processor = Llama4Processor(images, tokenizer, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=template)
    text = _TEXT | _ends(tokenizer) | {"vocab_size": len(tokenizer), "intermediate_size_mlp": 128}
    text |= {"num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 64}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    vision |= {"image_size": TILE, "patch_size": 14, "vision_output_dim": 64}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64}
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"boi_token_index": ids("<|image_start|>"), "eoi_token_index": ids("<|image_end|>")}
    return processor, Llama4Config(
        text_config=text, vision_config=vision, image_token_index=ids("<|patch|>"), **tokens, **_ends(tokenizer)
    )


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(*names.values(), **names)
    images = Gemma3ImageProcessor(size={"height": TILE, "width": TILE})
    template = TEMPLATE.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    text = _TEXT | _ends(tokenizer) | {"vocab_size": len(tokenizer), "sliding_window": 32, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    vision |= {"image_size": TILE, "patch_size": 14, "vision_use_head": False}
    ids = tokenizer.convert_tokens_to_ids
    tokens = {f"{mark}_token_index": ids(names[f"{mark}_token"]) for mark in ("image", "boi", "eoi")}
    return processor, Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens, **_ends(tokenizer)
    )


def _internvl() -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names |= {"video_token": "<video>"}
    tokenizer = _tokenizer(*names.values(), **names)
    images = GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=4)
    template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    text = _TEXT | _ends(tokenizer) | {"vocab_size": len(tokenizer), "model_type": "qwen2"}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    vision |= {"image_size": [TILE, TILE], "patch_size": [14, 14]}
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return processor, InternVLConfig(text_config=text, vision_config=vision, image_token_id=token, image_seq_length=4)


BUILDERS = {"llama4": _llama4, "gemma3": _gemma3, "internvl": _internvl}


def write_tiny(folder: Path, family: str, seed: int = 0) -> Path:
    """An ordinary `transformers` checkpoint with random float32 weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    processor, config = BUILDERS[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.endswith("bias"):  # meant to come from a checkpoint
            torch.nn.init.normal_(parameter, std=0.02)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
