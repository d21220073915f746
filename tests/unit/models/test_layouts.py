"""Which rows share a prefix, where their tokens go, and when one row is cheaper than padded ones."""

import numpy as np
import pytest
import torch

from ray_vlm.models.layouts import (
    BatchRows,
    LayoutPlanner,
    PackedGroup,
    PackedLayout,
    PackingOptions,
    PaddedLayout,
    PrefixGroup,
    equal_runs,
    group_rows,
    is_packed_cheaper,
    place_groups,
    plan_keys,
)

IMAGE = 9


def _ids(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def _count_up(ids: torch.Tensor, kinds: torch.Tensor, image_grid_thw: object, attention_mask: torch.Tensor) -> tuple:
    """Stand for a model's `get_rope_index`: positions without images."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions.expand(3, *positions.shape), None


def _planner(packing: PackingOptions, is_cpu: bool = True, keys: bool = False) -> LayoutPlanner:
    return LayoutPlanner(_count_up, packing, IMAGE, is_cpu, keys)


def _rows(tokens: list[np.ndarray], starts: list[int] | None = None, columns: int = 0) -> BatchRows:
    spans = [(0, 0)] * len(tokens)
    columns = columns or max(map(len, tokens))
    return BatchRows(tokens, [min(2, len(ids)) for ids in tokens], starts or [0] * len(tokens), columns, spans, [])


def test_answers_to_one_prompt_are_one_group_in_any_order() -> None:
    prompt, other = [7, 8, 9, 9], [7, 8, 9, 5]
    tokens = _ids([*prompt, 1], [*other, 1], [*prompt, 2, 3], [*other, 2], [*prompt, 1, 4])
    groups = group_rows(tokens, [4] * 5, [(0, 1), (1, 2), (0, 1), (1, 2), (0, 1)])
    assert groups == [PrefixGroup((0, 2, 4), 4), PrefixGroup((1, 3), 4)]


def test_what_answers_have_in_common_is_shared_too() -> None:
    tokens = _ids([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 8, 8])
    assert group_rows(tokens[:2], [2, 2], [(0, 0)] * 2) == [PrefixGroup((0, 1), 4)]
    assert group_rows(tokens, [2] * 3, [(0, 0)] * 3) == [PrefixGroup((0, 1, 2), 3)]


@pytest.mark.parametrize(
    ("spans", "prompts"),
    [
        ([(0, 1), (1, 2)], [3, 3]),  # other images
        ([(0, 1), (0, 1)], [4, 4]),  # other prompts
        ([(0, 1), (0, 0)], [3, 3]),  # an image in one of them
    ],
)
def test_rows_that_must_not_share(spans: list[tuple[int, int]], prompts: list[int]) -> None:
    tokens = _ids([1, 2, 3, 4], [1, 2, 3, 5])
    assert group_rows(tokens, [3, 3], [(0, 1), (0, 1)]) == [PrefixGroup((0, 1), 3)]
    assert group_rows(tokens, [3, 3], [(0, 0), (1, 1)]) == [PrefixGroup((0, 1), 3)], "both show none"
    assert group_rows(tokens, prompts, spans) == [PrefixGroup((0,), 4), PrefixGroup((1,), 4)]


def test_equal_rows_are_one_prefix_without_branches() -> None:
    groups = group_rows(_ids(*[[1, 2, 3]] * 3), [2] * 3, [(0, 0)] * 3)
    assert groups == [PrefixGroup((0, 1, 2), 3)]
    assert place_groups(groups, [3] * 3) == [PackedGroup(0, 3)]


def test_tokens_go_to_the_packed_row_and_back() -> None:
    """The example of `PackedLayout`, with rows that start in other columns."""
    tokens = _ids([1, 2, 3, 4], [1, 2, 5], [6, 7, 8])
    layout = _planner(PackingOptions(share=True, pack=True)).plan(_rows(tokens, [1, 1, 0], 6))
    assert isinstance(layout, PackedLayout)
    assert layout.row.groups == (PackedGroup(0, 2, (2, 1)), PackedGroup(5, 3))
    batch = torch.zeros(3, 6, dtype=torch.long)
    for row, (start, ids) in enumerate(zip([1, 1, 0], tokens, strict=True)):
        batch[row, start : start + len(ids)] = torch.from_numpy(ids)
    packed = batch.reshape(-1)[layout.source]
    assert packed.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert torch.equal(packed[0][layout.targets] * (batch > 0), batch)
    assert layout.position_ids[0].tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert (layout.tokens, layout.row.pairs, layout.pairs) == (0, 3 + (4 + 3) + 3 + 6, 8 * 9 // 2 - 19)


def test_a_packed_row_on_a_gpu_ends_at_a_multiple() -> None:
    tokens = _ids([1, 2, 3, 4], [1, 2, 5], [6, 7, 8])
    layout = _planner(PackingOptions(share=True), is_cpu=False, keys=True).plan(_rows(tokens))
    assert isinstance(layout, PackedLayout)
    assert layout.source.shape == (1, 128)
    assert layout.is_token is not None
    assert int(layout.is_token.sum()) == 8
    assert layout.row.groups[-1] == PackedGroup(8, 120), "padding attends to padding"
    assert layout.row.keys is not None
    assert layout.row.keys.index[:12].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]


def test_a_layout_is_uploaded_without_a_read() -> None:
    """On the device "meta" a read raises."""
    planner = _planner(PackingOptions(share=True), is_cpu=False, keys=True)
    packed = planner.plan(_rows(_ids([1, 2, 3, 4], [1, 2, 5]))).to("meta", non_blocking=True)
    assert isinstance(packed, PackedLayout)
    assert packed.row.keys is not None
    tensors = [packed.source, packed.targets, packed.position_ids, packed.is_token, packed.row.keys.index]
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    padded = _planner(PackingOptions()).plan(_rows(_ids([1, 2], [3]))).to("meta")
    assert padded.position_ids.device.type == "meta"


def test_keys_of_segments() -> None:
    keys = plan_keys([PackedGroup(0, 2, (2, 1)), PackedGroup(5, 3)])
    assert keys.index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert keys.query_ends.tolist() == [0, 2, 4, 5, 8]
    assert keys.key_ends.tolist() == [0, 2, 6, 9, 12]
    assert (keys.longest_query, keys.longest_key) == (3, 4)


def test_runs_of_equal_segments() -> None:
    groups = [PackedGroup(0, 4, (2, 2, 3)), PackedGroup(11, 3), PackedGroup(14, 3)]
    assert equal_runs(groups) == [(0, 4, 1), (4, 2, 2), (8, 3, 3)]


@pytest.mark.parametrize("is_cpu", [True, False])
def test_shared_answers_are_cheaper_in_one_row(is_cpu: bool) -> None:
    for answers in (2, 8, 16):
        for length in (16, 64, 256, 1024):
            group = [PackedGroup(0, 280, (length,) * answers)]
            assert is_packed_cheaper(group, answers, 280 + length, False, 256, is_cpu)


def test_many_short_rows_are_cheaper_with_padding_on_a_cpu() -> None:
    lengths = [18 + n % 4 for n in range(64)]
    groups = place_groups([PrefixGroup((n,), length) for n, length in enumerate(lengths)], lengths)
    assert not is_packed_cheaper(groups, 64, 21, False, 64, is_cpu=True), "each would be a call"
    assert is_packed_cheaper(groups, 64, 21, False, 64, is_cpu=False), "one call in all"
    assert is_packed_cheaper(groups, 64, 200, False, 64, is_cpu=True), "most is padding"
    even = place_groups([PrefixGroup((n,), 358 + n) for n in range(4)], [358 + n for n in range(4)])
    assert not is_packed_cheaper(even, 4, 361, False, 256, is_cpu=True), "next to no padding"


def test_equal_rows_stay_as_they_are() -> None:
    layout = _planner(PackingOptions(pack=True)).plan(_rows(_ids([1, 2, 3], [4, 5, 6])))
    assert isinstance(layout, PaddedLayout)
    assert not layout.masked
    assert (layout.tokens, layout.pairs) == (0, 0)


def test_only_padding_on_the_left_needs_a_mask() -> None:
    planner, tokens = _planner(PackingOptions()), _ids([1, 2, 3], [4])
    right, left = planner.plan(_rows(tokens)), planner.plan(_rows(tokens, [0, 2]))
    assert isinstance(right, PaddedLayout)
    assert isinstance(left, PaddedLayout)
    assert (right.masked, left.masked) == (False, True)
    assert (right.tokens, right.pairs) == (2, 12 - 6 - 1)
    assert left.position_ids[0].tolist() == [[0, 1, 2], [1, 1, 0]]


def test_images_are_in_the_order_of_the_rows() -> None:
    """Two rows show the second image, and one the first, behind them; then each row for itself."""
    tokens = _ids([IMAGE, 1, 2, 3], [IMAGE, 1, 2, 4], [IMAGE, 5, 6, 7])
    rows = BatchRows(tokens, [3] * 3, [0] * 3, 4, [(1, 2), (1, 2), (0, 1)], [(1, 2, 4), (1, 2, 2)])
    shared = _planner(PackingOptions(share=True)).plan(rows)
    assert (shared.images, shared.image_numbers) == (((8, 12), (0, 8)), (1, 0))
    apart = _planner(PackingOptions()).plan(rows)
    assert apart.image_numbers == (1, 1, 0)
