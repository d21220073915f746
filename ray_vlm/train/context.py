"""Which of the training processes this one is."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DistributedContext:
    """Where this process stands. `ray`: inside a Ray Train worker."""

    rank: int
    world_size: int
    device: str
    ray: bool

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in order of rank. Also a barrier."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone
