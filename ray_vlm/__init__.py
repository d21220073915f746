"""Fine-tune vision-language models with 4-bit LoRA on one core, one GPU or a Ray cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_vlm.evaluate.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """`Predictor`, which needs torch, is imported when it is asked for."""
    if name == "Predictor":
        from ray_vlm.evaluate.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'ray_vlm' has no attribute {name!r}")
