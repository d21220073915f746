"""Pairs of queries and keys that attention computes: in calls that are seen, and in segments that are planned."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ray_vlm.models.layouts import PackedKeys


class CountPairs(TorchDispatchMode):
    """Counts pairs of queries and keys in forward calls of attention; a square causal call has n (n + 1) / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func) and "backward" not in str(func):
            query, key = args[:2]
            queries, keys = query.shape[-2], key.shape[-2]
            is_causal = any(value is True for value in args[3:]) or bool((kwargs or {}).get("is_causal"))
            self.pairs += query.shape[0] * (queries * (queries + 1) // 2 if is_causal else queries * keys)
        return func(*args, **(kwargs or {}))


def pairs_in_segments(keys: PackedKeys) -> int:
    """Return the pairs of attention over segments that is causal from the bottom right: the first query of a segment
    attends to all keys but the later queries'."""
    segments = zip(keys.query_ends.diff().tolist(), keys.key_ends.diff().tolist(), strict=True)
    return sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in segments)
