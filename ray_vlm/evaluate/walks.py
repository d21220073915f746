"""GUI tasks answered step by step with the model's own memory: its answers to a task's earlier steps are in the prompt
of the next one, shortened as `Predictor.predict_step` does it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.tasks.gui_steps import remember


def plan_walks(records: Sequence[SftRecord], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the records of `batch_size` complete tasks at a time; a record without a task is one of
    its own."""
    tasks = sorted(_by_task(records).values(), key=len, reverse=True)  # tasks of a batch have about the same length
    return tuple(
        tuple(i for steps in tasks[start : start + batch_size] for i in steps)
        for start in range(0, len(tasks), batch_size)
    )


def walk(
    records: Sequence[SftRecord], builder: SampleBuilder, answer: Callable[[Sequence[SftRecord]], list[str]]
) -> list[str]:
    """Return the answers to complete GUI tasks, in the order of the records. `answer` gets step k of all tasks at once.

    The history of a step is the parsed output of each earlier answer of its task, as compact JSON. An answer without a
    parsed action adds nothing to it.
    """
    tasks = _by_task(records)
    answers = [""] * len(records)
    history: dict[Hashable, tuple[str, ...]] = dict.fromkeys(tasks, ())
    for number in range(max(map(len, tasks.values()))):
        positions = {name: steps[number] for name, steps in tasks.items() if number < len(steps)}
        batch = [_with_history(records[i], history[name]) for name, i in positions.items()]
        for (name, i), record, text in zip(positions.items(), batch, answer(batch), strict=True):
            answers[i] = text
            values = parse_answer(text, record, builder).values
            short, long = remember(history[name], values["output"], builder.setting)
            history[name] = (*long, *short)
    return answers


def _by_task(records: Sequence[SftRecord]) -> dict[Hashable, list[int]]:
    """Return the positions of each task's records, in order."""
    tasks: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record.context["task"] or i, []).append(i)
    return tasks


def _with_history(record: SftRecord, history: tuple[str, ...]) -> SftRecord:
    return replace(record, context={**record.context, "history": history, "step": len(history)})
