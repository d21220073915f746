"""float16 in training: the loss is multiplied by a scale, so that small gradients do not vanish.

Where a scaled gradient overflows, torch's `GradScaler` leaves the step out and halves the scale, as it is made to: no
fault, and usual in a run's first steps. It is one where a loss is not finite either, which no scale mends, or where the
scale has come down to nothing.
"""

from collections.abc import Callable
from typing import Any

from ray_vlm.train.attempt import Place

_LEAST = 1.0  # a scale at which gradients that still overflow are not the scale's fault


def scale_on_cpu(accelerator: Any) -> None:
    """Autocast and a scaler on CPUs, where accelerate leaves out both for float16; before anything is prepared."""
    import torch

    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")


def watch_overflow(trainer: Any, place: Place) -> Callable[[], str | None]:
    """A function for a step whose gradient is not finite: a sentence where that is the scaler's business, else None.

    All ranks call it together, since all see the same gradient.
    """

    def look() -> str | None:
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is None:
            return None
        finite, scale = all(place.gather(trainer.losses_are_finite())), scaler.get_scale()
        if not finite or scale <= _LEAST:
            return None
        return f"float16 overflowed at a loss scale of {scale:g}: the step is left out and the scale is lowered"

    return look
