"""Define what a row is, and how records become rows: plain data that every process shares. `samples.py` makes rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ray_vlm.config.method import SftMethod
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.config.task import Task, labels_of

IGNORED = -100  # the label of a token that is not trained, as torch's cross-entropy has it
KINDS: dict[str, Literal["answer", "pair", "prompt"]] = {"sft": "answer", "dpo": "pair", "grpo": "prompt"}


@dataclass(frozen=True)
class SampleSpec:
    """How records become rows: base model, task, class names in prompt order, images, what is trained.

    `hints`: what the prompt says about the training data. `token_weights`: (tag, weight) of answer tokens in the loss.
    `split`: fingerprint of the rows that training leaves out as shares. `kind`: what the method trains of a record.
    """

    model: Model
    task: Task
    labels: tuple[str, ...]
    min_pixels: int | None = None
    max_pixels: int | None = None
    loss_on: Literal["answer", "whole_sequence"] = "answer"
    resize: Literal["stretch", "pad"] = "stretch"
    pad_color: tuple[int, int, int] | None = None
    pad_place: Literal["end", "center"] = "end"
    hints: str = ""
    token_weights: tuple[tuple[str, float], ...] = ()
    split: str = ""
    kind: Literal["answer", "pair", "prompt"] = "answer"

    def with_labels(self, labels: Iterable[str]) -> "SampleSpec":
        """Return the spec with the class names of the data, each once; `task.labels` overrides them."""
        return replace(self, labels=labels_of(self.task) or tuple(dict.fromkeys(labels)))


def sample_spec(job: JobConfig, labels: Sequence[str] = ()) -> SampleSpec:
    """Return the job's `SampleSpec`. `labels` are the class names of the data; `task.labels` overrides them."""
    data = job.data
    return SampleSpec(
        model=job.model,
        task=job.task,
        labels=labels_of(job.task) or tuple(labels),
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        loss_on=job.method.loss_on if isinstance(job.method, SftMethod) else "answer",
        resize=data.resize,
        pad_color=data.pad_color,
        pad_place=data.pad_place,
        kind=KINDS[job.method.name],
    )


@dataclass(frozen=True)
class Sample:
    """What a model sees of one record. `labels` equals `input_ids` for trained tokens, and is -100 elsewhere.

    For generation `input_ids` is the prompt alone and `labels` is empty. For a pair it is the prompt, and `completions`
    are the preferred answer and the other. `images`: `uint8 [h, w, 3]` each. `weights`: `float32`, of each token in the
    loss; None if all are 1. `number`: the record's position in the index.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[np.ndarray, ...]
    weights: np.ndarray | None = None
    completions: tuple[np.ndarray, ...] = ()
    number: int = -1


@dataclass(frozen=True)
class Tokens:
    """A record's text as token ids, images included: the prompt alone, and prompt and answer together with the trained
    tokens marked."""

    prompt: list[int]
    all_ids: list[int]
    trained: list[bool]
    weights: list[float]
    num_image_tokens: int
