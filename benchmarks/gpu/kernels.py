"""Attention of prefix groups: this package's over segments, under a mask of booleans, and FlexAttention.

A group is a prefix and its answers, as `models/layouts.py` packs a group of GRPO: a token attends to the prefix and to
its own answer. Shapes of Qwen3-VL-8B: 32 heads over 8 of keys and values, 128 wide.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.profiler import profile_kernels
from benchmarks.gpu.supervise import first_line, leave_after_cuda_error
from ray_vlm.models.attention import load_varlen
from ray_vlm.models.layouts import PackedGroup, PackedRow, plan_keys
from ray_vlm.models.shared_attention import attend_in_blocks, attend_in_parts, attend_segments_at_once, build_mask

HEADS, SHARED, WIDTH = 32, 8, 128
SCALE = WIDTH**-0.5
PREFIX, ANSWERS = 1090, 8
KERNELS = ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
WINDOWS, WINDOW, VISION_HEADS, VISION_WIDTH = 64, 64, 16, 80  # of Qwen2.5-VL's image encoder, 1,024 image tokens
COMPILE_S = 12.0  # to compile FlexAttention and use it


def kernels(bench: Bench) -> None:
    """Measure a known weak spot of cuDNN, the windows of an image encoder, then attention of groups by their tokens;
    FlexAttention last, because to compile it takes long."""
    odd_lengths(bench)
    windows(bench)
    for length in bench.scale.lengths:
        groups(bench, length)
    attend = compile_flex(bench)
    for length in bench.scale.lengths:
        if bench.left_s < COMPILE_S and not bench.scale.rehearse:
            bench.add(f"group of {length:,}: FlexAttention", float("nan"), "ms", note="no time was left for it")
            continue
        flexible(bench, length, attend)


def groups(bench: Bench, length: int) -> None:
    """Measure forward and backward over a group of so many tokens: in one call over segments, in blocks, under a mask
    of the whole row, and, which computes other pairs, causal."""
    import torch

    q, k, v, row = build_group(bench, length)
    mask = build_mask(row.groups).to(q.device)
    parts, title = (q, k, v), f"group of {length:,}"
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def at_once() -> Any:
        if bench.scale.rehearse:  # torch's attention over segments has no kernel for a CPU
            return attend_in_parts(q, k, v, row.groups, SCALE)
        return attend_segments_at_once(q, k, v, row, SCALE)

    def masked() -> Any:
        return attend_masked(q, k, v, mask)

    with torch.no_grad():
        apart = (at_once().transpose(1, 2) - masked()).abs().max()
    bench.check(f"{title}: segments against a mask, largest difference", float(apart), "", 0.05)
    write(bench, title, "segments", at_once, parts, row)
    write(bench, title, "in blocks", lambda: attend_in_blocks(q, k, v, row.groups, SCALE), parts, row)
    write(bench, title, "mask, as torch chooses", masked, parts, row)
    profile = profile_kernels(masked, bench.scale.device)
    bench.add(f"{title}: kernels of a mask", profile.launches, "", note="; ".join(profile.names)[:300])
    if length == min(bench.scale.lengths) and not bench.scale.rehearse:
        for kernel in KERNELS:
            with chosen(kernel):
                write(bench, title, f"mask, {kernel}", masked, parts, row)
    write(bench, title, "causal over the whole row", lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True), parts, row)


def write(bench: Bench, title: str, name: str, call: Callable[[], Any], parts: Sequence[Any], row: PackedRow) -> None:
    """Write the time of forward and backward, and the speed of the operations that are needed: of each pair of tokens
    two products in the forward, and five in the backward."""
    operations = 7 * 2 * HEADS * WIDTH * row.pairs
    try:
        seconds = bench.seconds(lambda: backward(call, parts), repeats=3, warm=1)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        leave_after_cuda_error(error)
        bench.add(f"{title}: {name}", float("nan"), "ms", note=f"does not take it: {first_line(error)}")
        return
    bench.add(f"{title}: {name}", 1000 * seconds, "ms")
    bench.add(f"{title}: {name}, needed operations", operations / seconds / 1e12, "TFLOP/s")


def attend_masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Compute attention with a mask as transformers calls it: keys and values are repeated for the heads that share
    them."""
    import torch

    keys, values = (part.repeat_interleave(HEADS // SHARED, dim=1) for part in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def build_group(bench: Bench, length: int) -> tuple[Any, Any, Any, PackedRow]:
    """Build queries, keys and values `[1, heads, tokens, width]` of a group with a prefix of 1,090 tokens, or half of
    them, and which of the tokens attend to each other."""
    import torch

    device = bench.scale.device
    q, k, v = (
        torch.randn(1, heads, length, WIDTH, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, SHARED, SHARED)
    )
    prefix = min(PREFIX, length // 2)
    rest, more = divmod(length - prefix, ANSWERS)
    group = (PackedGroup(0, prefix, tuple(rest + (number < more) for number in range(ANSWERS))),)
    return q, k, v, PackedRow(group, plan_keys(group).moved(lambda tensor: tensor.to(device)))


def compile_flex(bench: Bench) -> Any:
    """Return FlexAttention, on a card compiled for rows of any length."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    return attend if bench.scale.rehearse else torch.compile(attend, dynamic=True)


def flexible(bench: Bench, length: int, attend: Any) -> None:
    """Measure FlexAttention with a block mask of the group, which skips blocks that are masked out."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    on_card, device, title = not bench.scale.rehearse, bench.scale.device, f"group of {length:,}"
    q, k, v, row = build_group(bench, length)
    spans = torch.tensor([end - start for start, end in row.groups[0].segments()], device=device)
    branch = torch.arange(len(spans), device=device).repeat_interleave(spans)  # 0 in the prefix

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & ((branch[key] == 0) | (branch[key] == branch[query]))

    def build() -> Any:
        return create_block_mask(sees, None, None, length, length, device=device, _compile=on_card)

    blocks = build()
    bench.add(f"{title}: a block mask is built", 1000 * bench.seconds(build, repeats=1, warm=0), "ms")
    try:
        with torch.no_grad():
            parts = [part.detach() for part in (q, k, v)]  # a CPU has no backward of it
            output = attend(*parts, block_mask=blocks, enable_gqa=True)
            mask = build_mask(row.groups).to(device)
            apart = (output - attend_masked(parts[0], parts[1], parts[2], mask)).abs().max()
    except RuntimeError as error:
        leave_after_cuda_error(error)
        bench.add(f"{title}: FlexAttention", float("nan"), "ms", note=f"does not take it: {first_line(error)}")
        return
    bench.check(f"{title}: FlexAttention against a mask, largest difference", float(apart), "", 0.05)
    if on_card:
        write(
            bench, title, "FlexAttention", lambda: attend(q, k, v, block_mask=blocks, enable_gqa=True), (q, k, v), row
        )


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
    attend: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    def apart() -> None:
        for number in range(count):
            attend(*(part[number : number + 1] for part in (q, k, v)))

    bench.add("windows of a layer: a call for each", 1000 * bench.seconds(apart, repeats=5), "ms")
    bench.add("windows of a layer: one call", 1000 * bench.seconds(lambda: attend(q, k, v), repeats=5), "ms")
    varlen = load_varlen()
    if varlen is None or bench.scale.rehearse:
        return  # it has no kernel for a CPU
    flat = [part.transpose(1, 2).reshape(count * WINDOW, VISION_HEADS, VISION_WIDTH) for part in (q, k, v)]
    ends = torch.arange(count + 1, device=device, dtype=torch.int32) * WINDOW
    try:
        seconds = bench.seconds(lambda: varlen(*flat, ends, ends, WINDOW, WINDOW), repeats=5)
        bench.add("windows of a layer: by their ends", 1000 * seconds, "ms")
    except (RuntimeError, TypeError, ValueError) as error:
        leave_after_cuda_error(error)
        bench.add("windows of a layer: by their ends", float("nan"), "ms", note=first_line(error))


def odd_lengths(bench: Bench) -> None:
    """Check gradients of queries where the number of keys is 64 more than a multiple of 128: early cuDNN 9 computed
    some that are NaN there."""
    length = 64 + (128 if bench.scale.rehearse else 2048)
    q, k, v, row = build_group(bench, length)
    mask = build_mask(row.groups).to(q.device)
    backward(lambda: attend_masked(q, k, v, mask), (q, k, v))
    bench.check("gradients that are no numbers, 64 over 128", int((~q.grad.isfinite()).sum()), "", 0)
