"""A decoding step on tensors that stay where they are, which a CUDA graph can repeat.

Token by token, a model of 36 layers with an adapter launches thousands of kernels, which takes the host longer than the
card needs to compute. A CUDA graph launches them all at once. It repeats operations on the same addresses, so a step
may depend on nothing but tensors that are changed in place: the token, its position, the slot of the cache that is
written, and the mask. `StaticSteps` holds these and knows nothing of CUDA: `capture` turns a step into what repeats it.
Without `capture` the same step runs as it is, on any device.

Attention reads the whole capacity of the cache, behind a mask. A graph has fixed shapes, so reading only the tokens
that are there would take a graph for each length, and capturing one costs several ordinary steps: more than it saves as
long as prompts (an image of 1,000 tokens) are not much shorter than answers. The capacity is what prompts and answers
need, so that no more than the tokens to come are read in vain. A masked SDPA takes any size of head: there is no
flash kernel to be missing.

Sequences leave in halves, for the same reason. Graphs of fewer sequences work on the first rows of the same tensors, so
all sizes of a rollout and all of its portions share one cache, and each size is captured once.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from ray_vlm.engines.fixed_cache import FixedCache
from ray_vlm.models.operations import counter_of
from ray_vlm.models.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)
_EAGER = 8  # tokens before the first capture: answers that end sooner cost none, and libraries choose their kernels
_WORTH = 64  # tokens to come for which a graph of fewer sequences is captured
_ROUND = 64  # tokens of a capacity: kernels of masked attention want aligned rows

Step = Callable[[], None]
# Runs a step, which may be repeated with the same result, and returns a function that repeats it.
Capture = Callable[[Step], Step]


class StaticSteps:
    """The steps of one rollout. `captures`: how many were captured."""

    def __init__(self, model: Module, axes: Callable[[Tensor], Tensor], capture: Capture | None, capacity: int = 0):
        """`axes` maps positions `[...]` to the model's format. `capture`: None runs every step as it is. `capacity`:
        tokens of the longest prompt and its answer in all portions, where it is known."""
        self.captures = 0
        self._model, self._axes, self._capture, self._capacity = model, axes, capture, capacity
        self._cache: FixedCache | None = None
        self._steps: dict[int, Step] = {}  # by the number of sequences, captured ones where there are some
        self._plain: dict[int, Step] = {}
        self._done = 0  # steps so far
        self._logits: dict[int, Tensor] = {}
        self._sequences = 0

    def start(self, prompts: DynamicCache, position: Tensor, mask: Tensor, repeats: int, capacity: int) -> None:
        """Take over a prefilled cache, which is emptied, for `repeats` sequences of each prompt.

        `position` (`int64 [sequences]`): of the first new token; `mask` (`[sequences, tokens]`): of the prompts;
        `capacity`: tokens of these prompts and their answers."""
        sequences, length = mask.shape
        capacity = -(-max(capacity, self._capacity) // _ROUND) * _ROUND
        held = self._cache
        if held is None or held.sequences < sequences or held.capacity < capacity:
            for steps in (self._steps, self._plain, self._logits):
                steps.clear()
            self._cache = held = None  # before the new one is allocated
            self._cache = held = FixedCache(prompts, sequences, capacity)
            self._token = torch.zeros_like(position)
            self._position = torch.zeros_like(position)
            self._mask = torch.zeros(sequences, 1, 1, capacity, dtype=torch.bool, device=mask.device)
        self._sequences = held.fill(prompts, repeats)
        self._position[:sequences] = position
        self._mask.zero_()
        self._mask[:sequences, 0, 0, :length] = mask.bool()
        self._first = True

    def __call__(self, token: Tensor) -> Tensor:
        """Return the logits `[sequences, vocabulary]` after one more token (`int64 [sequences]`) of each sequence."""
        cache, size = self._cache, self._sequences
        assert cache is not None
        if not self._first:
            cache.advance()
            self._position.add_(1)
        self._first = False
        self._token[:size] = token
        counter = counter_of(self._model)
        counter.count_decoded(size, cache.length)
        with counter.paused():
            self._step_of(size)()
        self._done += 1
        return self._logits[size]

    def remaining(self, unfinished: int, tokens_left: int) -> int:
        """Return how many sequences stay in the batch: a half of them, a quarter and so on, or all."""
        half = self._sequences
        while half > 1 and unfinished <= (half + 1) // 2:
            half = (half + 1) // 2
        return half if self._capture is None or tokens_left >= _WORTH else self._sequences

    def keep(self, rows: Tensor) -> None:
        """Continue with these sequences alone (`int64 [kept]`)."""
        assert self._cache is not None
        self._cache.keep(rows)
        self._sequences = len(rows)
        for values in (self._position, self._mask):
            values[: len(rows)] = values[rows]

    def _step_of(self, size: int) -> Step:
        """Return the step of that many sequences, captured where it is time and possible."""
        if size in self._steps:
            return self._steps[size]
        if size not in self._plain:
            self._plain[size] = self._build(size)
        if self._capture is None or self._done < _EAGER:
            return self._plain[size]
        try:
            self._steps[size] = self._capture(self._plain[size])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(f"A decoding step cannot be captured as a CUDA graph ({reason}): steps run one by one.")
            self._capture = None
            return self._plain[size]
        self.captures += 1
        return self._steps[size]

    def _build(self, size: int) -> Step:
        """Return the step of that many sequences, which reads and writes tensors that stay where they are."""
        assert self._cache is not None
        token, position, mask, slot = self._token[:size], self._position[:size], self._mask[:size], self._cache.slot
        # No reference to `self`: a cycle would keep the cache until the garbage collector comes.
        cache, model, axes, logits = self._cache.view(size), self._model, self._axes, self._logits

        def step() -> None:  # may run any number of times: what it changes, it changes to the same values again
            mask.index_fill_(3, slot, True)
            out: Any = model(
                input_ids=token[:, None],
                attention_mask=mask,  # four dimensions: transformers takes it as it is
                position_ids=axes(position)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            logits[size] = out.logits[:, -1]

        return step


class CudaGraphs:
    """Captures steps as CUDA graphs that share their memory; they are never replayed at the same time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run the step on another stream, as captures need it, capture it, and return its replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The outer context: after a capture that fails, torch before 2.15 stays on the capture's stream.
        # Other threads, which make batches ahead, may call CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay
