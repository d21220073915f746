"""Training in float16: the loss is multiplied by a scale, so that small gradients do not underflow.

If a scaled gradient overflows, torch's `GradScaler` skips the step and halves the scale. This is normal in the first
steps of a run. It is an error if a loss is not finite either, or if the scale is already 1 or less.
"""

from collections import deque
from typing import TYPE_CHECKING

from ray_vlm.distributed import DistributedContext

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_LEAST = 1.0  # at this scale or below an overflow is not caused by the scale


class LossScale:
    """The losses of a trainer's last step, and the scale that they were multiplied by in float16.

    `accumulation`: micro-batches of a step.
    """

    def __init__(self, accumulation: int):
        self._last: deque[torch.Tensor] = deque(maxlen=accumulation)
        self._accelerator: Accelerator | None = None

    def attach(self, accelerator: "Accelerator") -> None:
        """Use the scaler of the trainer's accelerator, before that prepares the model.

        On CPUs, turn on autocast and a gradient scaler, which accelerate does not do for float16 there.
        """
        self._accelerator = accelerator
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            import torch

            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu")

    def keep(self, loss: "torch.Tensor") -> None:
        """Keep the loss of a micro-batch."""
        self._last.append(loss.detach())

    def explain_overflow(self, context: DistributedContext) -> str | None:
        """Return a message if the scaler handles a gradient that is not finite, else None.

        All ranks must call it together; they see the same gradient.
        """
        scaler = getattr(self._accelerator, "scaler", None)
        if scaler is None:
            return None
        finite, scale = all(bool(loss.isfinite().all()) for loss in self._last), scaler.get_scale()
        if any(context.any_rank(not finite)) or scale <= _LEAST:
            return None
        return f"float16 overflowed at a loss scale of {scale:g}: the step is left out and the scale is lowered"
