"""Norms by part before clipping; a trained part without a gradient ends the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_vlm.cli import main
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import ModelError
from ray_vlm.methods.clock import Clock, split_time
from ray_vlm.models.families import FAMILIES
from ray_vlm.train.callbacks.gradient_norms import PATIENCE, GradientWatch, Listener, part_norms
from ray_vlm.train.callbacks.metrics import norms_by_part

FAMILY = FAMILIES["qwen3_vl"]


def _named(grads: dict[str, Any]) -> list[tuple[str, Any]]:
    prefixes = {part: names[0] if isinstance(names, tuple) else names for part, names in FAMILY.prefixes.items()}
    out = []
    for part, values in grads.items():
        for i, value in enumerate(values):
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.grad = None if value is None else torch.tensor(value)
            out.append((f"base_model.model.{prefixes[part]}.layers.{i}.weight", parameter))
    return out


def test_norms_by_part() -> None:
    grads = {"language": [[3.0, 0.0], [0.0, 4.0]], "vision": [None, [0.0, 0.0]]}
    assert part_norms(_named(grads), FAMILY) == {"language": 5.0, "vision": 0.0}
    assert part_norms(_named({"language": [None]}), FAMILY) == {}
    frozen = _named({"language": [[3.0, 4.0]], "vision": [[1.0, 1.0]]})
    frozen[1][1].requires_grad_(False)
    assert part_norms(frozen, FAMILY) == {"language": 5.0}


def test_norms_are_those_before_clipping() -> None:
    assert norms_by_part({"language": 0.6, "vision": 0.8}, 5.0) == pytest.approx(
        {"grad_norm_language": 3.0, "grad_norm_vision": 4.0}
    )
    assert norms_by_part({}, 5.0) == {}
    assert norms_by_part({"language": 0.0}, 0.0) == {"grad_norm_language": 0.0}


def test_gradients_that_are_not_kept_are_heard() -> None:
    named = _named({"language": [None, None], "vision": [None]})
    listener, context = Listener(named, FAMILY), DistributedContext(0, 1, "cpu", ray=False)
    assert listener.take(context) == {"language": 0.0, "vision": 0.0}
    sum((3 * weight[0] if "language" in name else weight.sum() * 0) for name, weight in named).backward()
    assert listener.take(context) == {"language": pytest.approx(18**0.5), "vision": 0.0}
    listener.stop()
    sum(weight.sum() for _, weight in named).backward()
    assert listener.take(context) == {"language": 0.0, "vision": 0.0}


def test_a_part_without_a_gradient_is_named_at_once() -> None:
    watch = GradientWatch(always_images=True)
    watch.look({"language": 0.0, "vision": 0.0})  # a GRPO step of equal rewards says nothing
    with pytest.raises(ModelError, match=r"vision: meant to learn.*while language has one"):
        watch.look({"language": 1.0, "vision": 0.0})


def test_rows_without_images_give_the_tower_time() -> None:
    watch = GradientWatch(always_images=False)
    for _ in range(PATIENCE - 1):
        watch.look({"language": 1.0, "vision": 0.0})
    watch.look({"language": 1.0, "vision": 0.5})
    for _ in range(2 * PATIENCE):
        watch.look({"language": 1.0, "vision": 0.0})
    late = GradientWatch(always_images=False)
    with pytest.raises(ModelError, match="vision"):
        [late.look({"language": 1.0, "vision": 0.0}) for _ in range(PATIENCE)]


def test_a_gradient_that_is_nan_is_one() -> None:
    GradientWatch(always_images=True).look({"language": 1.0, "vision": math.nan})


def test_a_tower_without_autograd_ends_the_run(
    job_file, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    forward = Qwen3VLVisionModel.forward

    def without_autograd(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(self, *args, **kwargs)

    path = str(job_file(lora={"target": ["language", "vision"]}))
    assert main(["train", path]) == 0
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text()
    for name in ("grad_norm_language", "grad_norm_vision", "forward_s", "backward_s", "data_s", "peak_memory_gib"):
        assert f'"{name}"' in lines
    monkeypatch.setattr(Qwen3VLVisionModel, "forward", without_autograd)
    assert main(["train", path, "--overwrite"]) == 1
    assert "vision: meant to learn" in capsys.readouterr().err


def test_phases_add_up_and_are_taken_once() -> None:
    clock = Clock("cpu")
    for _ in range(2):
        with clock.phase("a"):
            pass
    first = clock.take()
    assert set(first) == {"a"}
    assert first["a"] > 0
    assert clock.take() == {}


def test_a_step_is_split_without_counting_twice() -> None:
    phases = {"batch": 5.0, "data": 1.0, "collate": 0.5, "pixels": 0.25, "step": 4.0, "forward": 1.5}
    assert split_time(phases) == {"data_s": 1.75, "rollout_s": 3.5, "forward_s": 1.5, "backward_s": 2.5}
    assert split_time({}) == dict.fromkeys(("data_s", "rollout_s", "forward_s", "backward_s"), 0.0)
