"""Tiny checkpoints of families whose own processor does the images, or that differ from the demo's Qwens: real classes
of the installed transformers from configurations, with a tokenizer and a processor of their own.

A builder returns the processor and the configuration. `write_tiny` writes the checkpoint with random float32 weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_vlm.demo.tiny import PIXELS, build_processor, build_tokenizer, write_untrained

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
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_VISION |= {"image_size": TILE, "patch_size": 14}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN_TOKENS = ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")
_QWEN_TOKENS += ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _tokenizer(*special: str, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    plain = build_tokenizer()
    inner = plain.backend_tokenizer
    inner.add_special_tokens([*special, *names.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens=names,
    )


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return _TEXT | _ends(tokenizer) | {"vocab_size": len(tokenizer)} | more


def _square(images: type, **options: Any) -> Any:
    return images(size={"height": TILE, "width": TILE}, **options)


def _llama4() -> tuple[Any, Any]:
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    marks = ("image", "image_start", "image_end", "patch", "tile_x_separator", "tile_y_separator")
    tokenizer = _tokenizer(*(f"<|{mark}|>" for mark in marks))
    images = _square(Llama4ImageProcessor, max_patches=4)
    template = TEMPLATE.replace("IMAGE", "<|image|>")
    processor = Llama4Processor(images, tokenizer, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=template)
    text = _text(tokenizer, intermediate_size_mlp=128, num_local_experts=4)
    text |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 64}
    vision = _VISION | {"intermediate_size": 256, "vision_output_dim": 64}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64}
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"boi_token_index": ids("<|image_start|>"), "eoi_token_index": ids("<|image_end|>")}
    tokens |= {"image_token_index": ids("<|patch|>")}
    return processor, Llama4Config(text_config=text, vision_config=vision, **tokens, **_ends(tokenizer))


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(**names)
    template = TEMPLATE.replace("IMAGE", "<start_of_image>")
    images = _square(Gemma3ImageProcessor)
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    text = _text(tokenizer, sliding_window=32, query_pre_attn_scalar=16)
    vision = _VISION | {"vision_use_head": False}
    ids = tokenizer.convert_tokens_to_ids
    tokens = {f"{mark}_token_index": ids(names[f"{mark}_token"]) for mark in ("image", "boi", "eoi")}
    return processor, Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens, **_ends(tokenizer)
    )


def _gemma4() -> tuple[Any, Any]:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
    tokenizer = _tokenizer("<|video|>", **names, boa_token="<|audio>", eoa_token="<audio|>")
    images = Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2)
    template = TEMPLATE.replace("IMAGE", "<|image|>")
    audio, videos = Gemma4AudioFeatureExtractor(), Gemma4VideoProcessor()
    processor = Gemma4Processor(audio, images, tokenizer, videos, chat_template=template, image_seq_length=70)
    text = _text(tokenizer, sliding_window=32, hidden_size_per_layer_input=8, global_head_dim=16)
    text |= {"vocab_size_per_layer_input": len(tokenizer), "num_kv_shared_layers": 1}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_bidirectional_attention": "vision"}
    vision = _VISION | {"patch_size": 8, "pooling_kernel_size": 2, "num_key_value_heads": 4, "head_dim": 16}
    vision |= {"position_embedding_size": 64}
    ids = tokenizer.convert_tokens_to_ids
    tokens = {f"{mark}_token_id": ids(names[f"{mark}_token"]) for mark in ("image", "boi", "eoi", "audio")}
    tokens |= {"video_token_id": ids("<|video|>"), "boa_token_id": ids("<|audio>"), "eoa_token_index": ids("<audio|>")}
    return processor, Gemma4Config(text_config=text, vision_config=vision, **tokens, **_ends(tokenizer))


def _internvl() -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(**names, video_token="<video>")
    images = _square(GotOcr2ImageProcessor, crop_to_patches=True, max_patches=4)
    template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    vision = _VISION | {"image_size": [TILE, TILE], "patch_size": [14, 14]}
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    text = _text(tokenizer, model_type="qwen2")
    return processor, InternVLConfig(text_config=text, vision_config=vision, image_token_id=token, image_seq_length=4)


def _idefics3(kind: str = "Idefics3") -> tuple[Any, Any]:
    import transformers

    images = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
    )
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _tokenizer(*marks, *rows)
    more = {"video_processor": transformers.SmolVLMVideoProcessor()} if kind == "SmolVLM" else {}
    options = {"image_seq_len": 4, "chat_template": TEMPLATE.replace("IMAGE", "<image>")} | more
    processor = getattr(transformers, f"{kind}Processor")(images, tokenizer, **options)
    text, token = _text(tokenizer, model_type="llama"), tokenizer.convert_tokens_to_ids("<image>")
    options = {"text_config": text, "vision_config": _VISION, "image_token_id": token, "scale_factor": 2}
    return processor, getattr(transformers, f"{kind}Config")(**options, pad_token_id=tokenizer.pad_token_id)


def _smolvlm() -> tuple[Any, Any]:
    return _idefics3("SmolVLM")


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    points = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    images = _square(LlavaOnevisionImageProcessor, image_grid_pinpoints=points)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(), **options, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"image_token_index": ids("<image>"), "video_token_index": ids("<video>")}
    text, vision = _text(tokenizer, model_type="qwen2"), _VISION | {"model_type": "siglip_vision_model"}
    vision |= {"vision_use_head": False}
    return processor, LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=points, **tokens, **_ends(tokenizer)
    )


def _paligemma() -> tuple[Any, Any]:
    from transformers import PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = _tokenizer(image_token="<image>")
    tokenizer.bos_token = "<|im_start|>"
    images = _square(SiglipImageProcessor)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<image>"))
    text = _text(tokenizer, model_type="gemma")
    token = tokenizer.convert_tokens_to_ids("<image>")
    return processor, PaliGemmaConfig(
        text_config=text,
        vision_config=_VISION | {"vision_use_head": False},
        image_token_index=token,
        projection_dim=64,
        **_ends(tokenizer),
    )


def _mistral3() -> tuple[Any, Any]:
    from transformers import Mistral3Config, PixtralImageProcessor, PixtralProcessor

    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = PixtralImageProcessor(size={"longest_edge": 2 * TILE}, patch_size={"height": 14, "width": 14})
    template = TEMPLATE.replace("IMAGE", "[IMG]")
    processor = PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=template)
    token = tokenizer.convert_tokens_to_ids("[IMG]")
    text, vision = _text(tokenizer, model_type="mistral"), _VISION | {"model_type": "pixtral", "image_size": 2 * TILE}
    return processor, Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=token, spatial_merge_size=2, **_ends(tokenizer)
    )


def _pixtral() -> tuple[Any, Any]:
    from transformers import LlavaConfig, PixtralProcessor

    images, tokenizer = (made := _mistral3()[0]).image_processor, made.tokenizer
    processor = PixtralProcessor(images, tokenizer, patch_size=14, chat_template=made.chat_template)
    token = tokenizer.convert_tokens_to_ids("[IMG]")
    text, vision = _text(tokenizer, model_type="mistral"), _VISION | {"model_type": "pixtral", "image_size": 2 * TILE}
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return processor, LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=token, **options, **_ends(tokenizer)
    )


def _glm4v() -> tuple[Any, Any]:
    from transformers import Glm4vConfig, Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    marks = ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video", "video")
    tokenizer = _tokenizer(*(f"<|{mark}|>" for mark in marks), image_token="<|image|>")
    template = TEMPLATE.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    images = Glm4vImageProcessor(size=PIXELS)
    processor = Glm4vProcessor(images, tokenizer, Glm4vVideoProcessor(), chat_template=template)
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"image_token_id": ids("<|image|>"), "video_token_id": ids("<|video|>")}
    for kind in ("image", "video"):
        tokens[f"{kind}_start_token_id"] = ids(f"<|begin_of_{kind}|>")
        tokens[f"{kind}_end_token_id"] = ids(f"<|end_of_{kind}|>")
    text = _text(tokenizer, rope_parameters=_ROPE | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0})
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 128}
    vision |= {"image_size": TILE, "patch_size": 14}
    return processor, Glm4vConfig(text_config=text, vision_config=vision, **tokens, **_ends(tokenizer))


def _molmo2() -> tuple[Any, Any]:
    from transformers import Molmo2Config, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

    marks = ("im_patch", "im_col", "im_start", "low_res_im_start", "frame_start", "im_end", "frame_end", "im_low")
    tokenizer = _tokenizer("<|video|>", *(f"<{mark}>" for mark in marks), image_token="<|image|>")
    images = _square(Molmo2ImageProcessor, max_crops=4, overlap_margins=[1, 1])
    template = TEMPLATE.replace("IMAGE", "<|image|>")
    processor = Molmo2Processor(images, Molmo2VideoProcessor(), tokenizer, chat_template=template)
    ids = tokenizer.convert_tokens_to_ids
    names = ("image_start", "low_res_image_start", "image_end", "frame_start", "frame_end")
    tokens = {f"{name}_token_id": ids(f"<{name.replace('image', 'im')}>") for name in names}
    text = _text(tokenizer, additional_vocab_size=16, vocab_size=len(tokenizer) - 16)
    vision = _VISION | {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 16, "image_size": [TILE, TILE]}
    adapter = {"vision_feature_layer": [1, 2], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    adapter |= {"head_dim": 16, "intermediate_size": 128, "text_hidden_size": 64}
    return processor, Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=text,
        **tokens | {"image_patch_id": ids("<im_patch>")} | _ends(tokenizer),
    )


def _minicpm(version: str) -> tuple[Any, Any]:
    import transformers

    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>"}
    names |= {"image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>"}
    tokenizer = _tokenizer(**names, image_id_start_token="<image_id>", image_id_end_token="</image_id>")
    images = transformers.MiniCPMV4_6ImageProcessor(max_slice_nums=4, scale_resolution=112, patch_size=14)
    videos = transformers.MiniCPMV4_6VideoProcessor()
    template = TEMPLATE.replace("IMAGE", "<|image_pad|>")
    processor = getattr(transformers, f"{version}Processor")(images, videos, tokenizer, chat_template=template)
    ids = tokenizer.convert_tokens_to_ids
    tokens = {f"{kind}_token_id": ids(names[f"{kind}_token"]) for kind in ("image", "video")}
    if version == "MiniCPMV4_7":
        tokens |= {
            f"{kind}_id": ids(names[f"{kind}_token"])
            for kind in ("image_start", "image_end", "slice_start", "slice_end")
        }
        tokens["newline_id"] = tokenizer("\n").input_ids[0]
    vision = _VISION | {"num_hidden_layers": 3, "image_size": 112}
    text = _linear_text(tokenizer) | {"model_type": "qwen3_5_text"}
    return processor, getattr(transformers, f"{version}Config")(
        text_config=text, vision_config=vision, image_size=112, insert_layer_id=1, **tokens, **_ends(tokenizer)
    )


def _minicpmv4_6() -> tuple[Any, Any]:
    return _minicpm("MiniCPMV4_6")


def _minicpmv4_7() -> tuple[Any, Any]:
    return _minicpm("MiniCPMV4_7")


def _aya_vision() -> tuple[Any, Any]:
    from transformers import AyaVisionConfig, AyaVisionProcessor, GotOcr2ImageProcessor

    marks = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tokenizer = _tokenizer(*marks, "TILE_GLOBAL", "TILE")
    images = _square(GotOcr2ImageProcessor, crop_to_patches=True, max_patches=4)
    options = {"patch_size": 14, "img_size": TILE, "downsample_factor": 2}
    processor = AyaVisionProcessor(images, tokenizer, **options, chat_template=TEMPLATE.replace("IMAGE", "<image>"))
    token = tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>")
    text, vision = (
        _text(tokenizer, model_type="cohere2", sliding_window=32),
        _VISION | {"model_type": "siglip_vision_model"},
    )
    vision |= {"vision_use_head": False}
    return processor, AyaVisionConfig(
        text_config=text, vision_config=vision, image_token_index=token, downsample_factor=2, **_ends(tokenizer)
    )


def _cohere2_vision() -> tuple[Any, Any]:
    from transformers import Cohere2VisionConfig, Cohere2VisionImageProcessor, Cohere2VisionProcessor

    names = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
    tokenizer = _tokenizer(**names, img_line_break_token="<|IMG_LINE_BREAK|>")
    images = _square(Cohere2VisionImageProcessor, max_patches=4, patch_size=2)
    processor = Cohere2VisionProcessor(images, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<|IMG_PATCH|>"))
    text, vision = (
        _text(tokenizer, model_type="cohere2", sliding_window=32),
        _VISION | {"model_type": "siglip_vision_model"},
    )
    vision |= {"vision_use_head": False}
    return processor, Cohere2VisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=128,
        **_ends(tokenizer),
    )


def _linear_text(tokenizer: Any) -> dict[str, Any]:
    """The language model of Qwen3.5: three layers of linear attention, then one that attends to all tokens."""
    rope = _ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    text = _text(tokenizer, rope_parameters=rope, linear_num_key_heads=2, linear_num_value_heads=4)
    return text | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}


def _qwen(kind: str, text: Callable[[Any], dict[str, Any]], **vision: Any) -> tuple[Any, Any]:
    import transformers

    processor = build_processor("qwen3_vl")
    tokenizer = processor.tokenizer
    tokens = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in _QWEN_TOKENS}
    vision |= {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 324}
    config = getattr(transformers, f"{kind}Config")
    return processor, config(text_config=text(tokenizer), vision_config=vision, **tokens, **_ends(tokenizer))


def _qwen3_vl_moe() -> tuple[Any, Any]:
    rope = _ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return _qwen(
        "Qwen3VLMoe", lambda names: _text(names, rope_parameters=rope, **_EXPERTS), deepstack_visual_indexes=[0]
    )


def _qwen3_5() -> tuple[Any, Any]:
    return _qwen("Qwen3_5", _linear_text)


def _qwen3_5_moe() -> tuple[Any, Any]:
    return _qwen("Qwen3_5Moe", lambda names: _linear_text(names) | _EXPERTS | {"shared_expert_intermediate_size": 64})


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "mistral3": _mistral3,
    "pixtral": _pixtral,
    "glm4v": _glm4v,
    "molmo2": _molmo2,
    "minicpmv4_6": _minicpmv4_6,
    "minicpmv4_7": _minicpmv4_7,
    "llama4": _llama4,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
}
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # `ray_vlm.demo.tiny` builds them
ALL = (*QWENS, *BUILDERS)
REFUSED = ("paligemma",)  # when the model is loaded, with the reason


_LARGER = {"hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 32, "num_hidden_layers": 10}


def write_tiny(folder: Path, family: str, seed: int = 0, larger: bool = False) -> Path:
    """Write an ordinary `transformers` checkpoint with random float32 weights; with `larger`, a mixture of about 400 MB
    in bfloat16, in many files."""
    import torch
    from transformers import AutoModelForImageTextToText

    if family in QWENS:
        return write_untrained(folder, family, seed)
    processor, config = BUILDERS[family]()
    if larger:
        for name, value in _LARGER.items():
            setattr(config.text_config, name, value)
        config.vision_config.out_hidden_size = config.text_config.hidden_size
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if larger else torch.float32)
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.endswith("bias"):  # meant to come from a checkpoint
            torch.nn.init.normal_(parameter, std=0.02)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size="60MB")
    processor.save_pretrained(folder)
    return folder
