"""The rank of this process among the training processes, and what the ranks exchange beside gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of ranks and device of this process. `ray`: whether it is a Ray Train worker. `local_world_size`:
    ranks on this machine.

    Every method is a collective operation: all ranks must call it at the same point. None gives every rank the values
    of all, which for N ranks would be N times N values: rank 0 gathers them and broadcasts what follows from them.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    ray: bool = False
    local_world_size: int = 1

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank, on rank 0 and an empty list on the others. Also a barrier,
        because the ranks exchange the sizes of their values first."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        everyone = [value] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, everyone, dst=0)
        return everyone or []

    def scatter(self, values: Sequence[T]) -> T:
        """Return on each rank its own of rank 0's `values`, which are in order of rank. Other ranks' are ignored."""
        if self.world_size == 1:
            return values[0]
        import torch.distributed

        box: list[T | None] = [None]
        torch.distributed.scatter_object_list(box, list(values) if self.rank == 0 else None, src=0)
        return box[0]  # type: ignore[return-value]

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank has set it, so that all ranks act together."""
        return [bool(flag) for flag in self.max([int(flag) for flag in flags])]

    def max(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over all ranks."""
        if self.world_size == 1:
            return list(values)
        import torch.distributed

        largest = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.tolist()

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
    sizes = worker.get_world_size(), device, True, worker.get_local_world_size()
    return DistributedContext(worker.get_world_rank(), *sizes)
