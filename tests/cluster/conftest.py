"""Small jobs of DPO and GRPO for the tests on Ray workers."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.parity import write_pairs


@pytest.fixture
def job_of(job_file, tmp_path: Path, tiny_models: dict[str, str], scenes: Path) -> Any:
    """A function that writes a small job of a method."""

    def write(method: str, **sections: Any) -> Path:
        train = {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3}
        sections = {"train": train | sections.pop("train", {}), **sections}
        if method == "dpo":
            data = {"train": {"path": str(write_pairs(tmp_path, tiny_models["qwen3_vl"])), "format": "preference"}}
            return job_file(method="dpo", data=data | {"eval": {"ratio": 0.25}}, **sections)
        options = {"num_generations": 4, "max_completion_tokens": 10}
        options |= {"rewards": {"tests.integration.test_alignment:even_tokens": 1.0}, "beta": 0.05}
        data = {"eval": {"path": str(scenes / "eval.json"), "max_rows": 5}}
        return job_file(method={"name": "grpo", **options}, data=data, evaluate={"max_new_tokens": 8}, **sections)

    return write
