"""A frozen image encoder runs without autograd.

transformers hangs a hook on every input embedding so that gradient checkpointing works under an adapter, and counts the
patch embedding of Qwen2-VL's and Qwen2.5-VL's towers among them: a tower in which nothing learns is then computed twice
and back-propagated through at every step. The gradients of what does learn are the same to the bit without that.
"""

from typing import Any

from ray_vlm.models.backbone import base_of


def run_frozen_tower_plainly(model: Any) -> bool:
    """Run the model's image encoder under `no_grad` if nothing in it is trainable; returns whether that is so."""
    import torch

    tower = base_of(model).get_encoder(modality="image")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return False
    tower.forward = torch.no_grad()(tower.forward)
    return True
