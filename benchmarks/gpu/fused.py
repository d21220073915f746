"""What is fused around the products: norms, rotary embeddings, activations, adapters, the optimizer, and a step that
recomputes all but products.

Shapes of one layer of Qwen3-VL-8B: 4,096 wide, 32 heads over 8, 12,288 in the MLP, LoRA of rank 16.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.arms import Arm
from benchmarks.gpu.bench import QWEN3, Bench
from benchmarks.gpu.cases import Case
from ray_vlm.config.train import Recompute
from tests.support.stock import our_trainer

WIDTH, INNER, HEADS, SHARED, HEAD, RANK = 4096, 12288, 32, 8, 128, 16
LAYERS = 36  # whose adapters an optimizer updates


def fused(bench: Bench) -> None:
    """Measure each kernel beside transformers' operations, an adapter beside PEFT's, optimizers, and steps by what they
    recompute."""
    layers(bench)
    adapters(bench)
    optimizers(bench)
    steps(bench)


def layers(bench: Bench) -> None:
    """Measure forward and backward of the parts of a layer that are no products."""
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, apply_rotary_pos_emb

    from ray_vlm.models.kernels import choose_kernels, norm_by_torch

    device, tokens = bench.scale.device, 64 if bench.scale.rehearse else 4096
    kernels, note = choose_kernels(device)
    norm = Qwen3VLTextRMSNorm(WIDTH).to(device, torch.bfloat16).requires_grad_(False)
    x = _activations(device, 1, tokens, WIDTH)
    bench.add("norm: transformers'", _timed(bench, lambda: norm(x), x), "ms")
    bench.add("norm: torch's", _timed(bench, lambda: norm_by_torch(x, norm.weight, 1e-6), x), "ms")
    own = kernels.norm
    if own is not None:
        bench.add("norm: as chosen", _timed(bench, lambda: own(x, norm.weight, 1e-6), x), "ms", note=note)
        apart = float((own(x, norm.weight, 1e-6) - norm(x)).detach().abs().max())
        bench.check("norm: largest difference", apart, "", 0.05)
    q, k = (_activations(device, 1, heads, tokens, HEAD) for heads in (HEADS, SHARED))
    angles = torch.rand(1, tokens, HEAD, device=device, dtype=torch.bfloat16)
    rotate = kernels.rotate
    bench.add("rotary: transformers'", _timed(bench, lambda: apply_rotary_pos_emb(q, k, angles, angles), q, k), "ms")
    if rotate is not None:
        bench.add("rotary: as chosen", _timed(bench, lambda: rotate(q, k, angles, angles), q, k), "ms", note=note)
    a, b = _activations(device, 1, tokens, INNER), _activations(device, 1, tokens, INNER)
    bench.add("SwiGLU: transformers'", _timed(bench, lambda: torch.nn.functional.silu(a) * b, a, b), "ms")
    gate = kernels.gate
    if gate is not None:
        bench.add("SwiGLU: as chosen", _timed(bench, lambda: gate(a, b), a, b), "ms", note=note)


def adapters(bench: Bench) -> None:
    """Measure forward and backward of an adapted layer, by PEFT's operations and in one."""
    import torch
    from peft import LoraConfig, get_peft_model

    from ray_vlm.models.fused_adapter import fuse_adapters
    from ray_vlm.models.precision import autocast

    device, tokens = bench.scale.device, 64 if bench.scale.rehearse else 4096
    base = torch.nn.Sequential(torch.nn.Linear(WIDTH, INNER, bias=False, device=device, dtype=torch.bfloat16))
    model: Any = get_peft_model(base, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))
    x = _activations(device, tokens, WIDTH)

    def run() -> Any:
        with autocast("bf16", device):
            return model(x)

    before = run().detach()
    bench.add("adapted layer: PEFT's", _timed(bench, run, x), "ms")
    fuse_adapters(model)
    bench.add("adapted layer: in one operation", _timed(bench, run, x), "ms")
    apart = float((run().detach() - before).float().norm() / before.float().norm())
    bench.check("adapted layer: outputs apart", apart, "", 0.02)


def optimizers(bench: Bench) -> None:
    """Measure a step of each optimizer for the adapters of all layers."""
    import torch
    from bitsandbytes.optim import AdamW

    device, num_layers = bench.scale.device, 1 if bench.scale.rehearse else LAYERS
    shapes = [(RANK, WIDTH), (WIDTH, RANK), (RANK, INNER), (INNER, RANK)] * 3 * num_layers
    weights = [torch.nn.Parameter(torch.randn(*shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    made: dict[str, Callable[[], Any]] = {
        "AdamW": lambda: torch.optim.AdamW(weights),
        "AdamW, fused": lambda: torch.optim.AdamW(weights, fused=True),
        "AdamW, 8 bit": lambda: AdamW(weights, optim_bits=8),
    }
    if not bench.scale.rehearse:
        made["AdamW, 8 bit, paged"] = lambda: AdamW(weights, optim_bits=8, is_paged=True)
    for name, build in made.items():
        optimizer = build()
        bench.add(f"step of {name}", 1000 * bench.seconds(optimizer.step, repeats=3), "ms")


def steps(bench: Bench) -> None:
    """Measure a step of the shipped job by what it recomputes, as time allows."""
    modes: dict[str, Recompute] = {"all": True, "all but products": "selective", "nothing": False}
    if bench.scale.rehearse:
        modes = {"all but products": "selective"}
    for name, recompute in modes.items():
        if bench.left_s < 6 and not bench.scale.rehearse:
            bench.add(f"sft, 2 rows, recomputes {name}", float("nan"), "ms", note="not measured: no time was left")
            continue
        case = Case(f"sft, 2 rows, {name}", QWEN3, "sft", 2, recompute)
        arm = Arm(our_trainer, bench.job(case), [range(case.micro)])
        bench.add(f"sft, 2 rows, recomputes {name}", 1000 * bench.seconds(arm.step, repeats=2), "ms")
        del arm
        bench.clean_up()


def _activations(device: str, *shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)


def _timed(bench: Bench, call: Callable[[], Any], *inputs: Any) -> float:
    """Return the milliseconds of a forward and backward."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        out = call()
        sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()

    return 1000 * bench.seconds(run, repeats=3)
