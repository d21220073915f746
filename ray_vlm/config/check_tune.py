"""Rules of the `tune` section: the metrics that rank trials, and the jobs that can keep the base in memory."""

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
        "the first trial would change all weights of the base. Train a LoRA, or leave it out.",
    ),
    (
        lambda j: j.tune.resident and j.evaluate.asynchronous,
        ("tune.resident", "evaluate.asynchronous"),
        "a separate process for validation needs its own copy of the base. Leave one of them out.",
    ),
]


def tune_metrics(job: JobConfig) -> tuple[str, ...]:
    """Return the metric that ranks the job's trials, followed by those that are shown beside it."""
    named = job.tune.metric
    if named is None:
        return (job.evaluate.metric,)
    return (named,) if isinstance(named, str) else tuple(named)


def check_tune(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield every broken rule as `(dotted key, reason and fix)`."""
    metrics, known = tune_metrics(job), known_metrics(job)
    if job.tune.metric is None:
        metrics = known[:1]  # the default is `evaluate.metric`, which has its own rule
    if not metrics or len(set(metrics)) < len(metrics):
        yield "tune.metric", "it needs one metric, or a list of different ones, of which the first ranks."
    if wrong := [name for name in metrics if name not in known]:
        yield (
            "tune.metric",
            f"this method and task do not produce {', '.join(wrong)}. Use one of: {', '.join(known)}.",
        )
