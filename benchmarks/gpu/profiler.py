"""The profile of a call: kernels by kind, launches, waits for the device."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The first pattern that a kernel's name holds says what it is.
KINDS = (
    ("dequantise", r"dequant|gemv_4bit|gemm_4bit|kgemm_4bit"),
    ("attention", r"flash|fmha|attention|sdpa|softmax_warp"),
    ("products", r"gemm|cutlass|nvjet|xmma|cublas|matmul|::mm|addmm|::bmm|conv"),
    ("copies and casts", r"memcpy|memset|copy|cast|fill|cat|index|gather|scatter|masked"),
    ("norms, activations, adapters", r"elementwise|reduce|vectorized|norm|silu|mul|add|rsqrt|pow|mean|sum"),
)
_WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Profile:
    """`kinds`: device seconds by kind of kernel. `busy_s`: their sum. `launches`: kernels. `waits`: how often the host
    waited for the device."""

    kinds: dict[str, float]
    busy_s: float
    launches: int
    waits: int
    names: tuple[str, ...]


def profile_kernels(call: Callable[[], Any], device: str) -> Profile:
    """Run the call under a profiler. On a CPU, operations are counted as kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_card = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_card:
            torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    busy = launches = waits = 0.0
    names: Counter[str] = Counter()
    for event in profiler.key_averages():
        waits += event.count if event.key in _WAITS else 0
        seconds = (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6
        is_kernel = "CUDA" in str(event.device_type) if on_card else event.key.startswith(("aten::", "bitsandbytes::"))
        if is_kernel and seconds > 0:
            kinds[kind_of(event.key)] += seconds
            busy += seconds
            launches += event.count
            names[event.key] += seconds
    return Profile(dict(kinds), busy, int(launches), int(waits), tuple(name for name, _ in names.most_common(8)))


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
