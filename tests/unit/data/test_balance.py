"""Rare classes: factors are exact in expectation, weights are those asked for, and unknown names are refused."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from ray_vlm.config.data import Data
from ray_vlm.data import balance
from ray_vlm.data.balance import Balance, code_tags, describe_balance, plan_balance
from ray_vlm.data.plan import Plan, epoch_order
from ray_vlm.errors import ConfigError
from tests.support import earlier_plan

TAGS = [("object=a", "condition=clear")] * 90 + [("object=b", "condition=blocked")] * 10


def _balance(tags=TAGS, **options):
    return plan_balance(*code_tags(tags), np.ones(len(tags)), Data(**options))


def test_nothing_asked_for_changes_nothing() -> None:
    balance = _balance()
    assert balance.repeat_factors is None
    assert balance.token_weights == ()
    assert [entry["rows"] for entry in balance.table] == [90, 90, 10, 10]


def test_explicit_factors_by_value_or_whole_tag_take_the_largest() -> None:
    balance = _balance(oversample={"b": 3.0, "condition=blocked": 2.5})
    assert balance.repeat_factors.tolist() == [1.0] * 90 + [3.0] * 10
    rare = next(entry for entry in balance.table if entry["tag"] == "object=b")
    assert rare["shown_share"] == pytest.approx(30 / 120)
    assert any("object=b" in line and "3.00" in line for line in describe_balance(balance))


def test_auto_is_the_lvis_repeat_factor() -> None:
    balance = _balance(oversample="auto", oversample_threshold=0.4)
    assert balance.repeat_factors[-1] == pytest.approx(math.sqrt(0.4 / 0.1))
    assert balance.repeat_factors[0] == 1.0
    assert _balance(oversample="auto").repeat_factors[-1] == pytest.approx(math.sqrt(0.5 / 0.1)), (
        "two values: half is even"
    )


def test_a_common_class_can_be_shown_less() -> None:
    assert _balance(tags=[("a",)] * 3 + [("b",)], oversample={"a": 0.5}).repeat_factors.tolist() == [0.5, 0.5, 0.5, 1.0]


def test_weights_from_frequencies_have_a_mean_of_one() -> None:
    for setting, power in (("inverse", 1.0), ("inverse_sqrt", 0.5)):
        weights = dict(_balance(class_weights=setting).token_weights)
        assert set(weights) == {"object=a", "object=b"}, "conditions have a setting of their own"
        assert (90 * weights["object=a"] + 10 * weights["object=b"]) / 100 == pytest.approx(1.0)
        assert weights["object=b"] / weights["object=a"] == pytest.approx(9**power)
    assert dict(_balance(condition_weights={"blocked": 4.0}).token_weights) == {"condition=blocked": 4.0}


def test_objects_count_for_weights_and_rows_for_factors() -> None:
    tags = [("a", "a", "a", "b"), ("a",)]
    weights = dict(_balance(tags=tags, class_weights="inverse").token_weights)
    assert weights["b"] / weights["a"] == pytest.approx(4.0)
    assert _balance(tags=tags, oversample={"b": 2.0}).repeat_factors.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"oversample": {"c": 2.0}}, "no training row has 'c'"),
        ({"class_weights": {"b": 0.0}}, "above 0"),
        ({"condition_weights": {"b": 2.0}}, "no training row has 'b'"),
        ({"oversample": {"b": float(2000)}}, "up to 1000"),
    ],
)
def test_names_and_numbers_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _balance(**options)


def test_a_value_of_two_attributes_must_be_written_whole() -> None:
    with pytest.raises(ConfigError, match="object=x or other=x"):
        _balance(tags=[("object=x", "other=x")], oversample={"x": 2.0})


def test_fractions_are_exact_in_expectation_and_lengths_fixed_to_one() -> None:
    factors = np.array([1.0] * 40 + [2.5] * 7 + [0.3] * 9 + [1.0 / 3] * 5)
    epochs, seen = 3000, np.zeros(len(factors))
    lengths = set()
    for epoch in range(epochs):
        order = epoch_order(len(factors), True, 5, epoch, factors)
        lengths.add(len(order))
        counts = np.bincount(order, minlength=len(factors))
        assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
        seen += counts
    total = factors.sum()
    assert lengths <= {math.floor(total), math.ceil(total)}
    fraction = factors - np.floor(factors)
    sigma = np.sqrt(fraction * (1 - fraction) / epochs)
    assert (np.abs(seen / epochs - factors) <= 4 * sigma + 1e-12).all()


def test_the_same_seed_gives_the_same_rows_and_steps_never_overflow() -> None:
    factors = np.array([1.0] * 29 + [1.4] * 8)
    plan = Plan(37, 8, 4, 2, num_epochs=3, seed=1, repeat_factors=factors)
    assert plan.rows_per_epoch == 40
    for step in range(plan.num_steps):
        rows = plan.step_rows(step)
        assert 0 < len(rows) <= 8
        assert np.array_equal(rows, Plan(37, 8, 4, 2, num_epochs=3, seed=1, repeat_factors=factors).step_rows(step))


def test_a_step_s_rows_do_not_depend_on_the_workers_and_costs_are_shared_out() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(6, 1, 400).astype(np.float32)
    for world in (2, 3, 8):
        plan = Plan(400, 64, 2, world, token_costs=costs)
        ratios = []
        for step in range(6):
            ranks = [plan.rank_step(step, rank) for rank in range(world)]
            rows = sorted(r for parts in ranks for part in parts if not part.padding for r in part.rows)
            assert rows == sorted(Plan(400, 64, 2, 1).step_rows(step).tolist())
            sums = [sum(costs[list(p.rows)].sum() for p in parts if not p.padding) for parts in ranks]
            ratios.append(max(sums) / max(np.mean(sums), costs[rows].max()))  # no deal can do better than 1
        plain = [np.array_split(costs[plan.step_rows(s)], world) for s in range(6)]
        assert np.mean(ratios) < 1.08
        assert np.mean([max(p.sum() for p in s) / np.mean([p.sum() for p in s]) for s in plain]) > np.mean(ratios)


def test_an_equals_sign_in_a_value_or_a_class_name_is_text() -> None:
    tags = [("size=a=1",)] * 9 + [("size=b=2",)]
    weights = dict(_balance(tags=tags, class_weights="inverse").token_weights)
    assert weights["size=b=2"] / weights["size=a=1"] == pytest.approx(9.0)
    classes = [("speed=30",)] * 9 + [("dog",)]
    balance = plan_balance(*code_tags(classes), np.ones(10), Data(class_weights="inverse"), attributes=False)
    assert dict(balance.token_weights)["dog"] / dict(balance.token_weights)["speed=30"] == pytest.approx(9.0)


def test_a_condition_may_be_shown_less_often() -> None:
    tags = [("object=a", "condition=ok")] * 4 + [("object=a", "condition=bad")]
    assert _balance(tags=tags, oversample={"ok": 0.5}).repeat_factors.tolist() == [0.5] * 4 + [1.0]


def test_results_are_those_of_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the kinds, also of kinds that no row has."""
    monkeypatch.setattr(balance, "_ROWS_AT_ONCE", 8)
    rng = np.random.default_rng(0)
    names = [f"{key}={value}" for key in ("object", "condition", "size") for value in "abcd"]
    for case in range(60):
        kinds = list({tuple(rng.choice(names, rng.integers(0, 4)).tolist()): None for _ in range(12)})
        kind_of = rng.integers(0, len(kinds) - 1, int(rng.integers(1, 60)))  # never the last one
        tags, weights = [kinds[kind] for kind in kind_of], rng.choice([0.5, 1.0, 2.0], len(kind_of))
        data = Data(oversample=(None, "auto")[case % 2], class_weights=(None, "inverse", "inverse_sqrt")[case % 3])
        before, problems = _plan_or_problems(earlier_plan.plan_balance, tags, weights, data)
        for coded in ((kinds, kind_of), code_tags(tags)):
            now, others = _plan_or_problems(plan_balance, *coded, weights, data)
            assert others == problems
            if now is not None:
                assert (now.token_weights, now.table) == (before.token_weights, before.table)
                assert np.array_equal(now.repeat_factors, before.repeat_factors)


def _plan_or_problems(plan: Callable[..., Balance], *arguments: object) -> tuple[Balance | None, list[str]]:
    try:
        return plan(*arguments), []
    except ConfigError as error:
        return None, error.problems


def test_an_epoch_has_at_least_one_row() -> None:
    with pytest.raises(ConfigError, match="less than one row"):
        _balance(tags=[("a",)] * 50, oversample={"a": 0.01})
