"""LoRA on the experts of a base in 4 bit (`lora.target: [experts]`).

PEFT adapts a fused parameter by adding `B A` of every expert to the whole parameter in every forward, so it would
dequantise a whole layer and keep it for the backward. Here the factors are handed to the experts' own forward, which
multiplies the routed tokens with them (`quantised_experts.update_product`). The files of such an adapter are PEFT's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft.tuners.lora.layer
from torch import Tensor

from ray_vlm.models.quantised_experts import QuantisedExperts

if TYPE_CHECKING:
    from peft import LoraConfig


class ParamWrapper(peft.tuners.lora.layer.ParamWrapper):  # PEFT looks for a class of this name
    """PEFT's adapter of one weight of a layer's experts, where these are in 4 bit."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        self.num_experts, *sizes = module_of(self).expert_shapes[self.parameter_name]
        self._param_ndim = 3
        return sizes[0], sizes[1]

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return `[experts, a, rank]`, `[experts, rank, b]` and a scale; times it, their product is added to weights
        `[a, b]`."""
        first: Any = self.lora_A[adapter_name].weight
        second: Any = self.lora_B[adapter_name].weight
        first = first.reshape(self.num_experts, -1, first.shape[-1])  # [experts, rank, inputs]
        second = second.reshape(second.shape[0], -1, self.num_experts).permute(2, 0, 1)  # [experts, outputs, rank]
        left, right = (second, first) if self._did_swap_in_out_features else (first.mT, second.mT)
        return left, right, self.scaling[adapter_name]

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        experts, name = module_of(self), self.parameter_name
        factors = [self.get_delta_factors(adapter) for adapter in active_adapters if adapter in self.lora_A]
        before = experts.updates
        experts.updates = before | {name: factors}
        try:
            yield
        finally:
            experts.updates = before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: a 4-bit weight is too coarse for an adapter's change."""
        raise ValueError("adapters are merged into the unquantised base alone")


def module_of(wrapper: Any) -> QuantisedExperts:
    """Return the experts under one adapter of PEFT's, or under several."""
    return wrapper.get_base_layer()


def adapt_experts(config: "LoraConfig") -> "LoraConfig":
    """Let `config` use this module's adapter on experts that are in 4 bit, and return it."""
    config._register_custom_module({QuantisedExperts: ParamWrapper})
    return config
