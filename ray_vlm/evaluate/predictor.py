"""Predictions for applications: a trained adapter asked about one image, or many.

    from ray_vlm import Predictor

    predictor = Predictor.from_run("outputs/demo_sft")
    found = predictor.predict("photo.jpg")
    found.values["boxes"], found.values["labels"]  # in pixels of the photo, upright
    found.draw().save("found.png")

How images are resized and questions worded comes from the `preprocessing.json` beside the weights, so it is what
training did. `from_run` also takes `best/`, an exported adapter, a merged model, a base or a job file; `evaluate/
weights.py` finds out which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.parse import parse_answer
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.records import Box, Point, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import DataError
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker
from ray_vlm.evaluate.generate import generate_answers, plan_batches
from ray_vlm.evaluate.questions import Ask, build_question, name_of
from ray_vlm.evaluate.weights import find_answerer
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.store import full_address
from ray_vlm.tasks.gui_steps import read_memory, remember

Memory = Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | str | None  # steps as texts or JSON objects


@dataclass(frozen=True)
class Found:
    """An answer and what was understood of it. `values` are the task's own, places in pixels of the upright image:
    detection `boxes` and `labels`, classification `attributes`, GUI steps `output`, `box` and `point`, chat `answer`.

    `ok`: it was in the promised form; `repairs`: what had to be mended. `images` as they were given.
    """

    images: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]
    answer: str
    values: Mapping[str, Any]
    ok: bool
    repairs: tuple[str, ...]

    def draw(self) -> Any:
        """The first image with what was found on it, as a PIL image."""
        from ray_vlm.evaluate.draw import draw_found

        return draw_found(self.images[0], self.values)


@dataclass(frozen=True)
class Step:
    """A GUI step: `output` (action and arguments), where it points (pixels of the screen, or None), and the memories
    to hand to the next `predict_step`."""

    output: Mapping[str, Any]
    box: Box | None
    point: Point | None
    ok: bool
    answer: str
    short_term_memory: tuple[str, ...]
    long_term_memory: tuple[str, ...]


class Predictor:
    """A base with an adapter on it, or alone, that answers. Loads the weights at the first question."""

    def __init__(self, job: JobConfig, adapter: str | None = None, wording: str | None = None):
        """`job`: model, task and limits; `adapter`: folder or address of `best/` or `final/`; None is the base.
        `wording`: another folder whose `preprocessing.json` says how to ask.

        Raises `ModelError` for an adapter of another task or base.
        """
        self.weights = fetch_folder(adapter) if adapter is not None else None
        spec, asked_by = sample_spec(job, []), wording or self.weights
        spec = (read_preprocessing(asked_by, spec) if asked_by is not None else None) or spec
        self.job, self.task = job, spec.task.name
        self._adapter = adapter
        self._loaded = InferenceWorker(InferenceJob(job, spec, (), self.weights, ()))

    @classmethod
    def from_run(
        cls,
        run: str,
        weights: str | None = None,
        device: str | None = None,
        base: str | None = None,
        job: JobConfig | str | None = None,
        task: str | None = None,
    ) -> "Predictor":
        """From a run, its `best/`, an exported adapter, a merged model, a base, or a job file: folder, address or hub
        name.

        `weights`: of a run, `best`, `final` or `base`; None takes `best` where there is one. `device`: `cpu` or `cuda`;
        None is what the run trained on. `base`: an adapter's, where it lies elsewhere than when it was trained. `job`,
        or `task` alone, says how to ask weights with no `preprocessing.json` beside them. Raises `RunError` where
        nothing is found, `ConfigError` or `ModelError` where it takes more to ask.
        """
        asked = load_job(job) if isinstance(job, str) else job
        found = find_answerer(str(run), weights, base, asked, task, device)
        return cls(found.job, found.weights, found.wording)

    def predict(self, image: Any, **told: Any) -> Found:
        """The answer to one image, or to a list of them for `chat`.

        `told`: for chat `question`; for classification, if the job tells positions, `box` in pixels; for GUI steps
        `goal` and `history`. Raises `DataError` for an image that cannot be read.
        """
        return self.predict_many([Ask(image, told)])[0]

    def predict_many(self, asks: Sequence[Ask]) -> list[Found]:
        """The answers to many questions, `evaluate.batch_size` at a time. Raises `DataError` with every bad one."""
        records, problems = [], []
        for row, ask in enumerate(asks):
            try:
                records.append(self.record(ask, row))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)
        options, builder = self.job.evaluate, self.builder
        costs = [sum(builder.token_counts(record)[:2]) for record in records]
        answers = [""] * len(records)
        for batch in plan_batches(costs, options.batch_size):
            part = [records[i] for i in batch]
            texts = generate_answers(
                self._loaded.model, part, builder, len(part), options.max_new_tokens, self._loaded.device
            )
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
        return [self.understand(*of_one) for of_one in zip(records, answers, asks, strict=True)]

    def predict_step(
        self,
        image_path: Any,
        user_goal: str,
        short_term_memory: Memory = (),
        long_term_memory: Memory = (),
    ) -> Step:
        """The next GUI step towards the goal on this screen. Start without memories, and hand on what the last step
        returned; steps of your own may be texts or JSON objects, in a list, oldest first, or a single one.

        Raises `DataError` for an image that cannot be read and for a memory that is something else.
        """
        try:
            earlier = read_memory(long_term_memory, "long_term_memory")
            history = (*earlier, *read_memory(short_term_memory, "short_term_memory"))
        except ValueError as error:
            raise DataError(str(error)) from None
        found = self.predict(image_path, goal=user_goal, history=history)
        values = found.values
        short, long = remember(history, values["output"], self.builder.setting)
        return Step(values["output"], values["box"], values["point"], found.ok, found.answer, short, long)

    def record(self, ask: Ask, row: int = 0) -> SftRecord:
        """The record that asks. Raises `DataError` that names the image or the question and what is wrong."""
        found = self.try_record(ask, row)
        if isinstance(found, str):
            raise DataError(f"{name_of(ask, row)}: {found}")
        return found

    def try_record(self, ask: Ask, row: int = 0) -> SftRecord | str:
        """The record that asks, or why it cannot be asked."""
        try:
            record = build_question(ask, row, self.task, self.job.data.max_image_pixels)
            return self.builder.question_problem(record) or record
        except (ValueError, OSError, TypeError) as error:
            return str(error) or type(error).__name__

    def understand(self, record: SftRecord, answer: str, ask: Ask) -> Found:
        """What an answer to the record says."""
        parsed = parse_answer(answer, record, self.builder)
        return Found(ask.images, record.sizes, answer, parsed.values, parsed.ok, parsed.repairs)

    @cached_property
    def builder(self) -> SampleBuilder:
        """What words questions and reads answers."""
        return load_sample_builder(self._loaded.work.spec)

    def work(self, num_actors: int) -> InferenceJob:
        """The model as so many processes load it, 0 for this one; still without records."""
        where = self.weights if num_actors == 0 or self._adapter is None else full_address(self._adapter)
        return replace(self._loaded.work, adapter=where)
