"""Rules across sections: which settings can be combined. A rule is a predicate, its keys, and a reason with a fix.

`check_job` returns every broken rule; `load_job` raises them together with the schema's errors.
"""

import re
from collections.abc import Collection

from ray_vlm.config.check_method import METHOD_RULES, Broken, Rule, check_method, check_trl, known_metrics
from ray_vlm.config.data import Data, Source
from ray_vlm.config.method import DpoMethod
from ray_vlm.config.resume import touches
from ray_vlm.config.schema import Evaluate, JobConfig, Tune
from ray_vlm.config.task import labels_of

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")


def _sources(data: Data) -> list[Source]:
    return [s for s in (data.train, *data.mix, data.eval, data.test) if s is not None]


def _same_rows(a: Source | None, b: Source | None) -> bool:
    return a is not None and b is not None and bool(a.path) and a.reads_as(b) and not _may_be_disjoint(a, b)


def _may_be_disjoint(a: Source, b: Source) -> bool:
    """Whether two sources of one file may have disjoint ranges of tasks; `splits.py` checks it on reading the rows."""
    return None not in (a.task_end, b.task_start) or None not in (b.task_end, a.task_start)


def _is_temperature(value: float | list[float]) -> bool:
    return value > 0 if isinstance(value, float) else len(value) == 2 and min(value) >= 0


def _learning(job: JobConfig) -> set[str]:
    """Return the parts of the model that are trained."""
    if job.lora is not None:
        return {"language" if part == "experts" else part for part in job.lora.target}
    return {"language", "connector", "vision"} - set(job.train.freeze or ())


def _share(source: Source | None) -> float:
    return (source.ratio or 0.0) if source is not None else 0.0


RULES: list[Rule] = [
    (
        lambda j: any(bool(s.path) == (s.ratio is not None) for s in _sources(j.data)),
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
            s.format not in ("gui_csv", "auto") and (s.task_start or s.task_end or s.max_tasks) is not None
            for s in _sources(j.data)
        ),
        ("data",),
        "task_start, task_end and max_tasks choose among the tasks of a gui_csv. Remove them, or use max_rows.",
    ),
    (
        lambda j: any(s.create is not None and len(s.paths) > 1 for s in _sources(j.data)),
        ("data",),
        "`create` makes one file, and `path` names several. Name one, or give each an entry of data.mix.",
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
        lambda j: j.task.name == "classification" and any("=" not in label for label in labels_of(j.task)),
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
        lambda j: j.lora is not None and "experts" in j.lora.target and j.lora.dropout > 0,
        ("lora.target", "lora.dropout"),
        "experts are fused weights, and PEFT's adapters of those have no dropout. Set lora.dropout=0, or leave experts "
        "out.",
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
        lambda j: "" in labels_of(j.task) or len(set(labels_of(j.task))) < len(labels_of(j.task)),
        ("task.labels",),
        "a name is empty or listed twice. Name each class once.",
    ),
    (
        lambda j: j.evaluate.metric not in _metrics_of(j),
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
    (
        lambda j: j.train.memory is not None and j.cluster.gpu_memory_gib is None,
        ("train.memory", "cluster.gpu_memory_gib"),
        "it fits the job to a GPU, whose memory is not given. Set cluster.gpu_memory_gib.",
    ),
    (
        lambda j: bool(j.train.probe) and j.cluster.zero_stage == 3,
        ("train.probe", "cluster.deepspeed"),
        "under ZeRO-3 no worker has all weights to run a batch before training begins. Leave it out.",
    ),
    (
        lambda j: j.train.nonfinite != "stop" and j.cluster.deepspeed is not None,
        ("train.nonfinite", "cluster.deepspeed"),
        "DeepSpeed takes its step before the gradient can be checked. Leave train.nonfinite out.",
    ),
    (
        lambda j: j.train.precision == "fp16" and j.cluster.deepspeed is not None,
        ("train.precision", "cluster.deepspeed"),
        "DeepSpeed scales the loss by itself, and a step that it skips cannot be distinguished from a fault. Use bf16 "
        "or fp32, or leave cluster.deepspeed out.",
    ),
    (
        lambda j: j.train.optimizer == "paged_adamw_8bit" and not j.cluster.gpus_per_worker,
        ("train.optimizer", "cluster.gpus_per_worker"),
        "its moments move between a GPU and the computer's memory. Set cluster.gpus_per_worker=1, or use adamw_8bit.",
    ),
    (
        lambda j: j.train.optimizer != "adamw" and j.cluster.deepspeed is not None,
        ("train.optimizer", "cluster.deepspeed"),
        "its 8-bit blocks and the embeddings that it keeps in float32 are those of whole weights, and ZeRO, which "
        "spreads the moments over the workers, cuts and joins weights. Use adamw, or leave cluster.deepspeed out.",
    ),
    (
        lambda j: j.train.gradient_checkpointing == "selective" and j.cluster.zero_stage == 3,
        ("train.gradient_checkpointing", "cluster.deepspeed"),
        "under ZeRO-3 whole layers are recomputed, with their weights gathered again. Use true, or zero2.",
    ),
    (
        lambda j: j.train.vision_cache is not None and j.cluster.zero_stage == 3,
        ("train.vision_cache", "cluster.deepspeed"),
        "under ZeRO-3 no worker has all weights of the image encoder, whose hash is part of each file's name. Use "
        "zero2, or leave it out.",
    ),
    (
        lambda j: j.cluster.most_workers > j.train.global_batch_size,
        ("cluster.num_workers", "train.global_batch_size"),
        "there are more workers than rows in a step, so some would only run padding. Raise train.global_batch_size, or "
        "use fewer.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.cluster.least_workers >= j.cluster.most_workers,
        ("cluster.num_workers",),
        "the first number is the fewest workers, the second, larger one the most. Give [fewest, most], or one number.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.cluster.deepspeed is not None,
        ("cluster.num_workers", "cluster.deepspeed"),
        "a DeepSpeed checkpoint can only be read by the same number of workers. Give one number, or leave DeepSpeed "
        "out.",
    ),
    (
        lambda j: isinstance(j.cluster.num_workers, list) and j.evaluate.asynchronous,
        ("cluster.num_workers", "evaluate.asynchronous"),
        "elastic workers would take the resources of the validation process. Give one number, or leave "
        "evaluate.asynchronous out.",
    ),
    (
        lambda j: j.cluster.gpus_per_worker not in (0, 1),
        ("cluster.gpus_per_worker",),
        "a worker trains on one GPU or on CPUs. Use 0 or 1, and more workers for more GPUs.",
    ),
    (
        lambda j: j.cluster.deepspeed is not None and j.cluster.num_workers == 0,
        ("cluster.deepspeed", "cluster.num_workers"),
        "it partitions among workers, which Ray starts. Set cluster.num_workers to 1 or more, or leave it out.",
    ),
    (
        lambda j: j.cluster.deepspeed is not None and j.tune.resident,
        ("cluster.deepspeed", "tune.resident"),
        "a base that is kept for all trials cannot be partitioned by each of them. Leave one of them out.",
    ),
    (
        lambda j: j.cluster.zero_stage == 3 and j.method.name == "grpo",
        ("cluster.deepspeed", "method"),
        "under ZeRO-3 every token that is sampled would gather the whole model. Use zero2, with model.load_in_4bit if "
        "the base is too large for a GPU.",
    ),
    (
        lambda j: (
            j.cluster.zero_stage == 3
            and j.method.name == "dpo"
            and j.lora is not None
            and bool(j.train.gradient_checkpointing)
            and "vision" in j.lora.target
        ),
        ("cluster.deepspeed", "method", "lora.target", "train.gradient_checkpointing"),
        "with gradient checkpointing under ZeRO-3 the image encoder's adapter gets no gradient from pairs. Use "
        "lora.target without vision, train.gradient_checkpointing=false, or zero2.",
    ),
    (
        lambda j: j.cluster.zero_stage == 3 and isinstance(j.method, DpoMethod) and j.method.precompute_ref_log_probs,
        ("cluster.deepspeed", "method.precompute_ref_log_probs"),
        "the reference runs before the weights are partitioned. Use zero2, or leave precompute_ref_log_probs out.",
    ),
    (
        lambda j: (
            j.cluster.zero_stage == 3
            and j.data.eval is not None
            and j.method.name == "sft"
            and j.evaluate.metric != "loss"
            and not j.evaluate.asynchronous
        ),
        ("cluster.deepspeed", "evaluate.metric", "evaluate.asynchronous", "data", "method"),
        "under ZeRO-3 every token of an answer would gather the whole model. Set evaluate.metric=loss, or "
        "evaluate.asynchronous=true if one GPU can hold the base.",
    ),
]


def _is_address(address: str) -> bool:
    scheme, mark, rest = address.partition("://")
    return not mark or (scheme in _SCHEMES and bool(rest.strip("/")))


def check_job(job: JobConfig, unread: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return every broken rule as `(dotted key, reason and fix)`.

    `unread` are keys whose values could not be read: rules that need one of them are skipped.
    """
    known = _metrics_of(job)
    metrics = ", ".join(known)
    broken = [
        (keys[0], reason.replace("{metrics}", metrics))
        for fails, keys, reason in RULES
        if not any(touches(key, other) for key in keys for other in unread) and fails(job)
    ]
    sections = [*check_method(job), *_check_tune(job.tune, known)]
    broken += [(key, text) for key, text in sections if not any(touches(key, other) for other in unread)]
    return broken + list(check_trl(job.method))


def _metrics_of(job: JobConfig) -> tuple[str, ...]:
    return known_metrics(job.method, job.task.name, job.data.eval)


def tune_metrics(tune: Tune, evaluate: Evaluate) -> tuple[str, ...]:
    """Return the metric that ranks the job's trials, followed by those that are shown beside it."""
    if tune.metric is None:
        return (evaluate.metric,)
    return (tune.metric,) if isinstance(tune.metric, str) else tuple(tune.metric)


def _check_tune(tune: Tune, known: tuple[str, ...]) -> Broken:
    """Check the metrics that rank trials. `known`: those that `evaluate.metric` may name."""
    if tune.metric is None:
        return  # the default is `evaluate.metric`, which has its own rule
    metrics = [tune.metric] if isinstance(tune.metric, str) else tune.metric
    if not metrics or len(set(metrics)) < len(metrics):
        yield "tune.metric", "it needs one metric, or a list of different ones, of which the first ranks."
    if wrong := [name for name in metrics if name not in known]:
        yield (
            "tune.metric",
            f"this method and task do not produce {', '.join(wrong)}. Use one of: {', '.join(known)}.",
        )
