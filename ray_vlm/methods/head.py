"""On a CPU too, the head scores only tokens that are trained.

TRL's fused head leaves out the others where it has Triton (`trl/trainer/utils.py`, `add_fused_lm_head`); elsewhere it
scores every position, and its tile of logits is hundreds of megabytes. Here the backbone hands it the positions that
have a label, and what it says of them goes back to where TRL's trainers look.
"""

import functools
from typing import Any

from ray_vlm.models.backbone import base_of

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def score_labelled(model: Any) -> None:
    """Let the fused head of `model`, under an adapter or not, score labelled positions alone. Needs a backbone that
    knows `keep` (`methods/forward.share_prefixes`). Exact."""
    base = base_of(model)
    fused = base.forward

    @functools.wraps(fused)  # `generate` looks at the signature
    def forward(*args: Any, labels: Any = None, **inputs: Any) -> Any:
        plain = inputs.get("shift_labels") is not None or labels is None or labels.device.type == "cuda"
        if plain or not inputs.get("fused_lm_head") or not (labels[:, 1:] != -100).any():
            return fused(*args, labels=labels, **inputs)
        targets = labels[:, 1:]
        mask = targets != -100
        output = fused(*args, shift_labels=targets[mask][None], keep=mask, **inputs)
        for name in FIELDS:
            if (values := getattr(output, name)) is not None:
                setattr(output, name, values.new_zeros(mask.shape).masked_scatter(mask, values))
        output.label_mask = mask
        return output

    base.forward = forward
