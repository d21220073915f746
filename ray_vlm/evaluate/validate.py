"""Validation during training: metrics of held-out rows for each method, over all ranks.

SFT: the loss, and the task's metrics of generated answers if the job's metric is one of them. DPO: loss, accuracy and
margin of pairs. GRPO: rewards of greedy answers, with each part, and the task's metrics where the rows have a truth.
Every function takes this rank's records and returns the same numbers on every rank. Predictions stay in
`trainer.shown`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.collate import collate, collate_pairs
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.evaluate.generate import generate_answers
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.prediction import Prediction, build_predictions
from ray_vlm.methods.groups import score_answers
from ray_vlm.methods.rewards import total
from ray_vlm.methods.rollout import Sampling, sample_groups
from ray_vlm.runs.console import Progress


def validate_answers(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """Validate SFT: `loss`, and unless that is the job's metric, the task's metrics."""
    started, model, options = time.monotonic(), trainer.model, job.evaluate
    was_training = model.training
    model.eval()
    batches = _in_step(records, options.batch_size, device, world_size)
    sums = _sum(_loss(model, batches, builder, device), device, world_size)
    metrics = {"loss": sums[0] / max(sums[1], 1.0)}
    if options.metric != "loss":
        answers = _answer(model, records, builder, job, device, world_size)
        trainer.shown = build_predictions(records, answers, builder)
        metrics |= _measure(trainer.shown, job, world_size)
    model.train(was_training)
    return metrics | {"validation_s": time.monotonic() - started}


def _in_step(records: Sequence[Any], size: int, device: str, world_size: int) -> Iterator[tuple[Sequence[Any], bool]]:
    """Yield batches of this rank's records with whether they count: a rank that has fewer batches than another one
    yields further ones that do not count, because under ZeRO-3 all ranks must run the model equally often.
    """
    import torch

    most = torch.tensor(-(-len(records) // size), device=device)
    if world_size > 1:
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    progress = _progress("validation", records, world_size)
    for start in range(0, int(most) * size, size):
        batch = records[start : start + size]
        if records:
            yield batch or records[:1], bool(batch)
        progress.reach(min(start + size, len(records)))


def _progress(what: str, records: Sequence[Any], world_size: int) -> Progress:
    return Progress(what, len(records), "rows" if world_size == 1 else "rows of this worker")


def _answer(
    model: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> list[str]:
    """Return the model's greedy answer to each of this rank's records."""
    options, progress = job.evaluate, _progress("validation, answers", records, world_size)
    size, limit = options.batch_size, options.max_new_tokens
    return generate_answers(model, records, builder, size, limit, device, progress.reach)


def _loss(
    model: Any, batches: Iterable[tuple[Sequence[Any], bool]], builder: SampleBuilder, device: str
) -> tuple[float, float]:
    """Return the sum of the trained tokens' negative log-likelihoods, and their number."""
    import torch

    summed, tokens = 0.0, 0
    for records, counts in batches:
        batch = collate([builder.train_row(record) for record in records], builder, device)
        batch.pop("loss_weights", None)  # held-out rows have equal weight
        with torch.no_grad():
            out = model(**batch, fused_lm_head=True)
        summed -= float(out.log_probs.sum()) * counts
        tokens += int(out.label_mask.sum()) * counts
    return summed, tokens


def validate_pairs(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """Validate DPO: `loss`, `preference_accuracy` (share of pairs whose chosen answer has the higher reward),
    `reward_margin`, `reward_chosen` and `reward_rejected`; a reward is beta times the log-ratio to the reference."""
    started, model, size = time.monotonic(), trainer.model, job.evaluate.batch_size
    was_training = model.training
    model.eval()
    sums = dict.fromkeys(_PAIR_METRICS, 0.0)
    for number, (batch, counts) in enumerate(_in_step(records, size, device, world_size)):
        rows = [builder.pair_row(record) for record in batch]
        means = _measure_pairs(trainer, collate_pairs(rows, builder, device), number)
        for name, value in means.items():
            sums[name] += value * len(rows) * counts
    model.train(was_training)
    *summed, count = _sum((*sums.values(), float(len(records))), device, world_size)
    metrics = {name: value / max(count, 1.0) for name, value in zip(sums, summed, strict=True)}
    return metrics | {"validation_s": time.monotonic() - started}


_PAIR_METRICS = {  # this package's name: TRL's
    "loss": "loss",
    "preference_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}


def _measure_pairs(trainer: Any, batch: dict[str, Any], key: int) -> dict[str, float]:
    """Return means over a batch of pairs, by TRL's own loss. The reference model never changes, so its
    log-probabilities are computed once for each `key`."""
    import torch

    known = trainer.__dict__.setdefault("known_reference", {})
    batch["numbers"] = [-1]
    with torch.no_grad(), trainer.compute_loss_context_manager(), _alone(trainer):
        if key not in known:
            referred = trainer.refer(batch)
            known[key] = {name: referred[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        loss = float(trainer.compute_loss(trainer.model, batch | known[key]))
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()} | {"loss": loss}
    trainer._metrics["eval"].clear()
    return {name: float(metrics[trl_name]) for name, trl_name in _PAIR_METRICS.items()}


@contextmanager
def _alone(trainer: Any) -> Iterator[None]:
    """Keep TRL from gathering its metrics from all ranks at every batch: the batches of ranks differ here."""
    accelerator = trainer.accelerator
    accelerator.gather = accelerator.gather_for_metrics = lambda values: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def validate_rewards(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """Validate GRPO: `reward` and `reward_<part>` of greedy answers, and the task's metrics where rows have a truth;
    with `method.num_generations_eval` also `sampled_reward`, of answers that are sampled as in training."""
    started, was_training = time.monotonic(), trainer.model.training
    answers = _answer(trainer.model, records, builder, job, device, world_size)
    trainer.model.train(was_training)
    ids = [builder.tokenizer.encode(text, add_special_tokens=False) for text in answers]
    scores = _score(trainer, records, answers, ids, builder)
    everyone = [parts for rank_scores in _gather(scores, world_size) for parts in rank_scores]
    metrics = {}
    for name in everyone[0] if everyone else ():
        values = [parts[name] for parts in everyone if parts[name] is not None]
        metrics[f"reward_{name.rpartition(':')[2]}" if name else "reward"] = sum(values) / max(len(values), 1)
    if records and isinstance(records[0], SftRecord):
        trainer.shown = build_predictions(records, answers, builder)
        metrics |= _measure(trainer.shown, job, world_size)
    if job.method.num_generations_eval:
        totals = [parts[""] for parts in _sample(trainer, records, builder, job, device)]
        rewards = [value for rank_totals in _gather(totals, world_size) for value in rank_totals]
        metrics["sampled_reward"] = sum(rewards) / max(len(rewards), 1)
    return metrics | {"validation_s": time.monotonic() - started}


def _sample(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str
) -> list[dict[str, Any]]:
    """Return the scores of answers sampled to each record, with the same random numbers at every validation."""
    method, repeats = job.method, job.method.num_generations_eval
    sampling = Sampling(repeats, method.max_completion_tokens, method.temperature, method.top_p, method.top_k)
    rows = [builder.prompt_row(record) for record in records]
    seeds = [(job.seed, record.row) for record in records]
    model, size = trainer.accelerator.unwrap_model(trainer.model), max(1, job.evaluate.batch_size // repeats)
    groups = sample_groups(model, rows, builder, sampling, seeds, device, size)
    ids = [answer.ids for group in groups for answer in group]
    repeated = [record for record in records for _ in range(repeats)]
    return _score(trainer, repeated, [builder.text(answer) for answer in ids], ids, builder)


def _score(
    trainer: Any, records: Sequence[Any], answers: Sequence[str], ids: Sequence[Sequence[int]], builder: SampleBuilder
) -> list[dict[str, Any]]:
    """Return every part of each answer's reward, and under "" their total."""
    if not records:
        return []
    prompts = [[{"role": role, "content": text} for role, text in builder.turns(record)] for record in records]
    scores = score_answers(trainer.scored_by, records, answers, ids, prompts, builder)
    return [parts | {"": total(trainer.scored_by, parts)} for parts in scores]


VALIDATE: dict[str, Callable[..., dict[str, float]]] = {
    "sft": validate_answers,
    "dpo": validate_pairs,
    "grpo": validate_rewards,
}


def _measure(predictions: list[Prediction], job: JobConfig, world_size: int) -> dict[str, float]:
    everyone = [p for part in _gather(predictions, world_size) for p in part]
    return measure(job.task.name, sorted(everyone, key=lambda p: p.row))["overall"]


def _sum(values: Sequence[float], device: str, world_size: int) -> list[float]:
    """Sum each value over all ranks."""
    import torch

    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return sums.tolist()


def _gather(values: list[Any], world_size: int) -> list[list[Any]]:
    """Return every rank's list."""
    if world_size == 1:
        return [values]
    import torch

    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, values)
    return everyone
