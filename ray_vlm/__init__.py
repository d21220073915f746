"""Fine-tune vision-language models with 4-bit LoRA on one core, one GPU or a Ray cluster."""

from typing import TYPE_CHECKING, Any

from ray_vlm.logs import show_lines

if TYPE_CHECKING:
    from ray_vlm.evaluate.predictor import Ask, Predictor

__version__ = "0.1.0"
__all__ = ["Ask", "Predictor"]
show_lines()


def __getattr__(name: str) -> Any:
    """`Ask` and `Predictor` are imported when they are asked for, since they import numpy and pydantic."""
    if name not in __all__:
        raise AttributeError(f"module 'ray_vlm' has no attribute {name!r}")
    from ray_vlm.evaluate import predictor

    return getattr(predictor, name)
