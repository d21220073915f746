"""What transformers calls while it loads a base in 4 bit: bitsandbytes' quantiser, which also quantises fused experts.

transformers reads and quantises one weight after another, so that neither the host nor the GPU ever holds the base in
16 bit. The quantiser is registered by transformers' own `register_quantizer`, under a name of its own; a loaded model
carries bitsandbytes' name again, for PEFT and the Trainer.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ray_vlm.models.host_memory import release_read
from ray_vlm.models.quantised_experts import WEIGHTS, QuantisedExperts, hold_experts, quantise_experts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_METHOD = "ray_vlm_nf4"


class FourBitConfig(BitsAndBytesConfig):
    """NF4 with double quantisation, for linear layers and for experts. `unquantised`: names of modules that stay in
    `dtype`."""

    def __init__(self, dtype: "torch.dtype", unquantised: list[str]):
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=unquantised,
        )
        self.quant_method: Any = _METHOD


@register_quantizer(_METHOD)
class FourBitQuantiser(Bnb4BitHfQuantizer):
    """bitsandbytes' quantiser of linear layers, and of the experts of known layouts."""

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight is put in 4 bit."""
        module, _, name = param_name.rpartition(".")
        if isinstance(model.get_submodule(module), QuantisedExperts):
            return name in WEIGHTS
        return super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        hold_experts(model)  # before anything is read: it refuses experts of an unknown layout
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_quantize_ops(self) -> "_Quantise":
        """Return the operation that transformers runs on a weight when it has been read."""
        return _Quantise(self)


class _Quantise(Bnb4bitQuantize):
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        quantised: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantisedExperts):
                quantised[name] = quantise_experts(value[0] if isinstance(value, list) else value)
                release_read()  # of the experts before
            else:
                quantised |= super().convert({name: value}, full_layer_name, model, **kwargs)
        return quantised
