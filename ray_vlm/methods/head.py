"""Let the head score only labelled tokens, on a CPU too.

With Triton, TRL's fused head skips other tokens (`trl/trainer/utils.py`, `add_fused_lm_head`); without, it scores every
position, and its tile of logits takes hundreds of megabytes. Here the backbone passes only labelled positions to the
head, and the outputs are copied back to the positions where TRL's trainers read them.
"""

import functools
from typing import Any

from ray_vlm.models.backbone import base_of

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def score_labelled(model: Any) -> None:
    """Let the fused head of `model`, with or without an adapter, score labelled positions alone. The results are exact.

    The backbone must accept `keep` (`methods/prefix_sharing.share_prefixes`)."""
    base = base_of(model)
    fused = base.forward

    @functools.wraps(fused)  # `generate` inspects the signature
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
