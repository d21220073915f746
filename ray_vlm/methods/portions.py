"""Sample the answers of a step in portions that fit into the GPU's memory.

A group's random numbers depend on its seed alone, so portions of any size give the same answers, but for the rounding
of batches of other sizes, which on GPUs may differ.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray_vlm.errors import RunError
from ray_vlm.models.card_memory import release_memory
from ray_vlm.models.out_of_memory import NO_ROOM, describe_out_of_memory, is_out_of_memory

if TYPE_CHECKING:
    from torch.nn import Module

    from ray_vlm.data.samples import SampleBuilder
    from ray_vlm.data.spec import Sample
    from ray_vlm.engines.interface import Completion, Sampling

logger = logging.getLogger(__name__)


def sample_in_portions(
    sample: "Callable[..., list[list[Completion]]]",
    model: "Module",
    rows: "Sequence[Sample]",
    builder: "SampleBuilder",
    sampling: "Sampling",
    seeds: Sequence[Sequence[int]],
    device: str,
    group_batch: int | None = None,
    pixels: "Callable[[Sample], dict[str, Any]] | None" = None,
) -> "tuple[list[list[Completion]], int | None]":
    """Return `sample`'s answers to the prompts `rows`, and how many prompts were sampled at a time; None: all.

    `group_batch`: how many to begin with. It is halved as often as the GPU runs out of memory. Raise `RunError` if one
    prompt at a time does not fit, or under ZeRO-3, where all workers must run the same forwards.
    """
    while True:
        try:
            return sample(
                model, rows, builder, sampling, seeds, device, group_batch=group_batch, pixels=pixels
            ), group_batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried, reason = min(group_batch or len(rows), len(rows)), describe_out_of_memory(error)
            if tried <= 1 or _is_partitioned(model):
                raise RunError(_refuse(tried, sampling, reason)) from error
        # Outside the handler: until it ends, the error keeps the tensors of the calls that it went through.
        release_memory()
        group_batch = tried // 2
        logger.warning(
            f"sampling the answers to {tried} prompts at a time {NO_ROOM}: {reason}. Tried next, and kept: "
            f"{group_batch} at a time, with the same random numbers"
        )


def _refuse(tried: int, sampling: "Sampling", reason: str) -> str:
    at_a_time = "one prompt" if tried == 1 else f"{tried} prompts at a time"
    return (
        f"sampling the answers to {at_a_time} {NO_ROOM}: {reason}. Lower method.num_generations (now "
        f"{sampling.num_generations}), method.max_completion_tokens (now {sampling.max_new_tokens}) or "
        "data.max_pixels, set model.load_in_4bit, or use a larger card."
    )


def _is_partitioned(model: "Module") -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
