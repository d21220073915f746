"""`train.precision`: the arithmetic that a model runs in, and whether a card has it in hardware."""

from typing import TYPE_CHECKING, Any

from ray_vlm.config.train import Precision

if TYPE_CHECKING:
    import torch

DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
_HAS_BF16 = 8  # compute capability of the first cards (Ampere) that do not emulate bfloat16


def dtype_of(precision: Precision) -> "torch.dtype":
    """The dtype of the base and of the arithmetic."""
    import torch

    return getattr(torch, DTYPES[precision])


def autocast(precision: Precision, device: str) -> Any:
    """The context in which a trainer runs a forward on `device`."""
    import torch

    dtype = torch.bfloat16 if precision == "fp32" else dtype_of(precision)  # float32 is none that is cast to
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "fp32")


def describe_emulation(precision: Precision, device: str) -> str | None:
    """What to know of a card that only emulates bfloat16, as T4 and V100 do; torch says that they support it."""
    if precision != "bf16" or not device.startswith("cuda"):
        return None
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major >= _HAS_BF16:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) only emulates bfloat16, many times "
        "slower than float16. Set train.precision=fp16."
    )


def fastest_precision(device: str) -> Precision:
    """What weights that do not say are run in: bfloat16 where the card has it, float16 on older cards, float32 on
    CPUs."""
    if not device.startswith("cuda"):
        return "fp32"
    return "fp16" if describe_emulation("bf16", device) else "bf16"
