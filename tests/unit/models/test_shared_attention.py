"""Attention over packed rows: equal to attention under a mask of all pairs, from the pairs that are needed."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ray_vlm.models import shared_attention
from ray_vlm.models.layouts import PackedGroup, PackedRow, plan_keys
from ray_vlm.models.shared_attention import attend, attend_in_blocks, attend_in_parts, build_mask
from tests.support.attention_pairs import CountPairs, pairs_in_segments

GROUPS = (PackedGroup(0, 40, (5, 5, 300, 1)), PackedGroup(351, 7), PackedGroup(358, 7), PackedGroup(365, 3, (2,)))
TOKENS, SIZE, SCALE = 370, 16, 0.3


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *longest: int, **options: Any
) -> Tensor:
    """Stand for torch's attention over segments on a GPU: causal from the bottom right within each segment."""
    assert options["window_size"] == (-1, 0)
    assert query_ends.dtype == key_ends.dtype == torch.int32
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for (start, end), (first, last) in zip(_spans(query_ends), _spans(key_ends), strict=True):
        assert end - start <= longest[0]
        assert last - first <= longest[1]
        parts = [query[start:end], *(part[first:last].repeat_interleave(repeats, 1) for part in (key, value))]
        mask = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - end + start)
        heads_first = [part.transpose(0, 1) for part in parts]
        output = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=options["scale"])
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def _varlen_2_15(*args: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return _varlen(*args, **options)


def _varlen_2_11(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    assert args[0].shape[1] == args[1].shape[1], "it has one number of heads"
    return _varlen(*args, scale=scale, window_size=window_size)


def _spans(ends: Tensor) -> Iterator[tuple[int, int]]:
    return pairwise(ends.tolist())


def _ask(function: Callable[..., Tensor], heads: int) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        # As a layer has them: a projection's output, with heads behind tokens in memory.
        values = torch.randn(1, TOKENS, count, SIZE, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    leaves = [draw(4), draw(heads), draw(heads)]
    output = function(*(leaf.transpose(1, 2) for leaf in leaves))
    weights = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    (output * weights).sum().backward()
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _under_a_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=build_mask(GROUPS)[0, 0], scale=SCALE).transpose(
        1, 2
    )


def test_a_token_attends_to_its_prefix_and_its_own_branch() -> None:
    groups = [PackedGroup(0, 2, (2, 1)), PackedGroup(5, 1, (1,))]
    assert build_mask(groups)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("way", ["parts", "blocks", "torch 2.15", "torch 2.11"])
def test_attention_is_that_under_a_mask(way: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(*parts: Tensor) -> Tensor:
        if way == "parts":
            return attend_in_parts(*parts, GROUPS, SCALE)
        if way == "blocks":
            return attend_in_blocks(*parts, GROUPS, SCALE)
        varlen = _varlen_2_15 if way == "torch 2.15" else _varlen_2_11
        monkeypatch.setattr(shared_attention, "load_varlen", lambda: varlen)
        row = PackedRow(GROUPS, plan_keys(GROUPS))
        return attend(SimpleNamespace(), *parts, None, packed_row=row, scaling=SCALE)[0]  # type: ignore[arg-type]

    output, gradients = _ask(function, heads)
    expected, expected_gradients = _ask(_under_a_mask, heads)
    assert output.shape == (1, TOKENS, 4, SIZE)
    assert float((output - expected).abs().max()) < 1e-13
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((gradient - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("way", ["parts", "blocks"])
def test_branches_without_a_prefix(way: str) -> None:
    groups = (PackedGroup(0, 0, (3, 4)), PackedGroup(7, 2))
    function = attend_in_parts if way == "parts" else attend_in_blocks
    parts = [torch.randn(1, 2, 9, SIZE, dtype=torch.float64) for _ in range(3)]
    expected = scaled_dot_product_attention(*parts, attn_mask=build_mask(groups)[0, 0], scale=SCALE).transpose(1, 2)
    assert float((function(*parts, groups, SCALE) - expected).abs().max()) < 1e-13


def test_float32_and_narrow_inputs_under_autocast() -> None:
    """Of a model with float32 weights, whose rotary embeddings leave queries and keys in float32."""
    query, key, value = (torch.randn(1, 2, TOKENS, SIZE) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attend(SimpleNamespace(), query, key, value.bfloat16(), None, packed_row=PackedRow(GROUPS))  # type: ignore[arg-type]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=build_mask(GROUPS)[0, 0]).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    assert float((output - expected).abs().max()) < 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rounded = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    output, _ = _ask(lambda *parts: attend_in_parts(*(part.to(dtype) for part in parts), GROUPS, SCALE), 2)
    expected, _ = _ask(_under_a_mask, 2)
    assert float((output.double() - expected).abs().max()) < rounded


@pytest.mark.parametrize(("answers", "length"), [(8, 64), (8, 512), (16, 1024)])
def test_pairs_that_are_computed(answers: int, length: int) -> None:
    """Against those that are needed: 1.05 on CPUs and in segments on GPUs, 1.25 in blocks. A mask takes 2 to 11."""
    groups = [PackedGroup(0, 1090, (length,) * answers)]
    query = key = value = torch.zeros(1, 1, groups[0].end, 8)
    with torch.no_grad(), CountPairs() as parts:
        attend_in_parts(query, key, value, groups, SCALE)
    with torch.no_grad(), CountPairs() as blocks:
        attend_in_blocks(query, key, value, groups, SCALE)
    assert parts.pairs == groups[0].pairs
    assert groups[0].pairs <= blocks.pairs <= 1.25 * groups[0].pairs
    assert pairs_in_segments(plan_keys(groups)) == groups[0].pairs
