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
from ray_vlm.data.collate import batch_rows, collate, read_pixels
from ray_vlm.data.records import PromptRecord
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.models.families import FAMILIES
from ray_vlm.models.layouts import LayoutPlanner, PackedLayout, PackingOptions
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import lora_config
from ray_vlm.models.prefix_sharing import build_planner, share_prefixes
from ray_vlm.models.shared_attention import attend_prefix_groups
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
            rows.append(Sample(ids, np.zeros(len(prompt.input_ids), np.int64), prompt.images))
    return builder, rows


def _hidden(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of the tokens that are there, and gradients of a number made from them."""
    model.zero_grad()
    with only(torch.float64):
        hidden = model.get_base_model().base_model(**batch, use_cache=False).last_hidden_state
        visible = hidden[batch["attention_mask"].bool()]
        (visible * torch.linspace(-1, 1, visible.numel()).reshape(visible.shape)).sum().backward()
    return visible.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _share(model: Any, builder: Any, packing: PackingOptions) -> LayoutPlanner:
    """Let the model compute batches with a layout, and return what plans them."""
    attend_prefix_groups(model)
    share_prefixes(model)
    return build_planner(model, packing, builder.image_token_id, "cpu", "fp32")


def _batch(
    rows: list[Sample], builder: Any, planner: LayoutPlanner | None = None, side: str = "right"
) -> dict[str, Any]:
    """Return the rows as a batch; with a planner images that rows share are there once, and rows have a layout."""
    batch = collate(rows, builder, side=side)
    batch.pop("labels", None)
    if planner is None:
        return batch
    shown = list({id(row.images): row for row in rows if row.images}.values())
    ends = np.cumsum([0, *(len(row.images) for row in shown)]).tolist()
    span_of = {id(row.images): (ends[n], ends[n + 1]) for n, row in enumerate(shown)}
    spans = [span_of.get(id(row.images), (0, 0)) for row in rows]
    pixels = read_pixels([image for row in shown for image in row.images], builder, "cpu")
    prompts = [len(row.labels) for row in rows]  # `_rows` keeps the prompt's
    tokens = [row.input_ids for row in rows]
    layout = planner.plan(batch_rows(tokens, prompts, spans, shown, builder, side=side))
    return batch | pixels | {"layout": layout}


def _assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).abs().max()) < EXACT


# Their width is that of a wide model, for which few tokens that are saved pay for a call of attention.
SHARE = PackingOptions(share=True)
PACK = PackingOptions(pack=True)
NOTHING = PackingOptions()


def _text(length: int, first: int = 20) -> Sample:
    return Sample(np.arange(first, first + length, dtype=np.int64), np.zeros(length, np.int64), ())


@pytest.mark.parametrize(
    ("family", "side"),
    slow_but(
        [("qwen3_vl", "left"), ("qwen2_5_vl", "right"), ("qwen2_vl", "left")],
        itertools.product(QWEN, ["left", "right"]),
    ),
)
def test_sharing_is_exact(family: str, side: str, tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models[family], tmp_path)
    rows = [rows[i] for i in (0, 4, 1, 5, 2, 6, 7, 3)]
    model, seen = _model(tiny_models[family]), []
    plain_batch = _batch(rows, builder, side=side)
    plain, plain_gradients = _hidden(model, plain_batch)
    model.get_base_model().base_model.language_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    batch = _batch(rows, builder, _share(model, builder, SHARE), side)
    assert [len(group.branches) for group in batch["layout"].row.groups] == [4, 4]
    shared, shared_gradients = _hidden(model, batch)
    assert seen[0][0] == 1
    assert seen[0].numel() < 0.5 * batch["input_ids"].numel()
    assert len(batch["pixel_values"]) < 0.5 * len(plain_batch["pixel_values"])
    _assert_equal(shared, plain)
    assert gradients_apart(shared_gradients, plain_gradients, least=1e-2) < EXACT


@pytest.mark.parametrize(
    ("family", "packing"),
    slow_but([("qwen3_vl", SHARE), ("qwen2_5_vl", PACK), ("qwen2_vl", SHARE)], itertools.product(QWEN, [SHARE, PACK])),
    ids=str,
)
def test_packing_is_exact(family: str, packing: PackingOptions, tiny_models: dict[str, str], tmp_path: Any) -> None:
    """Rows of one and of two images and of none, long and short, in one row."""
    builder, rows = _rows(tiny_models[family], tmp_path)
    short = [_text(n) for n in (5, 30, 31)]
    rows = [rows[0], short[0], rows[4], _text(200), short[1], rows[1], short[2], rows[5]]
    model = _model(tiny_models[family])
    plain, plain_gradients = _hidden(model, _batch(rows, builder))
    batch = _batch(rows, builder, _share(model, builder, packing))
    assert isinstance(batch["layout"], PackedLayout)
    assert batch["layout"].source.numel() < (0.4 if packing.share else 0.8) * batch["input_ids"].numel()
    packed, packed_gradients = _hidden(model, batch)
    _assert_equal(packed, plain)
    assert gradients_apart(packed_gradients, plain_gradients, least=1e-2) < EXACT


def test_rows_that_end_with_padding_need_no_mask(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    rows = [rows[0], _text(40), rows[4], _text(5)]
    model, masks = _model(tiny_models["qwen3_vl"]), []
    plain, plain_gradients = _hidden(model, _batch(rows, builder))
    model.get_base_model().base_model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    planner = _share(model, builder, NOTHING)
    padded, padded_gradients = _hidden(model, _batch(rows, builder, planner))
    assert masks == [None]
    _assert_equal(padded, plain)
    assert gradients_apart(padded_gradients, plain_gradients, least=1e-2) < EXACT
    left, _ = _hidden(model, _batch(rows, builder, planner, "left"))
    assert masks[1] is not None
    _assert_equal(left, plain)


def test_a_neighbour_in_a_packed_row_changes_no_other(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, _ = _rows(tiny_models["qwen3_vl"], tmp_path)
    model, rows = _model(tiny_models["qwen3_vl"]), [_text(n) for n in (60, 20, 20, 20)]
    batch = _batch(rows, builder, _share(model, builder, PACK))
    before, _ = _hidden(model, batch)
    batch["input_ids"][2, 0] += 7
    after, _ = _hidden(model, batch)
    changed = ((after - before).abs().amax(dim=1) > EXACT).nonzero()[:, 0].tolist()
    assert changed == list(range(80, 100)), "the row itself, and neither of those beside it"


def test_an_answer_changes_no_other(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    model = _model(tiny_models["qwen3_vl"])
    batch = _batch(rows[:4], builder, _share(model, builder, SHARE))
    before, _ = _hidden(model, batch)
    counts = batch["attention_mask"].sum(dim=1).tolist()
    batch["input_ids"][1, counts[1] - 1] += 7
    after, _ = _hidden(model, batch)
    changed = ((after - before).abs().amax(dim=1) > EXACT).nonzero()[:, 0].tolist()
    assert changed == [counts[0] + counts[1] - 1]


def test_generation_goes_the_plain_way(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, _ = _rows(tiny_models["qwen3_vl"], tmp_path)
    model = _model(tiny_models["qwen3_vl"])
    ids, mask = torch.arange(20, 40)[None].repeat(2, 1), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    before = model.generate(input_ids=ids, **options)
    _share(model, builder, SHARE)
    assert torch.equal(model.generate(input_ids=ids, **options), before)


FOLDINGS = [NOTHING, SHARE, PackingOptions(share=True, pack=True)]


@pytest.mark.parametrize(
    ("family", "packing"),
    slow_but([*zip(QWEN, FOLDINGS, strict=True), ("qwen3_vl", FOLDINGS[2])], itertools.product(QWEN, FOLDINGS)),
    ids=str,
)
def test_images_that_rows_share_are_there_once(
    family: str, packing: PackingOptions, tiny_models: dict[str, str], tmp_path: Any
) -> None:
    """A row without images among the others, and one that shows an image of each of two."""
    builder, rows = _rows(tiny_models[family], tmp_path)
    rows = [rows[0], _text(30), rows[4], rows[1], rows[5]]
    model, patches = _model(tiny_models[family]), []
    copied = _batch(rows, builder)
    plain, plain_gradients = _hidden(model, copied)
    visual = model.get_base_model().base_model.visual
    visual.register_forward_hook(lambda module, args, out: patches.append(len(args[0])))
    once = _batch(rows, builder, _share(model, builder, packing))
    hidden, gradients = _hidden(model, once)
    assert patches == [len(once["pixel_values"] if packing.share else copied["pixel_values"])]
    _assert_equal(hidden, plain)
    assert gradients_apart(gradients, plain_gradients, least=1e-2) < EXACT


def test_images_that_differ_by_a_pixel_are_not_shared(tiny_models: dict[str, str], tmp_path: Any) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    image = rows[0].images[0].copy()
    image[-1, -1, -1] ^= 1
    rows = [rows[0], Sample(rows[1].input_ids, rows[1].labels, (image,)), rows[2]]
    model, patches = _model(tiny_models["qwen3_vl"]), []
    plain_batch = _batch(rows, builder)
    plain, _ = _hidden(model, plain_batch)
    visual = model.get_base_model().base_model.visual
    visual.register_forward_hook(lambda module, args, out: patches.append(len(args[0])))
    hidden, _ = _hidden(model, _batch(rows, builder, _share(model, builder, SHARE)))
    assert patches == [len(plain_batch["pixel_values"]) * 2 // 3], "the first image once, the other for itself"
    _assert_equal(hidden, plain)


def test_an_answer_without_tokens(tiny_models: dict[str, str], tmp_path: Any) -> None:
    """A row that ends with its prompt, beside one that goes on: all of it is the beginning."""
    builder, rows = _rows(tiny_models["qwen3_vl"], tmp_path)
    empty = Sample(rows[0].input_ids[: -len(ANSWERS[0])], rows[0].labels, rows[0].images)
    model = _model(tiny_models["qwen3_vl"])
    rows = [empty, rows[1], empty]
    plain, _ = _hidden(model, _batch(rows, builder))
    hidden, _ = _hidden(model, _batch(rows, builder, _share(model, builder, SHARE)))
    _assert_equal(hidden, plain)
