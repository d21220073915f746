"""The settings that a resumed job may change."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError

# Keys that a resumed run may change; all others affect what is learned.
MAY_CHANGE = (
    *(
        "cluster",
        "track",
        "checkpoint",
        "run",
        "data.num_loaders",
        "data.loaders",
        "data.index_dir",
        "data.test",
        "data.test_on_eval",
        "model.kernels",
    ),
    *("train.num_epochs", "train.max_steps", "train.log_every_steps", "train.early_stopping_patience"),
    *("train.micro_batch_size", "train.tokens_per_micro_batch", "train.packing", "train.gradient_checkpointing"),
    *("train.memory", "train.probe", "train.vision_cache", "train.vision_cache_gib", "train.nonfinite"),
    *("evaluate.every_steps", "evaluate.batch_size"),
    *("evaluate.asynchronous", "evaluate.engine", "evaluate.sampler_url", "evaluate.num_replicas", "evaluate.memory"),
    # What samples, and where: its answers differ by rounding, as those of another micro-batch.
    *("method.rollouts", "method.sampler_url", "method.sampler_sleep", "method.check_sampler_every"),
    *("method.max_rollout_gap", "method.samplers", "method.cpus_per_sampler", "method.gpus_per_sampler"),
    "method.sampling_batch",
)
_DECIDED = "data.shuffle"  # null in the job: as the run has it
_FORMAT = re.compile(r"data\.(train|eval|test|mix\.\d+)\.format")  # `auto` in the job: as the run has it
# Paths may differ, as in each Ray job's copy of the folder: rows and base are compared by content elsewhere.
_MAY_MOVE = re.compile(r"model\.(name|adapter)|data\.(train|eval|mix\.\d+)\.(path|image_root)")


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a message for each key that a resumed job must not change. Both jobs are as `dump_job` returns them."""
    before, after = _flat(old), _flat(new)
    if after.get(_DECIDED) is None:
        after[_DECIDED] = before.get(_DECIDED)
    after |= {k: before[k] for k, v in after.items() if v == "auto" and k in before and _FORMAT.fullmatch(k)}
    return [
        f"--resume: `{key}` was {before.get(key)!r} and is now {after.get(key)!r}. It decides what is learned, so it "
        "stays as it was; start a new run to change it."
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(touches(key, free) and len(key) >= len(free) for free in MAY_CHANGE)
        and not (_MAY_MOVE.fullmatch(key) and _same_name(before.get(key), after.get(key)))
    ]


def keep_shuffle(old: Mapping[str, Any], job: JobConfig) -> JobConfig:
    """Return a job that resumes one, as `dump_job` returned it, with its shuffle if the job names none. Runs of earlier
    versions without a word on it had a full one."""
    if job.data.shuffle is not None:
        return job
    value = old.get("data", {}).get("shuffle", "full")
    try:
        shuffle = Data(shuffle=value).shuffle
    except ValidationError:
        raise ConfigError(
            f"--resume: the resolved job of the run has data.shuffle={value!r}, which was altered. Set data.shuffle."
        ) from None
    return job.model_copy(update={"data": job.data.model_copy(update={"shuffle": shuffle})})


def keep_formats(old: Mapping[str, Any], job: JobConfig) -> JobConfig:
    """Return a job that resumes an earlier one with the formats that this one has, in place of `auto`, for the files
    that both read. `old`: the earlier job, as `dump_job` returned it."""
    before, data = old.get("data", {}), job.data

    def keep(source: Source | None, earlier: Mapping[str, Any] | None) -> Source | None:
        if source is None or source.format != "auto" or not earlier or not source.path:
            return source
        path = earlier.get("path")
        path = tuple(path) if isinstance(path, list) else path
        if source.path != path and not _same_name(path, source.path):
            return source
        return source.model_copy(update={"format": earlier.get("format", "auto")})

    kept: dict[str, Any] = {part: keep(getattr(data, part), before.get(part)) for part in ("train", "eval", "test")}
    mix = [*(before.get("mix") or ()), *[None] * len(data.mix)]
    kept["mix"] = tuple(keep(source, earlier) for source, earlier in zip(data.mix, mix, strict=False))
    return job.model_copy(update={"data": data.model_copy(update=kept)})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = {str(i): entry for i, entry in enumerate(value)}
        whole = not (isinstance(value, Mapping) and value) or f"{prefix}{key}" == _DECIDED
        flat |= {f"{prefix}{key}": value} if whole else _flat(value, f"{prefix}{key}.")
    return flat


def _same_name(old: object, new: object) -> bool:
    """Whether two absolute paths have the same last part, so that they may be copies of the same file."""
    if not (isinstance(old, str) and isinstance(new, str) and old.startswith("/") and new.startswith("/")):
        return False
    return old.rsplit("/", 1)[-1] == new.rsplit("/", 1)[-1]


def touches(key: str, other: str) -> bool:
    """Whether one dotted key equals or contains the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
