"""Rules of the methods: the rows, settings, batch sizes and TRL options of SFT, DPO and GRPO. Pure functions."""

import math
import re
from collections.abc import Callable, Iterator

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.data import Data, Source
from ray_vlm.config.method import METHOD_METRICS, DpoMethod, GrpoMethod, Method, SftMethod
from ray_vlm.config.schema import JobConfig, Pairs
from ray_vlm.config.train import Train

# (whether a job breaks the rule, the keys that it reads, of which the first is reported, reason and fix)
Rule = tuple[Callable[[JobConfig], bool], tuple[str, ...], str]
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
    "yolo": "detection",
    "voc": "detection",
    "label_studio": "detection",
    "labelme": "detection",
    "cvat": "detection",
    "hf_objects": "detection",
    "image_csv": "classification",
    "image_folder": "classification",
    "gui_csv": "gui_steps",
    "llava": "chat",
    "messages": "chat",
    "openai": "chat",
    "query_response": "chat",
    "alpaca": "chat",
}
PROMPT_FORMATS = ("prompt", "rec")  # prompts for GRPO, with columns for its rewards and no truth of a task


def _has_reference(method: Method) -> bool:
    return isinstance(method, DpoMethod) or (isinstance(method, GrpoMethod) and bool(method.beta))


def _samples_elsewhere(method: Method) -> bool:
    return isinstance(method, GrpoMethod) and method.rollouts in ("vllm", "server")


def _samples_by_server(method: Method) -> bool:
    return isinstance(method, GrpoMethod) and method.rollouts == "server"


def is_web_address(url: str | None) -> bool:
    """Whether a setting names a server, or nothing."""
    return url is None or re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url) is not None


def _of_grpo(method: Method) -> GrpoMethod:
    assert isinstance(method, GrpoMethod)
    return method


def _temperatures(pairs: Pairs) -> list[float]:
    return pairs.temperature if isinstance(pairs.temperature, list) else [pairs.temperature]


def _sampled_apart(method: Method) -> bool:
    return isinstance(method, GrpoMethod) and method.most_samplers > 0


def count_portions(job: JobConfig) -> int:
    """Return how many portions of prompts a step of GRPO has at least, each for one sampler at a time."""
    method, workers = _of_grpo(job.method), job.cluster.least_workers
    groups = -(-job.train.global_batch_size // method.num_generations)
    return workers * -(-groups // workers // (method.sampling_batch or 1))


_VLLM_HOTTEST = 2.0

SAMPLER_RULES: list[Rule] = [
    (
        lambda j: _sampled_apart(j.method) and j.cluster.num_workers == 0,
        ("method.samplers", "cluster.num_workers"),
        "samplers are processes that Ray starts. Set cluster.num_workers to 1 or more, or samplers to 0.",
    ),
    (
        lambda j: _sampled_apart(j.method) and _of_grpo(j.method).rollouts == "server",
        ("method.samplers", "method.rollouts"),
        "a server samples in processes of its own already. Use samplers=0, or another of rollouts.",
    ),
    (
        lambda j: _sampled_apart(j.method) and _of_grpo(j.method).most_samplers > count_portions(j),
        ("method.samplers", "method.sampling_batch", "method.num_generations", "train.global_batch_size"),
        "there are more samplers than portions of prompts in a step, so some would never sample. A step has "
        "global_batch_size / num_generations prompts, and a portion sampling_batch of them. Use fewer samplers, or "
        "more prompts in a step.",
    ),
    (
        lambda j: (
            isinstance(j.method, GrpoMethod)
            and isinstance(j.method.samplers, list)
            and j.method.least_samplers >= j.method.most_samplers
        ),
        ("method.samplers",),
        "the first number is the fewest samplers, the second, larger one the most. Give [fewest, most], or one number.",
    ),
    (
        lambda j: _sampled_apart(j.method) and j.tune.resident,
        ("tune.resident", "method.samplers"),
        "a trial is one process with one device, and samplers are further ones. Leave one of them out.",
    ),
    (
        lambda j: isinstance(j.method, GrpoMethod) and not j.method.samplers and j.method.max_staleness > 0,
        ("method.max_staleness", "method.samplers"),
        "a worker that samples its answers itself cannot train meanwhile. Set samplers to 1 or more, or leave it out.",
    ),
    (
        lambda j: (
            isinstance(j.method, GrpoMethod)
            and not j.method.samplers
            and (j.method.cpus_per_sampler, j.method.gpus_per_sampler) != (None, None)
        ),
        ("method.samplers", "method.cpus_per_sampler", "method.gpus_per_sampler"),
        "there are no samplers to get CPUs or GPUs. Set samplers to 1 or more, or leave these out.",
    ),
    (
        lambda j: (
            isinstance(j.method, GrpoMethod)
            and j.method.worker_engine in ("vllm", "server")
            and j.method.sampling_batch is not None
        ),
        ("method.sampling_batch", "method.rollouts", "method.samplers"),
        "vllm and servers batch requests by themselves. Leave it out, or use samplers.",
    ),
]

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
        lambda j: j.lora is None and _has_reference(j.method),
        ("lora", "method"),
        "the reference is the model with its adapter off, so this method needs an adapter. Keep `lora`.",
    ),
    (
        lambda j: _samples_elsewhere(j.method) and j.lora is None,
        ("method.rollouts", "lora"),
        "vllm, or a server, gets an adapter at every step, never whole weights. Keep `lora`, or rollouts=transformers.",
    ),
    (
        lambda j: _samples_elsewhere(j.method) and (_of_grpo(j.method).top_p < 1 or _of_grpo(j.method).top_k > 0),
        ("method.rollouts", "method.top_p", "method.top_k"),
        "vllm's log-probabilities are of the tokens that top_p and top_k leave, and the trainer's of all, so the "
        "correction for the difference would be biased. Use top_p=1 and top_k=0, or rollouts=transformers.",
    ),
    (
        lambda j: _samples_elsewhere(j.method) and _of_grpo(j.method).temperature > _VLLM_HOTTEST,
        ("method.rollouts", "method.temperature"),
        f"vllm samples at temperatures up to {_VLLM_HOTTEST:g}. Lower it, or use rollouts=transformers.",
    ),
    (
        lambda j: _samples_elsewhere(j.method) and j.lora is not None and bool(j.lora.modules_to_save),
        ("method.rollouts", "lora.modules_to_save"),
        "vllm or a server takes adapters without whole modules. Leave modules_to_save out, or use transformers.",
    ),
    (
        lambda j: _samples_by_server(j.method) and j.lora is not None and j.lora.target != ["language"],
        ("method.rollouts", "lora.target"),
        "a server takes adapters on the language model only. Use lora.target=[language], or rollouts=vllm.",
    ),
    (
        lambda j: isinstance(j.method, GrpoMethod) and (j.method.rollouts == "server") != bool(j.method.sampler_url),
        ("method.sampler_url", "method.rollouts"),
        "it is the address of the server of rollouts=server. Give both, or neither.",
    ),
    (
        lambda j: isinstance(j.method, GrpoMethod) and not is_web_address(j.method.sampler_url),
        ("method.sampler_url",),
        "it is no address of a server. Give one such as http://127.0.0.1:8000/v1, without a password or a query.",
    ),
    (
        lambda j: (j.evaluate.engine == "server") != bool(j.evaluate.sampler_url),
        ("evaluate.sampler_url", "evaluate.engine"),
        "it is the address of the server of engine=server. Give both, or neither.",
    ),
    (
        lambda j: j.evaluate.engine == "samplers" and bool(j.evaluate.num_replicas),
        ("evaluate.engine", "evaluate.num_replicas"),
        "the run's samplers hold the model, so no process of this command does. Leave num_replicas out.",
    ),
    (
        lambda j: not is_web_address(j.evaluate.sampler_url),
        ("evaluate.sampler_url",),
        "it is no address of a server. Give one such as http://127.0.0.1:8000/v1, without a password or a query.",
    ),
    (
        lambda j: j.evaluate.engine != "transformers" and max(_temperatures(j.pairs), default=0.0) > _VLLM_HOTTEST,
        ("pairs.temperature", "evaluate.engine"),
        f"vllm samples at temperatures up to {_VLLM_HOTTEST:g}. Lower it, or use engine=transformers.",
    ),
    (
        lambda j: (
            isinstance(j.method, GrpoMethod) and j.method.sampler_sleep is not None and j.method.worker_engine != "vllm"
        ),
        ("method.sampler_sleep", "method.rollouts", "method.samplers"),
        "only an engine of vllm that shares its card with a worker sleeps. Leave it out, or use rollouts=vllm without "
        "samplers.",
    ),
    *SAMPLER_RULES,
]


def known_metrics(method: Method, task: str, held_out: Source | None) -> tuple[str, ...]:
    """Return the metrics that `evaluate.metric` may name: the method's, and the task's if the rows have its format.

    `held_out`: the source of `data.eval`.
    """
    metrics = METHOD_METRICS[method.name]
    if isinstance(method, GrpoMethod) and not method.num_generations_eval:
        metrics = tuple(name for name in metrics if name != "sampled_reward")
    measured = method.name != "dpo" and not (held_out is not None and held_out.format in PROMPT_FORMATS)
    return (*metrics, *TASK_METRICS[task]) if measured else metrics


def known_formats(method: str, task: str, part: str) -> tuple[str, ...]:
    """Return the formats that `data.<part>` may have: pairs for DPO; the task's own formats or prompts for GRPO; for
    SFT and `data.test` only the task's own."""
    own = tuple(name for name, its_task in FORMAT_TASKS.items() if its_task == task)
    if part == "test" or method == "sft":
        return own
    return ("preference",) if method == "dpo" else (*own, *PROMPT_FORMATS)


def check_method(job: JobConfig) -> Broken:
    """Yield every rule of the method that the job breaks."""
    method = job.method
    yield from _check_formats(job.data, method.name, job.task.name)
    yield from _check_weights(job.data, method)
    if not isinstance(method, SftMethod):
        yield from _check_even(method, job.train, job.cluster)


def _check_formats(data: Data, method: str, task: str) -> Broken:
    parts = {"train": (data.train, *data.mix), "eval": (data.eval,), "test": (data.test,)}
    for part, sources in parts.items():
        known = known_formats(method, task, part)
        formats = {s.format for s in sources if s is not None and s.path}
        if wrong := sorted(formats - {*known, "auto"}):
            yield (
                f"data.{part}.format",
                f"{', '.join(wrong)} holds no rows for {method} of {task}. Use one of: {', '.join(known)}.",
            )


def _check_weights(data: Data, method: Method) -> Broken:
    """Check that class weights are used with SFT's plain loss, and oversampling with rows that have classes."""
    for key in ("class_weights", "condition_weights"):
        if getattr(data, key) is None:
            continue
        if method.name != "sft":
            yield (
                f"data.{key}",
                f"the weights apply to the tokens that sft imitates; {method.name} has none. Remove it.",
            )
        elif method.trl.get("loss_type", "nll") != "nll" or method.trl.get("label_smoothing_factor"):
            yield (
                f"data.{key}",
                "the weights apply to the plain loss; loss_type and label smoothing do not use them. Remove one of the "
                "two.",
            )
    made = {s.format for s in (data.train, *data.mix) if s is not None} & {"preference", *PROMPT_FORMATS}
    if made and data.oversample is not None:
        yield "data.oversample", f"rows of {', '.join(sorted(made))} have no classes. Remove it, or weight the sources."


def _check_even(method: DpoMethod | GrpoMethod, train: Train, cluster: Cluster) -> Broken:
    """Check that pairs, or groups of answers, divide evenly among the workers: TRL's means over workers assume it.

    A group is never split between workers. `train.global_batch_size` counts the answers of all groups.
    """
    group = method.num_generations if isinstance(method, GrpoMethod) else 1
    batch, micro = train.global_batch_size, train.micro_batch_size
    what = "sampled answers" if group > 1 else "pairs"
    if batch % group:
        yield (
            "method.num_generations",
            f"{group} does not divide train.global_batch_size={batch}, which counts sampled answers for grpo. Use a "
            f"multiple, such as {group * max(1, round(batch / group))}.",
        )
        return
    for workers in range(cluster.least_workers, cluster.most_workers + 1):
        if batch // group % workers:
            even = group * workers * max(1, batch // group // workers)
            groups = f" in {batch // group} groups" if group > 1 else ""
            fix = f"Use train.global_batch_size={even}."
            if isinstance(cluster.num_workers, list):
                fix = "Use a train.global_batch_size that all numbers of workers divide, or one number of workers."
            yield "cluster.num_workers", f"{workers} workers cannot share {batch} {what}{groups} evenly. {fix}"
            return
        if batch // workers % micro:
            yield (
                "train.micro_batch_size",
                f"{micro} does not divide the {batch // workers} {what} of one worker in a step. Use a divisor of it.",
            )
            return


# TRL options with a setting of the job's own: setting them in `method.trl` too is an error.
NAMED_IN_JOB = {
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
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optim": "train.optimizer",
    "optim_args": "train.optimizer",
    "tf32": "train.precision",
    "use_liger_kernel": "model.kernels",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
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
    "deepspeed": "cluster.deepspeed",
    "eval_on_start": "evaluate.at_start",
    "eval_delay": "evaluate.every_steps",
    "load_best_model_at_end": "evaluate.metric",
    "beta": "method.beta",
    "loss_type": "method.loss_type",
    "precompute_ref_log_probs": "method.precompute_ref_log_probs",
    "num_generations": "method.num_generations",
    "temperature": "method.temperature",
    "top_p": "method.top_p",
    "top_k": "method.top_k",
    "max_completion_length": "method.max_completion_tokens",
    "reward_weights": "method.rewards",
    "num_generations_eval": "method.num_generations_eval",
    "use_vllm": "method.rollouts",
    "fsdp": "cluster.deepspeed",
    "fsdp_config": "cluster.deepspeed",
}

# TRL options that would break the order and the batching of rows.
DECIDED_BY_PLAN = (
    *("average_tokens_across_devices", "packing", "padding_free", "dataset_kwargs", "disable_tqdm"),
    *("logging_nan_inf_filter", "push_to_hub", "dataloader_num_workers", "train_sampling_strategy"),
    *("ignore_data_skip", "resume_from_checkpoint", "save_only_model", "enable_jit_checkpoint"),
    *("steps_per_generation", "generation_batch_size", "num_iterations", "shuffle_dataset", "sync_ref_model"),
    *("precompute_ref_batch_size", "generation_kwargs", "use_transformers_continuous_batching", "log_completions"),
    *("vllm_mode", "vllm_importance_sampling_correction"),
)


def check_trl(method: Method) -> Broken:
    """Yield each option of `method.trl` that cannot be passed through."""
    for key, value in method.trl.items():
        if key in NAMED_IN_JOB:
            if key == "loss_type" and method.name == "sft":
                continue  # the losses of SFT have no setting of the job
            yield f"method.trl.{key}", f"this job sets that as `{NAMED_IN_JOB[key]}`. Set it there, and only there."
        elif key in DECIDED_BY_PLAN:
            yield f"method.trl.{key}", "this is decided by how rows are fed to TRL. Remove it."
        elif not _is_plain(value):
            yield (
                f"method.trl.{key}",
                "it is not plain data. Use text, finite numbers, true/false, null, lists and mappings.",
            )


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether `value` survives a round trip through JSON to the workers."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth < 20 and all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, str | int)
