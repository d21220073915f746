"""A KV cache with spare capacity. transformers' `DynamicLayer` copies all keys and values at every token."""

from typing import Any

_ROOM = 64  # tokens


def make_room(cache: Any) -> None:
    """Let the plain layers of a filled `DynamicCache` write new tokens in place; other kinds stay as they are."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room: list[Any] | None = None  # `keys` and `values` are views of these, which are longer

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.room is None or end > self.room[0].shape[-2]:
                self.room = [_with_room(old, end + _ROOM) for old in (self.keys, self.values)]
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self.room = None

    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = RoomyLayer()
            roomy.__dict__ |= layer.__dict__
            cache.layers[number] = roomy


def _with_room(old: Any, length: int) -> Any:
    """Copy `old` (`[sequences, heads, tokens, size]`) into a tensor with a capacity of `length` tokens."""
    room = old.new_empty(*old.shape[:-2], length, old.shape[-1])
    room[..., : old.shape[-2], :] = old
    return room
