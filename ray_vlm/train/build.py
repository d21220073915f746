"""What a worker's trainer is built from, and the trainer of the actor that validates beside training."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ray_vlm.config.method import DpoMethod, GrpoMethod
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.plan import Plan, plan_sample
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import Stream
from ray_vlm.distributed import DistributedContext
from ray_vlm.evaluate.validate import VALIDATIONS, Validation
from ray_vlm.methods import load_method
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.methods.reference import ReferenceCache, ReferenceSource
from ray_vlm.methods.rewards import Rewards, job_rewards
from ray_vlm.methods.trainer import PlannedBatches, TrainerInputs
from ray_vlm.methods.vllm import EngineSettings, build_sampler
from ray_vlm.models.load import load_adapted
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import plan_packing
from ray_vlm.models.surgery import ForwardOptions
from ray_vlm.storage import Store, join
from ray_vlm.train.deepspeed import deepspeed_config
from ray_vlm.train.worker_spec import WorkerSpec


def load_base(job: JobConfig, builder: SampleBuilder, context: DistributedContext) -> PreTrainedModel:
    """Load the base with what is trained: a new adapter, the job's adapter, or all weights."""
    resident, family = job.tune.resident, builder.family
    return load_adapted(job.model, job.lora, job.train, family, context.device, job.seed, resident)


def build_rewards(job: JobConfig, labels: Sequence[str]) -> Rewards | None:
    """Return the rewards of GRPO, None for other methods. `labels`: class names, which name parts of a reward."""
    if not isinstance(job.method, GrpoMethod):
        return None
    return job_rewards(job.task.name, job.method, job.data.train, labels)


def build_args(job: JobConfig, spec: WorkerSpec, eval_on_start: bool = False) -> TrainingArguments:
    """Return TRL's options for the method. Build them before loading the base: ZeRO-3 partitions it by them."""
    shared = shared_options(job, spec.plan, spec.eval is not None) | {"eval_on_start": eval_on_start}
    rewards = build_rewards(job, spec.sample_spec.labels)
    args = load_method(job.method.name).build_args(job.method, shared, spec.plan, rewards)
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would use every visible GPU and scale the loss
    return args


def shared_options(job: JobConfig, plan: Plan, has_eval: bool) -> dict[str, Any]:
    """Return the job's training options that all methods share, under the names of TRL's configs."""
    train, steps = job.train, plan.num_steps
    save_every = job.checkpoint.every_steps or plan.steps_per_epoch
    eval_every = job.evaluate.every_steps or plan.steps_per_epoch
    return {
        "output_dir": tempfile.gettempdir(),  # not used: all files go through the run's own store
        "ignore_data_skip": True,  # the stream already starts at the next unseen row
        "max_steps": steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": train.min_lr_ratio},
        "warmup_steps": math.ceil(train.warmup_ratio * steps),
        "optim": "adamw_torch",
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": bool(train.gradient_checkpointing),
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "deepspeed": deepspeed_config(job.cluster, train.precision),
        "use_cpu": job.cluster.gpus_per_worker == 0,
        # a batch of text only gives the image encoder no gradient, and DDP would wait for it
        "ddp_find_unused_parameters": job.task.name == "chat" and (job.lora is None or job.lora.target != ["language"]),
        # Adapters do not train expert routers, and TRL reads an attribute that Llama 4's configuration lacks.
        "router_aux_loss_coef": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": save_every,
        "eval_strategy": "steps" if has_eval else "no",
        "eval_steps": eval_every if has_eval else None,
        "seed": job.seed,
    }


def build_inputs(
    job: JobConfig,
    spec: WorkerSpec,
    model: PreTrainedModel,
    args: TrainingArguments,
    builder: SampleBuilder,
    context: DistributedContext,
    stream: Stream,
    first: int = 0,
) -> TrainerInputs:
    """Return what the job's trainer is built from, without callbacks. `first`: the first micro-batch of `stream`."""
    method, clock = load_method(job.method.name), Clock(context.device)

    def collate(rows: list[Sample]) -> object:
        return method.collate(rows, builder, context.device)

    steps, train = args.gradient_accumulation_steps, job.train
    sampler = None
    if isinstance(job.method, GrpoMethod) and job.method.rollouts == "vllm":
        sampler = build_sampler(EngineSettings(job.model, train.precision, job.seed), job.lora, args)
    return TrainerInputs(
        method=job.method,
        builder=builder,
        batches=PlannedBatches(stream, spec.plan, collate, steps, clock, first, context.rank),
        rows=spec.train,
        forwards=ForwardOptions(
            recompute=train.gradient_checkpointing,
            packing=plan_packing(job.method, job.lora, train.packing, builder.family, model.config),
            own_processor=builder.stock is not None,
            vision_cache=Path(train.vision_cache).expanduser() if train.vision_cache is not None else None,
            vision_cache_bytes=train.vision_cache_gib * 2**30,
            # Under ZeRO-3 all workers must run the encoder together.
            cache_step_features=job.method.name != "sft" and job.cluster.zero_stage < 3,
        ),
        clock=clock,
        loss_scale=LossScale(steps),
        operations=OperationCounter(),
        seed=job.seed,
        learning_rates=train.learning_rates or {},
        adapter_is_reference=job.model.adapter is not None,
        tolerates_nonfinite=train.nonfinite != "stop",
        has_eval=spec.eval is not None,
        rewards=build_rewards(job, spec.sample_spec.labels),
        sampler=sampler,
    )


def build_reference(job: JobConfig, base: str, rows: str, context: DistributedContext) -> ReferenceCache | None:
    """Return the cache of DPO's reference, None for a job that computes it at each step.

    `base`, `rows`: fingerprints of the base's weights and of the pairs.
    """
    if not isinstance(job.method, DpoMethod) or not job.method.precompute_ref_log_probs:
        return None
    source = ReferenceSource(job.model, job.train.precision, base, rows, job.method.trl.get("ld_alpha"))
    store = Store(join(job.run.output_dir, ".reference"))
    return ReferenceCache(store, source, context, job.train.micro_batch_size)


def build_validation(
    job: JobConfig, spec: WorkerSpec, builder: SampleBuilder, context: DistributedContext
) -> Validation:
    """Return the method's validation of this rank's share of the eval rows."""
    chosen = plan_sample(len(spec.eval), job.evaluate.num_samples) if spec.eval is not None else []
    share = [spec.eval[i] for i in chosen[context.rank :: context.world_size]] if spec.eval is not None else []
    return VALIDATIONS[job.method.name](share, builder, job.evaluate, job.task.name, context)
