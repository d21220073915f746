"""Fused norms, rotary embeddings and activations for the layers of Qwen's language models (`model.kernels`).

transformers computes each of them by several elementwise operations, and every operation reads and writes whole
activations. On GPUs the kernels are Liger's where `ray_vlm[kernels]` is installed (written in Triton, so there are none
for CPUs), and torch's fused RMSNorm elsewhere. A layer is changed by giving it a subclass of its class.
"""

import importlib.metadata
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ray_vlm.models.backbone import base_of, language_model

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_NORMS = ("Qwen3VLTextRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen2VLRMSNorm", "Qwen2RMSNorm")
_GATED = ("Qwen3VLTextMLP", "Qwen2MLP")
_ATTENTION = ("Qwen3VLTextAttention", "Qwen2_5_VLAttention", "Qwen2VLAttention")
_ROTATE = "apply_rotary_pos_emb"  # the function of transformers' modules for queries and keys


@dataclass(frozen=True)
class Kernels:
    """Functions in place of a layer's operations; None: as transformers has it.

    `norm(x, weight, eps)`: RMSNorm over the last axis. `rotate(q, k, cos, sin)`: rotary embedding of
    `[rows, heads, tokens, width]` with `[rows, tokens, width]`. `gate(a, b)`: `silu(a) * b`.
    """

    name: str
    norm: "Callable[[Tensor, Tensor, float], Tensor] | None" = None
    rotate: "Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None" = None
    gate: "Callable[[Tensor, Tensor], Tensor] | None" = None


def choose_kernels(device: str) -> tuple[Kernels, str]:
    """Return the kernels for `device`, and a sentence on them.

    Liger's are tried once, forward and backward, because a package for another CUDA or Triton can fail at its import or
    at its first call; then torch's norm alone is used.
    """
    own = Kernels("torch's fused norm", norm=norm_by_torch)
    try:
        version = importlib.metadata.version("liger_kernel")
    except importlib.metadata.PackageNotFoundError:
        return own, f"model.kernels: {own.name}; `pip install 'ray_vlm[kernels]'` adds more."
    try:
        kernels = liger_kernels()
        try_kernels(kernels, device)
    except Exception as error:  # an import, a compiler or a driver may raise anything
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:200]
        return own, (
            f"model.kernels: liger_kernel {version} does not work here ({reason}), so {own.name} is used. Install a "
            "version for this torch and CUDA, or set model.kernels=none."
        )
    return kernels, f"model.kernels: those of liger_kernel {version}"


def norm_by_torch(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
    """Return RMSNorm in the dtype of `x`, by one kernel on GPUs; autocast would return float32."""
    import torch

    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def liger_kernels() -> Kernels:
    """Return Liger's kernels. Raise `ImportError` and others where they cannot be imported."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
        # "llama": normalise in float32, round, multiply by the weight, as transformers does. Gradients not in place.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def rotate(q: "Tensor", k: "Tensor", cos: "Tensor", sin: "Tensor") -> "tuple[Tensor, Tensor]":
        # The kernel writes into its input, which may be a product that selective checkpointing keeps.
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)

    return Kernels("Liger's kernels", norm, rotate, LigerSiLUMulFunction.apply)


def try_kernels(kernels: Kernels, device: str) -> None:
    """Run each kernel once, forward and backward, on small tensors. It raises what the kernels raise."""
    import torch

    x, w, q, k, a, b = (
        torch.ones(*shape, device=device, requires_grad=True)
        for shape in ((2, 8), (8,), (1, 4, 2, 16), (1, 2, 2, 16), (2, 8), (2, 8))
    )
    angles = torch.ones(1, 2, 16, device=device)
    if kernels.norm is not None:
        kernels.norm(x, w, 1e-6).sum().backward()
    if kernels.gate is not None:
        kernels.gate(a, b).sum().backward()
    if kernels.rotate is not None:
        rotated = kernels.rotate(q, k, angles, angles)
        (rotated[0].sum() + rotated[1].sum()).backward()


def fuse_layers(model: "Module", kernels: Kernels) -> int:
    """Let the language model's layers use the kernels. Return how many modules do; 0 for families that are not Qwen's.

    Norms under weights of another dtype than their input keep their own forward."""
    count = 0
    for module in language_model(base_of(model)).modules():
        kind: Any = type(module)
        if not kind.__module__.startswith("transformers.models."):
            continue
        fused = _fused(kind, kernels)
        if fused is not None and _applies(module):
            module.__class__ = fused
            count += 1
    return count


@contextmanager
def separate_layers(model: "Module") -> Iterator[None]:
    """Run transformers' own forwards in the body."""
    fused = [(module, type(module)) for module in model.modules() if hasattr(type(module), "unfused_class")]
    for module, kind in fused:
        module.__class__ = kind.unfused_class  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, kind in fused:
            module.__class__ = kind


def _applies(module: Any) -> bool:
    """Return whether a gated layer has the activation that is fused; other layers have none."""
    activation = getattr(module, "act_fn", None)
    return activation is None or type(activation).__name__ in ("SiLU", "SiLUActivation")


@cache
def _fused(kind: Any, kernels: Kernels) -> Any:
    """Return the subclass of a class of transformers that uses the kernels; None where there is nothing to fuse."""
    stock: Any = kind.forward
    forward: Callable[..., Any]
    if kind.__name__ in _NORMS and (norm := kernels.norm) is not None:

        def forward(self: Any, hidden_states: "Tensor") -> "Tensor":
            if hidden_states.dtype != self.weight.dtype:
                return stock(self, hidden_states)
            return norm(hidden_states, self.weight, self.variance_epsilon)

    elif kind.__name__ in _GATED and (gate := kernels.gate) is not None:

        def forward(self: Any, x: "Tensor") -> "Tensor":
            return self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))

    elif kind.__name__ in _ATTENTION and (rotate := kernels.rotate) is not None and _ROTATE in stock.__code__.co_names:

        def rotated(q: "Tensor", k: "Tensor", cos: "Tensor", sin: "Tensor", *_: Any, **__: Any) -> Any:
            return rotate(q, k, cos, sin)

        names = {**stock.__globals__, _ROTATE: rotated}  # transformers' forward with another function of that name
        forward = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
        forward.__kwdefaults__ = stock.__kwdefaults__
    else:
        return None
    return type(kind.__name__, (kind,), {"forward": forward, "unfused_class": kind, "__module__": __name__})
