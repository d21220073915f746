"""Gradient norms by part of the model, and the check that every trained part receives a gradient.

A part without a gradient, such as a LoRA on an encoder that runs without autograd, learns nothing, and no loss curve
shows it. The check is per part and not per weight: the A matrices of a new LoRA have no gradient while B is zero.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family, part_of

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

PATIENCE = 20  # steps with a gradient before a part without one is an error, if rows may have no image


def part_norms(named_parameters: NamedParameters, family: Family) -> dict[str, float]:
    """Return the L2 norm of the gradients of the trained weights by part of the model, 0.0 for a part without any.

    Empty if no weight has a gradient.
    """
    grads: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            grads.setdefault(part_of(family, name), [])
            if parameter.grad is not None:
                grads[part_of(family, name)].append(parameter.grad)
    if not any(grads.values()):
        return {}
    # `get_total_norm` would add them up in the gradients' own precision, which may be bfloat16.
    norms = {
        part: torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).norm()
        for part, gradients in grads.items()
        if gradients
    }
    # `tolist` of one tensor waits for the GPU once for all parts.
    values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
    return {part: values.get(part, 0.0) for part in grads}


class GradientWatch:
    """Checks the norms of every step until each part has had a gradient."""

    def __init__(self, always_images: bool):
        """`always_images`: every row has an image, so in every step all parts must have a gradient."""
        self.patience = 1 if always_images else PATIENCE
        self.seen: set[str] = set()
        self.steps = 0  # that had a gradient somewhere

    def look(self, norms: dict[str, float]) -> None:
        """Raise `ModelError` with the parts that should have a gradient and have none. All ranks see the same norms."""
        if not any(norm > 0 for norm in norms.values()):  # no signal: a GRPO step of equal rewards
            return
        self.steps += 1
        self.seen |= {part for part, norm in norms.items() if norm > 0 or math.isnan(norm)}
        missing = sorted(set(norms) - self.seen)
        if missing and self.steps >= self.patience:
            raise ModelError(
                f"{', '.join(missing)}: meant to learn (lora.target), but no gradient reaches it, while "
                f"{', '.join(sorted(self.seen))} has one. Take it out of lora.target; if it should learn, see what "
                "computes it without autograd."
            )


class Listener:
    """Sums the squares of gradients by part in backward hooks, for DeepSpeed, which does not keep gradients."""

    def __init__(self, named_parameters: NamedParameters, family: Family):
        self.heard: dict[str, torch.Tensor | float] = {}
        trained = [(part_of(family, name), weight) for name, weight in named_parameters if weight.requires_grad]
        self._hooks = [weight.register_hook(self._hook(part)) for part, weight in trained]

    def _hook(self, part: str) -> Callable[[torch.Tensor], None]:
        self.heard[part] = 0.0

        def hear(grad: torch.Tensor) -> None:
            self.heard[part] = self.heard[part] + grad.detach().float().square().sum()

        return hear

    def take(self, context: DistributedContext) -> dict[str, float]:
        """Return the norms over all ranks since the last call, by part."""
        squares = context.sum([float(square) for square in self.heard.values()])
        self.heard = dict.fromkeys(self.heard, 0.0)
        return {part: math.sqrt(square) for part, square in zip(self.heard, squares, strict=True)}

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class GradientNormsCallback(TrainerCallback):
    """Measures the gradient norms of every step by part of the model, and raises if a trained part has no gradient.

    `norms`: of the current step. Under DeepSpeed, which does not expose gradients, the check works but `norms` is
    empty. `always_images`: every row has an image.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        context: DistributedContext,
        always_images: bool,
        deepspeed: bool,
    ):
        self.norms: dict[str, float] = {}
        self._family, self._context = family, context
        self._watch = GradientWatch(always_images)
        self._listener = Listener(model.named_parameters(), family) if deepspeed else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the norms and check them. Raises `ModelError` if a trained part has no gradient."""
        if self._listener is None:
            self.norms = part_norms(kwargs["model"].named_parameters(), self._family)
            self._watch.look(self.norms)
        elif self._watch.seen != set(self._listener.heard):
            self._watch.look(self._listener.take(self._context))
        else:
            self._listener.stop()
