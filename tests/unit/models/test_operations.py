"""Counted operations are those that torch counts of the same forward and backward, less what is not needed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from ray_vlm.demo.tiny import build_config, build_processor
from ray_vlm.models.layouts import BatchRows, PackingOptions
from ray_vlm.models.operations import OperationCounter, Work, count_flops, measure_size
from ray_vlm.models.prefix_sharing import build_planner, share_prefixes
from ray_vlm.models.shared_attention import attend_prefix_groups
from tests.conftest import QWEN


def _model(family: str, learns: str = "layers") -> Any:
    """Build a tiny model in which the weights with `learns` in their name are trained."""
    torch.manual_seed(0)
    config = build_config(build_processor(family).tokenizer, family)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns in name)
    return model


def _batch(family: str, rows: int = 1) -> dict[str, Any]:
    """Build rows of one image each and 24 tokens of text, the last 16 of which have labels."""
    processor = build_processor(family)
    side = 112 if family != "qwen3_vl" else 128
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    image = torch.tensor(pixels).permute(2, 0, 1)
    images = dict(processor.image_processor([image] * rows, do_resize=False, return_tensors="pt"))
    num_image_tokens = int(images["image_grid_thw"][0].prod()) // 4
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = torch.full((rows, num_image_tokens + 24), 30)
    ids[:, 2 : 2 + num_image_tokens] = token
    labels = torch.full_like(ids, -100)
    labels[:, -16:] = 30
    kinds = {"mm_token_type_ids": (ids == token).long(), "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "labels": labels, **kinds, **images}


def _all_pairs(work: Work, tokens: int) -> Work:
    """Return the work that torch counts without a causal kernel: all pairs of a row's tokens, all tokens scored."""
    return Work(tokens, tokens * tokens, tokens, work.patches, work.patch_pairs)


@pytest.mark.parametrize("family", QWEN)
def test_the_flops_of_a_forward_are_those_that_torch_counts(family: str) -> None:
    model, batch = _model(family), _batch(family)
    counter = OperationCounter()
    counter.attach(model)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(**batch)
    work, flops = counter.take()
    tokens = batch["input_ids"].numel()
    assert work.tokens == tokens
    assert work.pairs == tokens * (tokens + 1) // 2
    assert work.scored == 16
    assert work.patches == int(batch["image_grid_thw"].prod())
    all_flops = count_flops(measure_size(model), _all_pairs(work, tokens), backward=False)
    assert all_flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    assert flops == count_flops(measure_size(model), work, backward=False) < all_flops
    assert counter.take() == (Work(), 0.0)


@pytest.mark.parametrize("learns", ["language_model.layers", "layers", ""])
def test_the_flops_of_a_backward_are_those_that_torch_counts(learns: str) -> None:
    """With a frozen encoder and trained language layers; with trained encoder blocks too; with everything trained."""
    model, batch = _model("qwen3_vl", learns), _batch("qwen3_vl")
    counter = OperationCounter()
    counter.attach(model)
    model.enable_input_require_grads()
    if learns == "language_model.layers":
        model.model.visual.forward = torch.no_grad()(model.model.visual.forward)
    with FlopCounterMode(display=False) as counted:
        model(**batch).loss.backward()
    work, _ = counter.take()
    all_flops = count_flops(measure_size(model), _all_pairs(work, work.tokens), backward=True)
    # The two differ by the gradient of the first layer's input.
    assert all_flops == pytest.approx(counted.get_total_flops(), rel=0.03)


def test_padding_and_shared_prefixes_do_not_count() -> None:
    """Two rows in one tree need the tokens of one and the branch of the other."""
    family, batch = "qwen3_vl", _batch("qwen3_vl", rows=2)
    batch["input_ids"][1, -10:] = 31
    batch.pop("labels")
    model = _model(family)
    counter = OperationCounter()
    counter.attach(model)
    attend_prefix_groups(model)
    share_prefixes(model, counter)
    row = batch["input_ids"].shape[1]
    planner = build_planner(model, PackingOptions(share=True), model.config.image_token_id, "cpu", "fp32")
    grid = tuple(batch["image_grid_thw"][0].tolist())
    tokens = [ids.numpy() for ids in batch["input_ids"]]
    layout = planner.plan(BatchRows(tokens, [row - 10] * 2, [0, 0], row, [(0, 1)] * 2, [grid]))
    images = {name: batch[name][: len(batch[name]) // 2] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        model(**batch | images, layout=layout, use_cache=False)
    folded, _ = counter.take()
    beginning = row - 10
    assert folded.tokens == beginning + 2 * 10
    assert folded.pairs == beginning * (beginning + 1) // 2 + 2 * (10 * beginning + 10 * 11 // 2)

    plain = _model(family)
    counter = OperationCounter()
    counter.attach(plain)
    padded = {name: value.clone() for name, value in batch.items()}
    padded["attention_mask"][1, -10:] = 0
    with torch.no_grad():
        plain(**padded, use_cache=False)
    work, _ = counter.take()
    assert work.tokens == 2 * row - 10
    assert work.pairs == row * (row + 1) // 2 + beginning * (beginning + 1) // 2


def test_padding_on_the_right_does_not_count_without_a_mask() -> None:
    lengths = torch.tensor([88, 44, 40])
    mask = (torch.arange(88) < lengths[:, None]).long()
    batch = {"input_ids": torch.full((3, 88), 30), "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(mask)}
    model, counter = _model("qwen3_vl"), OperationCounter()
    counter.attach(model)
    share_prefixes(model, counter)
    planner = build_planner(model, PackingOptions(), model.config.image_token_id, "cpu", "fp32")
    tokens = [ids[:length].numpy() for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    layout = planner.plan(BatchRows(tokens, lengths.tolist(), [0] * 3, 88, [(0, 0)] * 3, []))
    with torch.no_grad():
        model(**batch, layout=layout, use_cache=False)
    work, _ = counter.take()
    assert work.tokens == int(lengths.sum())
    assert work.pairs == int((lengths * (lengths + 1) // 2).sum())


def test_decoding_counts_token_by_token() -> None:
    model, batch = _model("qwen3_vl"), _batch("qwen3_vl")
    batch.pop("labels")
    counter = OperationCounter()
    counter.attach(model)
    model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    work, _ = counter.take()
    row = batch["input_ids"].shape[1]
    assert work.tokens == row + 4
    assert work.pairs == row * (row + 1) // 2 + sum(row + i + 1 for i in range(4))


def test_only_the_experts_that_a_token_uses_count() -> None:
    dense = build_config(build_processor("qwen3_vl").tokenizer, "qwen3_vl")
    text = copy.deepcopy(dense.text_config.to_dict()) | {"num_experts": 4, "num_experts_per_tok": 2}
    text |= {"moe_intermediate_size": 64, "decoder_sparse_step": 1, "model_type": "qwen3_vl_moe_text"}
    vision = dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe"}
    size = measure_size(
        AutoModelForImageTextToText.from_config(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    )
    hidden, head_dim, heads = 128, 32, 4
    attention = 4 * hidden * heads * head_dim
    experts = 2 * (3 * hidden * 64)  # of 4 experts two
    assert size.language == 4 * (attention + experts + 4 * hidden)  # and the router
