"""The memory of a GPU: what a card of a nominal size has for torch, what others leave of it, and how torch manages it.

Light: torch is imported by the functions that ask the card. Without CUDA they do nothing.
"""

import gc
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.machine import GIB

if TYPE_CHECKING:
    import torch

TARGET = 0.92  # share of a card's memory that `train.memory: auto` plans with

# By the size on the label: GiB that torch reports as the card's total, the least of the cards of that label. Totals in
# public reports of torch's error ("GPU 0 has a total capacity of ..."): T4 14.56 (CatVTON issue 133), RTX 4090 23.64
# and A30 23.53, A100 39.50 (CoSeR issue 10) and 39.39, A100 79.25 (Vad-R1 issue 11). The values for 24 (A10G and L4,
# whose error correction takes memory), 32, 48 and for H100 (80) and H200 (141) are from experience, not looked up.
NOMINAL = {16: 14.5, 24: 22.0, 32: 31.7, 40: 39.4, 48: 44.3, 80: 79.1, 141: 139.7}

# torch reads one of these when a process first uses CUDA. The first is the name since torch 2.9; the others are older
# and go before it, so a user's own value stands in whichever it is.
_ALLOCATOR, *_OLDER = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR_VARIABLES = (_ALLOCATOR, *_OLDER)
_OTHERS = 1.0 * GIB  # bytes outside of this process's torch that are worth a sentence: its own context takes about half


def set_allocator() -> None:
    """Let torch's allocator grow its segments, unless the user has set one of `ALLOCATOR_VARIABLES`.

    Call it before the process uses CUDA. Batches and caches change their size at every step; in segments that cannot
    grow, free blocks remain that are too small for the next request.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR] = "expandable_segments:True"


def release_memory() -> None:
    """Collect garbage and return free blocks to the GPU, if this process uses one.

    Trainers, wrapped forwards and callbacks refer to each other in circles, so their tensors stay until garbage is
    collected.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def prepare_gpu(cluster: Cluster, method: Method) -> None:
    """Set torch's allocator for the workers' GPUs, and release what an earlier attempt or trial in this process has
    left. Call it before the process uses CUDA.

    vLLM's own allocator does not go with segments that grow, so where it samples the setting is left alone."""
    if cluster.gpus_per_worker:
        release_memory()
        if not (isinstance(method, GrpoMethod) and method.worker_engine == "vllm"):
            set_allocator()


def usable_gib(card: float) -> float:
    """Return the GiB that torch has of a card of this nominal size; other sizes are taken as they are."""
    return NOMINAL.get(int(card), card) if float(card).is_integer() else card


@dataclass(frozen=True)
class CardMemory:
    """Bytes of a GPU: `total`, `free`, and what this process's torch has `reserved` and `allocated` of them."""

    total: float
    free: float
    reserved: float
    allocated: float

    @property
    def available(self) -> float:
        """Bytes that this process's torch may reserve: what is free, and what it has reserved already."""
        return min(self.total, self.free + self.reserved)

    def room(self, card: float | None) -> float:
        """Return the bytes to plan with: the least of what the job says of its card (`card`, in GiB), of what the card
        has, and of what others leave of it."""
        return self.available if card is None else min(self.available, usable_gib(card) * GIB)

    def describe_others(self) -> str | None:
        """Return a sentence on what other processes hold, beside this process's own context; None if that is next to
        nothing."""
        others = self.total - self.available
        if others <= _OTHERS:
            return None
        return (
            f"of the GPU's {self.total / GIB:.1f} GiB other processes and CUDA's own context hold {others / GIB:.1f}; "
            f"{self.available / GIB:.1f} GiB are planned with"
        )


def read_card(device: "str | torch.device") -> CardMemory | None:
    """Return the memory of the GPU, None for another device."""
    if not str(device).startswith("cuda"):
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return CardMemory(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))
