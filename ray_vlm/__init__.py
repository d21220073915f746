"""Fine-tune vision-language models with 4-bit LoRA on one core, one GPU or a Ray cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_vlm.evaluate.predictor import Ask, Predictor

__version__ = "0.1.0"
__all__ = ["Ask", "Predictor"]


def __getattr__(name: str) -> Any:
    """`Predictor`, which needs torch, and `Ask` are imported when they are asked for."""
    if name == "Predictor":
        from ray_vlm.evaluate.predictor import Predictor

        return Predictor
    if name == "Ask":
        from ray_vlm.evaluate.predictor import Ask

        return Ask
    raise AttributeError(f"module 'ray_vlm' has no attribute {name!r}")
