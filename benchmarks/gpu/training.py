"""Training steps of this package beside stock TRL's on the same rows: time, tokens, MFU, memory, gradients.

A step is one micro-batch forward and backward and the optimizer. Memory of this package's step is measured before TRL's
trainer exists; then the two take steps in turn. TRL has its default settings except where they define the step: the
same rows, the same GRPO answers, nothing truncated, the same activation checkpointing.
"""

import dataclasses
import statistics
from dataclasses import dataclass

from benchmarks.arms import Arm
from benchmarks.gpu.bench import CAP_GIB, GIB, Bench
from benchmarks.gpu.cases import LARGER, MFU, OTHER, PAIRS, SHIPPED, Case, chosen_name, groups, injected_answers
from benchmarks.gpu.figure_file import ALLOCATED
from benchmarks.gpu.supervise import Refused, first_line
from ray_vlm.methods.trainer import PlannedTrainer
from ray_vlm.models.operations import OperationCounter
from ray_vlm.runs.compute import find_peak
from tests.support.stock import our_trainer, stock_trainer

NEEDED_S = 25.0  # for the largest group


def sft(bench: Bench) -> None:
    """Measure the shipped job, eight rows at a time, and the choice of `train.memory: auto`."""
    compare(bench, SHIPPED)
    compare(bench, LARGER)
    compare_choice(bench, SHIPPED, wait_s=40)


def compare_choice(bench: Bench, case: Case, wait_s: float) -> None:
    """Measure a case with what `train.memory: auto` chooses for it, which the planner says within the wait."""
    name = chosen_name(case)
    chosen = bench.plan(name, wait_s)
    if chosen is None:
        raise Refused(f"the planner has not said within {wait_s:g} s what train.memory=auto chooses")
    recompute, micro = chosen["recompute"], chosen["micro"]
    compare(bench, dataclasses.replace(case, name=name, micro=micro, recompute=recompute, mfu=MFU))


def grpo(bench: Bench) -> None:
    """Measure the training phase of a group of answers; both arms get the same answers."""
    for case in groups(bench.scale):
        if bench.left_s < NEEDED_S and not bench.scale.rehearse:
            bench.add(f"{case.name}: step", float("nan"), "s", note="no time was left for it")
            continue
        compare(bench, case)


def dpo(bench: Bench) -> None:
    """Measure DPO on two pairs, with the reference computed in every step."""
    compare(bench, PAIRS)


def qwen2_5(bench: Bench) -> None:
    """Measure the other family's SFT, and what `train.memory: auto` chooses for it."""
    compare(bench, OTHER)
    compare_choice(bench, OTHER, wait_s=15)


@dataclass(frozen=True)
class StepSpeed:
    """The measurements of an arm's step: seconds, tokens through the language model, model FLOPs."""

    seconds: float
    tokens: int
    flops: float


def compare(bench: Bench, case: Case) -> None:
    """Write the figures of a case for both arms, and their ratios. An arm that runs out of memory is noted."""
    import torch

    job = bench.job(case)
    rows = [[0]] if case.method == "grpo" else [range(case.micro)]
    answers = injected_answers(case) if case.method == "grpo" else ()
    sides: dict[str, Arm] = {}
    for name, build in (("ours", our_trainer), ("TRL", stock_trainer)):
        try:
            bench.clean_up()
            arm = Arm(build, job, rows, answers)
            take_step(bench, arm)  # kernels are chosen and buffers made
            if name == "ours":
                write_memory(bench, case, arm)
            sides[name] = arm
        except torch.OutOfMemoryError as error:
            bar = 1 if name == "ours" else None
            bench.add(f"{case.name}: {name} fits into {CAP_GIB:g} GiB", 0, "", bar, most=False, note=first_line(error))
    paces: dict[str, list[StepSpeed]] = {name: [] for name in sides}
    for _ in range(bench.scale.pairs):
        for name, arm in sides.items():
            paces[name].append(take_step(bench, arm))
    medians = {name: median(taken) for name, taken in paces.items()}
    write_paces(bench, case, medians)
    if len(sides) == 2:
        own, trl = medians["ours"], medians["TRL"]
        bench.add(f"{case.name}: step, TRL's time over ours", trl.seconds / own.seconds, "x", case.ratio, most=False)
        bench.add(f"{case.name}: model FLOPs, TRL's over ours", trl.flops / own.flops, "x")
        write_gradients(bench, case, sides["ours"], sides["TRL"])
    sides.clear()
    bench.clean_up()


def take_step(bench: Bench, arm: Arm) -> StepSpeed:
    """Take one step of an arm."""
    counter = counter_of(arm)
    counter.take()

    def step_and_learn() -> None:
        arm.step()
        arm.learn()

    seconds = bench.seconds(step_and_learn, repeats=1, warm=0)
    work, flops = counter.take()
    return StepSpeed(seconds, work.tokens, flops)


def counter_of(arm: Arm) -> OperationCounter:
    """Return the counter of an arm's operations: this package's trainer has one, TRL's is given one."""
    if isinstance(arm.trainer, PlannedTrainer):
        return arm.trainer.inputs.operations
    if not hasattr(arm.trainer, "operations"):
        arm.trainer.operations = OperationCounter()
        arm.trainer.operations.attach(arm.trainer.model)
    return arm.trainer.operations


def median(paces: list[StepSpeed]) -> StepSpeed:
    """Return the median time; the counts are the same in each step."""
    return StepSpeed(statistics.median(pace.seconds for pace in paces), paces[0].tokens, paces[0].flops)


def write_paces(bench: Bench, case: Case, paces: dict[str, StepSpeed]) -> None:
    """Write seconds, tokens and MFU of each arm."""
    import torch

    peak = None if bench.scale.rehearse else find_peak(torch.cuda.get_device_name(0))
    for name, pace in paces.items():
        bench.add(f"{case.name}: {name}, step", pace.seconds, "s")
        bench.add(f"{case.name}: {name}, tokens", pace.tokens / pace.seconds, "tokens/s")
        bench.add(f"{case.name}: {name}, model FLOPs", pace.flops / pace.seconds / 1e12, "TFLOP/s")
        if peak is not None:
            least = case.mfu if name == "ours" else None
            bench.add(
                f"{case.name}: {name}, MFU", pace.flops / pace.seconds / (peak * 1e12), "of peak", least, most=False
            )


def write_memory(bench: Bench, case: Case, arm: Arm) -> None:
    """Write the memory of this package's step; the parent compares it with the plan."""
    import torch

    if bench.scale.rehearse:
        model = arm.trainer.model
        learns = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        whole = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
        allocated = float(arm.peak() + whole + 2 * learns)
    else:
        allocated = float(torch.cuda.max_memory_allocated())
        free, total = torch.cuda.mem_get_info()
        bench.add(f"{case.name}: ours, reserved at the peak", torch.cuda.max_memory_reserved() / GIB, "GiB", CAP_GIB)
        bench.add(f"{case.name}: ours, of the card in use", (total - free) / GIB, "GiB", CAP_GIB)
    bench.add(f"{case.name}{ALLOCATED}", allocated / GIB, "GiB", CAP_GIB)


def write_gradients(bench: Bench, case: Case, own: Arm, stock: Arm) -> None:
    """Write the distance between the gradients of both arms, all of them as one vector, from equal weights.

    Both arms have trained since they were built, so the step is repeated with the weights of one.
    """
    import torch

    own_parameters, trl_parameters = (dict(arm.trainer.model.named_parameters()) for arm in (own, stock))
    with torch.no_grad():
        for name, parameter in own_parameters.items():
            if parameter.requires_grad:
                parameter.copy_(trl_parameters[name])
    own.step()
    stock.step()
    one, other = own.gradients(), stock.gradients()
    apart = sum(float((one[name].float() - g.float()).square().sum()) for name, g in other.items()) ** 0.5
    whole = sum(float(g.float().square().sum()) for g in other.values()) ** 0.5
    bench.add(f"{case.name}: gradients apart, bfloat16", apart / max(whole, 1e-30), "relative", 0.2)
