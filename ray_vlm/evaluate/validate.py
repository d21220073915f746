"""Validation during training: metrics of held-out rows for each method, over all ranks.

SFT: the loss, and the task's metrics of generated answers if the job's metric is one of them. DPO: loss, accuracy and
margin of pairs. GRPO: rewards of greedy answers, with each part, and the task's metrics where the rows have a truth.
Every rank measures its share of the rows, and all return the same numbers.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from ray_vlm.config.schema import Evaluate
from ray_vlm.data.collate import collate
from ray_vlm.data.records import PreferenceRecord, Record, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.interface import Completion, Engine, Sampling
from ray_vlm.engines.own import OwnEngine
from ray_vlm.evaluate.generate import generate_answers
from ray_vlm.evaluate.metrics import measure
from ray_vlm.evaluate.prediction import Prediction, build_predictions
from ray_vlm.methods.rewards import score_answers, total
from ray_vlm.models.backbone import evaluation_mode
from ray_vlm.runs.console import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ray_vlm.methods.dpo import PairedDPOTrainer
    from ray_vlm.methods.grpo import PlannedGRPOTrainer
    from ray_vlm.methods.trainer import PlannedTrainer

Metrics = dict[str, float]


class Validation(ABC):
    """What a rank validates. `records`: its share of the eval rows; `task`: the name of the task that they are of.
    `padding`: any eval row, for batches that do not count on a rank without rows; None if there are no rows at all."""

    def __init__(
        self,
        records: Sequence[Record],
        builder: SampleBuilder,
        options: Evaluate,
        task: str,
        context: DistributedContext,
        padding: Record | None = None,
    ):
        self.records, self.builder, self.options, self.task, self.context = records, builder, options, task, context
        self._padding = records[0] if records else padding

    def measure(self, trainer: "PlannedTrainer") -> tuple[Metrics, list[Prediction]]:
        """Return the metrics of the trainer's weights, the same on every rank, and the predictions of this rank."""
        started = time.monotonic()
        with evaluation_mode(trainer.model):
            metrics, predictions = self._measure(trainer)
        return metrics | {"validation_s": time.monotonic() - started}, predictions

    @abstractmethod
    def _measure(self, trainer: "PlannedTrainer") -> tuple[Metrics, list[Prediction]]: ...

    def batches(self) -> Iterator[tuple[Sequence[Record], bool]]:
        """Yield batches of this rank's records with whether they count: a rank that has fewer batches than another one
        yields further ones that do not count, because under ZeRO-3 all ranks must run the model equally often.
        """
        size, records = self.options.batch_size, self.records
        (most,) = self.context.max([-(-len(records) // size)])
        progress = self._progress("validation")
        for start in range(0, most * size, size):
            batch = records[start : start + size]
            if batch:
                yield batch, True
            elif self._padding is not None:
                yield [self._padding], False
            progress.reach(min(start + size, len(records)))

    def answer(self, engine: Engine, tick: Callable[[], None]) -> list[str]:
        """Return the engine's greedy answer to each of this rank's records. `tick`: called after each batch, which the
        engine of another process may have answered without any work here."""
        size, limit = self.options.batch_size, self.options.max_new_tokens
        progress = self._progress("validation, answers")

        def reach(count: int) -> None:
            tick()
            progress.reach(count)

        with engine.awake():
            return generate_answers(engine, self.records, self.builder, size, limit, reach)

    def score_task(self, predictions: list[Prediction]) -> Metrics:
        """Return the task's metrics of all ranks' predictions, which rank 0 measures."""
        everyone = [prediction for part in self.context.gather(predictions) for prediction in part]
        metrics: Metrics = {}
        if self.context.rank == 0:
            metrics = measure(self.task, sorted(everyone, key=lambda prediction: prediction.row))["overall"]
        return self.context.broadcast(metrics)

    def _progress(self, what: str) -> Progress:
        return Progress(what, len(self.records), "rows" if self.context.world_size == 1 else "rows of this worker")


class AnswerValidation(Validation):
    """Validates SFT: `loss`, and unless that is the job's metric, the task's metrics."""

    _engine: OwnEngine | None = None  # keeps how many rows fit at a time

    def _measure(self, trainer: "PlannedTrainer") -> tuple[Metrics, list[Prediction]]:
        """Return the metrics and the predictions, without any if the job's metric is the loss."""
        model = trainer.model
        summed, tokens = self.context.sum(self._loss(model, self.batches()))
        metrics = {"loss": summed / max(tokens, 1.0)}
        predictions: list[Prediction] = []
        if self.options.metric != "loss":
            self._engine = self._engine or OwnEngine(model, self.builder, self.context.device)
            self._engine.update(model)
            answers = self.answer(self._engine, trainer.clock.tick)
            predictions = build_predictions(cast(list[SftRecord], self.records), answers, self.builder)
            metrics |= self.score_task(predictions)
        return metrics, predictions

    def _loss(self, model: "PreTrainedModel", batches: Iterable[tuple[Sequence[Record], bool]]) -> tuple[float, float]:
        """Return the sum of the trained tokens' negative log-likelihoods, and their number."""
        import torch

        summed, tokens = 0.0, 0
        for records, counts in batches:
            rows = [self.builder.train_row(cast(SftRecord, record)) for record in records]
            batch = collate(rows, self.builder, self.context.device)
            batch.pop("loss_weights", None)  # held-out rows have equal weight
            with torch.no_grad():
                out = model(**batch, fused_lm_head=True)
            summed -= float(out.log_probs.sum()) * counts
            tokens += int(out.label_mask.sum()) * counts
        return summed, tokens


class PairValidation(Validation):
    """Validates DPO: `loss`, `preference_accuracy` (share of pairs whose chosen answer has the higher reward),
    `reward_margin`, `reward_chosen` and `reward_rejected`; a reward is beta times the log-ratio to the reference."""

    @cached_property
    def _reference(self) -> dict[int, dict[str, "torch.Tensor"]]:
        return {}  # of each batch, by its number; it never changes

    def _measure(self, trainer: "PairedDPOTrainer") -> tuple[Metrics, list[Prediction]]:  # type: ignore[override]
        """Return the metrics; pairs have no predictions."""
        from ray_vlm.methods.dpo import PAIR_METRICS

        sums = dict.fromkeys(PAIR_METRICS, 0.0)  # also on a rank without records, for the sum over ranks
        for number, (batch, counts) in enumerate(self.batches()):
            rows = [self.builder.pair_row(cast(PreferenceRecord, record)) for record in batch]
            means, self._reference[number] = trainer.measure_pairs(rows, self._reference.get(number))
            for name, value in means.items():
                sums[name] += value * len(rows) * counts
        *summed, count = self.context.sum((*sums.values(), float(len(self.records))))
        return {name: value / max(count, 1.0) for name, value in zip(sums, summed, strict=True)}, []


class RewardValidation(Validation):
    """Validates GRPO: `reward` and `reward_<part>` of greedy answers, and the task's metrics where rows have a truth;
    with `method.num_generations_eval` also `sampled_reward`, of answers that are sampled as in training."""

    def _measure(self, trainer: "PlannedGRPOTrainer") -> tuple[Metrics, list[Prediction]]:  # type: ignore[override]
        """Return the metrics, and predictions of rows with a truth."""
        trainer.engine.update(trainer.accelerator.unwrap_model(trainer.model))
        records, answers = self.records, self.answer(trainer.engine, trainer.clock.tick)
        ids = [self.builder.tokenizer.encode(text, add_special_tokens=False) for text in answers]
        scores = self._score(trainer, records, answers, ids)
        everyone = [parts for rank_scores in self.context.gather(scores) for parts in rank_scores]
        metrics: Metrics = {}
        for name in everyone[0] if everyone else ():
            values = [value for parts in everyone if (value := parts[name]) is not None]
            metrics[f"reward_{name.rpartition(':')[2]}" if name else "reward"] = sum(values) / max(len(values), 1)
        metrics = self.context.broadcast(metrics)
        predictions: list[Prediction] = []
        # On every rank together, also on one without rows.
        if any(self.context.any_rank(bool(records) and isinstance(records[0], SftRecord))):
            predictions = build_predictions(cast(list[SftRecord], records), answers, self.builder)
            metrics |= self.score_task(predictions)
        if trainer.method.num_generations_eval:
            totals = [parts[""] or 0.0 for parts in self._sample(trainer)]
            rewards = [value for rank_totals in self.context.gather(totals) for value in rank_totals]
            metrics["sampled_reward"] = self.context.broadcast(sum(rewards) / max(len(rewards), 1))
        return metrics, predictions

    def _sample(self, trainer: "PlannedGRPOTrainer") -> list[dict[str, float | None]]:
        """Return the scores of answers sampled to each record, with the same random numbers at every validation."""
        method, records, engine = trainer.method, self.records, trainer.engine
        repeats = method.num_generations_eval
        sampling = Sampling(repeats, method.max_completion_tokens, method.temperature, method.top_p, method.top_k)
        rows = [self.builder.prompt_row(record) for record in records]
        seeds = [(trainer.inputs.seed, record.row) for record in records]
        size = max(1, self.options.batch_size // repeats)
        groups: list[list[Completion]] = []
        with engine.awake():
            for i in range(0, len(rows), size):
                groups += engine.sample(rows[i : i + size], sampling, seeds[i : i + size])
                trainer.clock.tick()
        ids = [answer.ids for group in groups for answer in group]
        repeated = [record for record in records for _ in range(repeats)]
        return self._score(trainer, repeated, [self.builder.text(answer) for answer in ids], ids)

    def _score(
        self,
        trainer: "PlannedGRPOTrainer",
        records: Sequence[Record],
        answers: Sequence[str],
        ids: Sequence[Sequence[int]],
    ) -> list[dict[str, float | None]]:
        """Return every part of each answer's reward, and under "" their total."""
        if not records:
            return []
        turns = [self.builder.turns(record) for record in records]
        prompts = [[{"role": role, "content": text} for role, text in row_turns] for row_turns in turns]
        scores = score_answers(trainer.rewards, records, answers, ids, prompts, self.builder)
        return [parts | {"": total(trainer.rewards, parts)} for parts in scores]


VALIDATIONS: dict[str, type[Validation]] = {"sft": AnswerValidation, "dpo": PairValidation, "grpo": RewardValidation}
