"""GUI tasks answered step by step with the model's own memory: what it answered to a task's steps is what it is told of
them at the next one, cut and forgotten as `Predictor.predict_step` does it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from ray_vlm.data.parse import parse_answer
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.tasks.gui_steps import remember


def plan_walks(records: Sequence[SftRecord], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Positions of the records of `batch_size` tasks at a time, whole; a record without a task is one of its own."""
    whole = sorted(_by_task(records).values(), key=len, reverse=True)  # of one batch about as long
    return tuple(
        tuple(i for steps in whole[start : start + batch_size] for i in steps)
        for start in range(0, len(whole), batch_size)
    )


def walk(
    records: Sequence[SftRecord], builder: SampleBuilder, answer: Callable[[Sequence[SftRecord]], list[str]]
) -> list[str]:
    """The answers to whole GUI tasks, in the order of the records. `answer` is given step k of all tasks at once.

    The history of a step is the parsed output of each earlier answer of its task, as compact JSON. An answer in which
    no action was understood did nothing, and leaves nothing there.
    """
    tasks = _by_task(records)
    answers = [""] * len(records)
    history: dict[Hashable, tuple[str, ...]] = dict.fromkeys(tasks, ())
    for number in range(max(map(len, tasks.values()))):
        positions = {name: steps[number] for name, steps in tasks.items() if number < len(steps)}
        asked = [_with_history(records[i], history[name]) for name, i in positions.items()]
        for (name, i), record, text in zip(positions.items(), asked, answer(asked), strict=True):
            answers[i] = text
            found = parse_answer(text, record, builder).values
            short, long = remember(history[name], found["output"], builder.setting)
            history[name] = (*long, *short)
    return answers


def _by_task(records: Sequence[SftRecord]) -> dict[Hashable, list[int]]:
    """Positions of each task's records, in order."""
    tasks: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record.context["task"] or i, []).append(i)
    return tasks


def _with_history(record: SftRecord, history: tuple[str, ...]) -> SftRecord:
    return replace(record, context={**record.context, "history": history, "step": len(history)})
