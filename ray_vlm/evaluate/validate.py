"""Validation inside training: held-out rows, measured as the method learns, over all ranks.

SFT: the loss, and the task's metrics by generating where the job's metric is one. DPO: loss, accuracy and margin of
pairs. GRPO: rewards of greedy answers, with each part, and the task's metrics where the rows have a truth. Every
function takes this rank's records and gives every rank the same numbers. What was answered stays in `trainer.shown`.
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
from ray_vlm.runs.progress import Progress


def validate_answers(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """SFT: `loss`, and unless that is the job's metric what the task measures."""
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
    """Batches of this rank's records, as many as any rank has, and whether each counts: one after the last does not.

    Under ZeRO-3 the ranks go through the model together or not at all.
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
    """The model's greedy answer to each of this rank's records."""
    options, progress = job.evaluate, _progress("validation, answers", records, world_size)
    size, limit = options.batch_size, options.max_new_tokens
    return generate_answers(model, records, builder, size, limit, device, progress.reach)


def _loss(
    model: Any, batches: Iterable[tuple[Sequence[Any], bool]], builder: SampleBuilder, device: str
) -> tuple[float, float]:
    """Sum of the trained tokens' negative log-likelihoods, and their number."""
    import torch

    summed, tokens = 0.0, 0
    for records, counts in batches:
        batch = collate([builder.train_row(record) for record in records], builder, device)
        batch.pop("loss_weights", None)  # held-out rows count alike
        with torch.no_grad():
            out = model(**batch, fused_lm_head=True)
        summed -= float(out.log_probs.sum()) * counts
        tokens += int(out.label_mask.sum()) * counts
    return summed, tokens


def validate_pairs(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """DPO: `loss`, `preference_accuracy` (share of pairs whose chosen answer has the higher reward), `reward_margin`,
    `reward_chosen` and `reward_rejected`; a reward is beta times the log-ratio to the reference."""
    started, model, size = time.monotonic(), trainer.model, job.evaluate.batch_size
    was_training = model.training
    model.eval()
    sums = dict.fromkeys(_OF_PAIRS, 0.0)
    for number, (batch, counts) in enumerate(_in_step(records, size, device, world_size)):
        rows = [builder.pair_row(record) for record in batch]
        found = _measure_pairs(trainer, collate_pairs(rows, builder, device), number)
        for name, value in found.items():
            sums[name] += value * len(rows) * counts
    model.train(was_training)
    *summed, count = _sum((*sums.values(), float(len(records))), device, world_size)
    metrics = {name: value / max(count, 1.0) for name, value in zip(sums, summed, strict=True)}
    return metrics | {"validation_s": time.monotonic() - started}


_OF_PAIRS = {
    "loss": "loss",
    "preference_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}


def _measure_pairs(trainer: Any, batch: dict[str, Any], key: int) -> dict[str, float]:
    """Means over a batch of pairs, by TRL's own loss. The reference never changes: it is asked once for each `key`."""
    import torch

    known = trainer.__dict__.setdefault("known_reference", {})
    batch["numbers"] = [-1]
    with torch.no_grad(), trainer.compute_loss_context_manager(), _alone(trainer):
        if key not in known:
            referred = trainer.refer(batch)
            known[key] = {name: referred[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        loss = float(trainer.compute_loss(trainer.model, batch | known[key]))
    found = {name: values[-1] for name, values in trainer._metrics["eval"].items()} | {"loss": loss}
    trainer._metrics["eval"].clear()
    return {ours: float(found[theirs]) for ours, theirs in _OF_PAIRS.items()}


@contextmanager
def _alone(trainer: Any) -> Iterator[None]:
    """TRL gathers its metrics from all ranks at every batch; here ranks have other numbers of batches."""
    accelerator = trainer.accelerator
    accelerator.gather = accelerator.gather_for_metrics = lambda values: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def validate_rewards(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str, world_size: int
) -> dict[str, float]:
    """GRPO: `reward` and `reward_<part>` of greedy answers, and what the task measures where rows have a truth; with
    `method.num_generations_eval` also `sampled_reward`, of answers that are sampled as in training."""
    started, was_training = time.monotonic(), trainer.model.training
    answers = _answer(trainer.model, records, builder, job, device, world_size)
    trainer.model.train(was_training)
    ids = [builder.tokenizer.encode(text, add_special_tokens=False) for text in answers]
    mine = _score(trainer, records, answers, ids, builder)
    everyone = [of_answer for part in _gather(mine, world_size) for of_answer in part]
    metrics = {}
    for name in everyone[0] if everyone else ():
        values = [of_answer[name] for of_answer in everyone if of_answer[name] is not None]
        metrics[f"reward_{name.rpartition(':')[2]}" if name else "reward"] = sum(values) / max(len(values), 1)
    if records and isinstance(records[0], SftRecord):
        trainer.shown = build_predictions(records, answers, builder)
        metrics |= _measure(trainer.shown, job, world_size)
    if job.method.num_generations_eval:
        totals = [of_answer[""] for of_answer in _sample(trainer, records, builder, job, device)]
        rewards = [value for part in _gather(totals, world_size) for value in part]
        metrics["sampled_reward"] = sum(rewards) / max(len(rewards), 1)
    return metrics | {"validation_s": time.monotonic() - started}


def _sample(
    trainer: Any, records: Sequence[Any], builder: SampleBuilder, job: JobConfig, device: str
) -> list[dict[str, Any]]:
    """The scores of answers sampled to each record. Its random numbers are the same at every validation."""
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
    """Every part of each answer's reward, and under "" all of it."""
    if not records:
        return []
    prompts = [[{"role": role, "content": text} for role, text in builder.turns(record)] for record in records]
    scores = score_answers(trainer.scored_by, records, answers, ids, prompts, builder)
    return [of_answer | {"": total(trainer.scored_by, of_answer)} for of_answer in scores]


VALIDATE: dict[str, Callable[..., dict[str, float]]] = {
    "sft": validate_answers,
    "dpo": validate_pairs,
    "grpo": validate_rewards,
}


def _measure(predictions: list[Prediction], job: JobConfig, world_size: int) -> dict[str, float]:
    everyone = [p for part in _gather(predictions, world_size) for p in part]
    return measure(job.task.name, sorted(everyone, key=lambda p: p.row))["overall"]


def _sum(values: Sequence[float], device: str, world_size: int) -> list[float]:
    """Sums over all ranks."""
    import torch

    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return sums.tolist()


def _gather(mine: list[Any], world_size: int) -> list[list[Any]]:
    """Every rank's list."""
    if world_size == 1:
        return [mine]
    import torch

    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
