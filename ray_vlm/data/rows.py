"""One record -> token ids, labels and resized pixels: the work of a loader, in a thread or in a Ray Data process.

`RowSpec` is plain data that says how; `Preparer` holds the processor and does it. Training, validation and prediction
go through the same `Preparer`, so they cannot resize or word anything differently.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ray_vlm.config.schema import JobConfig, Model, Task
from ray_vlm.data.images import ImageSpec, decode, resize
from ray_vlm.data.records import SftRecord
from ray_vlm.errors import DataError, ModelError
from ray_vlm.models.families import Family
from ray_vlm.models.load import family_of, load_config, load_processor
from ray_vlm.models.quiet import quiet_libraries
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.boxes import Frame

IGNORED = -100  # the label of a token that is not trained, as torch's cross-entropy has it


@dataclass(frozen=True)
class RowSpec:
    """How records become rows: base model, task, class names in prompt order, pixel limits, what is trained."""

    model: Model
    task: Task
    labels: tuple[str, ...]
    min_pixels: int | None = None
    max_pixels: int | None = None
    loss_on: Literal["answer", "whole_sequence"] = "answer"


def row_spec(job: JobConfig, labels: list[str]) -> RowSpec:
    """The job's `RowSpec`. `labels` are the class names of the training data; `task.labels` wins over them."""
    names = tuple(job.task.labels or labels)
    return RowSpec(job.model, job.task, names, job.data.min_pixels, job.data.max_pixels, job.method.loss_on)


@dataclass(frozen=True)
class Row:
    """What a model sees of one record. `labels` equals `input_ids` where a token is trained, else -100.

    For generation `input_ids` is the prompt alone and `labels` is empty. `images`: `uint8 [h, w, 3]` each.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[np.ndarray, ...]


class Preparer:
    """Turns records into rows; holds the processor."""

    def __init__(self, spec: RowSpec):
        quiet_libraries()
        self.spec = spec
        self.task = TASKS[spec.task.name]
        self.processor = load_processor(spec.model)
        self.tokenizer = self.processor.tokenizer
        self.family: Family = family_of(load_config(spec.model))
        self.image_spec = _image_spec(self.processor, spec)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.family.image_token)
        self._around = lru_cache(64)(self._render)
        self._check_wording()

    def _check_wording(self) -> None:
        """Refuse a prompt or a class name that the tokenizer would not read as plain text."""
        special = set(self.tokenizer.all_special_tokens) | {self.family.image_token, "\0"}
        for text in (self.spec.task.prompt or "", *self.spec.labels):
            found = sorted(token for token in special if token in text)
            if found or (not text.isprintable() and not text.replace("\n", "").isprintable()):
                what = f"it holds {found[0]!r}" if found else "it holds characters that cannot be written"
                raise DataError(f"prompt or class name {text[:80]!r} cannot be used: {what}. Reword it.")

    def frame(self, record: SftRecord) -> Frame:
        """The coordinate frame of the record's first image."""
        return Frame(record.sizes[0], self.image_spec.resized(record.sizes[0]), self.family.coordinates)

    def prompt(self, record: SftRecord) -> str:
        return self.task.ask(self.spec.labels, self.spec.task.prompt)

    def answer(self, record: SftRecord) -> str:
        return self.task.answer(record.truth, self.frame(record))

    def token_counts(self, record: SftRecord) -> tuple[int, int, int]:
        """Tokens of (images, prompt without images, answer); reads no pixels."""
        prompt, answer, num_images = self._tokens(record)
        return sum(num_images), len(prompt) - sum(num_images), len(answer)

    def train_row(self, record: SftRecord) -> Row:
        """Prompt and answer with pixels."""
        prompt, answer, _ = self._tokens(record)
        ids = np.array(prompt + answer, np.int32)
        labels = ids.copy()
        if self.spec.loss_on == "answer":
            labels[: len(prompt)] = IGNORED
        labels[ids == self.image_token_id] = IGNORED
        return Row(ids, labels, self._pixels(record))

    def prompt_row(self, record: SftRecord) -> Row:
        """The prompt with pixels, for generation."""
        prompt, _, _ = self._tokens(record)
        return Row(np.array(prompt, np.int32), np.zeros(0, np.int32), self._pixels(record))

    def _tokens(self, record: SftRecord) -> tuple[list[int], list[int], list[int]]:
        before, after = self._around(self.prompt(record), len(record.images))
        num_tokens = [self.image_spec.num_tokens(size) for size in record.sizes]
        prompt, counts = [], iter(num_tokens)
        for token in before:
            prompt.extend([token] * next(counts) if token == self.image_token_id else [token])
        answer = self.tokenizer(self.answer(record) + after, add_special_tokens=False)["input_ids"]
        return prompt, answer, num_tokens

    def _render(self, question: str, num_images: int) -> tuple[tuple[int, ...], str]:
        """Token ids of the prompt, one for each image, and the text that closes an answer."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
        user = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        render = self.processor.apply_chat_template
        prompt = render([user], tokenize=False, add_generation_prompt=True)
        mark = "\x00"
        told = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
        whole = render([user, told], tokenize=False)
        if not whole.startswith(prompt) or whole.count(mark) != 1:
            raise DataError("the processor's chat template renders an answer that does not continue its own prompt.")
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return tuple(ids), whole[len(prompt) :].partition(mark)[2]

    def _pixels(self, record: SftRecord) -> tuple[np.ndarray, ...]:
        images = []
        for path, size in zip(record.images, record.sizes, strict=True):
            try:
                pixels = decode(path)
            except Exception as error:  # decoders raise what they like
                raise DataError(f"row {record.row} (id {record.id}): {path} cannot be decoded ({error}).") from None
            if (pixels.shape[1], pixels.shape[0]) != size:
                raise DataError(f"row {record.row} (id {record.id}): {path} has changed size since the run started.")
            images.append(resize(pixels, self.image_spec, self.processor.image_processor))
        return tuple(images)


def _image_spec(processor: Any, spec: RowSpec) -> ImageSpec:
    images = processor.image_processor
    low = spec.min_pixels or images.size["shortest_edge"]
    high = spec.max_pixels or images.size["longest_edge"]
    return ImageSpec(images.patch_size, images.merge_size, min(low, high), high)


@lru_cache(maxsize=4)
def load_preparer(spec: RowSpec) -> Preparer:
    """The process's `Preparer` for `spec`, made once."""
    return Preparer(spec)


def describe_preprocessing(preparer: Preparer) -> dict[str, Any]:
    """How inputs are made, for `preprocessing.json` beside the weights; `read_preprocessing` reads it back."""
    spec = preparer.spec
    return {
        "task": spec.task.model_dump(),
        "labels": list(spec.labels),
        "coordinates": preparer.family.coordinates,
        "images": asdict(preparer.image_spec),
    }


def read_preprocessing(folder: str, spec: RowSpec) -> RowSpec:
    """`spec` with the wording, class names and pixel limits that the weights in `folder` were trained with."""
    path = Path(folder) / "preprocessing.json"
    if not path.is_file():
        return spec
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        images = saved["images"]
        spec = replace(spec, task=Task(**saved["task"]), labels=tuple(saved["labels"]))
        return replace(spec, min_pixels=images["min_pixels"], max_pixels=images["max_pixels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not readable ({error}). Use an adapter folder that a run wrote.") from None
