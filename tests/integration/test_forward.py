"""Shared beginnings are exact: hidden states and gradients of both families, in both paddings, and nothing leaks.

In float64, where another order of summation is about 1e-14 and a fault is not hidden in it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate, read_pixels
from ray_vlm.data.records import PromptRecord
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.prefix_sharing import PackingOptions, share_prefixes
from tests.conftest import QWEN
from tests.support.precision import arithmetic, only
from tests.support.stock import gradients_apart
from tests.support.twins import slow_but

EXACT = 1e-9  # absolute for hidden states of about 1, relative for gradients
ANSWERS = [[300, 301], [300, 302, 303, 304], [310], [300, 301, 305]]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with arithmetic(torch.float64):
        yield


def _model(folder: str) -> Any:
    from peft import get_peft_model

    model = load_model(Model(name=folder, load_in_4bit=False), precision="fp32")
    torch.manual_seed(0)
    target = ["language", "connector", "vision"]
    model = get_peft_model(model, lora_config(Lora(rank=4, target=target), FAMILIES[model.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(torch.float64)


def _rows(folder: str, tmp_path: Any) -> tuple[Any, list[Sample]]:
    """Two prompts, one with an image and one with two, with every answer behind each."""
    from PIL import Image

    builder = load_sample_builder(SampleSpec(Model(name=folder, load_in_4bit=False), ChatTask(), (), kind="prompt"))
    paths = []
    for i, size in enumerate([(96, 64), (64, 96), (64, 64)]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        paths.append((str(tmp_path / f"{i}.png"), size))
    rows = []
    for shown, text in ((paths[:1], "<image>What is shown?"), (paths[1:], "<image>And <image>here?")):
        images, sizes = zip(*shown, strict=True)
        prompt = builder.prompt_row(PromptRecord("x", 0, images, sizes, (("user", text),)))
        for answer in ANSWERS:
            ids = np.concatenate([prompt.input_ids, np.array(answer)])
            rows.append(Sample(ids, prompt.labels, prompt.images))
    return builder, rows


def _hidden(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of the tokens that are there, and gradients of a number made from them."""
    model.zero_grad()
    with only(torch.float64):
        hidden = model.get_base_model().base_model(**batch, use_cache=False).last_hidden_state
        visible = hidden[batch["attention_mask"].bool()]
        (visible * torch.linspace(-1, 1, visible.numel()).reshape(visible.shape)).sum().backward()
    return visible.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).abs().max()) < EXACT


@pytest.mark.parametrize(
    ("family", "side"),
    slow_but(
        [("qwen3_vl", "left"), ("qwen2_5_vl", "right"), ("qwen2_vl", "left")],
        itertools.product(QWEN, ["left", "right"]),
    ),
)
def test_sharing_is_exact(family: str, side: str, tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models[family], tmp_path)
    batch = collate([rows[i] for i in (0, 4, 1, 5, 2, 6, 7, 3)], builder, side=side)
    batch.pop("labels", None)
    model = _model(tiny_models[family])
    plain, plain_gradients = _hidden(model, batch)
    backbone, seen = model.get_base_model().base_model, []
    backbone.language_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    share_prefixes(model, PackingOptions(share=True, pack=False))
    shared, shared_gradients = _hidden(model, batch)
    assert seen[0][0] == 2, "two trees"
    assert seen[0].numel() < 0.5 * batch["input_ids"].numel()
    _assert_equal(shared, plain)
    assert gradients_apart(shared_gradients, plain_gradients, least=1e-2) < EXACT


@pytest.mark.parametrize(
    ("family", "share"),
    slow_but([("qwen3_vl", True), ("qwen2_5_vl", False), ("qwen2_vl", True)], itertools.product(QWEN, [True, False])),
)
def test_packing_is_exact(family: str, share: bool, tiny_models: dict[str, str], tmp_path: Any) -> None:
    """Rows of one and of two images and of none, long and short, in fewer rows than they are."""
    builder, rows = _rows(tiny_models[family], tmp_path)
    long = Sample(np.arange(20, 220, dtype=np.int64), np.zeros(200, np.int64), ())
    short = [Sample(np.arange(20, 20 + n, dtype=np.int64), np.zeros(n, np.int64), ()) for n in (5, 30, 31)]
    batch = collate([rows[0], short[0], rows[4], long, short[1], rows[1], short[2], rows[5]], builder)
    batch.pop("labels", None)
    model = _model(tiny_models[family])
    plain, plain_gradients = _hidden(model, batch)
    seen: list[Any] = []
    model.get_base_model().base_model.language_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    share_prefixes(model, PackingOptions(share=share, pack=True))
    packed, packed_gradients = _hidden(model, batch)
    assert seen[0].numel() < (0.4 if share else 0.8) * batch["input_ids"].numel()
    _assert_equal(packed, plain)
    assert gradients_apart(packed_gradients, plain_gradients, least=1e-2) < EXACT


def test_a_neighbour_in_a_pack_changes_no_other(tiny_models: dict[str, str]) -> None:
    builder = load_sample_builder(SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), ()))
    rows = [Sample(np.arange(20, 20 + n, dtype=np.int64), np.zeros(n, np.int64), ()) for n in (60, 20, 20, 20)]
    model = _model(tiny_models["qwen3_vl"])
    share_prefixes(model, PackingOptions(share=False, pack=True))
    batch = collate(rows, builder)
    batch.pop("labels", None)
    before, _ = _hidden(model, batch)
    batch["input_ids"][2, 0] += 7
    after, _ = _hidden(model, batch)
    changed = ((after - before).abs().amax(dim=1) > EXACT).nonzero()[:, 0].tolist()
    assert changed == list(range(80, 100)), "the row itself, and neither of those beside it"


def test_an_answer_changes_no_other(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    model = _model(tiny_models["qwen3_vl"])
    share_prefixes(model, PackingOptions(share=True, pack=False))
    batch = collate(rows[:4], builder)
    batch.pop("labels", None)
    before, _ = _hidden(model, batch)
    counts = batch["attention_mask"].sum(dim=1).tolist()
    batch["input_ids"][1, counts[1] - 1] += 7
    after, _ = _hidden(model, batch)
    changed = ((after - before).abs().amax(dim=1) > EXACT).nonzero()[:, 0].tolist()
    assert changed == [counts[0] + counts[1] - 1]


def test_generation_goes_the_plain_way(tiny_models: dict[str, str]) -> None:
    model = _model(tiny_models["qwen3_vl"])
    ids = torch.arange(20, 40)[None].repeat(2, 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    before = model.generate(input_ids=ids, **options)
    share_prefixes(model, PackingOptions(share=True, pack=False))
    assert torch.equal(model.generate(input_ids=ids, **options), before)


FOLDINGS = [PackingOptions(), PackingOptions(share=True), PackingOptions(share=True, pack=True)]


@pytest.mark.parametrize(
    ("family", "packing"),
    slow_but([*zip(QWEN, FOLDINGS, strict=True), ("qwen3_vl", FOLDINGS[2])], itertools.product(QWEN, FOLDINGS)),
    ids=str,
)
def test_images_that_rows_share_are_there_once(
    family: str, packing: PackingOptions, tiny_models: dict[str, str], tmp_path: Any
) -> None:
    """`image_spans`, with a row without images among the others, and one that shows an image of each of two."""
    builder, rows = _rows(tiny_models[family], tmp_path)
    text = Sample(np.arange(20, 50, dtype=np.int64), np.zeros(30, np.int64), ())
    order = [rows[0], text, rows[4], rows[1], rows[5]]
    copied = collate(order, builder)
    once = {name: value for name, value in copied.items() if name != "labels"}
    once |= read_pixels([*rows[0].images, *rows[4].images], builder, "cpu")
    once["image_spans"] = [(0, 1), (1, 1), (1, 3), (0, 1), (1, 3)]
    copied.pop("labels", None)
    model, patches = _model(tiny_models[family]), []
    plain, plain_gradients = _hidden(model, copied)
    visual = model.get_base_model().base_model.visual
    visual.register_forward_hook(lambda module, args, out: patches.append(len(args[0])))
    share_prefixes(model, packing)
    hidden, gradients = _hidden(model, once)
    assert patches == [len(once["pixel_values"] if packing.share else copied["pixel_values"])]
    _assert_equal(hidden, plain)
    assert gradients_apart(gradients, plain_gradients, least=1e-2) < EXACT


def test_images_that_differ_by_a_pixel_are_not_shared(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    image = rows[0].images[0].copy()
    image[-1, -1, -1] ^= 1
    other = Sample(rows[1].input_ids, rows[1].labels, (image,))
    model, patches = _model(tiny_models["qwen3_vl"]), []
    batch = collate([rows[0], other, rows[2]], builder)
    batch.pop("labels", None)
    plain, _ = _hidden(model, batch)
    visual = model.get_base_model().base_model.visual
    visual.register_forward_hook(lambda module, args, out: patches.append(len(args[0])))
    share_prefixes(model, PackingOptions(share=True))
    hidden, _ = _hidden(model, batch)
    assert patches == [len(batch["pixel_values"]) * 2 // 3], "the first image twice as one, the other for itself"
    _assert_equal(hidden, plain)


def test_an_answer_without_tokens(tiny_models: dict[str, str], tmp_path: Any) -> None:
    """A row that ends with its prompt, beside one that goes on: all of it is the beginning."""
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    empty = Sample(rows[0].input_ids[: -len(ANSWERS[0])], rows[0].labels, rows[0].images)
    model = _model(tiny_models["qwen3_vl"])
    batch = collate([empty, rows[1], empty], builder)
    batch.pop("labels", None)
    plain, _ = _hidden(model, batch)
    share_prefixes(model, PackingOptions(share=True, pack=True))
    hidden, _ = _hidden(model, batch)
    _assert_equal(hidden, plain)
