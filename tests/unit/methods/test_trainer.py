"""The batches of a plan as TRL's dataloader, without a model."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ray_vlm.data.feed import Feed
from ray_vlm.data.plan import Plan
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.trainer import PlannedBatches


def _stream(plan: Plan, first: int, replaced: dict[int, int]) -> Iterator[list[Any]]:
    for number in range(first, plan.num_steps * plan.accumulation):
        rows = plan.micro_batch(number, 0).rows
        yield [SimpleNamespace(number=replaced.get(row, row), images=[b""]) for row in rows]


def _batches(plan: Plan, first: int = 0, replaced: dict[int, int] | None = None) -> PlannedBatches:
    stream: Any = _stream(plan, first, replaced or {})
    build = lambda rows: [row.number for row in rows]  # noqa: E731
    return PlannedBatches(stream, Feed(stream, build), plan, plan.accumulation, Clock("cpu"), first)


def test_an_epoch_that_is_resumed_midway_yields_its_rest() -> None:
    """Two epochs of two steps of two micro-batches, from the second step on."""
    plan = Plan(8, 4, 2, 1, num_epochs=2.0, shuffle=False)
    batches = _batches(plan, first=2)
    assert len(batches) == 4
    assert list(batches) == [[4, 5], [6, 7]]
    assert list(batches) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(batches) == [], "the plan has ended"
    assert batches.num_images == 12


def test_a_row_that_was_replaced_is_told_with_its_replacement() -> None:
    batches = _batches(Plan(4, 2, 2, 1, shuffle=False), replaced={3: 0})
    assert list(batches) == [[0, 1], [2, 0]]
    assert batches.lost == [(3, 0)]


def test_rows_that_are_looked_at_stay_in_the_stream() -> None:
    batches = _batches(Plan(8, 4, 2, 1, num_epochs=2.0, shuffle=False))
    ahead, taken = [], []
    for _ in range(2):
        for batch in batches:
            taken.append(batch)
            coming = batches.peek()
            ahead.append(coming and [row.number for row in coming])
            assert batches.number == len(taken)
    assert ahead == [*taken[1:], None]
    assert batches.num_images == 16
