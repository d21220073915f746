"""`method.trl`: the TRL options that a job may pass through, and the settings that determine the others."""

import math
from collections.abc import Iterator

from ray_vlm.config.schema import JobConfig

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
DECIDED_BY_FEED = (
    *("average_tokens_across_devices", "packing", "padding_free", "dataset_kwargs", "disable_tqdm"),
    *("logging_nan_inf_filter", "push_to_hub", "dataloader_num_workers", "train_sampling_strategy"),
    *("ignore_data_skip", "resume_from_checkpoint", "save_only_model", "enable_jit_checkpoint"),
    *("steps_per_generation", "generation_batch_size", "num_iterations", "shuffle_dataset", "sync_ref_model"),
    *("precompute_ref_batch_size", "generation_kwargs", "use_transformers_continuous_batching", "log_completions"),
    *("vllm_mode", "vllm_importance_sampling_correction"),
)


def check_trl(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be passed through, as `(dotted key, reason and fix)`."""
    for key, value in job.method.trl.items():
        if key in NAMED_IN_JOB:
            if key == "loss_type" and job.method.name == "sft":
                continue  # the losses of SFT have no setting of the job
            yield f"method.trl.{key}", f"this job sets that as `{NAMED_IN_JOB[key]}`. Set it there, and only there."
        elif key in DECIDED_BY_FEED:
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
