"""What the model's work on a batch raises."""

from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import RunError
from ray_vlm.evaluate.actors import _run_batch

FULL = "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(("text", "out_of_memory"), [(FULL, True), ("bad shape", False)])
def test_a_card_without_room_is_told_with_what_to_lower(text: str, out_of_memory: bool) -> None:
    job = JobConfig.model_validate({"model": {"name": "x"}, "data": {}, "evaluate": {"batch_size": 16}})
    worker: Any = SimpleNamespace(inference=SimpleNamespace(batches=((0,), (1,)), job=job), records=["a", "b"])

    def answer(*args: Any) -> None:
        raise RuntimeError(text)

    with pytest.raises(RunError if out_of_memory else RuntimeError) as error:
        _run_batch(worker, answer, 1)
    assert isinstance(error.value, RunError) == out_of_memory
    if out_of_memory:
        message = f"ran out of GPU memory at batch 1: {FULL}. Lower evaluate.batch_size (now 16)"
        assert str(error.value).startswith(message)
