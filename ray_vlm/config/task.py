"""The `task` section of a job: what the model is asked. Each task has a section of its own."""

from typing import Annotated, Literal

from pydantic import Field

from ray_vlm.config.section import CountOrZero, Section, read_variant


class _Task(Section):
    """What the sections of all tasks have."""

    name: str
    system: str | None = Field(None, min_length=1, description="System message before the question. null: none.")
    codec: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma", "paligemma", "internvl", "molmo2"] | None = Field(
        None, description="Model family whose format of boxes and points is used. null: the model's own."
    )
    regions: tuple[Annotated[tuple[str, ...], Field(strict=False, min_length=1)], ...] = Field(
        (
            ("upper left", "upper centre", "upper right"),
            ("middle left", "centre", "middle right"),
            ("lower left", "lower centre", "lower right"),
        ),
        min_length=1,
        strict=False,
        description="Names for the regions of an image: a list of rows from the top, each from left to right.",
    )


class PromptedTask(_Task):
    """What the tasks have whose question is not in the data."""

    prompt: str | None = Field(
        None,
        min_length=1,
        description="The question. `{labels}` is replaced by the class names; tasks have further placeholders. null: "
        "the task's own prompt.",
    )


class LabelledTask(PromptedTask):
    """What the tasks have whose objects belong to classes."""

    labels: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        strict=False,  # a YAML list becomes a tuple, which can be hashed
        description="Class names in the order of the question; classification: `attribute=value`. null: those in the "
        "training data.",
    )


class DetectionTask(LabelledTask):
    """Detection finds every object of the named classes and gives its box."""

    name: Literal["detection"] = Field("detection", description="Find every object of the named classes.")


class ClassificationTask(LabelledTask):
    """Classification names what an image shows, and its condition."""

    name: Literal["classification"] = Field("classification", description="Name what is shown, and its condition.")
    position: bool = Field(
        False, description="State the position of the row's box in the question, as its centre and its region."
    )
    class_regions: bool = Field(
        False, description="State the usual region of each class in the training data in the question."
    )


class GuiStepsTask(PromptedTask):
    """GUI steps are the actions on screens that lead to a goal, one after another."""

    name: Literal["gui_steps"] = Field("gui_steps", description="Give the next action on a screen, towards a goal.")
    short_memory: CountOrZero = Field(3, description="How many of the last steps the question has in full.")
    long_memory_tokens: CountOrZero = Field(
        256, description="Most tokens of the steps before those; the oldest are cut first."
    )


class ChatTask(_Task):
    """Chat answers the questions in the data in free text."""

    name: Literal["chat"] = Field("chat", description="Answer the questions in the data in free text.")


Task = Annotated[
    DetectionTask | ClassificationTask | GuiStepsTask | ChatTask,
    Field(discriminator="name"),
    read_variant(DetectionTask, ClassificationTask, GuiStepsTask, ChatTask),
]


def prompt_of(task: Task) -> str | None:
    """Return the prompt that the job gives, if any."""
    return task.prompt if isinstance(task, PromptedTask) else None


def labels_of(task: Task) -> tuple[str, ...]:
    """Return the class names that the job gives, if any."""
    return task.labels or () if isinstance(task, LabelledTask) else ()
