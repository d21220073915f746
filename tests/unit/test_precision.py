"""In a float64 block nothing is narrower, wherever float32 is asked for, and the witness says so if something is."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.precision import arithmetic, only


class Halved(torch.autograd.Function):
    """x/2 by way of float32, in both directions, as TRL's log-probability head does it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.float() / 2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].to(torch.float32).mul(torch.full((), 0.5, dtype=torch.float32)).to(grads[0].dtype)


def _asks_for_float32(x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        unrecorded = x.float() + 1
    return [
        x.float(),
        x.to(torch.float32),
        x.to(dtype=torch.float32),
        x.to("cpu", torch.float32),
        x.type(torch.float32),
        torch.softmax(x, dim=0, dtype=torch.float32),
        torch.nn.functional.softmax(x, dim=0, dtype=torch.float32),
        x.sum(dtype=torch.float32),
        torch.zeros(2),
        torch.arange(3, dtype=torch.float32),
        torch.zeros_like(x, dtype=torch.float32),
        torch.tensor([0.5]),
        unrecorded,
    ]


def test_every_request_for_float32_gives_float64() -> None:
    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    assert {value.dtype for value in _asks_for_float32(x)} == {torch.float32}, "without the block"
    with arithmetic(torch.float64), only(torch.float64):
        assert {value.dtype for value in _asks_for_float32(x)} == {torch.float64}


def test_backward_passes_are_in_float64_too() -> None:
    x = torch.full((), 1 / 3, dtype=torch.float64, requires_grad=True)
    with arithmetic(torch.float64), only(torch.float64):
        (Halved.apply(x) * x).backward()
    assert x.grad is not None
    assert float(x.grad) == 1 / 3
    with pytest.raises(AssertionError, match="_to_copy"), only(torch.float64):
        Halved.apply(x).backward()


def test_nothing_stays_behind() -> None:
    def leave() -> None:
        with arithmetic(torch.float64):
            raise KeyError

    engine = torch.autograd._engine_run_backward
    with pytest.raises(KeyError):
        leave()
    assert torch.zeros(1).dtype == torch.get_default_dtype() == torch.float32
    assert torch.autograd._engine_run_backward is engine


def test_an_image_processor_s_constants_stay_on_their_side(tiny_models: dict[str, str]) -> None:
    """It keeps mean and standard deviation in the dtype of its first call."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_models["qwen3_vl"])
    image = torch.arange(3 * 64 * 64).reshape(3, 64, 64).to(torch.uint8)

    def pixels() -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"]

    before = pixels()
    with arithmetic(torch.float64):
        within = pixels()
    assert before.dtype == torch.float32
    assert within.dtype == torch.float64
    assert torch.equal(pixels(), before)
    assert 0 < float((within - before).abs().max()) < 1e-6
    mean, std = torch.tensor(processor.image_mean).double(), torch.tensor(processor.image_std).double()
    colours = (image.double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert float((within.sort().values.amin() - colours.amin()).abs()) < 1e-12


def test_the_witness_sees_what_came_from_elsewhere() -> None:
    with arithmetic(torch.float64):
        stray = torch.from_numpy(np.ones(2, np.float32))  # no torch function that a mode could change
        with pytest.raises(AssertionError, match=r"aten\.add"), only(torch.float64):
            stray + torch.ones(2)
        with pytest.raises(AssertionError, match=r"aten\.cat"), only(torch.float64):
            torch.cat([torch.ones(2), stray])
    with pytest.raises(AssertionError, match="no operation"), only(torch.float64):
        pass


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"), arithmetic(torch.bfloat16):
        pass
