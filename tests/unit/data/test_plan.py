"""The plan: every row once an epoch, the same steps for any number of workers, any step without those before."""

import itertools
import pickle

import numpy as np
import pytest

from ray_vlm.data import plan as plans
from ray_vlm.data.balance import deal, group_alike, min_parts
from ray_vlm.data.plan import Plan, plan_sample


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "batch", "micro"), [(50, 8, 4), (7, 16, 3), (64, 8, 1), (9, 5, 2), (1, 6, 1)])
def test_every_row_exactly_once_an_epoch_on_any_world(world: int, rows: int, batch: int, micro: int) -> None:
    plan = Plan(rows, batch, micro, world, num_epochs=2, seed=3)
    for epoch in range(2):
        seen = []
        for step in range(plan.steps_per_epoch):
            of_step = []
            for rank in range(world):
                parts = plan.rank_step(epoch * plan.steps_per_epoch + step, rank)
                assert len(parts) == plan.accumulation
                assert all(0 < len(part.rows) <= micro for part in parts)
                of_step += [r for part in parts if not part.padding for r in part.rows]
            one = Plan(rows, batch, micro, 1, num_epochs=2, seed=3).step_rows(epoch * plan.steps_per_epoch + step)
            assert of_step == one.tolist(), "the step's rows, in order, whatever the world size"
            seen += of_step
        assert sorted(seen) == list(range(rows))


def test_epochs_differ_and_seeds_repeat() -> None:
    plan = Plan(40, 8, 8, 1, num_epochs=2, seed=1)
    first = np.concatenate([plan.step_rows(s) for s in range(5)])
    second = np.concatenate([plan.step_rows(s) for s in range(5, 10)])
    assert not np.array_equal(first, second)
    assert np.array_equal(first, np.concatenate([Plan(40, 8, 8, 1, seed=1).step_rows(s) for s in range(5)]))


def test_unshuffled_is_file_order() -> None:
    plan = Plan(10, 4, 4, 1, shuffle=False)
    assert [plan.step_rows(s).tolist() for s in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_micro_batches_count_through_the_run() -> None:
    plan = Plan(30, 8, 2, 2, num_epochs=2)
    for number in range(plan.num_steps * plan.accumulation):
        step, part = divmod(number, plan.accumulation)
        assert plan.micro_batch(number, 1) == plan.rank_step(step, 1)[part]


def test_max_steps_wins_over_epochs() -> None:
    assert Plan(10, 2, 2, 1, num_epochs=3).num_steps == 15
    assert Plan(10, 2, 2, 1, num_epochs=0.5).num_steps == 3
    assert Plan(10, 2, 2, 1, num_epochs=3, max_steps=4).num_steps == 4
    assert [Plan(100, 1, 1, 1, num_epochs=e).num_steps for e in (1.1, 2.2, 0.07)] == [110, 220, 7]


def test_a_step_is_dealt_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dealing costs as much as the step has rows: again for each rank, it would grow with the square of the ranks."""
    dealt: list[int] = []
    monkeypatch.setattr(plans, "deal", lambda rows, costs, size: dealt.append(size) or deal(rows, costs, size))
    plan = Plan(1000, 500, 1, 250, token_costs=np.arange(1000) % 7)
    rows = {step: [plan.rank_step(step, rank) for rank in range(250)] for step in (0, 1)}
    assert dealt == [250, 250]
    assert sorted(row for parts in rows[1] for part in parts for row in part.rows) == sorted(plan.step_rows(1).tolist())


def test_a_sample_is_spread_over_the_rows_and_over_their_periods() -> None:
    chosen = plan_sample(900, 300)
    assert [position // 3 for position in chosen] == list(range(300))
    assert all(70 < sum(position % 3 == k for position in chosen) < 130 for k in range(3))
    assert chosen == plan_sample(900, 300)
    assert plan_sample(3, 5) == plan_sample(3, None) == [0, 1, 2]


def test_micro_batches_under_a_budget_of_tokens() -> None:
    """No micro-batch is above it, no row is lost, and every rank and step has as many; costs stay balanced."""
    tokens = np.random.default_rng(0).integers(20, 1000, 200)
    for world in (1, 2, 3):
        plan = Plan(
            200,
            24,
            1,
            world,
            num_epochs=2,
            token_costs=tokens.astype(float),
            tokens=tokens,
            max_tokens_per_micro_batch=1500,
        )
        for step in range(plan.num_steps):
            batches = [plan.rank_step(step, rank) for rank in range(world)]
            assert {len(of_rank) for of_rank in batches} == {plan.accumulation}
            real = [b.rows for of_rank in batches for b in of_rank if not b.padding]
            assert all(len(rows) * tokens[list(rows)].max() <= 1500 for rows in real)
            assert sorted(r for rows in real for r in rows) == sorted(plan.step_rows(step).tolist())
        fewest = max(
            min_parts(tokens[rows], 1500)
            for step in range(plan.num_steps)
            for rows in deal(plan.step_rows(step), tokens[plan.step_rows(step)].astype(float), world)
        )
        assert plan.accumulation == fewest
    assert pickle.loads(pickle.dumps(plan)).rank_step(3, 1) == plan.rank_step(3, 1)


def test_groups_of_like_sizes() -> None:
    parts = group_alike(np.array([9, 1, 5, 5, 4]), 3, 100)
    assert [part.tolist() for part in parts] == [[0], [2, 3, 4], [1]]
    assert [part.tolist() for part in group_alike(np.array([3]), 2, 3)] == [[0], []]
    assert [part.tolist() for part in group_alike(np.array([5, 5, 5]), 2, 10)] in ([[0], [1, 2]], [[0, 1], [2]])
    assert min_parts(np.array([5, 5, 5]), 10) == 2
    assert min_parts(np.array([9, 1, 5, 5, 4]), 9) == 4


def test_no_other_groups_have_less_padding() -> None:
    """Against every way to cut sorted sizes into so many stretches."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes, budget = rng.integers(1, 60, 7), 120
        parts = min_parts(sizes, budget) + int(rng.integers(0, 2))
        groups = group_alike(sizes, parts, budget)
        ranked = np.sort(sizes)[::-1]
        cuts = itertools.combinations(range(1, 7), parts - 1)
        ways = [[ranked[a:b] for a, b in itertools.pairwise((0, *cut, 7))] for cut in cuts]
        fitting = [sum(len(g) * g[0] for g in way) for way in ways if all(len(g) * g[0] <= budget for g in way)]
        assert sum(len(part) * sizes[part].max() for part in groups) == min(fitting)
        assert sorted(np.concatenate(groups).tolist()) == list(range(7))
