"""Answer prompts in portions that fit into the GPU's memory.

A group's random numbers depend on its seed alone, and a greedy answer on none, so portions of any size give the same
answers, but for the rounding of batches of other sizes, which on GPUs may differ.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray_vlm.errors import RunError
from ray_vlm.models.card_memory import release_memory
from ray_vlm.models.out_of_memory import NO_ROOM, describe_out_of_memory, is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class PortionWords:
    """The words of messages. `action`: what is done to prompts, such as "sampling the answers to"; `kept`: ends the
    line on a smaller portion; `advice`: a sentence that begins with "Lower", on what takes less memory; `whole`: the
    advice where all prompts must run together."""

    action: str
    kept: str
    advice: str
    whole: str


def in_portions(
    run: Callable[[int | None], T], num_prompts: int, portion: int | None, can_halve: bool, words: PortionWords
) -> tuple[T, int | None]:
    """Return `run(portion)`, and how many prompts ran at a time; None: all.

    `portion`: how many to begin with. It is halved as often as the GPU runs out of memory. Raise `RunError` if one
    prompt at a time does not fit. `can_halve`: False under ZeRO-3, where all workers must run the same forwards.
    """
    while True:
        try:
            return run(portion), portion
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried, reason = min(portion or num_prompts, num_prompts), describe_out_of_memory(error)
            at_a_time = "one prompt" if tried == 1 else f"{tried} prompts at a time"
            failed = f"{words.action} {at_a_time} {NO_ROOM}: {reason}."
            if tried <= 1 or not can_halve:
                raise RunError(f"{failed} {words.advice if tried <= 1 else words.whole}") from error
        # Outside the handler: until it ends, the error keeps the tensors of the calls that it went through.
        release_memory()
        portion = tried // 2
        logger.warning(f"{failed} Tried next, and kept: {portion} at a time{words.kept}")
