"""What a worker's trainer is built from, and the trainer of the actor that validates beside training."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.method import DpoMethod, GrpoMethod
from ray_vlm.config.schema import Evaluate, JobConfig
from ray_vlm.config.train import Precision, Train
from ray_vlm.data.feed import Feed
from ray_vlm.data.plan import Plan, plan_sample
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.data.stream import Stream
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.adapter_check import CheckedEngine
from ray_vlm.engines.adapter_evidence import resolution_of
from ray_vlm.engines.interface import Engine
from ray_vlm.engines.own import OwnEngine
from ray_vlm.engines.ray_samplers import NAMESPACE, RaySamplers
from ray_vlm.engines.rollout_gap import largest_gap
from ray_vlm.engines.scoring import build_scorer
from ray_vlm.engines.server import build_server_engine
from ray_vlm.engines.vllm import build_training_engine
from ray_vlm.engines.vllm_start import EngineLimits, EngineSettings
from ray_vlm.evaluate.validate import VALIDATIONS, Validation
from ray_vlm.methods import load_method
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.loss_scale import LossScale
from ray_vlm.methods.reference import ReferenceCache, ReferenceSource
from ray_vlm.methods.rewards import Rewards, job_rewards
from ray_vlm.methods.trainer import PlannedBatches, TrainerInputs
from ray_vlm.models.backbone import base_of
from ray_vlm.models.frozen_encoder import DiskFeatureCache
from ray_vlm.models.layouts import PackingOptions
from ray_vlm.models.load import load_adapted
from ray_vlm.models.lora import trains_images
from ray_vlm.models.memory import StepSettings
from ray_vlm.models.operations import OperationCounter
from ray_vlm.models.prefix_sharing import build_planner, plan_packing
from ray_vlm.models.surgery import ForwardOptions
from ray_vlm.storage import Store, join
from ray_vlm.train.deepspeed import deepspeed_config
from ray_vlm.train.memory_plan import fit_rollout
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
        "optim": optimizer_name(train, job.cluster),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": bool(train.gradient_checkpointing),
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "deepspeed": deepspeed_config(job.cluster, train.precision),
        "use_cpu": job.cluster.gpus_per_worker == 0,
        # a batch of text only gives the image encoder no gradient, and DDP would wait for it
        "ddp_find_unused_parameters": job.task.name == "chat" and trains_images(job.lora),
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


def optimizer_name(train: Train, cluster: Cluster) -> str:
    """Return the name of `train.optimizer` in transformers (`OptimizerNames`).

    torch's AdamW updates all weights in one kernel on GPUs. It is left unfused under float16, whose loss scale it would
    undo by itself, and under DeepSpeed, which may step on the computer's processors."""
    if train.optimizer != "adamw":
        return train.optimizer
    fused = cluster.gpus_per_worker and train.precision != "fp16" and cluster.deepspeed is None
    return "adamw_torch_fused" if fused else "adamw_torch"


def build_forwards(
    job: JobConfig, packing: PackingOptions, own_processor: bool, vision_cache: DiskFeatureCache | None
) -> ForwardOptions:
    """Return what the job wants of its model's forward."""
    fuses = job.model.kernels == "auto" and job.cluster.gpus_per_worker > 0
    return ForwardOptions(
        recompute=job.train.gradient_checkpointing,
        packing=packing,
        own_processor=own_processor,
        vision_cache=vision_cache,
        kernels=fuses,
        fused_adapters=fuses and job.lora is not None and job.cluster.zero_stage < 3,
        # Under ZeRO-3 all workers must run the encoder together.
        cache_step_features=job.method.name != "sft" and job.cluster.zero_stage < 3,
    )


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
        batch = method.collate(rows, builder, planner)
        if disk_cache is not None and isinstance(batch, dict) and "image_plan" in batch:
            disk_cache.read_ahead(batch["image_plan"])
        return batch

    steps, train = args.gradient_accumulation_steps, job.train
    packing = plan_packing(job.method, job.lora, train.packing, builder.family, model.config)
    planner = None
    if builder.stock is None:
        planner = build_planner(model, packing, builder.image_token_id, context.device, train.precision)
    disk_cache = None
    if train.vision_cache is not None:
        disk_cache = DiskFeatureCache(Path(train.vision_cache).expanduser(), train.vision_cache_gib * 2**30, model)
    # TRL takes all micro-batches of a step at once. On a CPU making them ahead takes the cores that train.
    ahead = spec.plan.accumulation if context.device.startswith("cuda") else 0
    feed = Feed(stream, collate, context.device, ahead)
    settings = StepSettings(job.method, train, job.cluster, job.lora, job.model.load_in_4bit)
    portion = fit_rollout(settings, model, spec.prompt_tokens, context.device)
    return TrainerInputs(
        method=job.method,
        builder=builder,
        batches=PlannedBatches(stream, feed, spec.plan, steps, clock, first, context.rank),
        rows=spec.train,
        forwards=build_forwards(job, packing, builder.stock is not None, disk_cache),
        clock=clock,
        loss_scale=LossScale(steps),
        operations=OperationCounter(),
        planner=planner,
        seed=job.seed,
        learning_rates=train.learning_rates or {},
        adapter_is_reference=job.model.adapter is not None,
        tolerates_nonfinite=train.nonfinite != "stop",
        has_eval=spec.eval is not None,
        rewards=build_rewards(job, spec.sample_spec.labels),
        engine=build_engine(job, spec, model, builder, context, args, portion, clock.tick),
    )


def build_engine(
    job: JobConfig,
    spec: WorkerSpec,
    model: PreTrainedModel,
    builder: SampleBuilder,
    context: DistributedContext,
    args: TrainingArguments,
    portion: int | None,
    on_progress: Callable[[], None],
) -> Engine | None:
    """Return the engine that samples and answers in a GRPO job, None for other methods. `portion`: how many prompts the
    package's own loop samples at a time; None: all of a step. `on_progress`: called for each answer of a sampler."""
    if not isinstance(job.method, GrpoMethod):
        return None
    if job.method.samplers:
        shares = job.method.rollouts == "vllm"  # which batches requests by itself
        size = job.method.sampling_batch or (None if shares else 1)
        samplers, deaths = RaySamplers(spec.samplers, NAMESPACE), job.cluster.max_failures
        pool = SamplerPool(samplers, context, size, deaths, on_progress=on_progress)
        return check_engine(pool, job.method, job.train.precision, builder, context.device) if shares else pool
    if job.method.rollouts == "transformers":
        return OwnEngine(model, builder, context.device, portion)
    if job.method.rollouts == "server":
        server = build_server(job, job.method, spec, model, builder)
        return check_engine(server, job.method, job.train.precision, builder, context.device)
    settings = EngineSettings(job.model, job.train.precision, job.seed, context.device)
    sequences = job.train.global_batch_size // job.cluster.least_workers
    limits = replace(plan_limits(job.method, job.evaluate, spec), sequences=sequences)
    share = job.method.trl.get("vllm_gpu_memory_utilization")
    sleep, engines = job.method.sampler_sleep, context.local_world_size
    engine = build_training_engine(settings, limits, model, builder, args, sleep, share, engines)
    return check_engine(engine, job.method, job.train.precision, builder, context.device)


def check_engine(
    engine: Engine, method: GrpoMethod, precision: Precision, builder: SampleBuilder, device: str
) -> CheckedEngine:
    """Return an engine of other processes as one that is proved to answer with the trainer's adapter. `device`: the
    trainer's."""
    return CheckedEngine(
        engine,
        build_scorer(builder, precision, device),
        resolution_of(precision, device),
        largest_gap(method.max_rollout_gap, precision, device),
        method.check_sampler_every,
        f"method.rollouts={method.rollouts}",
    )


def build_server(
    job: JobConfig, method: GrpoMethod, spec: WorkerSpec, model: PreTrainedModel, builder: SampleBuilder
) -> Engine:
    """Connect to the server of `method.sampler_url`, to which the adapter of `model` will be pushed."""
    assert method.sampler_url is not None
    kinds = (getattr(base_of(model).config, name, None) for name in ("image_token_id", "video_token_id"))
    never, limits = [token for token in kinds if token is not None], plan_limits(method, job.evaluate, spec)
    setting, url = "method.sampler_url", method.sampler_url
    return build_server_engine(setting, url, job.model, builder, limits, never, trains=True, run_folder=spec.run)


def plan_limits(method: GrpoMethod, evaluate: Evaluate, spec: WorkerSpec) -> EngineLimits:
    """Return the largest requests of training and of validation."""
    answer = max(evaluate.max_new_tokens, method.max_completion_tokens if method.num_generations_eval else 0)
    validated = spec.eval_prompt_tokens + answer if spec.eval is not None else 0
    return EngineLimits(max(spec.prompt_tokens + method.max_completion_tokens, validated), spec.prompt_images)


def build_reference(
    job: JobConfig, base: str, rows: str, context: DistributedContext, threads: int = 0
) -> ReferenceCache | None:
    """Return the cache of DPO's reference, None for a job that computes it at each step.

    `base`, `rows`: fingerprints of the base's weights and of the pairs. `threads`: of the worker that make rows; 0
    where other processes do, which leave the worker's own CPUs free.
    """
    if not isinstance(job.method, DpoMethod) or not job.method.precompute_ref_log_probs:
        return None
    source = ReferenceSource(job.model, job.train.precision, base, rows, job.method.trl.get("ld_alpha"))
    store = Store(join(job.run.output_dir, ".reference"))
    threads = threads or max(1, int(job.cluster.cpus_per_worker) - 1)
    return ReferenceCache(store, source, context, job.train.micro_batch_size, threads)


def build_validation(
    job: JobConfig, spec: WorkerSpec, builder: SampleBuilder, context: DistributedContext
) -> Validation:
    """Return the method's validation of this rank's share of the eval rows."""
    chosen = plan_sample(len(spec.eval), job.evaluate.num_samples) if spec.eval is not None else []
    share = [spec.eval[i] for i in chosen[context.rank :: context.world_size]] if spec.eval is not None else []
    padding = spec.eval[chosen[0]] if spec.eval is not None and len(chosen) else None
    return VALIDATIONS[job.method.name](share, builder, job.evaluate, job.task.name, context, padding)
