"""The tasks, one module each."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_vlm.data.records import SftRecord
from ray_vlm.tasks import chat, classification, detection, gui_steps
from ray_vlm.tasks.answers import Answer, Parsed, PromptContext, Turns
from ray_vlm.tasks.boxes import Frame


class TaskModule(Protocol):
    """The functions of a task's module. Training, rewards, validation, evaluation and prediction call the same ones."""

    def check(self, record: SftRecord, labels: Sequence[str]) -> str | None:
        """Return why a record cannot be trained on, or None."""

    def tags(self, record: SftRecord) -> tuple[str, ...]:
        """Return the classes and conditions of a record, by which rows are balanced and tokens weighted."""

    def ask(self, record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns:
        """Build the question."""

    def answer(self, record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer:
        """Write the right answer."""

    def parse(self, text: str, frames: Sequence[Frame]) -> Parsed:
        """Parse a model's answer. Never raises."""

    def score(self, parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
        """Score a parsed answer against the truth."""


TASKS: dict[str, TaskModule] = {
    "detection": detection,
    "classification": classification,
    "gui_steps": gui_steps,
    "chat": chat,
}
