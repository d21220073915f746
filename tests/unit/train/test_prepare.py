"""What is planned and refused before anything is loaded."""

from typing import Any

import numpy as np
import pytest

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan
from ray_vlm.errors import ConfigError
from ray_vlm.train import prepare
from ray_vlm.train.worker_spec import WorkerSpec, settle_workers


class _Index:
    """An index with the arrays that the checks read."""

    def __init__(self, **arrays: list[int]):
        self.records = tuple(_Record(f"r{i}") for i in range(len(next(iter(arrays.values())))))
        for name, values in arrays.items():
            setattr(self, name, np.array(values))


class _Record:
    def __init__(self, id: str):
        self.id = id


def _job(**sections: Any) -> JobConfig:
    return JobConfig.model_validate({"model": {"name": "x"}, "data": {"train": {"path": "a"}}, **sections})


def test_grpo_plans_prompts_and_all_prompts_of_a_worker_at_once() -> None:
    """32 answers of 4 to a prompt, on 2 workers: 8 prompts a step, 4 for each worker."""
    job = _job(
        method={"name": "grpo", "num_generations": 4},
        train={"global_batch_size": 32, "micro_batch_size": 8},
        cluster={"num_workers": 2},
    )
    plan = prepare.plan_run(job, 80)
    assert (plan.global_batch_size, plan.micro_batch_size, plan.world_size) == (8, 4, 2)
    assert plan.accumulation == 1
    assert plan.whole_steps


def test_fewer_workers_keep_the_rows_of_each_step() -> None:
    sections = {"train": {"global_batch_size": 8, "micro_batch_size": 2}, "cluster": {"num_workers": [1, 2]}}
    job = _job(**sections)
    spec = WorkerSpec({}, "run", sample_spec=None, plan=Plan(32, 8, 2, 2, seed=3), train=(), eval=None)  # type: ignore[arg-type]
    settled_job, settled = settle_workers(job, spec, 1)
    assert settled_job.cluster.num_workers == 1
    rows = [
        sorted(row for rank in range(plan.world_size) for batch in plan.rank_step(1, rank) for row in batch.rows)
        for plan in (spec.plan, settled.plan)
    ]
    assert rows[0] == rows[1]


def test_a_row_above_the_token_limit_is_named_with_the_limit_that_fits() -> None:
    index: Any = _Index(tokens=[10, 70, 20])
    prepare._check_budget(70, index)
    with pytest.raises(ConfigError, match=r"tokens_per_micro_batch=69: the row with id 'r1' alone has 70 tokens"):
        prepare._check_budget(69, index)


@pytest.mark.parametrize(
    ("cluster", "trains_vision", "refused"),
    [
        ({}, True, False),
        ({"deepspeed": "zero2"}, False, False),
        ({"deepspeed": "zero2"}, True, True),
        ({"deepspeed": "zero3"}, False, True),
    ],
)
def test_rows_without_images_are_refused_where_workers_would_wait(
    cluster: dict[str, Any], trains_vision: bool, refused: bool
) -> None:
    index: Any = _Index(image_tokens=[16, 0, 0])
    section = Cluster(num_workers=2, **cluster)
    if not refused:
        return prepare._check_images(index, section, trains_vision)
    with pytest.raises(ConfigError, match="2 rows, the first with id 'r1', have no image"):
        prepare._check_images(index, section, trains_vision)


def test_answers_that_cannot_be_written_in_full_are_counted_by_part() -> None:
    """Two tokens close each answer in the template; they do not count."""
    parts: Any = _Parts(_Index(answer_tokens=[5, 13, 22]), _Index(answer_tokens=[12]))
    assert prepare._describe_long_answers(parts, 20, 2) == []
    (note,) = prepare._describe_long_answers(parts, 10, 2)
    assert note.startswith("2 of 3 rows of data.train have answers of more than evaluate.max_new_tokens=10 tokens")
    assert "the longest has 20" in note


class _Parts:
    def __init__(self, train: _Index, eval: _Index):
        self.train, self.eval = train, eval
