"""Rules of the methods: the rows, settings and batch sizes of SFT, DPO and GRPO. Pure functions of the job."""

from collections.abc import Iterator

from ray_vlm.config.data import Source
from ray_vlm.config.method import METHOD_METRICS, OF_METHODS
from ray_vlm.config.rule import Rule
from ray_vlm.config.schema import JobConfig

Broken = Iterator[tuple[str, str]]  # (dotted key, reason and fix)

# What `evaluate.metric` may name for each task; higher is better for all but the loss.
TASK_METRICS = {
    "detection": ("f1_50", "map", "map_50", "mean_iou", "precision_50", "recall_50", "parse_rate"),
    "classification": ("accuracy", "attribute_accuracy", "balanced_accuracy", "macro_f1", "parse_rate"),
    "gui_steps": (
        *("step_success", "task_success", "action_accuracy", "argument_accuracy", "grounding", "mean_iou"),
        "parse_rate",
    ),
    "chat": ("exact", "normalised", "anls", "parse_rate"),
}

# The task for which the rows of each format are examples.
FORMAT_TASKS = {
    "coco": "detection",
    "objects": "detection",
    "image_csv": "classification",
    "gui_csv": "gui_steps",
    "llava": "chat",
    "messages": "chat",
}


METHOD_RULES: list[Rule] = [
    (
        lambda j: j.train.tokens_per_micro_batch is not None and j.method.name != "sft",
        ("train.tokens_per_micro_batch", "method"),
        "TRL averages over the pairs or answers of a micro-batch, so all need the same number. Use micro_batch_size.",
    ),
    (
        lambda j: j.train.tokens_per_micro_batch is not None and j.train.memory is not None,
        ("train.tokens_per_micro_batch", "train.memory"),
        "both set the size of a micro-batch. Leave one of them out.",
    ),
    (
        lambda j: j.lora is None and (j.method.name == "dpo" or (j.method.name == "grpo" and bool(j.method.beta))),
        ("lora", "method"),
        "the reference is the model with its adapter off, so this method needs an adapter. Keep `lora`.",
    ),
    (
        lambda j: j.method.rollouts == "vllm" and (j.lora is None or j.lora.target != ["language"]),
        ("method.rollouts", "lora.target"),
        "vllm supports adapters on the language model only. Use lora.target=[language].",
    ),
    (
        lambda j: j.method.rollouts == "vllm" and not j.cluster.gpus_per_worker,
        ("method.rollouts", "cluster.gpus_per_worker"),
        "vllm needs a GPU. Set cluster.gpus_per_worker=1, or use transformers rollouts.",
    ),
]


def known_metrics(job: JobConfig) -> tuple[str, ...]:
    """Return the metrics that `evaluate.metric` may name: the method's, and the task's if the rows have its format."""
    metrics = METHOD_METRICS[job.method.name]
    if not job.method.num_generations_eval:
        metrics = tuple(name for name in metrics if name != "sampled_reward")
    measured = job.method.name != "dpo" and not (job.data.eval is not None and job.data.eval.format == "prompt")
    return (*metrics, *TASK_METRICS[job.task.name]) if measured else metrics


def known_formats(job: JobConfig, part: str) -> tuple[str, ...]:
    """Return the formats that `data.<part>` may have: pairs for DPO; the task's own formats or prompts for GRPO; for
    SFT and `data.test` only the task's own."""
    own = tuple(name for name, task in FORMAT_TASKS.items() if task == job.task.name)
    if part == "test" or job.method.name == "sft":
        return own
    return ("preference",) if job.method.name == "dpo" else (*own, "prompt")


def check_method(job: JobConfig) -> Broken:
    """Yield every rule of the method that the job breaks."""
    method = job.method
    for key, methods in OF_METHODS.items():
        if method.name not in methods and getattr(method, key) != type(method).model_fields[key].default:
            yield f"method.{key}", f"{method.name} does not use it; {' and '.join(methods)} do. Remove it."
    yield from _check_formats(job)
    yield from _check_weights(job)
    if method.name != "sft":
        yield from _check_even(job)


def _check_formats(job: JobConfig) -> Broken:
    sources: dict[str, tuple[Source | None, ...]] = {
        "train": (job.data.train, *job.data.mix),
        "eval": (job.data.eval,),
        "test": (job.data.test,),
    }
    for part, part_sources in sources.items():
        known = known_formats(job, part)
        wrong = sorted({s.format for s in part_sources if s is not None and s.path and s.format not in known})
        if wrong:
            yield (
                f"data.{part}.format",
                f"{', '.join(wrong)} holds no rows for {job.method.name} of {job.task.name}. Use one of: "
                f"{', '.join(known)}.",
            )


def _check_weights(job: JobConfig) -> Broken:
    """Check that class weights are used with SFT's plain loss, and oversampling with rows that have classes."""
    data, trl = job.data, job.method.trl
    for key in ("class_weights", "condition_weights"):
        if getattr(data, key) is None:
            continue
        if job.method.name != "sft":
            yield (
                f"data.{key}",
                f"the weights apply to the tokens that sft imitates; {job.method.name} has none. Remove it.",
            )
        elif trl.get("loss_type", "nll") != "nll" or trl.get("label_smoothing_factor"):
            yield (
                f"data.{key}",
                "the weights apply to the plain loss; loss_type and label smoothing do not use them. Remove one of the "
                "two.",
            )
    made = {s.format for s in (data.train, *data.mix) if s is not None} & {"preference", "prompt"}
    if made and data.oversample is not None:
        yield "data.oversample", f"rows of {', '.join(sorted(made))} have no classes. Remove it, or weight the sources."


def _check_even(job: JobConfig) -> Broken:
    """Check that pairs, or groups of answers, divide evenly among the workers: TRL's means over workers assume it.

    A group is never split between workers. `train.global_batch_size` counts the answers of all groups.
    """
    group = job.method.num_generations if job.method.name == "grpo" else 1
    batch, micro = job.train.global_batch_size, job.train.micro_batch_size
    what = "sampled answers" if group > 1 else "pairs"
    if batch % group:
        yield (
            "method.num_generations",
            f"{group} does not divide train.global_batch_size={batch}, which counts sampled answers for grpo. Use a "
            f"multiple, such as {group * max(1, round(batch / group))}.",
        )
        return
    for workers in range(job.cluster.least_workers, job.cluster.most_workers + 1):
        if batch // group % workers:
            even = group * workers * max(1, batch // group // workers)
            groups = f" in {batch // group} groups" if group > 1 else ""
            fix = f"Use train.global_batch_size={even}."
            if isinstance(job.cluster.num_workers, list):
                fix = "Use a train.global_batch_size that all numbers of workers divide, or one number of workers."
            yield "cluster.num_workers", f"{workers} workers cannot share {batch} {what}{groups} evenly. {fix}"
            return
        if batch // workers % micro:
            yield (
                "train.micro_batch_size",
                f"{micro} does not divide the {batch // workers} {what} of one worker in a step. Use a divisor of it.",
            )
            return
