"""Rules across sections: which settings can be combined. A rule is a predicate, its keys, and a reason with a fix.

`check_job` returns every broken rule; `load_job` raises them together with the schema's errors.
"""

import re
from collections.abc import Collection, Iterator

from ray_vlm.config.check_cluster import CLUSTER_RULES
from ray_vlm.config.check_method import METHOD_RULES, check_method, known_metrics
from ray_vlm.config.check_tune import TUNE_RULES, check_tune
from ray_vlm.config.data import Source
from ray_vlm.config.resume import touches
from ray_vlm.config.rule import Rule
from ray_vlm.config.schema import JobConfig
from ray_vlm.config.trl import check_trl

# Options that only some tasks read; for others they would have no effect.
_OF_TASKS = {
    "prompt": ("detection", "classification", "gui_steps"),
    "labels": ("detection", "classification"),
    "position": ("classification",),
    "class_regions": ("classification",),
    "short_memory": ("gui_steps",),
    "long_memory_tokens": ("gui_steps",),
}

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")


def _sources(job: JobConfig) -> list[Source]:
    data = job.data
    return [s for s in (data.train, *data.mix, data.eval, data.test) if s is not None]


def _same_rows(a: Source | None, b: Source | None) -> bool:
    return a is not None and b is not None and bool(a.path) and a.path == b.path and not _may_be_disjoint(a, b)


def _may_be_disjoint(a: Source, b: Source) -> bool:
    """Whether two sources of one file may have disjoint ranges of tasks; `splits.py` checks it on reading the rows."""
    return None not in (a.task_end, b.task_start) or None not in (b.task_end, a.task_start)


def _is_temperature(value: float | list[float]) -> bool:
    return value > 0 if isinstance(value, float) else len(value) == 2 and min(value) >= 0


def _learning(job: JobConfig) -> set[str]:
    """Return the parts of the model that are trained."""
    if job.lora is not None:
        return set(job.lora.target)
    return {"language", "connector", "vision"} - set(job.train.freeze or ())


def _share(source: Source | None) -> float:
    return (source.ratio or 0.0) if source is not None else 0.0


RULES: list[Rule] = [
    (
        lambda j: any(bool(s.path) == (s.ratio is not None) for s in _sources(j)),
        ("data",),
        "each source needs a `path`, or for eval and test a `ratio` of the training rows, and not both.",
    ),
    (
        lambda j: any(
            s is not None and s.ratio and not s.path and s != Source(ratio=s.ratio) for s in (j.data.eval, j.data.test)
        ),
        ("data.eval", "data.test"),
        "a share of the training rows is read with their settings, so `ratio` stands alone. Remove the other settings.",
    ),
    (
        lambda j: any(s is not None and s.weight != 1 for s in (j.data.eval, j.data.test)),
        ("data.eval", "data.test"),
        "`weight` is how often training rows are shown in an epoch. Remove it here.",
    ),
    (
        lambda j: any(s.ratio is not None for s in (j.data.train, *j.data.mix) if s is not None),
        ("data.train",),
        "`ratio` is for eval and test, which take their rows from train. Give a path.",
    ),
    (
        lambda j: bool(j.data.mix or _share(j.data.eval) or _share(j.data.test)) and j.data.train is None,
        ("data.train",),
        "it is missing, and other parts take their rows from it. Give it a path and a format.",
    ),
    (
        lambda j: _share(j.data.eval) + _share(j.data.test) >= 1,
        ("data.eval", "data.test"),
        "eval and test together take all training rows. Use smaller shares, such as 0.1.",
    ),
    (
        lambda j: any(
            s.format != "gui_csv" and (s.task_start or s.task_end or s.max_tasks) is not None for s in _sources(j)
        ),
        ("data",),
        "task_start, task_end and max_tasks choose among the tasks of a gui_csv. Remove them, or use max_rows.",
    ),
    (
        lambda j: j.data.condition_weights is not None and j.task.name != "classification",
        ("data.condition_weights", "task"),
        "conditions are attributes of classification. Use data.class_weights.",
    ),
    (
        lambda j: (j.data.oversample or j.data.class_weights) is not None and j.task.name == "chat",
        ("data.oversample", "data.class_weights", "task"),
        "free text has no classes to balance. Remove oversample and class_weights, or give sources a weight.",
    ),
    (
        lambda j: j.data.oversample_threshold is not None and j.data.oversample != "auto",
        ("data.oversample_threshold", "data.oversample"),
        "only `oversample: auto` uses it. Set that, or remove the threshold.",
    ),
    (
        lambda j: j.data.pad_color is not None and not all(0 <= v <= 255 for v in j.data.pad_color),
        ("data.pad_color",),
        "it needs three numbers from 0 to 255. Correct them, or remove it.",
    ),
    (
        lambda j: j.data.resize != "pad" and (j.data.pad_color is not None or j.data.pad_place != "end"),
        ("data.resize", "data.pad_color", "data.pad_place"),
        "pad_color and pad_place need `resize: pad`. Set that, or remove them.",
    ),
    (
        lambda j: j.task.name == "classification" and any("=" not in label for label in j.task.labels or ()),
        ("task.labels", "task"),
        "classification writes labels as attribute=value, such as condition=blocked. Correct them, or leave them out.",
    ),
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
        lambda j: j.lora is not None and not set(j.lora.ranks or ()) <= set(j.lora.target),
        ("lora.ranks", "lora.target"),
        "it names a part that gets no adapter. Add the part to lora.target, or take it out here.",
    ),
    (
        lambda j: not set(j.train.learning_rates or ()) <= _learning(j),
        ("train.learning_rates", "lora.target", "train.freeze"),
        "it names a part without trained weights. Add the part to lora.target, or take it out here.",
    ),
    (
        lambda j: j.train.freeze is not None and j.lora is not None,
        ("train.freeze", "lora"),
        "with an adapter only the parts in lora.target are trained. Set lora.target, or `lora: null`.",
    ),
    (
        lambda j: j.lora is None and not _learning(j),
        ("train.freeze",),
        "all parts are frozen, so nothing would be trained. Leave one out.",
    ),
    (
        lambda j: "://" in (j.train.vision_cache or ""),
        ("train.vision_cache",),
        "it is a folder on each node's own disk, not an address. Give a path.",
    ),
    (
        lambda j: j.train.vision_cache is not None and not _learning(j).isdisjoint({"vision", "connector"}),
        ("train.vision_cache", "lora.target", "train.freeze"),
        "the image features change while the image encoder or the connector is trained. Leave "
        "train.vision_cache out, or train only the language model.",
    ),
    (
        lambda j: j.task.labels is not None and (len(set(j.task.labels)) < len(j.task.labels) or "" in j.task.labels),
        ("task.labels",),
        "a name is empty or listed twice. Name each class once.",
    ),
    (
        lambda j: j.evaluate.metric not in known_metrics(j),
        ("evaluate.metric", "task", "method"),
        "this method and task do not produce this metric. Use one of: {metrics}.",
    ),
    (
        lambda j: j.train.early_stopping_patience is not None and j.data.eval is None,
        ("train.early_stopping_patience", "data"),
        "early stopping needs validation, and `data.eval` is not set. Give it rows, or leave early stopping out.",
    ),
    (
        lambda j: j.evaluate.asynchronous and j.cluster.num_workers == 0,
        ("evaluate.asynchronous", "cluster.num_workers"),
        "it needs a separate process, which Ray starts. Set cluster.num_workers to 1 or more, or leave it out.",
    ),
    (
        lambda j: j.evaluate.asynchronous and j.data.eval is None,
        ("evaluate.asynchronous", "data"),
        "there is nothing to validate on, since `data.eval` is not set. Give it rows, or leave it out.",
    ),
    (
        lambda j: j.evaluate.engine == "vllm" and not j.cluster.gpus_per_worker,
        ("evaluate.engine", "cluster.gpus_per_worker"),
        "vllm needs a GPU. Set cluster.gpus_per_worker=1, or use transformers.",
    ),
    (
        lambda j: j.evaluate.memory == "model" and j.task.name != "gui_steps",
        ("evaluate.memory", "task"),
        "only GUI steps have a memory of earlier steps. Leave it out, or set task=gui_steps.",
    ),
    (
        lambda j: j.track.energy != (j.track.country is not None),
        ("track.country", "track.energy"),
        "energy and country go together: the carbon dioxide of a kilowatt-hour depends on the country. Give both.",
    ),
    (
        lambda j: not j.track.wandb and bool(j.track.wandb_entity or j.track.wandb_group or j.track.wandb_tags),
        ("track.wandb", "track.wandb_entity", "track.wandb_group", "track.wandb_tags"),
        "entity, group and tags belong to Weights & Biases. Set track.wandb=true, or remove them.",
    ),
    (
        lambda j: _same_rows(j.data.test, j.data.eval) and not j.data.test_on_eval,
        ("data.test", "data.eval"),
        "the rows that choose `best/` cannot also give the headline numbers. Use separate rows; or set "
        "data.test_on_eval=true, and every report will say that its rows also chose `best/`.",
    ),
    (
        lambda j: j.data.test_on_eval and j.data.eval is None,
        ("data.test_on_eval", "data.eval"),
        "it tests on the rows of `data.eval`, which is not set. Give it rows, or give data.test its own.",
    ),
    (
        lambda j: j.data.test_on_eval and j.data.test is not None and not _same_rows(j.data.test, j.data.eval),
        ("data.test_on_eval", "data.test"),
        "data.test has rows of its own, which are the better test. Remove one of the two.",
    ),
    (
        lambda j: any(_same_rows(j.data.test, s) for s in (j.data.train, *j.data.mix)),
        ("data.test", "data.train"),
        "the training rows cannot also give the headline numbers. Use separate rows.",
    ),
    (
        lambda j: (j.data.min_pixels or 0) > (j.data.max_pixels or j.data.min_pixels or 0),
        ("data.min_pixels", "data.max_pixels"),
        "it is larger than data.max_pixels. Lower it, or raise data.max_pixels.",
    ),
    (
        lambda j: not _is_temperature(j.pairs.temperature),
        ("pairs.temperature",),
        "it needs one temperature above 0, or two of 0 (the likeliest answer) or more. Correct it.",
    ),
    (
        lambda j: j.run.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", j.run.name),
        ("run.name",),
        "it is not usable as a folder name. Use letters, digits, '-', '_' and '.', beginning with a letter or digit.",
    ),
    (
        lambda j: "\0" in j.run.output_dir or not _is_address(j.run.output_dir),
        ("run.output_dir",),
        "it is neither a folder nor an address that can hold runs. Use a path, s3://, gs://, abfs:// or hdfs://.",
    ),
    *METHOD_RULES,
    *TUNE_RULES,
    *CLUSTER_RULES,
]


def _is_address(address: str) -> bool:
    scheme, mark, rest = address.partition("://")
    return not mark or (scheme in _SCHEMES and bool(rest.strip("/")))


def check_job(job: JobConfig, unread: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return every broken rule as `(dotted key, reason and fix)`.

    `unread` are keys whose values could not be read: rules that need one of them are skipped.
    """
    metrics = ", ".join(known_metrics(job))
    broken = [
        (keys[0], reason.replace("{metrics}", metrics))
        for fails, keys, reason in RULES
        if not any(touches(key, other) for key in keys for other in unread) and fails(job)
    ]
    sections = [*check_method(job), *check_tune(job)]
    broken += [(key, text) for key, text in sections if not any(touches(key, other) for other in unread)]
    return broken + list(_check_task(job)) + list(check_trl(job))


def _check_task(job: JobConfig) -> Iterator[tuple[str, str]]:
    for key, tasks in _OF_TASKS.items():
        if job.task.name not in tasks and getattr(job.task, key) != type(job.task).model_fields[key].default:
            yield f"task.{key}", f"{job.task.name} does not use it; {' and '.join(tasks)} do. Remove it."
