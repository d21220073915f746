"""Blocks of the benchmark that end in every way there is, without torch, and the child that runs them."""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.blocks import Block
from benchmarks.gpu.figure_file import FigureFile
from benchmarks.gpu.supervise import Events, Refused, run_blocks


class FakeBench:
    """Writes a figure for each block that ends."""

    def __init__(self, figures: FigureFile):
        self.figures, self.block = figures, ""

    def of_block(self, name: str, limit_s: float) -> "FakeBench":
        self.block = name
        return self

    def clean_up(self) -> None:
        """Nothing was left."""


def good(bench: FakeBench) -> None:
    bench.figures.add(bench.block, "process", os.getpid(), "")


def fails_halfway(bench: FakeBench) -> None:
    bench.figures.add(bench.block, "before it failed", 1.5, "s")
    raise RuntimeError("something broke\nin two lines")


def breaks_the_card(bench: FakeBench) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def refuses(bench: FakeBench) -> None:
    raise Refused("torch sees no NVIDIA card")


def slow(bench: FakeBench) -> None:
    while True:
        try:
            time.sleep(0.05)
        except Exception:  # what a library may do
            continue


def imports_slowly(bench: FakeBench) -> None:
    """A module that takes long is cut off by the time limit."""
    folder = Path(bench.figures.path).parent
    (folder / "a_slow_module.py").write_text("import time\ntime.sleep(600)\n")
    sys.path.insert(0, str(folder))
    importlib.import_module("a_slow_module")


def hangs(bench: FakeBench) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(600)


def dies(bench: FakeBench) -> None:
    os._exit(9)


def block(function: str, limit_s: float = 20.0, needs: tuple[str, ...] = (), must: bool = False) -> Block:
    """A block of this module."""
    return Block(function, f"tests.gpu.fake_blocks:{function}", limit_s, needs, must)


if __name__ == "__main__":
    folder, whole_s, named = Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
    chosen = [Block(**{**options, "needs": tuple(options["needs"])}) for options in named]
    bench = FakeBench(FigureFile(folder / "figures.json"))
    sys.exit(run_blocks(chosen, bench, Events(folder / "events.jsonl"), time.monotonic() + whole_s))
