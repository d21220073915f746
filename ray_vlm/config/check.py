"""Rules that span sections: what goes together. Each rule is a predicate, a key, a reason and what to do instead.

`check_job` returns every broken rule; `load_job` raises them together with the schema's complaints.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ray_vlm.config.schema import JobConfig

# What `evaluate.metric` may name for each task; higher is better for all but the loss.
TASK_METRICS = {"detection": ("f1_50", "map", "map_50", "mean_iou", "precision_50", "recall_50", "parse_rate")}

# TRL options that a job names itself, or that the feed decides: setting them in `method.trl` too is an error.
_NAMED_IN_JOB = {
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "num_train_epochs": "train.num_epochs",
    "max_steps": "train.max_steps",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_ratio",
    "lr_scheduler_type": "train.min_lr_ratio",
    "lr_scheduler_kwargs": "train.min_lr_ratio",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.bf16",
    "fp16": "train.bf16",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "run.output_dir",
    "run_name": "run.name",
    "report_to": "track.wandb",
    "logging_steps": "train.log_every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluate.every_steps",
    "eval_strategy": "evaluate.every_steps",
    "max_length": "data.max_tokens",
    "completion_only_loss": "method.loss_on",
    "assistant_only_loss": "method.loss_on",
    "model_init_kwargs": "model",
    "ddp_find_unused_parameters": "lora.target",
    "activation_checkpointing": "train.gradient_checkpointing",
    "auto_find_batch_size": "train.micro_batch_size",
    "logging_strategy": "train.log_every_steps",
    "logging_first_step": "train.log_every_steps",
    "use_cpu": "cluster.gpus_per_worker",
    "eval_on_start": "evaluate.every_steps",
    "eval_delay": "evaluate.every_steps",
    "load_best_model_at_end": "evaluate.metric",
}

# TRL options that would break what the feed promises.
_DECIDED_BY_FEED = (
    *("average_tokens_across_devices", "packing", "padding_free", "dataset_kwargs", "disable_tqdm"),
    *("logging_nan_inf_filter", "push_to_hub", "dataloader_num_workers", "train_sampling_strategy"),
    *("ignore_data_skip", "resume_from_checkpoint", "save_only_model", "enable_jit_checkpoint"),
)

# (holds for a broken job, the keys that it reads - the first is blamed -, reason and fix)
Rule = tuple[Callable[[JobConfig], bool], tuple[str, ...], str]

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
_PLACES = ("path", "image_root")

RULES: list[Rule] = [
    (
        lambda j: j.lora is None and j.model.load_in_4bit,
        ("model.load_in_4bit", "lora"),
        "4-bit weights cannot be trained themselves. Set model.load_in_4bit=false to train all, or keep `lora`.",
    ),
    (
        lambda j: j.lora is None and j.model.adapter is not None,
        ("model.adapter", "lora"),
        "an adapter is given, but `lora: null` asks for full fine-tuning. Merge the adapter first, or set `lora`.",
    ),
    (
        lambda j: j.task.labels is not None and (len(set(j.task.labels)) < len(j.task.labels) or "" in j.task.labels),
        ("task.labels",),
        "a name is empty or listed twice. Name each class once.",
    ),
    (
        lambda j: j.evaluate.metric not in ("loss", *TASK_METRICS[j.task.name]),
        ("evaluate.metric", "task"),
        "the task does not produce this metric. Use `loss` or one of: {metrics}.",
    ),
    (
        lambda j: j.train.early_stopping_patience is not None and j.data.eval is None,
        ("train.early_stopping_patience", "data"),
        "early stopping needs validation, and `data.eval` is not set. Give it rows, or leave early stopping out.",
    ),
    (
        lambda j: j.data.test is not None and j.data.eval is not None and j.data.test.path == j.data.eval.path,
        ("data.test", "data.eval"),
        "the rows that choose `best/` cannot also give the headline numbers. Use rows of its own.",
    ),
    (
        lambda j: j.data.test is not None and j.data.train is not None and j.data.test.path == j.data.train.path,
        ("data.test", "data.train"),
        "the rows that are learned cannot also give the headline numbers. Use rows of its own.",
    ),
    (
        lambda j: (j.data.min_pixels or 0) > (j.data.max_pixels or j.data.min_pixels or 0),
        ("data.min_pixels", "data.max_pixels"),
        "larger than data.max_pixels. Lower it, or raise data.max_pixels.",
    ),
    (
        lambda j: j.cluster.num_workers > j.train.global_batch_size,
        ("cluster.num_workers", "train.global_batch_size"),
        "more workers than rows in a step; some would only run filler. Raise train.global_batch_size, or use fewer.",
    ),
    (
        lambda j: j.cluster.gpus_per_worker not in (0, 1),
        ("cluster.gpus_per_worker",),
        "a worker trains on one GPU or on CPUs. Use 0 or 1, and more workers for more GPUs.",
    ),
    (
        lambda j: j.run.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", j.run.name),
        ("run.name",),
        "not usable as a folder name. Use letters, digits, '-', '_' and '.', beginning with a letter or digit.",
    ),
    (
        lambda j: "\0" in j.run.output_dir or not _is_place(j.run.output_dir),
        ("run.output_dir",),
        "not a folder, and not an address that runs can be kept at. Use a path, s3://, gs://, abfs:// or hdfs://.",
    ),
]


# Keys that a resumed run may change; the rest decide what is learned.
MAY_CHANGE = (
    *("cluster", "track", "checkpoint", "run", "data.num_loaders", "data.test"),
    *("train.num_epochs", "train.max_steps", "train.log_every_steps", "train.early_stopping_patience"),
    *("train.micro_batch_size", "train.gradient_checkpointing", "evaluate.every_steps", "evaluate.batch_size"),
)
# Paths may differ, as they do in each Ray job's copy of the folder: rows and base are compared by their contents.
_MAY_MOVE = ("model.name", "model.adapter", *(f"data.{s}.{key}" for s in ("train", "eval") for key in _PLACES))


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a resumed job changes and may not: one sentence for each key. Both are resolved jobs as `dump_job` gives."""
    before, after = _flat(old), _flat(new)
    return [
        f"--resume: `{key}` was {before.get(key)!r} and is now {after.get(key)!r}. It decides what is learned, so it "
        "stays as it was; start a new run to change it."
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(_touches(key, free) and len(key) >= len(free) for free in MAY_CHANGE)
        and not (key in _MAY_MOVE and _same_name(before.get(key), after.get(key)))
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _same_name(old: Any, new: Any) -> bool:
    """Whether two absolute paths end alike: the same thing, perhaps, in another place."""
    both = isinstance(old, str) and isinstance(new, str) and old.startswith("/") and new.startswith("/")
    return both and old.rsplit("/", 1)[-1] == new.rsplit("/", 1)[-1]


def _is_place(address: str) -> bool:
    scheme, mark, rest = address.partition("://")
    return not mark or (scheme in _SCHEMES and bool(rest.strip("/")))


def check_output_dir(address: str, name: str = "run.output_dir") -> list[str]:
    """Why a Ray job may not write to `address`, if so: what it is given of the folder is a copy that is thrown away."""
    if "://" in address or address.startswith(("/", "~")):
        return []
    return [
        f"{name}={address!r} is relative, and a Ray job runs in a copy of the folder that is thrown away. "
        "Give an absolute path on a file system that all nodes share, or s3://..."
    ]


def check_job(job: JobConfig, unread: Collection[str] = ()) -> list[tuple[str, str]]:
    """Every broken rule as `(dotted key, reason and fix)`; an empty list when all is well.

    `unread` are keys whose values could not be read: rules that need one of them are left out.
    """
    metrics = ", ".join(TASK_METRICS[job.task.name])
    broken = [
        (keys[0], reason.replace("{metrics}", metrics))
        for fails, keys, reason in RULES
        if not any(_touches(key, other) for key in keys for other in unread) and fails(job)
    ]
    return broken + list(_check_trl(job))


def _touches(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _check_trl(job: JobConfig) -> Iterator[tuple[str, str]]:
    for key, value in job.method.trl.items():
        if key in _NAMED_IN_JOB:
            yield f"method.trl.{key}", f"this job sets that as `{_NAMED_IN_JOB[key]}`. Set it there, and only there."
        elif key in _DECIDED_BY_FEED:
            yield f"method.trl.{key}", "this is decided by how rows are fed to TRL. Remove it."
        elif not _is_plain(value):
            yield f"method.trl.{key}", "not plain data. Use text, finite numbers, true/false, null, lists and mappings."


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether JSON carries `value` to the workers unchanged."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth < 20 and all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, str | int)
