"""Training in float16: the loss is multiplied by a scale, so that small gradients do not underflow.

If a scaled gradient overflows, torch's `GradScaler` skips the step and halves the scale. This is normal in the first
steps of a run. It is an error if a loss is not finite either, or if the scale is already 1 or less.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from ray_vlm.train.context import DistributedContext

_LEAST = 1.0  # at this scale or below an overflow is not caused by the scale


class StepLosses:
    """The losses of a trainer's last step.

    On CPUs it also turns on autocast and a gradient scaler, which accelerate does not do for float16 there; so it must
    be built before accelerate prepares the model."""

    def __init__(self, accelerator: Any, accumulation: int):
        import torch

        self._last: deque[Any] = deque(maxlen=accumulation)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu")

    def keep(self, loss: Any) -> None:
        """Keep the loss of a micro-batch."""
        self._last.append(loss.detach())

    def are_finite(self) -> bool:
        """Return whether all losses of the step are finite on this rank."""
        return all(bool(loss.isfinite().all()) for loss in self._last)


def watch_overflow(trainer: Any, context: DistributedContext) -> Callable[[], str | None]:
    """Return a function for a step whose gradient is not finite: a message if the scaler handles it, else None.

    All ranks must call it together; they see the same gradient.
    """

    def look() -> str | None:
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is None:
            return None
        finite, scale = all(context.all_gather(trainer.losses.are_finite())), scaler.get_scale()
        if not finite or scale <= _LEAST:
            return None
        return f"float16 overflowed at a loss scale of {scale:g}: the step is left out and the scale is lowered"

    return look
