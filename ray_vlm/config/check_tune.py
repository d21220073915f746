"""Rules of the `tune` section: what a sweep can rank by, and what can stay in memory from trial to trial."""

from collections.abc import Iterator

from ray_vlm.config.check_method import known_metrics
from ray_vlm.config.rule import Rule
from ray_vlm.config.schema import JobConfig

TUNE_RULES: list[Rule] = [
    (
        lambda j: j.tune.resident and j.cluster.most_workers > 1,
        ("tune.resident", "cluster.num_workers"),
        "a trial is one process with one device. Set cluster.num_workers to 1 or 0.",
    ),
    (
        lambda j: j.tune.resident and j.lora is None,
        ("tune.resident", "lora"),
        "all weights would be changed by the first trial. Train a LoRA, or leave it out.",
    ),
    (
        lambda j: j.tune.resident and j.evaluate.asynchronous,
        ("tune.resident", "evaluate.asynchronous"),
        "validation in a process of its own needs a base of its own. Leave one of them out.",
    ),
]


def tune_metrics(job: JobConfig) -> tuple[str, ...]:
    """What ranks the job's trials, the first one, and what is shown beside it."""
    named = job.tune.metric
    if named is None:
        return (job.evaluate.metric,)
    return (named,) if isinstance(named, str) else tuple(named)


def check_tune(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Every broken rule as `(dotted key, reason and fix)`."""
    metrics, known = tune_metrics(job), known_metrics(job)
    if job.tune.metric is None:
        metrics = known[:1]  # that of `evaluate`, which has a rule of its own
    if not metrics or len(set(metrics)) < len(metrics):
        yield "tune.metric", "a list of different metrics; the first one ranks."
    if wrong := [name for name in metrics if name not in known]:
        yield (
            "tune.metric",
            f"this method and task do not produce {', '.join(wrong)}. Use one of: {', '.join(known)}.",
        )
