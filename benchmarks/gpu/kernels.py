"""Attention of trees and packs: which kernel a boolean mask gets, and how others perform.

A tree is a prefix and its answers, as `models/prefix_sharing.py` lays out a group of GRPO: a token sees the tokens
before it in the prefix and in its own answer. Shapes of Qwen3-VL-8B: 32 heads over 8 of keys and values, 128 wide.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.profiler import profile_kernels
from benchmarks.gpu.supervise import first_line, leave_after_cuda_error

HEADS, SHARED, WIDTH = 32, 8, 128
ANSWERS = 8
KERNELS = ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
WINDOWS, WINDOW, VISION_HEADS, VISION_WIDTH = 64, 64, 16, 80  # of Qwen2.5-VL's image encoder, 1,024 image tokens


def kernels(bench: Bench) -> None:
    """Measure a known weak spot of cuDNN, the windows of an image encoder, then masked attention by length of the
    tree."""
    odd_lengths(bench)
    windows(bench)
    for number, length in enumerate(bench.scale.lengths):
        trees(bench, length, flexible=bool(number % 2))  # to compile takes seconds, so not for each


def trees(bench: Bench, length: int, flexible: bool) -> None:
    """Measure forward and backward over a tree of so many tokens with each kernel that accepts it."""
    import torch

    q, k, v, mask = build_tree(bench, length)
    needed = int(mask.sum())
    operations = 3 * 4 * HEADS * WIDTH * needed  # what the pairs that see each other need, forward and backward

    def write(name: str, call: Callable[[], Any]) -> None:
        try:
            seconds = bench.seconds(lambda: backward(call, (q, k, v)), repeats=3, warm=1)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            leave_after_cuda_error(error)
            bench.add(f"tree of {length}: {name}", float("nan"), "ms", note=f"does not take it: {first_line(error)}")
            return
        bench.add(f"tree of {length}: {name}", 1000 * seconds, "ms")
        bench.add(f"tree of {length}: {name}, needed operations", operations / seconds / 1e12, "TFLOP/s")

    attend = torch.nn.functional.scaled_dot_product_attention

    def masked() -> Any:
        return attend_masked(q, k, v, mask)

    write("mask, as torch chooses", masked)
    profile = profile_kernels(masked, bench.scale.device)
    bench.add(f"tree of {length}: kernels of a mask", profile.launches, "", note="; ".join(profile.names)[:300])
    for kernel in () if bench.scale.rehearse else KERNELS:
        with chosen(kernel):
            write(f"mask, {kernel}", masked)
    write("causal, no mask", lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
    if flexible:
        attend_in_blocks(bench, length, (q, k, v), mask, write)


def attend_masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Compute attention with a mask as transformers calls it: keys and values are repeated for the heads that share
    them."""
    import torch

    keys, values = (part.repeat_interleave(HEADS // SHARED, dim=1) for part in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def build_tree(bench: Bench, length: int) -> tuple[Any, Any, Any, Any]:
    """Build queries, keys, values `[1, heads, tokens, width]` and the mask `bool [1, 1, tokens, tokens]` of a tree,
    half of which is the prefix."""
    import torch

    device = bench.scale.device
    q, k, v = (
        torch.randn(1, heads, length, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, SHARED, SHARED)
    )
    branch = branches(length, device)
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = earlier & ((branch[None] == 0) | (branch[None] == branch[:, None]))
    return q, k, v, mask[None, None]


def branches(length: int, device: str) -> Any:
    """Return for each token 0 in the prefix, else the number of its answer: `int64 [tokens]`."""
    import torch

    beginning = min(1090, length // 2)
    rest = torch.arange(length - beginning, device=device) * ANSWERS // (length - beginning) + 1
    return torch.cat([torch.zeros(beginning, dtype=torch.long, device=device), rest])


def attend_in_blocks(
    bench: Bench, length: int, parts: tuple[Any, Any, Any], mask: Any, write: Callable[..., None]
) -> None:
    """Return FlexAttention with a block mask of the tree, compiled on a card. It skips blocks that are masked out."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = bench.scale.device
    branch = branches(length, device)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & ((branch[key] == 0) | (branch[key] == branch[query]))

    q, k, v = parts
    on_card = not bench.scale.rehearse
    blocks = create_block_mask(sees, None, None, length, length, device=device, _compile=on_card)
    attend = torch.compile(flex_attention, dynamic=False) if on_card else flex_attention
    with torch.no_grad():
        dense = attend_masked(q, k, v, mask)
        q0, k0, v0 = (part.detach() for part in parts)  # a CPU has no backward of it
        apart = (attend(q0, k0, v0, block_mask=blocks, enable_gqa=True) - dense).abs().max()
    bench.check(f"tree of {length}: FlexAttention against a mask, largest difference", float(apart), "", 0.05)
    if on_card:
        write("FlexAttention", lambda: attend(q, k, v, block_mask=blocks, enable_gqa=True))


def backward(call: Callable[[], Any], parts: Sequence[Any]) -> None:
    """Run forward and backward of a call with queries, keys and values."""
    for part in parts:
        part.grad = None
    call().sum().backward()


def chosen(kernel: str) -> Any:
    """Return a context in which torch uses this kernel or none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, kernel)]) if hasattr(SDPBackend, kernel) else nullcontext()


def windows(bench: Bench) -> None:
    """Measure an image encoder's windows: one call for each, as in transformers, all in one call, and by their
    offsets."""
    import torch

    device, count = bench.scale.device, 4 if bench.scale.rehearse else WINDOWS
    shape = (count, VISION_HEADS, WINDOW, VISION_WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention

    def apart() -> None:
        for number in range(count):
            attend(*(part[number : number + 1] for part in (q, k, v)))

    bench.add("windows of a layer: a call for each", 1000 * bench.seconds(apart, repeats=5), "ms")
    bench.add("windows of a layer: one call", 1000 * bench.seconds(lambda: attend(q, k, v), repeats=5), "ms")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    if bench.scale.rehearse:
        return  # it has no kernel for a CPU
    flat = [part.transpose(1, 2).reshape(count * WINDOW, VISION_HEADS, VISION_WIDTH) for part in (q, k, v)]
    ends = torch.arange(count + 1, device=device, dtype=torch.int32) * WINDOW
    try:
        seconds = bench.seconds(lambda: varlen_attn(*flat, ends, ends, WINDOW, WINDOW), repeats=5)
        bench.add("windows of a layer: by their ends", 1000 * seconds, "ms")
    except (RuntimeError, TypeError, ValueError) as error:
        leave_after_cuda_error(error)
        bench.add("windows of a layer: by their ends", float("nan"), "ms", note=first_line(error))


def odd_lengths(bench: Bench) -> None:
    """Check gradients of queries where the number of keys is 64 more than a multiple of 128: early cuDNN 9 computed
    some that are NaN there."""

    length = 64 + (128 if bench.scale.rehearse else 2048)
    q, k, v, mask = build_tree(bench, length)
    backward(lambda: attend_masked(q, k, v, mask), (q, k, v))
    bench.check("gradients that are no numbers, 64 over 128", int((~q.grad.isfinite()).sum()), "", 0)
