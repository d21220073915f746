"""The heaviest micro-batch of a plan is found without a look at each of them."""

import numpy as np
import pytest

from ray_vlm.config.method import GrpoMethod, Method, SftMethod
from ray_vlm.config.train import Train
from ray_vlm.data.plan import MicroBatch, Plan
from ray_vlm.train.memory_plan import heaviest_rows


def _weigh_all(plan: Plan, tokens: np.ndarray, most: int) -> int:
    """The padded tokens of the heaviest micro-batch, of whose rows only the `most` longest run at a time."""
    weights = []
    for step in range(plan.num_steps):
        for rank in range(plan.world_size):
            for batch in plan.rank_step(step, rank):
                longest = sorted(tokens[list(batch.rows)].tolist(), reverse=True)[:most]
                weights.append(len(longest) * longest[0])
    return max(weights)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["rows", "dealt", "budget", "grpo"])
def test_no_micro_batch_is_heavier(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 400, int(rng.integers(9, 200)))
    world = int(rng.integers(1, 6))
    dealt, budgeted = kind in ("dealt", "budget"), kind == "budget"
    plan = Plan(
        num_rows=len(tokens),
        global_batch_size=8,
        micro_batch_size=int(rng.integers(1, 4)),
        world_size=world,
        num_epochs=1.5,
        seed=seed,
        token_costs=tokens if dealt else None,
        tokens=tokens if budgeted else None,
        max_tokens_per_micro_batch=700 if budgeted else 0,
    )
    method: Method = GrpoMethod(num_generations=4) if kind == "grpo" else SftMethod()
    rows = heaviest_rows(method, Train(micro_batch_size=8), plan, tokens)
    most = 2 if kind == "grpo" else len(tokens)  # eight answers at a time are those to two prompts
    assert len(rows) * tokens[list(rows)].max() == _weigh_all(plan, tokens, most)


def test_a_few_steps_of_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 400, 50_000)
    plan, steps = Plan(len(tokens), 512, 2, 64, token_costs=tokens), set()
    rank_step = Plan.rank_step

    def watch(self: Plan, step: int, rank: int) -> list[MicroBatch]:
        steps.add(step)
        return rank_step(self, step, rank)

    monkeypatch.setattr(Plan, "rank_step", watch)
    rows = heaviest_rows(SftMethod(), Train(), plan, tokens)
    assert tokens[list(rows)].max() > 390
    assert len(steps) < plan.num_steps / 4
