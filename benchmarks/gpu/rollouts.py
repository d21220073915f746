"""GRPO's answers: seconds per token in this package's loop, in stock TRL's `generate`, and with possible improvements.

Bases with random weights never produce an end token, so every answer has its full length.
"""

import statistics
from typing import Any

from benchmarks.arms import Arm
from benchmarks.gpu.bench import QWEN3, Bench
from benchmarks.gpu.cases import Case
from benchmarks.gpu.profiler import profile_kernels
from benchmarks.gpu.supervise import first_line, leave_after_cuda_error
from ray_vlm.models.dequantize import multiply_dequantised, quantised_layers
from tests.support.graphs import RecordedSteps
from tests.support.stock import our_trainer, stock_trainer

GROUP = 8  # answers to a prompt
DECODE_MS = 15.0  # of a token of the most sequences, in the best of the ways
PROMPT = 1100  # tokens before the one that a decoding step writes, on the card


def rollouts(bench: Bench) -> None:
    """Measure the sampling of a step's answers, then a single decoding step with and without possible improvements."""
    for sequences in bench.scale.rollouts:
        sample(bench, sequences)
    static_steps(bench)
    decode(bench)


def sample(bench: Bench, sequences: int) -> None:
    """Time the sampling of the answers, eight per prompt, by both arms in turn."""
    group = min(GROUP, sequences)
    case = Case(f"{sequences} answers", QWEN3, "grpo", group, length=bench.scale.sampled)
    prompts = sequences // group
    job = bench.job(case, prompts)
    arms = {"ours": Arm(our_trainer, job, [range(prompts)]), "TRL, generate": Arm(stock_trainer, job, [range(prompts)])}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(1 if sequences > GROUP else max(1, bench.scale.pairs - 1)):  # the constructor has warmed up
        for name, arm in arms.items():
            taken[name].append(bench.seconds(arm.draw, repeats=1, warm=0))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, seconds in medians.items():
        bench.add(f"{case.name}: {name}, a token", 1000 * seconds / bench.scale.sampled, "ms")
        bench.add(f"{case.name}: {name}", sequences * bench.scale.sampled / seconds, "tokens/s")
    bench.add(f"{case.name}: TRL's time over ours", medians["TRL, generate"] / medians["ours"], "x")
    arms.clear()
    bench.clean_up()


def static_steps(bench: Bench) -> None:
    """Time a token of the package's own step of fixed shape, with an adapter: as it is and repeated by a CUDA graph.

    With 4-bit weights and, if the card has room for them, with weights that are dequantised once."""
    from peft import get_peft_model

    from ray_vlm.config.schema import Lora
    from ray_vlm.engines.arithmetic import answering
    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.lora import lora_config

    model = get_peft_model(bench.base(QWEN3), lora_config(Lora(rank=16), FAMILIES["qwen3_vl"])).eval()
    tokens = (16 if bench.scale.rehearse else PROMPT) + bench.scale.sampled
    try:
        for sequences in bench.scale.rollouts:
            # Of a single sequence no copy is made: the kernels read 4 bits.
            for weights, planned in (("4 bit", 1), ("dequantised where they fit", sequences)):
                with answering(model, bench.scale.device, planned, tokens):
                    name = f"{sequences} sequences, {weights}"
                    time_steps(bench, model, sequences, f"{name}: the step of fixed shape", graph=False)
                    graphed_name = f"{name}: the step of fixed shape, as a CUDA graph"
                    barred = planned > 1 and sequences == max(bench.scale.rollouts)
                    bar = DECODE_MS if barred else None
                    time_steps(bench, model, sequences, graphed_name, graph=True, bar=bar)
    finally:
        model.unload()
        bench.clean_up()


def time_steps(bench: Bench, model: Any, sequences: int, name: str, graph: bool, bar: float | None = None) -> None:
    """Time the steps of that many answers to one prompt of text, after those that come before a capture."""
    import torch

    from ray_vlm.engines.static_step import CudaGraphs, StaticSteps

    device, length, sampled = bench.scale.device, 16 if bench.scale.rehearse else PROMPT, bench.scale.sampled
    capture = (RecordedSteps() if bench.scale.rehearse else CudaGraphs()) if graph else None
    ids = torch.randint(5, 300, (1, length), device=device)
    positions = torch.arange(length, device=device).expand(3, 1, length)
    with torch.no_grad():
        cache = model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values
        steps = StaticSteps(model, lambda position: position.expand(3, *position.shape), capture)
        mask, first = torch.ones(sequences, length, device=device), torch.full((sequences,), length, device=device)
        steps.start(cache, first, mask, sequences, length + 2 * sampled)
        token = torch.full((sequences,), 20, device=device)
        for _ in range(10):  # the capture is among them
            token = steps(token).argmax(dim=-1)
        seconds = bench.seconds(lambda: steps(token), repeats=min(20, sampled), warm=1)
    note = "" if not graph or steps.captures else "it cannot be captured: as it is"
    note = "a CPU has no graphs: a recording" if graph and bench.scale.rehearse else note
    bench.add(f"{name}, a token", 1000 * seconds, "ms", bar, note=note)


def decode(bench: Bench) -> None:
    """Measure one token of eight sequences through the language model without an adapter: launches, and the effect of
    dequantised weights and of a CUDA graph."""
    import torch

    step = build_step(bench, GROUP)
    with torch.no_grad(), torch.autocast(bench.scale.device.partition(":")[0], torch.bfloat16):
        seconds = bench.seconds(step, repeats=5, warm=2)
        bench.add("a decoding step: as it is", 1000 * seconds, "ms")
        profile = profile_kernels(step, bench.scale.device)
        bench.add("a decoding step: launches", profile.launches, "")
        bench.add("a decoding step: share of the time that the card works", profile.busy_s / seconds, "")
        graphed(bench, step, "a decoding step: as a CUDA graph")
        with multiply_dequantised(quantised_layers(bench.base(QWEN3))):
            bench.add("a decoding step: bfloat16 weights", 1000 * bench.seconds(step, repeats=5, warm=2), "ms")
            graphed(bench, step, "a decoding step: bfloat16 weights, as a CUDA graph")


def build_step(bench: Bench, sequences: int) -> Any:
    """Build a function that writes one token of each sequence after a prompt, into a cache of fixed size."""
    import torch
    from transformers import StaticCache

    base, device = bench.base(QWEN3), bench.scale.device
    decoder, text = base.get_decoder(), base.config.get_text_config()
    length = 16 if bench.scale.rehearse else PROMPT
    cache = StaticCache(config=text, max_cache_len=length + 8)
    embeddings = torch.randn(sequences, length, text.hidden_size, device=device, dtype=torch.bfloat16)
    positions = torch.arange(length, device=device).expand(3, sequences, length)
    with torch.no_grad():
        decoder(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True)
    mask = torch.ones(sequences, 1, 1, length + 8, dtype=torch.bool, device=device)
    mask[..., length + 1 :] = False
    new, position = embeddings[:, -1:], positions[..., -1:] + 1

    def step() -> Any:
        hidden = decoder(
            inputs_embeds=new, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        for layer in cache.layers:  # the next call writes the same position again
            if hasattr(layer, "cumulative_length"):
                rewind(layer, length)
        return base.get_output_embeddings()(hidden)

    return step


def rewind(layer: Any, length: int) -> None:
    """Make a layer of a static cache write after `length` tokens again."""
    counter = layer.cumulative_length
    if hasattr(counter, "fill_"):
        counter.fill_(length)
    else:
        layer.cumulative_length = length


def graphed(bench: Bench, step: Any, name: str) -> None:
    """Time the step as one CUDA graph; a CPU has none and runs the step unchanged."""
    import torch

    if bench.scale.rehearse:
        bench.add(name, 1000 * bench.seconds(step, repeats=1), "ms", note="a CPU has no graphs: as it is")
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # something in the step asks the device for a value
        leave_after_cuda_error(error)
        bench.add(name, float("nan"), "ms", note=f"cannot be captured: {first_line(error)}")
        return
    bench.add(name, 1000 * bench.seconds(graph.replay, repeats=10, warm=2), "ms")
