"""Compare a model's faster paths with the plain one on one batch, before the first step of a run.

Kernels, fused adapters and the like are right on the machine that tested them. On another one, with another driver,
compiler or version, a fault would not stop a run: it would train on wrong gradients. So each run compares the loss and
some gradients once, and stops where they differ by more than rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_vlm.config.train import Precision
from ray_vlm.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

_COMPARED = 8  # weights whose gradients are compared, spread over the model
_LARGEST = 2**26  # numbers of a gradient that is kept
_START = 0.02  # standard deviation of a new adapter's zeros during the comparison: else an update would not show
# Relative differences of loss and gradients that rounding may make: numbers of bfloat16 have 8 bits, those of float16
# and TF32 11. Equal paths of tiny models differ by up to 0.06 in bfloat16 on a CPU; not measured on a card.
_LIMITS: Mapping[Precision, tuple[float, float]] = {"bf16": (0.03, 0.2), "fp16": (0.01, 0.03), "fp32": (0.01, 0.03)}
_LIMITS_CPU = (1e-5, 1e-3)  # of float32 without TF32
_SMALLEST = 0.1  # losses below it are compared as if they were this large


@dataclass(frozen=True)
class Switch:
    """A faster path. `off`: the setting that turns it off; `plain`: opens a context in which the model runs without."""

    name: str
    off: str
    plain: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Difference:
    """Relative differences from the plain path: of the loss, and of the compared gradients as one vector."""

    loss: float
    gradient: float


def compare_paths(
    model: "Module",
    switches: Sequence[Switch],
    run: "Callable[[Callable[[Tensor], None]], None]",
    precision: Precision,
    agree: Callable[[Difference], Difference] = lambda difference: difference,
) -> str:
    """Compare the model with the plain path on a batch, and return a sentence on it.

    `run` goes forward and backward and calls its argument with the loss while the gradients are there. `agree` returns
    the largest differences of all ranks, so that all of them go on or stop. Raise `ModelError` for a path that differs,
    with the setting that turns it off.
    """
    limits = _limits(precision, next(model.parameters()).device.type)
    with _visible_adapter(model):
        fast = _run(model, run)
        plain = _run_plain(model, switches, run)
        difference = agree(_compare(fast, plain))
        if _is_rounding(difference, limits):
            names = ", ".join(switch.name for switch in switches)
            return (
                f"compared with the plain path on one batch: {names}; loss {difference.loss:.1e} and gradients "
                f"{difference.gradient:.1e} apart"
            )
        guilty = []
        for switch in switches:  # each alone
            others = [other for other in switches if other is not switch]
            if not _is_rounding(agree(_compare(_run_plain(model, others, run), plain)), limits):
                guilty.append(switch)
        guilty = guilty or list(switches)
    settings = " and ".join(dict.fromkeys(switch.off for switch in guilty))
    raise ModelError(
        f"{', '.join(switch.name for switch in guilty)}: on one batch the loss is {difference.loss:.2g} and gradients "
        f"are {difference.gradient:.2g} (relative) from those of the plain path, where rounding makes at most "
        f"{limits[0]:g} and {limits[1]:g}. Set {settings}, and report the versions of torch, of the kernels and of the "
        "driver."
    )


def _limits(precision: Precision, device: str) -> tuple[float, float]:
    return _LIMITS_CPU if device == "cpu" and precision == "fp32" else _LIMITS[precision]


def _is_rounding(difference: Difference, limits: tuple[float, float]) -> bool:
    """Return whether both differences are within the limits; NaN is not."""
    return difference.loss <= limits[0] and difference.gradient <= limits[1]


@dataclass(frozen=True)
class _Outcome:
    loss: float
    gradients: "tuple[Tensor, ...]"


def _run(model: "Module", run: "Callable[[Callable[[Tensor], None]], None]") -> _Outcome:
    """Run the batch, and return the loss and copies of the compared gradients."""
    outcomes: list[_Outcome] = []

    def look(loss: "Tensor") -> None:
        gradients = tuple(p.grad.detach().clone() for p in _compared(model) if p.grad is not None)
        outcomes.append(_Outcome(float(loss.detach()), gradients))

    run(look)
    return outcomes[0]


def _run_plain(
    model: "Module", switches: Sequence[Switch], run: "Callable[[Callable[[Tensor], None]], None]"
) -> _Outcome:
    with ExitStack() as plain:
        for switch in switches:
            plain.enter_context(switch.plain())
        return _run(model, run)


def _compared(model: "Module") -> "list[Parameter]":
    """Return some trained weights, evenly spaced over the model."""
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and p.numel() <= _LARGEST]
    count = min(_COMPARED, len(trained))
    return [trained[number * (len(trained) - 1) // max(1, count - 1)] for number in range(count)]


def _compare(fast: _Outcome, plain: _Outcome) -> Difference:
    size = sum(float(other.double().square().sum()) for other in plain.gradients)
    difference = sum(
        float((one.double() - other.double()).square().sum())
        for one, other in zip(fast.gradients, plain.gradients, strict=True)
    )
    loss = abs(fast.loss - plain.loss) / max(abs(plain.loss), _SMALLEST)
    return Difference(loss, (difference / size if size else difference) ** 0.5)


@contextmanager
def _visible_adapter(model: "Module") -> Iterator[None]:
    """Give matrices of a trained adapter that are all zeros small random numbers for the time of the body: what a new
    adapter adds is zero, and so are gradients of the matrices before."""
    import torch

    trained = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_B." in name]
    zeros = [p for p in trained if not bool(p.detach().any())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            values = torch.randn(parameter.shape, generator=generator) * _START
            parameter.copy_(values.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
