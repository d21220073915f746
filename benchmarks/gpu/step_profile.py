"""The profile of a step, and of an image encoder alone."""

from collections.abc import Callable
from typing import Any

from benchmarks.arms import Arm
from benchmarks.gpu.bench import QWEN2_5, QWEN3, Bench
from benchmarks.gpu.cases import SHIPPED
from benchmarks.gpu.profiler import profile_kernels
from benchmarks.gpu.shapes import write_shape
from ray_vlm.models.attention import attend_at_once
from ray_vlm.models.vision_inputs import encoder_shape, plan_images, register_plan, use_image_plans
from tests.support.stock import our_trainer


def profile_step(bench: Bench) -> None:
    """Profile one micro-batch of the shipped job, then one image through each encoder alone."""
    arm = Arm(our_trainer, bench.job(SHIPPED), [range(SHIPPED.micro)])
    arm.step()
    write_profile(bench, "a micro-batch of SFT", arm.step)
    del arm
    bench.clean_up()
    for model in (QWEN2_5, QWEN3):
        encode = build_encoder(bench, model)
        write_profile(bench, f"an image through the encoder of {model.rpartition('/')[2]}", encode)


def write_profile(bench: Bench, name: str, call: Callable[[], Any]) -> None:
    """Write seconds, and the share of each kind of kernel in the host's time."""
    seconds = bench.seconds(call, repeats=1, warm=0)
    profile = profile_kernels(call, bench.scale.device)
    bench.add(f"{name}: time", 1000 * seconds, "ms")
    bench.add(f"{name}: launches", profile.launches, "")
    bench.add(f"{name}: waits for the device", profile.waits, "")
    for kind, took in sorted(profile.kinds.items(), key=lambda item: -item[1]):
        bench.add(f"{name}: {kind}", took / seconds, "of time")
    idle, names = max(0.0, 1 - profile.busy_s / seconds), "; ".join(profile.names)[:300]
    bench.add(f"{name}: the card idles", idle, "of time", note=names)


def build_encoder(bench: Bench, model: str) -> Any:
    """Build a function that runs one image through the image encoder of a base with random weights, as in training,
    with nothing else loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(write_shape(bench.folder, model, bench.scale))
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    kind = type(whole.get_encoder(modality="image"))
    with torch.device(bench.scale.device):
        encoder = kind._from_config(config.vision_config, dtype=torch.bfloat16, attn_implementation="sdpa")
    encoder = whole.base_model.visual = encoder.to(torch.bfloat16)
    assert attend_at_once(whole)
    assert use_image_plans(whole)
    side = bench.scale.side * config.vision_config.spatial_merge_size
    values = encoder.patch_embed.proj.weight[0].numel()
    patches = torch.randn(side * side, values, device=bench.scale.device, dtype=torch.bfloat16)
    grid, shape = torch.tensor([[1, side, side]], device=bench.scale.device), encoder_shape(config)
    assert shape is not None
    register_plan(grid, plan_images(shape, [(1, side, side)]).to(bench.scale.device, non_blocking=True))

    def encode() -> Any:
        with torch.no_grad():
            return encoder(patches, grid_thw=grid)

    encode()
    return encode
