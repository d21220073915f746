"""The growing cache of the decoding loop: new keys and values are written in place, and sequences are repeated and
dropped, also in layers of linear attention, which have a state in place of keys and values."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import DynamicCache

_ROOM = 64  # tokens of spare capacity


def make_room(cache: "DynamicCache") -> None:
    """Let the plain layers of a filled `DynamicCache` write new tokens in place; other kinds stay as they are.

    transformers' `DynamicLayer` copies all keys and values at every token."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room: "list[Tensor] | None" = None  # `keys` and `values` are views of these, which are longer

        def update(
            self, key_states: "Tensor", value_states: "Tensor", *args: object, **kwargs: object
        ) -> tuple["Tensor", "Tensor"]:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.room is None or end > self.room[0].shape[-2]:
                self.room = [_with_room(old, end + _ROOM) for old in (self.keys, self.values) if old is not None]
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: "Tensor") -> None:
            super().batch_select_indices(indices)
            self.room = None  # of the rows that left

    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = RoomyLayer()
            roomy.__dict__ |= layer.__dict__  # its keys and values
            cache.layers[number] = roomy


def repeat_rows(cache: "DynamicCache", repeats: int) -> None:
    """Repeat each sequence of a filled cache, its copies one after another."""
    import torch

    layer: Any
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            state = next(state for state in layer.conv_states.values() if state is not None)
            layer.reorder_cache(torch.arange(len(state)).repeat_interleave(repeats))
        else:
            layer.batch_repeat_interleave(repeats)


def select_rows(cache: "DynamicCache", rows: "Tensor") -> None:
    """Keep these sequences of a filled cache, `int64 [sequences]`."""
    layer: Any
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            layer.reorder_cache(rows)  # for transformers an order of beams, which may name each any number of times
        else:
            layer.batch_select_indices(rows)


def _with_room(old: "Tensor", length: int) -> "Tensor":
    """Copy `old` (`[sequences, heads, tokens, size]`) into a tensor with a capacity of `length` tokens."""
    room = old.new_empty(*old.shape[:-2], length, old.shape[-1])
    room[..., : old.shape[-2], :] = old
    return room


def is_plain(cache: "DynamicCache") -> bool:
    """Return whether all layers attend to all tokens: then a cache of fixed size can take them over."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def cache_bytes(config: Any, dtype: "torch.dtype", sequences: int, tokens: int) -> int:
    """Return the bytes of keys and values of that many sequences. `config`: the language model's."""
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize * sequences * tokens
