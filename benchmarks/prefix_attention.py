"""What attention over shared prefixes computes and takes, for GRPO's training phase: pairs of tokens, operations, time.

Pairs: what attention of a group of answers behind 1,090 tokens computes over what it needs, in the calls on a CPU (in
parts), in calls of torch's attention in blocks, and in the segments that a card is given, with padding to its width.

Work: floating-point operations of a step at the size of Qwen3-VL-8B and Qwen2.5-VL-7B, of stock TRL over this
package's. The language model with its adapters, checkpointing and head is rehearsed on fake tensors: forward,
recomputation, backward (weights of adapters included), products and attention as computed, which in the backward are
five products for two. A causal call counts n (n + 1) / 2 pairs and a masked one n^2. TRL has a row for each answer
and attends causally where no row is padded, as here, and under a mask where answers have several lengths (no bar).
The image encoder is counted from its weights, with windows where it has them: this package encodes an image once; TRL
for each row, and of Qwen2.5-VL recomputes it and goes back through it.

Time: tiny models (`benchmarks/arms.py`) behind about 280 tokens, float32, one thread; it is CPU time, which other
processes do not lengthen. A cell is a number of answers and their length, the same for all, which are injected. Arms
take steps in turn: this package, stock TRL, and TRL patched (its frozen encoder without autograd, a head that scores
trained tokens alone). A figure is the median of the ratios of paired steps; cells of many tokens have one pair. In the
first pair of each cell log-probabilities and gradients are compared with TRL's.

The whole takes 12 minutes. `--only pairs|work|time`, `--family` and `--cell 8x512` (more than once) measure a part;
`--pairs` takes so many pairs of each cell.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import SIDE, Arm, logps_apart, make_job, write_model
from benchmarks.figures import figure, report
from benchmarks.real_size import IMAGE, REAL, TEXT, count_step, encoder_work, rehearse
from ray_vlm.models.layouts import MULTIPLE, PackedGroup, plan_keys
from ray_vlm.models.memory import Batch
from tests.support.attention_pairs import CountPairs, pairs_in_segments
from tests.support.stock import gradients_apart, our_trainer, patched_trainer, stock_trainer

PROMPT = 1090
GROUPS = ((8, 64), (8, 512), (16, 1024))
PAIRS_BAR, BLOCKS_BAR = 1.05, 1.25
WORK_BARS = {"qwen3_vl": 2.1, "qwen2_5_vl": 2.8}
SPEED_BARS = {"qwen3_vl": 1.4, "qwen2_5_vl": 1.5}  # of 8 answers of 512
NO_SLOWER = 0.97
EXACT = 3e-5  # as in `shared_prefix`
CELLS = tuple((count, length) for count in (2, 8, 16) for length in (16, 64, 256, 512, 1024))
QUICK = ((2, 16), (8, 64))
PROMPT_TOKENS = 283  # of the tiny models' rows, to choose pairs by
PAIR_TOKENS, MOST_PAIRS, BARRED_PAIRS = 9_000, 4, 3


@dataclass(frozen=True)
class Selection:
    """What to measure. `only`: pairs, work or time; `cells`: numbers of answers and tokens of each; `pairs`: of steps;
    None: all, and as many as suit a cell."""

    only: str | None
    families: Sequence[str]
    cells: Sequence[tuple[int, int]] | None
    pairs: int | None


def count_pairs() -> list[dict[str, Any]]:
    """Return the pairs that attention computes over those that it needs."""
    import torch

    from ray_vlm.models.shared_attention import attend_in_blocks, attend_in_parts

    figures = []
    for count, length in GROUPS:
        group = PackedGroup(0, PROMPT, (length,) * count)
        part = torch.zeros(1, 1, group.end, 8)
        padding = PackedGroup(group.end, -group.end % MULTIPLE)
        ways = {"in parts, on a CPU": (attend_in_parts, PAIRS_BAR), "in blocks": (attend_in_blocks, BLOCKS_BAR)}
        title = f"pairs, {count} x {length} behind {PROMPT:,}"
        for name, (attend, bar) in ways.items():
            with torch.no_grad(), CountPairs() as counted:
                attend(part, part, part, [group], 1.0)
            figures.append(figure(f"{title}: {name}", counted.pairs / group.pairs, "of needed", bar))
        computed = pairs_in_segments(plan_keys([group, padding] if padding.prefix else [group]))
        figures.append(figure(f"{title}: in segments, on a card", computed / group.pairs, "of needed", PAIRS_BAR))
        figures.append(figure(f"{title}: under a mask of the row", group.end**2 / group.pairs, "of needed"))
        rows = count * (PROMPT + length) * (PROMPT + length + 1) // 2
        figures.append(figure(f"{title}: TRL's rows, causal", rows / group.pairs, "of needed"))
    return figures


def count_work(families: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Return TRL's operations over this package's at the size of real models."""
    figures, prompt = [], IMAGE + TEXT + 2  # 1,090
    for name, family in REAL.items():
        if family not in families:
            continue
        rehearsal = rehearse(name, family)
        image = encoder_work(rehearsal, IMAGE)
        encoded = 3 if family == "qwen2_5_vl" else 1
        for count, length in ((8, 512),) if quick else ((8, 128), *GROUPS[1:]):
            rows, scored = (count, prompt + length), count * length
            group = PackedGroup(0, prompt, (length,) * count)
            own = image + count_step(rehearsal, Batch(1, group.end, groups=(group,), spread=rows, labelled=scored))
            title = f"work, {name.split('/')[1]}, {count} x {length} behind {prompt:,}: TRL over ours"
            for is_masked in (False, True):
                trl = count * image * encoded + count_step(rehearsal, Batch(*rows, masked=is_masked, labelled=scored))
                bar = WORK_BARS[family] if (count, length) == (8, 512) and not is_masked else None
                wording = f"{title}, TRL under a mask" if is_masked else title
                figures.append(figure(wording, trl / own, "x", bar, most=False))
    return figures


def time_cells(folder: Path, family: str, cells: Sequence[tuple[int, int]], pairs: int | None) -> list[dict[str, Any]]:
    """Time the cells of one family."""
    model, figures = write_model(folder / "model", family), []
    for arm in build_arms(folder, model, family, 2, 16):
        arm.step()  # the first steps of a process are slower than any other
    for count, length in cells:
        figures += time_cell(folder, model, family, count, length, pairs or pairs_for(count, length))
    return figures


def pairs_for(count: int, length: int) -> int:
    """Return how many pairs of steps to take of a cell, fewer for one of many tokens."""
    if (count, length) == (8, 512):
        return BARRED_PAIRS
    return max(1, min(MOST_PAIRS, PAIR_TOKENS // (count * (PROMPT_TOKENS + length))))


def build_arms(folder: Path, model: str, family: str, count: int, length: int) -> list[Arm]:
    """Return this package's arm, stock TRL's, and that of TRL patched, with the same answers."""
    job = make_job(folder, model, family, "grpo", (1,), count, max_completion_tokens=length)
    rng = np.random.default_rng(length)
    answers = [rng.integers(20, 600, length).tolist() for _ in range(count)]
    for number, ids in enumerate(answers):  # `token_reward` must differ within the group, or no gradient is left
        ids[-1] += (number - sum(ids)) % 7
    return [Arm(build, job, [[0]], answers) for build in (our_trainer, stock_trainer, patched_trainer)]


def time_cell(folder: Path, model: str, family: str, count: int, length: int, pairs: int) -> list[dict[str, Any]]:
    """Time one cell: `pairs` rounds of a step of each arm, which begin with another arm each time."""
    arms = build_arms(folder, model, family, count, length)
    own, stock, _ = arms
    masks = watch_masks(stock)
    times: list[list[float]] = []
    apart = 0.0
    for turn in range(pairs):
        order = [(turn + number) % len(arms) for number in range(len(arms))]
        seconds = {number: take_step(arms[number]) for number in order}
        times.append([seconds[number] for number in range(len(arms))])
        if turn == 0:
            apart = max(gradients_apart(own.gradients(), stock.gradients(), 1e-2), logps_apart(own, stock))
    title = f"time, {count} x {length}, {family}"
    bar = SPEED_BARS[family] if (count, length) == (8, 512) else NO_SLOWER
    figures = []
    for number, name, least in ((1, "TRL", bar), (2, "TRL patched", NO_SLOWER)):
        ratio = statistics.median(seconds[number] / seconds[0] for seconds in times)
        figures.append(figure(f"{title}: {name} over ours, pairs: {pairs}", ratio, "x", least, most=False))
    return [
        *figures,
        figure(f"{title}: step", statistics.median(seconds[0] for seconds in times), "s"),
        figure(f"{title}: tokens, TRL over ours", stock.tokens / own.tokens, "x"),
        figure(f"{title}: TRL attends under a mask", int(any(masks)), ""),
        figure(f"{title}: log-probabilities, gradients apart", apart, "", EXACT),
    ]


def take_step(arm: Arm) -> float:
    """Return the CPU seconds of a step."""
    started = time.process_time()
    arm.step()
    return time.process_time() - started


def watch_masks(arm: Arm) -> list[bool]:
    """Return a list that gets, for each forward of the language model's first layer, whether attention has a mask."""
    from ray_vlm.models.backbone import base_of, language_layers

    masks: list[bool] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        masks.append(kwargs.get("attention_mask") is not None)

    language_layers(base_of(arm.trainer.model))[0].register_forward_pre_hook(note, with_kwargs=True)
    return masks


def measure(selection: Selection, quick: bool) -> list[dict[str, Any]]:
    """Return the selected figures."""
    import torch

    torch.set_num_threads(1)
    figures = []
    if selection.only in (None, "pairs"):
        figures += count_pairs()
    if selection.only in (None, "work"):
        figures += count_work(selection.families, quick)
    if selection.only not in (None, "time"):
        return figures
    for family in selection.families:
        with tempfile.TemporaryDirectory() as folder:
            cells = selection.cells or (QUICK if quick else CELLS)
            figures += time_cells(Path(folder), family, cells, selection.pairs or (1 if quick else None))
    return figures


def parse_cell(text: str) -> tuple[int, int]:
    """Return the number of answers and their length of `8x512`."""
    count, _, length = text.partition("x")
    return int(count), int(length)


def main() -> None:
    """Measure what the arguments select, and report it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", choices=("pairs", "work", "time"))
    parser.add_argument("--family", choices=tuple(SIDE))
    parser.add_argument("--cell", type=parse_cell, action="append")
    parser.add_argument("--pairs", type=int)
    args, rest = parser.parse_known_args()
    families = (args.family,) if args.family else tuple(SIDE)
    report(partial(measure, Selection(args.only, families, args.cell, args.pairs)), rest, about=__doc__)


if __name__ == "__main__":
    main()
