"""The context of blocks: the size of everything, the card, bases that are built once, and the file of figures."""

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.figure_file import GIB, FigureFile

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case
    from ray_vlm.config.schema import JobConfig

CAP_GIB = 40.0  # the card that jobs are planned for
QWEN3, QWEN2_5 = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
FAMILY_OF = {QWEN3: "qwen3_vl", QWEN2_5: "qwen2_5_vl"}


@dataclass(frozen=True)
class Scale:
    """The sizes of all measurements.

    `side`: image tokens along a side. `groups`: GRPO's number of answers and tokens of each. `rollouts`: sequences
    sampled at once; `sampled`: tokens of each. `lengths`: tokens of a prefix group whose attention is timed,
    multiples of 128. `matrix`: rows of a product; `copied`: bytes of a copy. `pairs`: timed steps of each arm.
    """

    rehearse: bool
    side: int = 32
    words: int = 110
    groups: tuple[tuple[int, int], ...] = ((8, 128), (8, 512), (16, 1024), (16, 512))
    rollouts: tuple[int, ...] = (8, 64)
    sampled: int = 48
    lengths: tuple[int, ...] = (2176, 5248, 9344, 17536)
    matrix: int = 8192
    copied: int = 4 * GIB
    pairs: int = 3

    @property
    def device(self) -> str:
        """Return the device of tensors."""
        return "cpu" if self.rehearse else "cuda:0"


REAL = Scale(rehearse=False)
SMALL = Scale(
    rehearse=True,
    side=4,
    words=8,
    groups=((4, 8), (8, 16)),
    rollouts=(4, 8),
    sampled=6,
    lengths=(128, 256),
    matrix=256,
    copied=2**20,
    pairs=1,
)


@dataclass
class Bench:
    """The context that a block works with. `folder`: for configurations and rows, never weights. `plans`: the planner's
    file."""

    scale: Scale
    figures: FigureFile
    folder: Path
    plans: Path
    block: str = ""
    bases: dict[str, Any] = field(default_factory=dict)
    end: float = math.inf

    def of_block(self, name: str, limit_s: float) -> "Bench":
        """Return this context for the figures of one block and its time limit in seconds."""
        self.block, self.end = name, time.monotonic() + limit_s
        return self

    @property
    def left_s(self) -> float:
        """Return the seconds until the block is ended."""
        return self.end - time.monotonic()

    def add(
        self, name: str, value: float, unit: str, bar: float | None = None, most: bool = True, note: str = ""
    ) -> None:
        """Write a figure. Bars of speed and size apply to real shapes, so a rehearsal has none."""
        self.figures.add(self.block, name, value, unit, None if self.scale.rehearse else bar, most, note)

    def check(self, name: str, value: float, unit: str, bar: float) -> None:
        """Write a figure whose bar holds for tiny shapes too."""
        self.figures.add(self.block, name, value, unit, bar)

    def base(self, model: str) -> Any:
        """Return the model's base in 4 bit on the card, built on first use; one is kept at a time."""
        from benchmarks.gpu.shapes import build_base

        if model not in self.bases:
            self.bases.clear()
            self.clean_up()
            started = time.monotonic()
            self.bases[model] = build_base(self.folder, model, self.scale)
            self.synchronize()
            self.add(f"{model.rpartition('/')[2]} built and quantised", time.monotonic() - started, "s")
        return self.bases[model]

    def job(self, case: "Case", prompts: int = 1, **train: Any) -> "JobConfig":
        """Build the job of a case (`cases.build_job`), whose base `load_resident` returns from now on."""
        from benchmarks.gpu.cases import build_job
        from ray_vlm.models.load import keep_resident
        from tests.support.stock import device_of

        job = build_job(self.folder, case, self.scale, prompts, **train)
        keep_resident(job.model, job.train.precision, device_of(job), self.base(case.model))
        return job

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if not self.scale.rehearse:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int, warm: int = 1) -> float:
        """Return the median seconds of a call, the device's work included, after `warm` calls that do not count."""
        for _ in range(warm):
            call()
        taken = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            call()
            self.synchronize()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def clean_up(self) -> None:
        """Free the memory of earlier work: trainers are reference cycles, which only the garbage collector frees."""
        gc.collect()
        if "torch" not in sys.modules or self.scale.rehearse:
            return
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def plan(self, case: str, wait_s: float = 0.0) -> dict[str, Any] | None:
        """Return the planner's result for a case, or None if it has not come within the wait."""
        end = time.monotonic() + wait_s
        while True:
            plans = json.loads(self.plans.read_text()) if self.plans.exists() else {}
            if case in plans or time.monotonic() >= end:
                return plans.get(case)
            time.sleep(0.2)
