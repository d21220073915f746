"""The rank of this process among the training processes, and what the ranks exchange beside gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of ranks and device of this process. `ray`: whether it is a Ray Train worker.

    Every method is a collective operation: all ranks must call it at the same point.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    ray: bool = False

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank, on every rank. Also a barrier."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        everyone = [value] * self.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank has set it, so that all ranks act together."""
        if self.world_size == 1:
            return list(flags)
        import torch.distributed

        any_set = torch.tensor([int(flag) for flag in flags], device=self.device)
        torch.distributed.all_reduce(any_set, op=torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in any_set.tolist()]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        import torch.distributed

        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()


def build_context(use_gpu: bool, in_ray: bool) -> DistributedContext:
    """Return the rank and the device of this process. `in_ray`: whether it is a Ray Train worker."""
    if not in_ray:
        return DistributedContext(0, 1, "cuda:0" if use_gpu else "cpu", ray=False)
    import ray.train.torch
    import torch

    worker = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    if device != "cpu":
        torch.cuda.set_device(device)  # NCCL sends objects through the current GPU
    return DistributedContext(worker.get_world_rank(), worker.get_world_size(), device, ray=True)
