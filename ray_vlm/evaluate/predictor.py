"""Predictions for applications: ask a trained adapter about one image, or many.

    from ray_vlm import Predictor

    predictor = Predictor.from_run("outputs/demo_sft")
    prediction = predictor.predict("photo.jpg")
    prediction.values["boxes"], prediction.values["labels"]  # in pixels of the upright photo
    prediction.draw().save("found.png")

Image sizes and prompts come from the `preprocessing.json` beside the weights, so they are those of training. `from_run`
also takes `best/`, an exported adapter, a merged model, a base or a job file (`evaluate/weights.py`).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray_vlm.config.load import load_job
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.images import read_size
from ray_vlm.data.preprocessing import read_preprocessing
from ray_vlm.data.records import Box, ImageCell, ImageRange, Point, SftRecord
from ray_vlm.data.records import Image as ImageSource
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.data.spec import sample_spec
from ray_vlm.errors import DataError
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, open_adapter
from ray_vlm.evaluate.generate import generate_answers, plan_batches
from ray_vlm.evaluate.prediction import in_words
from ray_vlm.evaluate.weights import find_answerer
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.tasks.answers import IMAGE
from ray_vlm.tasks.boxes import box_problem
from ray_vlm.tasks.gui_steps import read_memory, remember

if TYPE_CHECKING:
    import PIL.Image

    from ray_vlm.data.draw import ImageLike

Memory = Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | str | None  # steps as texts or JSON objects
Sizes = Sequence[tuple[int, int]]
Fields = Mapping[str, Any]  # `Ask.told`


@dataclass(frozen=True)
class Ask:
    """One question. `images`: a path, an address, encoded bytes, a PIL image or an array `uint8 [h, w, 3]`, or a list
    of these; `told`: the other fields of the question, as `Predictor.predict` takes them."""

    images: Any
    told: Fields = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        images = self.images if isinstance(self.images, list | tuple) else (self.images,)
        object.__setattr__(self, "images", tuple(images))


@dataclass(frozen=True)
class Found:
    """An answer and its parsed values. `values`, with coordinates in pixels of the upright image: `boxes` and `labels`
    for detection, `attributes` for classification, `output`, `box` and `point` for GUI steps, `answer` for chat.

    `ok`: the answer had the requested form; `repairs`: corrections that made it readable. `images`: as the caller
    passed them. `classes`: the task's labels, whose order gives each its colour in `draw`.
    """

    images: "tuple[ImageLike, ...]"
    sizes: tuple[tuple[int, int], ...]
    answer: str
    values: Mapping[str, Any]
    ok: bool
    repairs: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def draw(self, min_side: int = 1) -> "PIL.Image.Image":
        """Draw the values on the first image and return it as a PIL image: labelled boxes, the box or point of a GUI
        step, and the rest of the answer as text in a strip below. An image whose longer side has fewer than `min_side`
        pixels is enlarged."""
        from ray_vlm.data.draw import draw_values

        caption = in_words(self.values, labels=False)
        return draw_values(self.images[0], self.values, self.classes, caption, min_side=min_side)


@dataclass(frozen=True)
class Step:
    """A GUI step: `output` (action and arguments), the `box` or `point` of its target (pixels of the screen, or None),
    and the memories to pass to the next `predict_step`."""

    output: Mapping[str, Any]
    box: Box | None
    point: Point | None
    ok: bool
    answer: str
    short_term_memory: tuple[str, ...]
    long_term_memory: tuple[str, ...]


class Predictor:
    """A base model that answers, with or without an adapter. The weights are loaded at the first question."""

    def __init__(self, job: JobConfig, adapter: str | None = None, wording: str | None = None):
        """`job`: model, task and limits; `adapter`: folder or address of `best/` or `final/`, None for the base.
        `wording`: another folder, whose `preprocessing.json` gives the prompt.

        Raise `ModelError` for an adapter of another task or base.
        """
        self.weights = fetch_folder(adapter) if adapter is not None else None
        spec, folder = sample_spec(job, []), wording or self.weights
        spec = (read_preprocessing(folder, spec) if folder is not None else None) or spec
        self.job, self.task = job, spec.task.name
        self._adapter = adapter
        self._worker = InferenceWorker(InferenceJob(job, spec, (), open_adapter(job, adapter, self.weights, 0), ()))

    @classmethod
    def from_run(
        cls,
        run: str,
        weights: str | None = None,
        device: str | None = None,
        base: str | None = None,
        job: JobConfig | str | None = None,
        task: str | None = None,
        engine: Literal["transformers", "vllm"] | None = None,
    ) -> "Predictor":
        """Build a predictor from the folder, address or hub name of a run, its `best/`, an exported adapter, a merged
        model or a base, or from a job file.

        `weights`: `best`, `final` or `base` of a run; None takes `best` where there is one. `device`: `cpu` or `cuda`;
        None is the one that the run trained on. `base`: the base of an adapter that has moved since training. `job`,
        or `task` alone, gives the task and the prompt for weights without a `preprocessing.json`. `engine`: what
        answers, in place of the job's `evaluate.engine`, whose server or vLLM may not be here. Raise `RunError` where
        nothing has that name, `ConfigError` or `ModelError` where an option is missing or does not apply.
        """
        asking_job = load_job(job) if isinstance(job, str) else job
        answerer = find_answerer(str(run), weights, base, asking_job, task, device)
        chosen = answerer.job
        if engine is not None:
            options = chosen.evaluate.model_copy(update={"engine": engine, "sampler_url": None})
            chosen = chosen.model_copy(update={"evaluate": options})
        return cls(chosen, answerer.weights, answerer.wording)

    def predict(self, image: "ImageLike | Sequence[ImageLike]", **told: object) -> Found:
        """Answer a question about one image, or for chat about a list of images.

        `told`: `question` for chat; `box` in pixels for classification, if the job uses positions; `goal` and `history`
        for GUI steps. Raise `DataError` for an image that cannot be read.
        """
        return self.predict_many([Ask(image, told)])[0]

    def predict_many(self, asks: Sequence[Ask]) -> list[Found]:
        """Answer many questions, `evaluate.batch_size` at a time. Raise `DataError` with every one that cannot be
        asked."""
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
        self._worker.expect(records)
        for batch in plan_batches(costs, options.batch_size):
            part = [records[i] for i in batch]
            texts = generate_answers(self._worker.engine, part, builder, len(part), options.max_new_tokens)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
        return [self.understand(*row) for row in zip(records, answers, asks, strict=True)]

    def predict_step(
        self,
        image_path: "ImageLike",
        user_goal: str,
        short_term_memory: Memory = (),
        long_term_memory: Memory = (),
    ) -> Step:
        """Predict the next GUI step towards the goal on this screen. Start without memories, then pass those of the
        last `Step`; your own memories may be texts or JSON objects, a list with the oldest first, or a single one.

        Raise `DataError` for an image that cannot be read and for a memory of another type.
        """
        try:
            earlier = read_memory(long_term_memory, "long_term_memory")
            history = (*earlier, *read_memory(short_term_memory, "short_term_memory"))
        except ValueError as error:
            raise DataError(str(error)) from None
        prediction = self.predict(image_path, goal=user_goal, history=history)
        values = prediction.values
        short, long = remember(history, values["output"], self.builder.prompt_context)
        return Step(values["output"], values["box"], values["point"], prediction.ok, prediction.answer, short, long)

    def record(self, ask: Ask, row: int = 0) -> SftRecord:
        """Build the record of a question. Raise `DataError` with the name of the question and the reason."""
        record = self.try_record(ask, row)
        if isinstance(record, str):
            raise DataError(f"{name_of(ask, row)}: {record}")
        return record

    def try_record(self, ask: Ask, row: int = 0) -> SftRecord | str:
        """Return the record of a question, or the reason why it cannot be asked."""
        try:
            record = build_question(ask, row, self.task, self.job.data.max_image_pixels)
            return self.builder.question_problem(record) or record
        except (ValueError, OSError, TypeError) as error:
            return str(error) or type(error).__name__

    def understand(self, record: SftRecord, answer: str, ask: Ask) -> Found:
        """Parse an answer to the record."""
        parsed, classes = parse_answer(answer, record, self.builder), tuple(self.builder.spec.labels)
        return Found(ask.images, record.sizes, answer, parsed.values, parsed.ok, parsed.repairs, classes)

    @property
    def builder(self) -> SampleBuilder:
        """The sample builder, which writes prompts and parses answers."""
        return self._worker.builder

    def inference_job(self, num_actors: int) -> InferenceJob:
        """Return the inference job for that many processes, 0 for this one; without records."""
        adapter = open_adapter(self.job, self._adapter, self.weights, num_actors)
        return replace(self._worker.inference, adapter=adapter)


def name_of(ask: Ask, row: int) -> str:
    """Return the name of a question in messages: its id, the path of its first image, or its number."""
    return ask.id or next((str(image) for image in ask.images if isinstance(image, str | Path)), f"input {row}")


def build_question(ask: Ask, row: int, task: str, max_image_pixels: int) -> SftRecord:
    """Build the record of a question. Raise `ValueError`, `OSError` or `TypeError` with the reason."""
    images = tuple(_encode(image) for image in ask.images)
    sizes = tuple(read_size(image, max_image_pixels) for image in images)
    truth, context = _READ[task](ask.told, sizes)
    return SftRecord(name_of(ask, row), row, images, sizes, truth, context)


def _encode(image: "ImageLike") -> ImageSource:
    """Return an image as records hold it: a path, an address, a position in a file, or the bytes of an encoded file."""
    if isinstance(image, bytes | ImageRange | ImageCell):
        return image
    if isinstance(image, str | Path):
        return str(image)
    from PIL import Image

    if not isinstance(image, Image.Image):
        try:
            image = Image.fromarray(image)
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{type(image).__name__} is no image ({error}); give a path, bytes, PIL or uint8"
            ) from None
    out = io.BytesIO()
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _only(fields: Fields, *names: str) -> None:
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(f"{', '.join(unknown)} means nothing to this task; it takes {', '.join(names) or 'an image'}")


def _read_nothing(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields)
    _one(sizes)
    return {"boxes": (), "labels": ()}, {}


def _read_box(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "box")
    _one(sizes)
    box = fields.get("box")
    if box is None:
        return {"attributes": {}}, {}
    box = tuple(float(v) for v in box)
    if len(box) != 4 or (problem := box_problem(box, sizes[0])):
        raise ValueError(f"box {list(box)} is not x1, y1, x2, y2 in pixels" + (f": {problem}" if len(box) == 4 else ""))
    return {"attributes": {}}, {"box": box}


def _read_question(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "question")
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("chat needs a question")
    tags = "" if IMAGE in question else IMAGE * len(sizes)
    return {"answer": ""}, {"turns": (("user", tags + question),)}


def _read_goal(fields: Fields, sizes: Sizes) -> tuple[dict, dict]:
    _only(fields, "goal", "history")
    _one(sizes)
    goal, history = fields.get("goal"), read_memory(fields.get("history"), "history")
    if not isinstance(goal, str) or not goal.strip():
        raise ValueError("a GUI step needs a goal")
    context = {"instruction": goal, "task": "", "step": len(history), "history": history}
    return {"output": {"action": ""}, "box": None, "point": None}, context


def _one(sizes: Sizes) -> None:
    if len(sizes) != 1:
        raise ValueError(f"{len(sizes)} images, and this task takes one")


_READ = {
    "detection": _read_nothing,
    "classification": _read_box,
    "chat": _read_question,
    "gui_steps": _read_goal,
}
