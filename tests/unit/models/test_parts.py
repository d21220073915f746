"""Parts of a model: their ranks and learning rates, frozen parts, modules trained in full, and a frozen tower."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from ray_vlm.config.schema import Lora, Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data.collate import collate
from ray_vlm.data.records import PromptRecord
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import ModelError
from ray_vlm.models.families import FAMILIES, part_of
from ray_vlm.models.frozen_encoder import run_without_autograd
from ray_vlm.models.load import load_model
from ray_vlm.models.lora import check_modules, freeze_parts, lora_config, split_rates
from tests.conftest import QWEN

KNOWN = FAMILIES["qwen3_vl"]


def _base(folder: str) -> Any:
    return load_model(Model(name=folder, load_in_4bit=False), precision="fp32")


def test_each_part_has_its_rank_and_the_same_scale(tiny_models: dict[str, str]) -> None:
    lora = Lora(rank=8, alpha=16, target=["language", "vision"], ranks={"vision": 2})
    model = get_peft_model(_base(tiny_models["qwen3_vl"]), lora_config(lora, KNOWN))
    ranks = {(part_of(KNOWN, n), p.shape[0]) for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {("language", 8), ("vision", 2)}
    scales = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert scales == {2.0}


def test_each_part_has_its_learning_rate(tiny_models: dict[str, str]) -> None:
    lora = Lora(rank=4, target=["language", "connector", "vision"])
    model = get_peft_model(_base(tiny_models["qwen3_vl"]), lora_config(lora, KNOWN))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": learned, "weight_decay": 0.1}], lr=1e-3)
    split_rates(optimizer, model.named_parameters(), KNOWN, {"vision": 1e-5})
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rate[id(parameter)] == (1e-5 if part_of(KNOWN, name) == "vision" else 1e-3), name
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_rates_of_parts_hold_in_training(job_file: Any) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.train.driver import train

    target = {"lora": {"target": ["language", "vision"]}}
    path = job_file(**target, train={"learning_rates": {"vision": 1e-12}, "weight_decay": 0.0})
    before = _adapter(train(load_job(path), "").final)
    vision = [float(p.abs().max()) for n, p in before.items() if "visual" in n and "lora_B" in n]
    language = [float(p.abs().max()) for n, p in before.items() if "visual" not in n and "lora_B" in n]
    assert max(vision) < 1e-10
    assert min(language) > 1e-5


def _adapter(folder: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_frozen_parts_stay(tiny_models: dict[str, str]) -> None:
    model = freeze_parts(_base(tiny_models["qwen3_vl"]), ["vision", "connector"], KNOWN)
    assert {part_of(KNOWN, n) for n, p in model.named_parameters() if p.requires_grad} == {"language"}


def test_missing_modules_are_named_with_the_nearest(tiny_models: dict[str, str]) -> None:
    model = _base(tiny_models["qwen3_vl"])
    check_modules(model, ["embed_tokens", "lm_head"])
    with pytest.raises(ModelError, match=r"no 'embed_token'\. The nearest: embed_tokens"):
        check_modules(model, ["embed_token"])


@pytest.mark.parametrize("family", QWEN)
def test_a_frozen_tower_runs_without_autograd_and_changes_no_gradient(family: str, tiny_models: dict[str, str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    spec = SampleSpec(Model(name=tiny_models[family], load_in_4bit=False), ChatTask(), (), kind="prompt")
    gradients = []
    for plainly in (False, True):
        model = get_peft_model(_base(tiny_models[family]), _nonzero(lora_config(Lora(rank=4), FAMILIES[family])))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        seen: list[bool] = []
        tower = model.get_base_model().get_encoder(modality="image")
        if plainly:
            assert run_without_autograd(model)
        tower.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.last_hidden_state.requires_grad))
        record = PromptRecord("a", 0, (_png(pixels),), ((96, 64),), (("user", "<image>\nWhat?"),), {})
        batch = collate([load_sample_builder(spec).prompt_row(record)], load_sample_builder(spec))
        batch.pop("labels", None)
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if plainly:
            assert seen == [False]
    assert gradients[0].keys() == gradients[1].keys()
    assert any(float(value.abs().sum()) > 0 for value in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def _nonzero(config: Any) -> Any:
    torch.manual_seed(0)
    config.init_lora_weights = False
    return config


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_trained_tower_keeps_its_graph(tiny_models: dict[str, str]) -> None:
    model = get_peft_model(_base(tiny_models["qwen3_vl"]), lora_config(Lora(rank=4, target=["connector"]), KNOWN))
    assert not run_without_autograd(model)
