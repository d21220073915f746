"""Splits: shares are exact, groups stay whole, classes keep their mix, and nothing is in two parts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from ray_vlm.data.splits import code_texts, plan_split, rarest_tags
from ray_vlm.errors import ConfigError
from tests.support import earlier_plan


def _code_groups(groups: Sequence[str]) -> np.ndarray:
    """Return a code for each row's group, `int64 [rows]`; -1 for rows without one, whose text is empty."""
    codes: dict[str, int] = {"": -1}
    return np.fromiter((codes.setdefault(group, len(codes) - 1) for group in groups), np.int64, len(groups))


def _split(groups: list[str], strata: list[str], shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    return plan_split(_code_groups(groups), code_texts(strata), shares, seed)


def _check_complete(parts: dict[str, np.ndarray], count: int) -> None:
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [10, 99, 1000])
def test_shares_are_exact_and_every_row_is_in_one_part(count: int) -> None:
    parts = _split([""] * count, [""] * count, {"eval": 0.1, "test": 0.2}, seed=3)
    _check_complete(parts, count)
    assert abs(len(parts["eval"]) - 0.1 * count) <= 1
    assert abs(len(parts["test"]) - 0.2 * count) <= 1
    again = _split([""] * count, [""] * count, {"eval": 0.1, "test": 0.2}, seed=3)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)
    other = _split([""] * count, [""] * count, {"eval": 0.1, "test": 0.2}, seed=4)
    assert not np.array_equal(parts["train"], other["train"])


def test_classes_keep_their_mix() -> None:
    strata = ["common"] * 900 + ["rare"] * 60 + ["rarer"] * 40
    parts = _split([""] * 1000, strata, {"eval": 0.1}, seed=0)
    counts = Counter(strata[i] for i in parts["eval"])
    assert abs(counts["common"] - 90) <= 1
    assert abs(counts["rare"] - 6) <= 1
    assert abs(counts["rarer"] - 4) <= 1


def test_no_group_is_cut() -> None:
    groups = [f"task{i // 4}" for i in range(400)]
    parts = _split(groups, [""] * 400, {"eval": 0.1, "test": 0.1}, seed=1)
    _check_complete(parts, 400)
    of = {name: {groups[i] for i in rows} for name, rows in parts.items()}
    assert not of["train"] & (of["eval"] | of["test"])
    assert not of["eval"] & of["test"]
    assert len(of["eval"]) == len(of["test"]) == 10


def test_rows_without_a_group_are_units_of_their_own() -> None:
    parts = _split(["a", "a", *[""] * 18], [""] * 20, {"eval": 0.5}, seed=1)
    _check_complete(parts, 20)
    assert len({0, 1} & set(parts["eval"].tolist())) in (0, 2)


def test_a_part_that_would_be_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval would be empty"):
        _split([""] * 3, [""] * 3, {"eval": 0.01}, seed=0)


@pytest.mark.parametrize("grouped", [False, True])
def test_parts_are_those_of_earlier_versions(grouped: bool) -> None:
    """Also with codes of groups that other rows have too, and in another order."""
    rng = np.random.default_rng(grouped)
    for _ in range(60):
        count, shares = int(rng.integers(30, 200)), {"eval": 0.2, "test": float(rng.choice([0.1, 0.33]))}
        groups = rng.choice(["", "", "z", "b", "a", *(f"g{i}" for i in range(30))], count).tolist()
        groups = groups if grouped else [""] * count
        strata = rng.choice(["", "rare", "A", "common"], count, p=[0.1, 0.1, 0.3, 0.5]).tolist()
        before = earlier_plan.plan_split(groups, strata, shares, 3)
        codes = _code_groups(groups)
        other = np.append(rng.permutation(codes.max() + 1) * 1_000_003, -1)  # -1 stays -1
        for group_of in (codes, other[codes]):
            now = plan_split(group_of, code_texts(strata), shares, 3)
            assert list(now) == list(before)
            assert all(np.array_equal(now[name], before[name]) for name in before)


def test_the_rarest_tag_of_a_row_is_its_stratum() -> None:
    kinds = [("common", "rare"), ("common",), (), ("other", "rare"), ("none has it",)]
    kind_of = np.array([1] * 6 + [0] * 2 + [3] * 3 + [2])
    tags = [kinds[kind] for kind in kind_of]
    counts = Counter(tag for row_tags in tags for tag in set(row_tags))
    names = [min(row_tags, key=lambda tag: (counts[tag], tag), default="") for row_tags in tags]
    order = {name: code for code, name in enumerate(sorted(set(names)))}
    codes = rarest_tags(kinds, kind_of)
    ranks = {code: rank for rank, code in enumerate(sorted(set(codes.tolist())))}
    assert [ranks[code] for code in codes.tolist()] == [order[name] for name in names]
