"""Gradient norms by part of the model, and the check that every part which is meant to learn has a gradient.

A part without one (LoRA on a tower whose output is computed without autograd, say) trains for days and learns nothing,
and no loss curve shows it. Of a new LoRA the A matrices have rightly none while B is zero: a part counts as a whole.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ModelError
from ray_vlm.models.families import Family, part_of
from ray_vlm.train.context import DistributedContext

PATIENCE = 20  # steps with a gradient somewhere, of rows that may hold no image, before a part is missed


def part_norms(named_parameters: Iterable[tuple[str, Any]], family: Family) -> dict[str, float]:
    """L2 norm of the gradients of what is trained, by part of the model; 0.0 where a part has none.

    Empty where no gradient is to be seen.
    """
    import torch

    grads: dict[str, list[Any]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            grads.setdefault(part_of(family, name), [])
            if parameter.grad is not None:
                grads[part_of(family, name)].append(parameter.grad)
    if not any(grads.values()):
        return {}
    norms = {
        part: torch.stack([norm.float() for norm in torch._foreach_norm(found)]).norm()
        for part, found in grads.items()
        if found
    }
    told = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))  # the card is waited for once
    return {part: told.get(part, 0.0) for part in grads}


class GradientWatch:
    """Sees the norms of every step until each part has had a gradient."""

    def __init__(self, always_images: bool):
        """`always_images`: every row has one, so every part has a gradient wherever any has."""
        self.patience = 1 if always_images else PATIENCE
        self.seen: set[str] = set()
        self.steps = 0  # that had a gradient somewhere

    def look(self, norms: dict[str, float]) -> None:
        """Raises `ModelError` that names the parts which have none and should. All ranks see the same norms."""
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
    """Hears gradients as they are made, where they are not kept to be looked at. Sums of squares by part."""

    def __init__(self, named_parameters: Iterable[tuple[str, Any]], family: Family):
        self.heard: dict[str, Any] = {}
        trained = [(part_of(family, name), weight) for name, weight in named_parameters if weight.requires_grad]
        self._hooks = [weight.register_hook(self._hook(part)) for part, weight in trained]

    def _hook(self, part: str) -> Callable[[Any], None]:
        self.heard[part] = 0.0

        def hear(grad: Any) -> None:
            self.heard[part] = self.heard[part] + grad.detach().float().square().sum()

        return hear

    def take(self, context: DistributedContext) -> dict[str, float]:
        """What all ranks have heard since it was asked last."""
        mine = {part: float(square) for part, square in self.heard.items()}
        self.heard = dict.fromkeys(self.heard, 0.0)
        return {part: math.sqrt(sum(of_rank[part] for of_rank in context.all_gather(mine))) for part in mine}

    def stop(self) -> None:
        """Hear no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def watch_gradients(
    job: JobConfig, family: Family, model: Any, context: DistributedContext
) -> Callable[[Any], dict[str, float]]:
    """A function that gives the model's norms by part, and raises where a part of the job gets none.

    DeepSpeed keeps gradients to itself: there the parts are watched, and their norms are not known.
    """
    watch = GradientWatch(always_images=job.task.name != "chat")
    listener = Listener(model.named_parameters(), family) if job.cluster.deepspeed else None
    parts = set(listener.heard) if listener else set()

    def look(model: Any) -> dict[str, float]:
        if listener is None:
            norms = part_norms(model.named_parameters(), family)
            watch.look(norms)
            return norms
        if watch.seen != parts:
            watch.look(listener.take(context))
        else:
            listener.stop()
        return {}

    return look
