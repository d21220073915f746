"""`train.precision`: the dtype of a model's arithmetic, and whether a GPU has it in hardware."""

from typing import TYPE_CHECKING, Any

from ray_vlm.config.train import Precision

if TYPE_CHECKING:
    import torch

DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
_HAS_BF16 = 8  # compute capability of the first GPUs (Ampere) that do not emulate bfloat16


def dtype_of(precision: Precision) -> "torch.dtype":
    """Return the dtype of the base and of the arithmetic."""
    import torch

    return getattr(torch, DTYPES[precision])


def autocast(precision: Precision, device: str) -> Any:
    """Return the context in which a trainer runs a forward on `device`."""
    import torch

    dtype = torch.bfloat16 if precision == "fp32" else dtype_of(precision)  # autocast refuses float32
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "fp32")


def multiply_in_tf32(device: str) -> None:
    """Let a GPU multiply what is float32 in TF32, which has the range of float32 and 10 bits of mantissa.

    Without it float32 products run about eight times slower on an A100. Products on CPUs are not changed. The old name
    of the setting keeps torch's newer one in step with it; after the newer one torch refuses to read the old."""
    if not device.startswith("cuda"):
        return
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def describe_emulation(precision: Precision, device: str) -> str | None:
    """Return a warning for a GPU that only emulates bfloat16, as T4 and V100 do (torch reports it as supported)."""
    if precision != "bf16" or not device.startswith("cuda"):
        return None
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major >= _HAS_BF16:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) only emulates bfloat16, many times "
        "slower than float16. Tried next: bfloat16 all the same, as the job says. Set train.precision=fp16."
    )


def fastest_precision(device: str) -> Precision:
    """Return the precision for weights that do not name one: bfloat16 if the GPU has it, float16 on older GPUs, float32
    on CPUs."""
    if not device.startswith("cuda"):
        return "fp32"
    return "fp16" if describe_emulation("bf16", device) else "bf16"
