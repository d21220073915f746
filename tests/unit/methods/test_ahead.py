"""The calls of a step and of the next one, answered by samplers that threads play."""

import numpy as np
import torch

from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.interface import Sampling
from ray_vlm.methods.ahead import SampledAhead, seeds_of
from tests.support.played_samplers import PlayedSamplers, expected_group, row

SAMPLING = Sampling(num_generations=2, max_new_tokens=4)


def _model(value: float) -> torch.nn.Module:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([value]))
    return model


def test_seeds_depend_on_the_run_the_step_the_row_and_how_often_it_came() -> None:
    rows = [row(4), row(7), row(4)]
    assert seeds_of(rows, 1, 5) == [(1, 5, 4, 0), (1, 5, 7, 0), (1, 5, 4, 1)]


def test_the_next_step_is_sampled_with_the_weights_of_this_one() -> None:
    samplers = PlayedSamplers(2)
    pool = SamplerPool(samplers, DistributedContext(), 1)
    ahead, staleness = SampledAhead(pool), []
    steps = {step: [row(2 * step), row(2 * step + 1)] for step in range(4)}
    for step in range(3):
        pool.update(_model(float(step)))
        for asked in (step, step + 1):
            ahead.submit(asked, step, steps[asked], seeds_of(steps[asked], 0, asked), SAMPLING)
        groups, logged = ahead.collect(step)
        weight = float(max(0, step - 1))
        assert groups == [expected_group(weight, seed, 2) for seed in seeds_of(steps[step], 0, step)]
        staleness.append(logged["staleness"])
        assert logged["samplers"] == 2
        assert min(logged.values()) >= 0
    assert staleness == [0.0, 1.0, 1.0]
    asked = [number for sampler in samplers.samplers for (number,) in sampler.asked]
    assert len(asked) == len(set(asked)), "nothing is sampled twice"
    pool.close()


def test_rows_that_were_replaced_since_are_sampled_anew() -> None:
    pool = SamplerPool(PlayedSamplers(1), DistributedContext(), 1)
    ahead = SampledAhead(pool)
    pool.update(_model(1.0))
    first, second = [row(1), row(2)], [row(1), row(9)]
    ahead.submit(1, 0, first, seeds_of(first, 0, 1), SAMPLING)
    ahead.submit(1, 1, second, seeds_of(second, 0, 1), SAMPLING)
    groups, logged = ahead.collect(1)
    assert groups == [expected_group(1.0, seed, 2) for seed in seeds_of(second, 0, 1)]
    assert logged["staleness"] == 0.0
    assert np.isfinite(list(logged.values())).all()
    pool.close()
