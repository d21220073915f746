"""A run as users start it, `train(job)`, on the card: whether it finishes, and the figures in its run folder."""

import json
import math

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import SHIPPED
from ray_vlm.config.load import dump_job
from ray_vlm.runs.compute import measure_compute
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.read import read_run
from ray_vlm.train.driver import train

STEPS = 6


def run_job(bench: Bench) -> None:
    """Train six steps of the shipped job in this process, from the index to `final/`."""
    job = bench.job(SHIPPED, global_batch_size=2 * SHIPPED.micro, max_steps=STEPS)
    paths = train(job, json.dumps(dump_job(job)), overwrite=True)
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    bench.check("steps that are missing", STEPS - len(lines), "", 0)
    bench.check("losses that are no numbers", sum(not math.isfinite(line["loss"]) for line in lines), "", 0)
    compute = measure_compute(read_run(str(paths.root)))
    later = lines[1:]
    for name in ("step_s", "data_s", "forward_s", "backward_s"):
        bench.add(f"median {name.removesuffix('_s')}", sorted(line[name] for line in later)[len(later) // 2], "s")
    bench.add("tokens", compute["tokens_per_s"], "tokens/s")
    if compute["mfu"] is not None:
        bench.add("MFU as `runs compute` has it, the first step in it", compute["mfu"], "of peak")
    bench.add("peak memory as `runs compute` has it", compute["peak_memory_gib"], "GiB", 40.0)
