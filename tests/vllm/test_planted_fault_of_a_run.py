"""A GRPO run whose real vLLM loses the adapter ends with an exit status that is not 0, in words that name the fault.

vLLM runs in processes of its own, as it does in a run.
"""

from typing import Any

import pytest

pytest.importorskip("vllm")

from ray_vlm.cli import main
from ray_vlm.engines.vllm import VllmEngine

pytestmark = pytest.mark.slow
GRPO = {"name": "grpo", "rollouts": "vllm", "num_generations": 4, "max_completion_tokens": 12}
GRPO["rewards"] = {"tests.vllm.test_planted_fault_of_a_run:even_tokens": 1.0}


def even_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a random model can earn: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


@pytest.mark.parametrize("fault", [True, False], ids=["adapter_dropped", "healthy"])
def test_a_run_ends_where_the_adapter_is_dropped(
    fault: bool, job_file: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if fault:
        monkeypatch.setattr(VllmEngine, "_push", lambda self: None)
    path = job_file(
        method=GRPO,
        lora={"rank": 4, "alpha": 8, "target": ["language"]},
        train={"max_steps": 3, "learning_rate": 5e-3, "warmup_ratio": 0.0, "micro_batch_size": 8},
    )
    status = main(["train", str(path)])
    output = "".join(capfd.readouterr())
    assert "the adapter changes too little to prove that it is in use" in output, "before the first step"
    if fault:
        assert status != 0
        assert "method.rollouts=vllm: after push 2 of the adapter the engine answers with the base alone" in output
    else:
        assert status == 0
        assert "push 2 of the adapter is proved to be in use" in output
