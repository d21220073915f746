"""Run a frozen image encoder without autograd.

transformers registers a hook on every input embedding so that gradient checkpointing works with an adapter, and counts
the patch embedding of Qwen2-VL's and Qwen2.5-VL's towers among them: a frozen tower is then computed twice and
back-propagated through at every step. Without that the gradients of trained weights are bitwise the same.
"""

from typing import Any

from ray_vlm.models.backbone import base_of


def run_frozen_tower_plainly(model: Any) -> bool:
    """Run the model's image encoder under `no_grad` if nothing in it is trainable. Return whether that is so."""
    import torch

    tower = base_of(model).get_encoder(modality="image")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return False
    tower.forward = torch.no_grad()(tower.forward)
    return True
