"""Trained weights on the host, as they travel to samplers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_vlm.errors import RunError

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Weights:
    """Trained weights on the host: of each its bytes, `uint8 [n]`, the name of its dtype in torch, and its shape."""

    values: Mapping[str, tuple[np.ndarray, str, tuple[int, ...]]]

    @classmethod
    def read(cls, model: "Module") -> "Weights":
        """Copy the weights of `model` that are trained."""
        import torch

        values = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                data = parameter.detach().to("cpu", copy=True).contiguous()
                values[name] = data.reshape(-1).view(torch.uint8).numpy(), str(data.dtype)[6:], tuple(data.shape)
        return cls(values)

    def write(self, model: "Module") -> None:
        """Set these weights in `model`. Raise `RunError` if it trains others."""
        import torch

        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if odd := sorted(trained.keys() ^ self.values.keys()):
            raise RunError(f"a sampler trains other weights than the worker, such as {odd[0]}. Please report this.")
        for name, parameter in trained.items():
            data, dtype, shape = self.values[name]
            value = torch.from_numpy(np.array(data)).view(getattr(torch, dtype)).reshape(shape)  # a copy: it is shared
            parameter.data.copy_(value)

    def equals(self, other: "Weights | None") -> bool:
        """Whether both are the same to the bit."""
        return other is not None and all(
            np.array_equal(data, other.values[name][0]) for name, (data, _, _) in self.values.items()
        )
