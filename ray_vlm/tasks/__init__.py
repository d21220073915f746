"""The tasks, one module each."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import chat, classification, detection, gui_steps
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns
from ray_vlm.tasks.boxes import Frame


class TaskModule(Protocol):
    """The functions of a task's module. Training, rewards, validation, evaluation and prediction call the same ones.

    `check` returns why a record cannot be trained on, or None; `tags` its classes and conditions; `ask` builds the
    question; `answer` writes the right answer; `parse` parses a model's and never raises; `score` compares it with the
    truth.
    """

    def check(self, record: SftRecord, labels: Sequence[str]) -> str | None: ...
    def tags(self, record: SftRecord) -> tuple[str, ...]: ...
    def ask(self, record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns: ...
    def answer(self, record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer: ...
    def parse(self, text: str, frames: Sequence[Frame]) -> Parsed: ...
    def score(self, parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]: ...


TASKS: dict[str, TaskModule] = {
    "detection": detection,
    "classification": classification,
    "gui_steps": gui_steps,
    "chat": chat,
}


def row_tags(task: str, record: object) -> tuple[str, ...]:
    """Return the classes and conditions of a record for the task of that name; pairs and prompts have none."""
    return TASKS[task].tags(record) if isinstance(record, SftRecord) else ()
