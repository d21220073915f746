"""Evaluation with several replicas: the same predictions in the same order, and the speed-up.

A Qwen3-VL of the demo's size answers drawn scenes in Ray Data actors, with one thread per replica. The time runs from
the first answer to the last, without the start of Ray and the load of the model.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, report
from ray_vlm.config.load import load_job
from ray_vlm.data.parts import load_parts
from ray_vlm.demo.shapes import draw
from ray_vlm.evaluate.actors import InferenceJob, run_batches
from ray_vlm.evaluate.generate import answer_batch, plan_batches

JOB = "jobs/demo_sft.yaml"


def answers(inference: InferenceJob, num_actors: int) -> tuple[dict[int, Any], float]:
    """Return the answers of every batch, and batches per second once all actors work."""
    texts_by_batch, marks = {}, []
    for number, texts in run_batches(inference, answer_batch, range(len(inference.batches)), num_actors):
        texts_by_batch[number] = texts
        marks.append(time.perf_counter())
    warm = 2 * num_actors
    return texts_by_batch, (len(marks) - 1 - warm) / (marks[-1] - marks[warm])


def measure(quick: bool) -> list[dict[str, Any]]:
    """Measure one and two replicas in turn, twice each; `quick`: once each with fewer scenes."""
    with tempfile.TemporaryDirectory() as temporary:
        path = draw(Path(temporary), "studio", "test", 48 if quick else 240)
        words = [f"data.test.path={path}", "data.train=null", "data.eval=null", "model.load_in_4bit=false"]
        job = load_job(JOB, [*words, "cluster.cpus_per_worker=1", "evaluate.batch_size=4"])
        parts = load_parts(job, ["test"])
        assert parts.test is not None
        batches = plan_batches(parts.test.image_tokens + parts.test.prompt_tokens, job.evaluate.batch_size)
        inference = InferenceJob(job, parts.spec, parts.test.records, None, batches)
        rates: dict[int, list[float]] = {1: [], 2: []}
        seen = []
        for _ in range(1 if quick else 2):
            for count, count_rates in rates.items():
                texts, rate = answers(inference, count)
                count_rates.append(rate * job.evaluate.batch_size)
                seen.append(texts)
        here, _ = answers(inference, 0)
    alike = all(list(texts) == list(here) and texts == here for texts in seen)
    one, two = (sum(count_rates) / len(count_rates) for count_rates in rates.values())
    return [
        figure("evaluate.identical", int(alike), "", 1, most=False),
        figure("evaluate.one_replica", one, "rows/s"),
        figure("evaluate.two_replicas", two, "rows/s"),
        figure("evaluate.speedup", two / one, "x", None if quick else 1.6, most=False),
    ]


if __name__ == "__main__":
    report(measure)
