"""Measurements of this package on one NVIDIA card, beside stock TRL on the same rows.

`python -m benchmarks.gpu --json F` needs a card with 14 GiB free or more; memory is capped at 40 GiB. Blocks run in
order of importance, each with a time limit, and every figure is in F as soon as it is measured. Bases have the shapes
of Qwen3-VL-8B and Qwen2.5-VL-7B with random weights, built on the card: no hub, and no weights on a disk. `--blocks
sft,grpo` selects blocks; `--rehearse` runs the same code with tiny shapes on a CPU. The exit code is 1 if a bar is
missed or a block did not end as planned.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.blocks import BLOCKS, WHOLE_S, choose_blocks
from benchmarks.gpu.figure_file import FigureFile, write_plans, write_table
from benchmarks.gpu.supervise import Events, run_blocks, run_children, start_child

PLANNER_S = 30.0  # to wait for plans that are missing once the blocks have ended


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu.json"), help="where figures go as they come")
    parser.add_argument("--blocks", help=f"only these, parted by commas, of {', '.join(b.name for b in BLOCKS)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU: does the code run?")
    parser.add_argument("--limit", type=float, default=WHOLE_S, help="seconds for all blocks together")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the folder that a parent has made
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the blocks, print the table, and return the exit code."""
    args = parse(argv)
    try:
        blocks = choose_blocks(args.blocks)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    figures = FigureFile(args.json.absolute())
    if args.child is not None:
        return _be_child(args, figures)
    figures.clear()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        end = time.monotonic() + args.limit
        planner = _start_planner(folder, args.rehearse)

        def start(names: Sequence[str]) -> subprocess.Popen:
            left = f"{end - time.monotonic():.1f}"
            same = ["--json", str(figures.path), "--limit", left, *(["--rehearse"] if args.rehearse else [])]
            return start_child(["--child", str(folder), "--blocks", ",".join(names), *same])

        try:
            all_ended = run_children(blocks, start, Events(folder / "events.jsonl"), figures, args.limit)
            with suppress(subprocess.TimeoutExpired):
                planner.wait(max(1.0, min(PLANNER_S, end - time.monotonic())))
        finally:
            planner.kill()
            planner.wait()
        plans = folder / "plans.json"
        write_plans(figures, json.loads(plans.read_text()) if plans.exists() else {}, not args.rehearse)
    entries = figures.read()
    print("\n" + write_table(entries))
    return 0 if all_ended and all(one["ok"] for one in entries) else 1


def _start_planner(folder: Path, rehearse: bool) -> subprocess.Popen:
    """The planner works beside the card; its figures are compared where they come in time."""
    (folder / "planner").mkdir()
    command = [sys.executable, "-m", "benchmarks.gpu.plan", "--folder", str(folder / "planner")]
    command += ["--output", str(folder / "plans.json"), *(["--rehearse"] if rehearse else [])]
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})


def _be_child(args: argparse.Namespace, figures: FigureFile) -> int:
    from benchmarks.gpu.bench import REAL, SMALL, Bench

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a trainer would spread a model over all cards that it sees
    end = time.monotonic() + args.limit
    bench = Bench(SMALL if args.rehearse else REAL, figures, args.child, args.child / "plans.json")
    return run_blocks(choose_blocks(args.blocks), bench, Events(args.child / "events.jsonl"), end)


if __name__ == "__main__":
    raise SystemExit(main())
