"""Values that TRL refuses only when it trains are refused before a model is loaded."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_vlm.config.load import load_job
from ray_vlm.errors import ConfigError
from ray_vlm.methods.options import CHOICES, check_options


def _check(tmp_path: Path, method: dict[str, Any]) -> None:
    job = {"method": method, "model": {"name": "tiny"}, "data": {"train": {"path": "rows.json"}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    check_options(load_job(tmp_path / "job.yaml").method)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "grpo", "loss_type": "gspo"}, "GSPO is loss_type grpo with method.trl.importance"),
        ({"name": "grpo", "loss_type": "sigmoid"}, "method.loss_type=sigmoid: .*Use one of: grpo, "),
        ({"name": "grpo", "trl": {"importance_sampling_level": "group"}}, "method.trl.importance_sampling_level=group"),
        ({"name": "grpo", "trl": {"scale_rewards": "std"}}, "Use one of: group, batch, none, True, False"),
        ({"name": "sft", "trl": {"loss_type": "focal"}}, "method.trl.loss_type=focal: .*Use one of: nll, dft"),
        ({"name": "sft", "trl": {"fsdp": "full_shard"}}, "`cluster.deepspeed`"),
    ],
)  # fmt: skip
def test_a_value_that_trl_does_not_know_is_refused_at_once(tmp_path: Path, method: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _check(tmp_path, method)


@pytest.mark.parametrize("key", CHOICES["grpo"])
def test_every_choice_is_taken_and_is_one_of_trl(tmp_path: Path, key: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    assert getattr(GRPOConfig(output_dir="unused", use_cpu=True, bf16=False), key) in CHOICES["grpo"][key]
    for value in CHOICES["grpo"][key]:
        assert isinstance(value, bool) or f'"{value}"' in source or f"'{value}'" in source
        options = {"loss_type": value} if key == "loss_type" else {"trl": {key: value}}
        _check(tmp_path, {"name": "grpo", **options})
