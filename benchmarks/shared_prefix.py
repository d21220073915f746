"""A training step of ours against stock TRL's on the same rows: images encoded once, beginnings read once, rows packed.

Tiny Qwen3-VL and Qwen2.5-VL (text 256 wide, 4 layers; tower 128 wide, 3 layers), float32, LoRA on the language model,
activation checkpointing in both arms as TRL has it, one torch thread; prompts of about 280 tokens, 256 of them of an
image; completions injected where no rollout is measured. TRL is tuned (`max_length=None`, the same dtype, for SFT
`batch_rebalance` with lengths too); "patched" has in addition the frozen tower without autograd and a head that scores
trained tokens alone; "default" draws SFT's rows at random and collates in the trainer's process (`max_length` stays
None there too: 1,024 would cut answers off, and it would be another step). Arms alternate and learn: a ratio is the
median of pairs, and counts only if log-probabilities, gradients and the losses of all steps agree as far as float32
lets them (`EXACT`; that the two sides compute one function is shown in float64, by `parity`). Tokens through the
language model and patches through the tower are counted by hooks. What the same step takes at the size of real models
is computed (`benchmarks/real_size.py`).
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import GROUP, SIDE, Arm, logps_apart, make_job, write_model
from benchmarks.figures import figure, report
from benchmarks.image_path import image_path
from benchmarks.real_size import computed
from benchmarks.stock import gradients_apart, our_trainer, patched_trainer, stock_trainer
from ray_vlm.config.schema import JobConfig

# EXACT is about rounding, which depends on the machine: 3.4e-6 on an Intel Xeon; `parity` saw 1.8 times as much on an
# AMD EPYC as on that, so 1e-5 left too little room.
EXACT, CURVE = 3e-5, 1e-4
CURVES = 20  # steps of `--full`
BARS: dict[str, tuple[float, float]] = {  # Qwen3-VL, Qwen2.5-VL
    "grpo, C=16": (5.0, 6.0),
    "grpo, C=64": (3.0, 3.5),
    "grpo, C=32, whole step with rollouts": (2.0, 2.0),
    "dpo, C=32": (1.9, 2.5),
    "dpo, C=32, with caches from epoch 2": (3.2, 4.0),
    "sft, 40 % padding efficiency": (1.5, 2.0),
    "sft, against batch_rebalance at accumulation 4": (1.1, 1.1),
}
UNEVEN = (900, *(60,) * 7)  # words of SFT's answers
TAIL = tuple(int(n) for n in np.random.default_rng(3).lognormal(4.5, 1.2, 32).clip(1, 1500))


class Case:
    """Arms of one case, stepped in turn."""

    def __init__(
        self, name: str, family: str, ours: Arm, stock: Arm, patched: Arm | None = None, default: Arm | None = None
    ):
        self.name, self.family = name, family
        self.arms = [arm for arm in (ours, stock, patched, default) if arm]
        self.titles = ["TRL", *(["TRL patched"] if patched else [])]
        self.default = default or stock

    def run(self, pairs: int) -> list[dict[str, Any]]:
        """The figures after so many pairs of steps, one to warm up."""
        times, losses, exact, collating = [], [], 0.0, []
        ours, stock, *_ = self.arms
        for number in range(pairs + 1):
            times.append([arm.step() for arm in self.arms])
            collating.append(self.default.collate())
            if number == 0:
                apart = gradients_apart(ours.gradients(), stock.gradients(), 1e-2)
                exact = max(apart, logps_apart(ours, stock))
            losses.append((ours.loss, stock.loss))
            for arm in self.arms:
                arm.learn()
        later = logps_apart(ours, stock)
        curve = max(abs(mine - theirs) / max(abs(theirs), 1e-2) for mine, theirs in losses)
        found = []
        for n, title in enumerate(self.titles, 1):
            ratio = statistics.median(of_pair[n] / of_pair[0] for of_pair in times[1:])
            asked = {"bar": self.bar, "most": False} if n == 1 else {}
            found.append(self.figure(f"step, {title} against ours", ratio, "x", **asked))
        n = self.arms.index(self.default)
        waits = zip(times[1:], collating[1:], strict=True)
        ratio = statistics.median((of_pair[n] + wait) / of_pair[0] for of_pair, wait in waits)
        found.append(self.figure("step, TRL default against ours", ratio, "x"))
        found.append(self.figure("log-probabilities, gradients apart", exact, "", EXACT))
        found.append(self.figure(f"losses of {len(losses)} steps apart", curve, "", CURVE))
        found.append(self.figure(f"log-probabilities of step {len(losses)} apart", later, ""))
        found.append(self.figure("tokens, TRL against ours", stock.tokens / ours.tokens, "x"))
        if ours.patches:
            found.append(self.figure("patches, TRL against ours", stock.patches / ours.patches, "x"))
        return found

    @property
    def bar(self) -> float | None:
        """The least that is asked of the ratio."""
        both = BARS.get(self.name)
        return both and both[list(SIDE).index(self.family)]

    def figure(self, what: str, value: float, unit: str, bar: float | None = None, most: bool = True) -> dict[str, Any]:
        """One of the case's."""
        return figure(f"{self.name}, {self.family}: {what}", value, unit, bar, most)


def groups(folder: Path, model: str, family: str, length: int, pairs: int) -> list[dict[str, Any]]:
    """GRPO's training phase on eight injected answers of `length` tokens."""
    job, rng = make_job(folder, model, family, "grpo", (1,)), np.random.default_rng(length)
    answers = [rng.integers(20, 600, length).tolist() for _ in range(GROUP)]
    arms = [Arm(build, job, [[0]], answers) for build in (our_trainer, stock_trainer, patched_trainer)]
    case = Case(f"grpo, C={length}", family, *arms)
    found = case.run(pairs)
    if length == 64:
        found.append(case.figure("peak of live bytes", arms[0].peak() / arms[1].peak(), "x of TRL's", 0.4))
    return found


def whole_step(folder: Path, model: str, family: str, pairs: int) -> list[dict[str, Any]]:
    """GRPO with rollouts of `transformers`: sampling, scoring, loss and gradients. The same prompt, other answers."""
    import time

    job = make_job(folder, model, family, "grpo", (1,), max_completion_tokens=32)
    ours, stock = Arm(our_trainer, job, [[0]]), Arm(stock_trainer, job, [[0]])

    def timed(arm: Arm) -> float:
        started = time.perf_counter()
        arm.draw()
        arm.step(seen=True)
        return time.perf_counter() - started

    times = [(timed(ours), timed(stock)) for _ in range(pairs + 1)][1:]
    case = Case("grpo, C=32, whole step with rollouts", family, ours, stock)
    said = [int(arm.inputs[0]["completion_mask"].sum()) for arm in (ours, stock)]
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    found = [case.figure("TRL against ours", ratio, "x", case.bar, most=False)]
    return [*found, case.figure("tokens sampled in the last step, TRL's to ours", said[1] / said[0], "x")]


def preferences(folder: Path, model: str, family: str, pairs: int) -> list[dict[str, Any]]:
    """DPO on two pairs: with the reference asked in every step, and with it and the images' features known."""
    job = make_job(folder, model, family, "dpo", (28, 28))
    arms = [Arm(build, job, [[0, 1]]) for build in (our_trainer, stock_trainer, patched_trainer)]
    found = Case("dpo, C=32", family, *arms).run(pairs)
    cached = job.model_copy(update={"train": job.train.model_copy(update={"vision_cache": str(folder / "features")})})
    ours = Arm(our_trainer, cached, [[0, 1]])
    referred = ours.trainer.refer(ours.inputs[0])
    named = [referred[f"ref_{which}_logps"].numpy() for which in ("chosen", "rejected")]
    ours.trainer.reference = np.stack(named, axis=1)
    return found + Case("dpo, C=32, with caches from epoch 2", family, ours, Arm(stock_trainer, job, [[0, 1]])).run(
        pairs
    )


def imitation(folder: Path, model: str, family: str, pairs: int) -> list[dict[str, Any]]:
    """SFT where one row is long; against TRL's best sampler; and where there is nothing to gain."""
    job = make_job(folder, model, family, "sft", UNEVEN)
    arms = [Arm(build, job, [range(8)]) for build in (our_trainer, stock_trainer, patched_trainer)]
    found = Case("sft, 40 % padding efficiency", family, *arms).run(pairs)
    job = make_job(folder, model, family, "sft", TAIL)
    ours, stock = Arm(our_trainer, job, budgeted(job)), Arm(stock_trainer, job, rebalanced(job))
    known, drawn = lengths(job), np.array_split(np.arange(len(TAIL)), 4)  # their order is random already
    default = Arm(stock_trainer, job, drawn)
    case = Case("sft, against batch_rebalance at accumulation 4", family, ours, stock, default=default)
    efficiency = statistics.mean(float(known[part].mean() / known[part].max()) for part in drawn)
    found.append(case.figure("padding efficiency in random order", efficiency, ""))
    found += case.run(max(2, pairs // 2))
    if pairs >= CURVES:
        found.append(case.figure("peak of live bytes", ours.peak() / stock.peak(), "x of TRL's"))
    job = make_job(folder, model, family, "sft", (60,) * 4)
    folded, plain = Arm(our_trainer, job, [range(4)]), Arm(partial(our_trainer, fold=False), job, [range(4)])
    times = [(folded.step(), plain.step()) for _ in range(2 * pairs + 1)][1:]
    ratio = statistics.median(mine / theirs for mine, theirs in times)
    return [*found, figure(f"sft, nothing to fold, {family}: step against a plain one", ratio, "x", 1.03)]


def lengths(job: JobConfig) -> np.ndarray:
    """Tokens of each of the job's rows."""
    from ray_vlm.train.prepare import prepare

    index = prepare(job).train
    return index.image_tokens + index.prompt_tokens + index.answer_tokens


def rebalanced(job: JobConfig, accumulation: int = 4) -> list[list[int]]:
    """Micro-batches of one step as transformers' `batch_rebalance` makes them, with the rows' true lengths."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    known = lengths(job).tolist()
    return [list(map(int, rows)) for rows in BatchRebalanceSampler(known, len(known), 1, accumulation)]


def budgeted(job: JobConfig, accumulation: int = 4) -> list[list[int]]:
    """The same rows as our plan shares them out under the largest budget of tokens that makes as many micro-batches."""
    from ray_vlm.data.plan import Plan

    known, found = lengths(job), None
    for budget in range(int(known.max()), int(known.sum()), 16):
        plan = Plan(len(known), len(known), 1, 1, costs=known, tokens=known, budget=budget)
        if plan.accumulation == accumulation:
            found = [list(batch.rows) for batch in plan.rank_step(0, 0)]
    assert found is not None
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    """All cases in eight minutes; quick: of one family, and nothing computed."""
    found = _measure(["qwen3_vl"] if quick else list(SIDE), 3)
    return found if quick else found + computed()


def full() -> list[dict[str, Any]]:
    """Curves of twenty steps."""
    return _measure(list(SIDE), CURVES) + computed()


def _measure(families: Sequence[str], pairs: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for family in families:
            folder = Path(temporary) / family
            folder.mkdir()
            model = write_model(folder / "model", family)
            parts: list[Callable[..., list]] = [partial(groups, length=16), partial(groups, length=64)]
            for part in (*parts, whole_step, preferences, imitation):
                found += part(folder, model, family, pairs=pairs)
            found += image_path(folder, model, family)
    return found


if __name__ == "__main__":
    report(measure, full=full)
