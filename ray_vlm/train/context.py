"""The rank of this process among the training processes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of ranks and device of this process. `ray`: whether it is a Ray Train worker."""

    rank: int
    world_size: int
    device: str
    ray: bool

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank, on every rank. Also a barrier."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone
