"""Reports to Ray: one finite score, higher is better, and numbers as Python types."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ray.train.v2.api.preemption import PreemptionInfo
from transformers import TrainerControl, TrainerState

from ray_vlm.distributed import DistributedContext
from ray_vlm.runs.monitor import as_python_numbers
from ray_vlm.train.best import is_better, recall_best, score_of
from ray_vlm.train.callbacks.preemption import Notice, PreemptionCallback


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_is_always_finite_and_a_bad_one_the_worst(bad: float) -> None:
    """Ray takes a missing score for the best when lower is better, and deletes what is good."""
    assert math.isfinite(score_of("f1_50", {"f1_50": bad}))
    assert score_of("f1_50", {"f1_50": bad}) < score_of("f1_50", {"f1_50": 0.0})
    assert score_of("loss", {"loss": bad}) < score_of("loss", {"loss": 1e9})


def test_a_lower_loss_and_a_higher_metric_score_higher() -> None:
    assert score_of("loss", {"loss": 0.1}) > score_of("loss", {"loss": 0.2})
    assert score_of("map", {"map": 0.2}) > score_of("map", {"map": 0.1})
    assert not is_better("loss", {"loss": math.nan}, {"loss": 0.5})
    assert is_better("loss", {"loss": 0.4}, {"loss": 0.5})
    assert not is_better("map", {"map": 0.4}, {"map": 0.5})


def test_numbers_of_numpy_and_torch_become_python_s_own() -> None:
    report = as_python_numbers({"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.int64(3), "d": 4, "e": "x"})
    assert {type(v) for v in report.values()} <= {int, float, str}
    assert json.loads(json.dumps(report)) == {"a": 0.5, "b": 2.0, "c": 3.0, "d": 4, "e": "x"}


def test_the_best_so_far_is_read_back_from_what_was_written() -> None:
    lines = [
        {"kind": "eval", "attempt": 1, "step": step, "epoch": 0.5, "time": 1.0, "f1_50": score}
        for step, score in ((2, 0.5), (4, None), (6, 0.75), (8, 0.75), (10, 0.5))
    ]
    assert recall_best(lines, "f1_50") == ({"step": 8, "metrics": {"f1_50": 0.75}}, 2)
    assert recall_best(lines[:2], "f1_50") == ({"step": 2, "metrics": {"f1_50": 0.5}}, 1)
    assert recall_best([], "f1_50") == (None, 0)


def test_among_equals_the_lower_loss_and_then_the_later_step_is_the_best() -> None:
    """In many runs F1 is 0 at first, and the loss decides which weights are better."""
    validations = ((2, 0.0, 3.0), (4, 0.0, 1.5), (6, 0.0, 2.0), (8, 0.0, 1.5), (10, 0.0, None))
    numbers = [{"f1_50": f1, "loss": math.nan if loss is None else loss} for _, f1, loss in validations]
    assert [is_better("f1_50", now, before) for before, now in pairwise(numbers)] == [True, False, True, False]
    lines = [{"kind": "eval", "attempt": 1, "step": step, "f1_50": f1, "loss": loss} for step, f1, loss in validations]
    best, since = recall_best(lines, "f1_50")
    assert best is not None
    assert (best["step"], since) == (8, 4), "early stopping still waits for the metric itself"


@pytest.mark.parametrize(("step", "leaves"), [(4, True), (5, False)])
def test_a_notice_after_the_last_step_is_none(step: int, leaves: bool) -> None:
    """A run that is trained to its end is saved, not moved to other machines."""
    notice = Notice(lambda: PreemptionInfo(None, {"node": [0]}), every_s=0.0)
    callback = PreemptionCallback(lambda: False, notice, num_steps=5, context=DistributedContext())
    control = TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=step), control)
    assert (callback.leaving is not None) == leaves
    assert control.should_training_stop == leaves
    assert callback.stopped == leaves
