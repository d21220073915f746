"""A KV cache with a capacity from the start, whose tensors stay where they are.

A decoding step that reads and writes them can be recorded once and repeated, as a CUDA graph is. transformers' static
cache would take the prompts too, whose attention then reads the whole capacity; and each of its layers has a position
of its own to move. Nothing here refers back to the cache, so its memory is free as soon as the rollout ends.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class FixedCache:
    """Keys and values of at most `sequences` sequences and `capacity` tokens, filled from a prefilled cache.

    `pairs`: keys and values of each layer, `[sequences, heads, capacity, size]`. They are never moved: fewer sequences
    are the first rows of the same tensors (`view`). `slot` (`int64 [1]`): where the next token is written.
    """

    def __init__(self, like: DynamicCache, sequences: int, capacity: int):
        """`like`: a filled cache, by whose layers heads, sizes, dtype and device are chosen. All must be plain."""
        self.sequences, self.capacity, self.length = sequences, capacity, 0
        layers: list[Any] = list(like.layers)
        self.pairs = [
            tuple(
                old.new_zeros(sequences, old.shape[1], capacity, old.shape[3])  # a masked NaN would still be a NaN
                for old in (layer.keys, layer.values)
            )
            for layer in layers
        ]
        self.slot = torch.zeros(1, dtype=torch.int64, device=layers[0].keys.device)

    def fill(self, prefilled: DynamicCache, repeats: int) -> int:
        """Take over the prompts of a filled cache, each for `repeats` sequences, and empty it. Return the number of
        sequences."""
        sequences = 0
        layers: list[Any] = list(prefilled.layers)
        for layer, pair in zip(layers, self.pairs, strict=True):
            for old, new in zip((layer.keys, layer.values), pair, strict=True):
                prompts, heads, length, size = old.shape
                sequences = prompts * repeats
                rows = new[:sequences].view(prompts, repeats, heads, self.capacity, size)
                rows[..., :length, :] = old[:, None]
            self.length = length
            layer.reset()  # layer by layer, so that prompts are not held twice
        self.slot.fill_(self.length)
        return sequences

    def keep(self, rows: Tensor) -> None:
        """Move these sequences (`int64 [kept]`, ascending or not) to the front."""
        for pair in self.pairs:
            for values in pair:
                values[: len(rows)] = values[rows]

    def advance(self) -> None:
        """Let the next token be written to the following position."""
        self.length += 1
        self.slot.add_(1)

    def view(self, sequences: int) -> Cache:
        """Return the first sequences as a cache that a model takes for one new token of each."""
        return Cache(layers=[_FixedLayer(keys[:sequences], values[:sequences], self) for keys, values in self.pairs])


class _FixedLayer(DynamicLayer):
    """A layer that writes one token at its cache's slot, and returns the whole capacity."""

    def __init__(self, keys: Tensor, values: Tensor, fixed: FixedCache):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self._fixed = fixed

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._fixed.slot, key_states)
        self.values.index_copy_(2, self._fixed.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._fixed.length
