"""float16 in training: the loss is multiplied by a scale, so that small gradients do not vanish.

Where a scaled gradient overflows, torch's `GradScaler` leaves the step out and halves the scale, as it is made to: no
fault, and usual in a run's first steps. It is one where a loss is not finite either, which no scale mends, or where the
scale has come down to nothing.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from ray_vlm.train.context import DistributedContext

_LEAST = 1.0  # a scale at which gradients that still overflow are not the scale's fault


class StepLosses:
    """The losses of a trainer's last step. On CPUs it turns autocast and a scaler on, which accelerate leaves out for
    float16 there; so it is made before anything is prepared."""

    def __init__(self, accelerator: Any, accumulation: int):
        import torch

        self._last: deque[Any] = deque(maxlen=accumulation)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu")

    def keep(self, loss: Any) -> None:
        """Hear a micro-batch's loss."""
        self._last.append(loss.detach())

    def are_finite(self) -> bool:
        """Whether all of them are, on this rank."""
        return all(bool(loss.isfinite().all()) for loss in self._last)


def watch_overflow(trainer: Any, context: DistributedContext) -> Callable[[], str | None]:
    """A function for a step whose gradient is not finite: a sentence where that is the scaler's business, else None.

    All ranks call it together, since all see the same gradient.
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
