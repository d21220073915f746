"""Which rows share a prefix, and which tokens attend to each other in a tree."""

import random

import pytest
import torch

from ray_vlm.models.prefix_sharing import PrefixGroup, _visible, plan_packs, plan_trees


class Images:
    """Images of rows by name, and the tokens at which each row's images end."""

    def __init__(self, shown: list[str], ends: list[int]):
        self.shown, self.ends = shown, ends

    def end(self, row: int) -> int:
        return self.ends[row]

    def same(self, one: int, other: int) -> bool:
        return self.shown[one] == self.shown[other]


def test_answers_to_one_prompt_are_one_tree_in_any_order() -> None:
    prompt, other = [7, 8, 9, 9], [7, 8, 9, 5]
    tokens = [[*prompt, 1], [*other, 1], [*prompt, 2, 3], [*other, 2], [*prompt, 1, 4]]
    trees = plan_trees(tokens, Images(["a", "b", "a", "b", "a"], [3] * 5))
    assert trees == [PrefixGroup((0, 2, 4), 4), PrefixGroup((1, 3), 4)]


@pytest.mark.parametrize(
    ("shown", "ends"),
    [
        (["a", "b"], [2, 2]),  # images that differ, if only in a pixel
        (["a", "a"], [4, 2]),  # an image after the first token that differs
    ],
)
def test_rows_that_must_not_share(shown: list[str], ends: list[int]) -> None:
    tokens = [[1, 2, 3, 4], [1, 2, 3, 5]]
    assert plan_trees(tokens, Images(["a", "a"], [2, 2])) == [PrefixGroup((0, 1), 3)]
    assert plan_trees(tokens, Images(shown, ends)) == [PrefixGroup((0,), 4), PrefixGroup((1,), 4)]


def test_rows_with_a_short_common_prefix_do_not_share() -> None:
    assert len(plan_trees([[1, 2, 3, 4, 5, 6], [1, 7, 8, 9, 9, 9]], Images(["", ""], [0, 0]))) == 2


def test_equal_rows_are_one_prefix_without_branches() -> None:
    assert plan_trees([[1, 2, 3]] * 3, Images([""] * 3, [0] * 3)) == [PrefixGroup((0, 1, 2), 3)]


def test_a_branch_attends_to_the_prefix_and_itself() -> None:
    trees, branches = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]), torch.tensor([[0, 0, 1, 1, 2, 0, 1, -1]])
    seen = _visible(trees, branches)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_packs_have_the_lowest_cost() -> None:
    assert plan_packs([10, 3, 7, 5, 5], hidden=64) == [[0], [2, 1], [3, 4]]
    assert plan_packs([4, 4, 4], hidden=64) == [[0], [1], [2]], "nothing is gained"
    assert len(plan_packs([300, 300, 300, 40], hidden=4096)) == 1, "attention is cheap compared with wide layers"
    assert len(plan_packs([300, 300, 300, 40], hidden=64)) == 3, "and expensive compared with narrow ones"
    assert plan_packs([6000, 5000], hidden=10**9) == [[0], [1]], "a pack's mask is square"
    rng = random.Random(0)
    for _ in range(100):
        sizes = [rng.randint(1, 50) for _ in range(rng.randint(1, 20))]
        packs = plan_packs(sizes, hidden=64)
        assert sorted(n for pack in packs for n in pack) == list(range(len(sizes)))
        width = max(sum(sizes[n] for n in pack) for pack in packs)
        assert len(packs) * width <= 1.2 * len(sizes) * max(sizes)
