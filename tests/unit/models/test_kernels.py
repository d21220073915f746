"""Fused layers and adapters compute what transformers and PEFT do, from fewer operations, and say what they use."""

import sys
import types
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from ray_vlm.errors import ModelError
from ray_vlm.models import kernels as module
from ray_vlm.models.backbone import base_of, language_layers
from ray_vlm.models.fused_adapter import fuse_adapters, separate_adapters
from ray_vlm.models.kernels import Kernels, choose_kernels, fuse_layers, norm_by_torch, separate_layers
from ray_vlm.models.self_check import Switch, compare_paths
from tests.conftest import QWEN
from tests.support.precision import arithmetic
from tests.unit.models.test_selective import Operations, adapted, gradients

MOVED = ("aten::add", "aten::mul", "aten::clone", "aten::_to_copy", "aten::copy_")


def _rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    def half(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


ALL = Kernels("plain functions in the places of kernels", norm_by_torch, _rotate, lambda a, b: silu(a) * b)


def _apart(fused: tuple[torch.Tensor, ...], stock: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(fused, stock, strict=True))


@pytest.mark.parametrize("family", QWEN)
def test_the_same_numbers(family: str, tiny_models: dict[str, str]) -> None:
    model = adapted(tiny_models[family], in_4bit=False)
    layers = len(language_layers(base_of(model)))
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model.to(dtype)
        with arithmetic(dtype):
            stock = gradients(model)
            assert fuse_adapters(model) == 7 * layers
            norms = 4 if family == "qwen3_vl" else 2
            assert fuse_layers(model, ALL) == (norms + 2) * layers + 1
            with Operations() as operations:
                fused = gradients(model)
            assert operations.counts["aten::addmm"] >= 7 * layers
            with separate_adapters(model), separate_layers(model):
                plain = gradients(model)
            again = gradients(model)
        assert _apart(fused, stock) < limit
        assert all(torch.equal(a, b) for a, b in zip(plain, stock, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, fused, strict=True))
        with separate_adapters(model), separate_layers(model):
            stock = [type(m) for m in model.modules()]
        for one, kind in zip(model.modules(), stock, strict=True):
            one.__class__ = kind


@pytest.mark.parametrize("in_4bit", [True, False])
def test_an_adapter_is_added_by_fewer_operations(in_4bit: bool, tiny_models: dict[str, str]) -> None:
    """Under autocast: PEFT copies, scales and adds; it casts the input of a plain layer to float32 and back."""
    model = adapted(tiny_models["qwen3_vl"], in_4bit, "bf16")
    counts, losses = [], []
    for fused in (False, True):
        if fused:
            fuse_adapters(model)
        with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
            outcome = gradients(model)
        counts.append(sum(operations.counts[name] for name in MOVED))
        losses.append(outcome)
        assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".lora_" in name)
    layers = 7 * len(language_layers(base_of(model)))
    assert counts[0] - counts[1] >= 3 * layers  # two or more in the forward, one in the backward
    assert _apart(losses[1], losses[0]) < 0.1


def test_what_peft_must_do_itself_it_does(tiny_models: dict[str, str]) -> None:
    model = adapted(tiny_models["qwen3_vl"], in_4bit=False, dropout=0.5)
    fuse_adapters(model)
    with Operations() as operations:
        gradients(model)
    assert operations.counts["aten::addmm"] == 0, "dropout is PEFT's"
    with torch.no_grad(), Operations() as operations:
        model.eval()(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
        assert operations.counts["aten::addmm"] > 0
    with model.disable_adapter(), torch.no_grad(), Operations() as operations:
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
    assert operations.counts["aten::addmm"] == 0


def test_a_package_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise module.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(module.importlib.metadata, "version", version)
    kernels, note = choose_kernels("cpu")
    assert kernels.norm is norm_by_torch
    assert kernels.gate is None
    assert "ray_vlm[kernels]" in note
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    kernels, note = choose_kernels("cpu")
    assert "liger_kernel 9.9 does not work here (ModuleNotFoundError" in note

    def launch(*_: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient\nmore")

    broken = types.SimpleNamespace(apply=launch)
    for name, function in (("rms_norm", "RMSNorm"), ("rope", "Rope"), ("swiglu", "SiLUMul")):
        fake = types.SimpleNamespace(**{f"Liger{function}Function": broken})
        monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
        monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", fake)  # type: ignore[arg-type]
    kernels, note = choose_kernels("cpu")
    assert kernels.norm is norm_by_torch
    assert "(RuntimeError: CUDA driver version is insufficient)" in note
    assert "model.kernels=none" in note


@pytest.mark.parametrize("fault", [None, "gate", "norm"])
def test_a_path_that_differs_is_refused(fault: str | None, tiny_models: dict[str, str]) -> None:
    model = adapted(tiny_models["qwen3_vl"], in_4bit=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    wrong = {"gate": lambda a, b: silu(a) * b * 1.01, "norm": lambda x, w, eps: norm_by_torch(x, w, eps) * float("nan")}
    fuse_adapters(model)
    fuse_layers(model, Kernels("of a test", **({fault: wrong[fault]} if fault else {"norm": norm_by_torch})))

    def run(look: Any) -> None:
        look(gradients(model)[0])

    switches = [
        Switch("fused kernels", "model.kernels=none", lambda: separate_layers(model)),
        Switch("fused adapters", "the other", lambda: separate_adapters(model)),
    ]
    if fault is None:
        assert "fused kernels, fused adapters; loss" in compare_paths(model, switches, run, "fp32")
    else:
        with pytest.raises(ModelError, match=r"fused kernels: on one batch the loss .* Set model\.kernels=none, and"):
            compare_paths(model, switches, run, "fp32")
    assert not any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
