"""One training step of this package's trainers and of stock TRL's on the same rows, for `parity` and `shared_prefix`.

The model has an adapter whose B is not zero; for DPO and GRPO that adapter is the reference, and the trained weights
start close to it. GRPO's answers are injected: both arms get the same answers and rewards.
"""

import copy
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ray_vlm.config.load import dump_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.interface import Completion
from ray_vlm.methods import load_method
from ray_vlm.models.backbone import after_recompute, recompute, recompute_first
from ray_vlm.models.frozen_encoder import run_without_autograd
from ray_vlm.models.layouts import PackingOptions
from ray_vlm.models.prefix_sharing import build_planner, score_labelled, share_prefixes
from ray_vlm.train.build import build_inputs, build_rewards
from ray_vlm.train.prepare import prepare
from ray_vlm.train.worker_spec import WorkerSpec
from tests.support.engines import RecordingEngine
from tests.support.precision import arithmetic, only

Step = dict[str, Any]  # {"loss": float, "grads": Gradients}
Gradients = dict[str, torch.Tensor]  # by the name of the weights


def build_model(job: JobConfig) -> Any:
    """Build the base with an adapter whose B is not zero, so that no gradient is zero."""
    import torch
    from peft import get_peft_model

    from ray_vlm.models.families import FAMILIES
    from ray_vlm.models.load import load_model, load_resident
    from ray_vlm.models.lora import lora_config
    from ray_vlm.models.selective import keep_products

    assert job.lora is not None
    base = (load_resident if job.tune.resident else load_model)(job.model, job.train.precision, device_of(job))
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(job.lora, FAMILIES[base.config.model_type]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    layers = job.train.gradient_checkpointing
    if layers == "selective":
        after_recompute(model, lambda: keep_products(model))
    elif layers and layers is not True:
        recompute_first(model, layers)
    return model


def device_of(job: JobConfig) -> str:
    """Return the device of a job that trains in one process."""
    return "cuda:0" if job.cluster.gpus_per_worker else "cpu"


def arguments(job: JobConfig) -> dict[str, Any]:
    """Return the options that both arms share."""
    options: dict[str, Any] = {"output_dir": tempfile.mkdtemp(), "report_to": []}
    options |= {"use_cpu": not job.cluster.gpus_per_worker, "bf16": job.train.precision == "bf16"}
    options |= {"fp16": job.train.precision == "fp16"}
    options |= {"gradient_checkpointing": bool(job.train.gradient_checkpointing)}
    return options | {"max_steps": 1, "average_tokens_across_devices": True}


def checkpointed(trainer: Any) -> Any:
    """Return the trainer with the activation checkpointing that `train` would enable for its options."""
    if trainer.args.gradient_checkpointing:
        recompute(trainer.model, {"use_reentrant": False})
    if trainer.args.bf16 or trainer.args.fp16:  # under autocast, as a trainer puts its model when it begins to train
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
    trainer.model.train()
    return trainer


def one_step(trainer: Any, batch: Any, away: bool = False, dtype: torch.dtype = torch.float32) -> Step:
    """Return loss and gradients of one step's forward and backward through the trainer's own code. `away`: move the
    weights off the reference first. `dtype`: float64 converts the model, and raises `AssertionError` if the step, which
    must be in `arithmetic(dtype)`, uses a narrower number."""
    trainer.model.to(dtype)
    if away:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if ".default." in name and "lora_B" in name:
                    parameter.mul_(1.5)
    trainer.current_gradient_accumulation_steps = 1
    with only(dtype):
        samples, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        loss = float(trainer.training_step(trainer.model, samples[0], num_items))
    parameters = trainer.model.named_parameters()
    return {"loss": loss, "grads": {n: p.grad.clone() for n, p in parameters if p.grad is not None}}


def our_step(
    job: JobConfig, rows: int, answers: Sequence[Sequence[int]] = (), dtype: torch.dtype = torch.float32
) -> Step:
    """Take a step of this package's trainer on the first `rows` records of the job, in float32 or float64."""
    return _step_of(our_trainer, job, rows, answers, dtype)


def our_trainer(
    job: JobConfig, batches: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = (), fold: bool = True
) -> tuple[Any, list]:
    """Return this package's trainer of the job's method, and its micro-batches of these records. `answers`: used in
    place of sampled ones; None: GRPO samples. `fold`: share prefixes and pack."""
    prepared = prepare(job)
    job, builder, records = prepared.job, load_sample_builder(prepared.spec), prepared.train.records
    trainer_class, model = load_method(job.method.name), build_model(job)
    spec = WorkerSpec(dump_job(job), "", prepared.spec, prepared.plan, records, None)
    size = job.train.micro_batch_size if job.method.name == "grpo" else job.train.global_batch_size
    shared = arguments(job) | {"per_device_train_batch_size": size}
    args = trainer_class.build_args(job.method, shared, prepared.plan, build_rewards(job, prepared.spec.labels))
    no_rows: Generator[list[Sample]] = (batch for batch in list[list[Sample]]())
    context = DistributedContext(device=device_of(job))
    inputs = build_inputs(job, spec, model, args, builder, context, no_rows)
    hidden = model.config.get_text_config().hidden_size
    packing = PackingOptions(fold and job.method.name != "sft", fold, hidden)
    recompute = bool(job.train.gradient_checkpointing)  # `build_model` has applied anything else
    planner = None
    if builder.stock is None:
        planner = build_planner(model, packing, builder.image_token_id, context.device, job.train.precision)
    forwards = replace(inputs.forwards, packing=packing, recompute=recompute)
    inputs = replace(inputs, forwards=forwards, planner=planner)
    if answers:
        group = job.method.num_generations
        groups = [[_injected(ids) for ids in answers[i : i + group]] for i in range(0, len(answers), group)]
        inputs = replace(inputs, engine=RecordingEngine(groups))
    trainer = trainer_class(model, args, inputs)
    rows = [[replace(builder.row(records[i]), number=i) for i in batch] for batch in batches]
    return trainer, [trainer.collate_here(batch) for batch in rows]


def _injected(ids: Sequence[int]) -> Completion:
    return Completion(list(ids), [0.0] * len(ids), True)


def stock_step(
    job: JobConfig, rows: int, answers: Sequence[Sequence[int]] = (), dtype: torch.dtype = torch.float32
) -> Step:
    """Take a step of stock TRL's trainer on the same rows, in float32 or float64."""
    return _step_of(stock_trainer, job, rows, answers, dtype)


def _step_of(
    build: Callable[..., tuple[Any, list]],
    job: JobConfig,
    rows: int,
    answers: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> Step:
    with arithmetic(dtype):
        trainer, (batch,) = build(job, [range(rows)], answers)
        return one_step(trainer, batch, job.method.name != "sft", dtype)


def gradients_apart(one: Gradients, other: Gradients, least: float) -> float:
    """Return the largest difference of a gradient, relative to the norm of `other`'s; a norm below `least` times the
    largest one is raised to that."""
    assert one.keys() == other.keys()
    scale = max(float(gradient.norm()) for gradient in other.values())
    assert scale > 0
    return max(float((one[n] - g).norm()) / max(float(g.norm()), least * scale) for n, g in other.items())


def stock_trainer(
    job: JobConfig, batches: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()
) -> tuple[Any, list]:
    """Return stock TRL's trainer, and its micro-batches of the same rows through its own collator and processor."""
    prepared = prepare(job)
    builder = load_sample_builder(prepared.spec)
    build = {"sft": _stock_sft, "dpo": _stock_dpo, "grpo": _stock_grpo}[job.method.name]
    return build(job, builder, [[prepared.train.records[i] for i in batch] for batch in batches], answers)


def patched_trainer(
    job: JobConfig, batches: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()
) -> tuple[Any, list]:
    """Return stock TRL's trainer with two simple patches: the frozen image encoder without autograd, and a head that
    scores only trained tokens."""
    trainer, made = stock_trainer(job, batches, answers)
    share_prefixes(trainer.model)
    score_labelled(trainer.model)
    run_without_autograd(trainer.model)
    return trainer, made


def _prompt_row(record: Any, builder: SampleBuilder) -> dict[str, Any]:
    from PIL import Image

    text = builder.turns(record)[-1][1].removeprefix("<image>")
    return {"images": [Image.open(record.images[0])], "prompt": [{"role": "user", "content": text}]}


def _answer_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _stock_sft(job: JobConfig, builder: SampleBuilder, records: Any, answers: Any) -> tuple[Any, Any]:
    from trl import SFTConfig, SFTTrainer

    rows = [
        [_prompt_row(r, builder) | {"completion": _answer_turn(builder.answer(r).text)} for r in part]
        for part in records
    ]
    trainer = _stock(job, builder, rows[0], SFTTrainer, SFTConfig, {"max_length": None})
    trainer.model_accepts_loss_kwargs = (
        True  # for Qwen's it would weigh every micro-batch alike, however few its tokens
    )
    trainer.drawn = copy.deepcopy(rows)  # the collator changes what it is given
    return trainer, [trainer.data_collator(part) for part in rows]


def _stock_dpo(job: JobConfig, builder: SampleBuilder, records: Any, answers: Any) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    rows = [
        [
            _prompt_row(r, builder) | {"chosen": _answer_turn(r.chosen), "rejected": _answer_turn(r.rejected)}
            for r in part
        ]
        for part in records
    ]
    options = {"max_length": None, "beta": 0.1 if job.method.beta is None else job.method.beta}
    trainer = _stock(job, builder, rows[0], DPOTrainer, DPOConfig, options)
    trainer.drawn = copy.deepcopy(rows)  # the collator changes what it is given
    return trainer, [trainer.data_collator(part) for part in rows]


def _stock_grpo(job: JobConfig, builder: SampleBuilder, records: Any, answers: Any) -> tuple[Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    rows = [[_prompt_row(r, builder) for r in part] for part in records]
    group, method = job.method.num_generations, job.method
    options = {"num_generations": group, "max_completion_length": method.max_completion_tokens}
    options |= {"beta": method.beta or 0.0, "temperature": method.temperature}
    trainer = _stock(job, builder, rows[0], GRPOTrainer, GRPOConfig, options, {"reward_funcs": [token_reward]})
    if answers:
        trainer._generate_single_turn = lambda *_, **__: ([list(ids) for ids in answers], None)
    return trainer, [[row for row in part for _ in range(group)] for part in rows]


def token_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Return a reward that depends only on the answer's tokens, so that both arms can compute it."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def _stock(
    job: JobConfig,
    builder: SampleBuilder,
    rows: list,
    trainer: Any,
    config: Any,
    options: dict,
    more: dict | None = None,
) -> Any:
    import datasets

    size = {"per_device_train_batch_size": job.train.global_batch_size}
    processor = copy.deepcopy(builder.processor)
    processor.tokenizer.padding_side = "left" if job.method.name == "grpo" else "right"  # as TRL loads it
    return trainer(
        model=build_model(job),
        args=config(**arguments(job), **size, **options),
        processing_class=processor,
        train_dataset=datasets.Dataset.from_list(rows),
        **(more or {}),
    )
