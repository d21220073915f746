"""What every engine offers: answers to prompts, sampled in groups or greedy.

An engine is the package's own loop on the model that trains (`own.py`), vLLM in processes of its own (`vllm.py`), a
server that already runs (`server.py`), or actors that hold one of these (`actors.py`). Rollouts, validation,
`evaluate`, `predict` and `pairs` ask it, and do not know which it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

    from ray_vlm.data.spec import Sample


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. `temperature`: of all, or of each completion of a group; 0: greedy. `top_p` 1 and
    `top_k` 0: from the whole vocabulary."""

    num_generations: int = 8
    max_new_tokens: int = 256
    temperature: float | tuple[float, ...] = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """A sampled answer. `ids` include the end token; `finished` is False if the answer was cut off before it.

    `logprobs`: natural logarithm of each token's probability at the sampling temperature (greedy: 1) over the whole
    vocabulary, before top-p, top-k and the ban on image tokens: what the trainer's forward computes.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


# Returns a row's image inputs if they are already processed.
Pixels = Callable[["Sample"], dict[str, Any]]


class Engine(ABC):
    """Answers prompts with one model and, where there is one, its adapter."""

    @abstractmethod
    def update(self, model: "Module") -> None:
        """Answer with the adapter of `model` as it is now. Do nothing where the engine runs `model` itself."""

    @abstractmethod
    def sample(
        self,
        rows: "Sequence[Sample]",
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample `sampling.num_generations` completions for each prompt row, in order.

        `seeds[i]` (non-negative integers) seeds row i's random numbers, so that neither the other rows of the call nor
        the number of workers changes them."""

    @abstractmethod
    def answer(self, rows: "Sequence[Sample]", max_new_tokens: int) -> list[list[int]]:
        """Return the tokens of a greedy answer to each prompt row, in order, with the end token where there is one."""

    def sample_base(
        self, rows: "Sequence[Sample]", sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """Return `sample` of the base alone, as if the model had no adapter: what shows that the adapter is in use.
        Only engines that hold a copy of the model can, and need to."""
        raise NotImplementedError(f"{type(self).__name__} does not answer without the adapter.")

    def parts(self) -> "Sequence[Engine]":
        """Return the engines that may each answer with an adapter of their own, of those that this one is made of."""
        return [self]

    @property
    def has_ended(self) -> bool:
        """Whether the engine answers no more, since it was closed or a call of it failed."""
        return False

    def close(self) -> None:  # noqa: B027  (most engines hold nothing)
        """Give back processes, memory and files. The engine answers no more."""

    def awake(self) -> AbstractContextManager[None]:
        """Return a context for several calls in a row, between which an engine that sleeps stays awake."""
        return nullcontext()
