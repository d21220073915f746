"""GUI tasks with the model's own memory: whole tasks in a batch, steps in order, what each is told of the others."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray_vlm.config.task import GuiStepsTask
from ray_vlm.data.records import SftRecord
from ray_vlm.evaluate.generate import plan_walks, walk
from ray_vlm.tasks import gui_steps
from ray_vlm.tasks.answers import PromptContext
from ray_vlm.tasks.boxes import Frame

FRAMES = (Frame((100, 100), (100, 100)),)


def _record(task: str, step: int, truth: str = "truth") -> SftRecord:
    context = {"instruction": "go", "task": task, "step": step, "history": (truth,) * step}
    return SftRecord(f"{task}/{step}", 0, ("a.png",), ((100, 100),), {}, context, task)


def _builder(**options: Any) -> Any:
    context = PromptContext(GuiStepsTask(**options), count_tokens=lambda text: 1)
    return SimpleNamespace(
        task=gui_steps,
        frames=lambda record: FRAMES,
        prompt_context=context,
        spec=SimpleNamespace(task=context.options, labels=()),
    )


def test_a_batch_holds_whole_tasks_the_longest_first() -> None:
    names = ["a", "b", "b", "c", "a", "b", "", ""]
    records = [_record(name, 0) for name in names]
    assert plan_walks(records, 2) == ((1, 2, 5, 0, 4), (3, 6), (7,))


def test_each_step_is_told_what_was_answered_to_those_before() -> None:
    records = [_record("a", 0), _record("b", 0), _record("a", 1), _record("a", 2), _record("b", 1)]
    rounds: list[list[tuple[str, tuple[str, ...], int]]] = []

    def answer(asked: Sequence[SftRecord]) -> list[str]:
        rounds.append([(r.id, r.context["history"], r.context["step"]) for r in asked])
        return ["no step" if r.id == "b/0" else f'{{"action": "{r.id}", "bbox_2d": [1, 2, 3, 4]}}' for r in asked]

    answers = walk(records, _builder(), answer)
    assert rounds == [
        [("a/0", (), 0), ("b/0", (), 0)],
        [("a/1", ('{"action":"a/0"}',), 1), ("b/1", (), 0)],
        [("a/2", ('{"action":"a/0"}', '{"action":"a/1"}'), 2)],
    ], "of what was not understood nothing is told, and nowhere the truth"
    assert [answers[i] for i in (1, 3)] == ["no step", '{"action": "a/2", "bbox_2d": [1, 2, 3, 4]}']


def test_the_memory_is_cut_as_in_training() -> None:
    records = [_record("a", step) for step in range(5)]
    last: list[tuple[str, ...]] = []

    def answer(asked: Sequence[SftRecord]) -> list[str]:
        last.append(asked[0].context["history"])
        return [f'{{"action": "{asked[0].id}"}}']

    walk(records, _builder(short_memory=1, long_memory_tokens=4), answer)  # of three tokens each: one and its number
    assert last[-1] == ('{"action":"a/2"}', '{"action":"a/3"}')
