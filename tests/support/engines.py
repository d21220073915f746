"""A stand-in for an engine."""

from collections.abc import Sequence
from typing import Any

from ray_vlm.data.spec import Sample
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling


class RecordingEngine(Engine):
    """Answers with what it is given, and keeps every call.

    `groups`: what each `sample` returns; None: for each row as many completions as asked, whose tokens are `ids`.
    `calls`: name and arguments of each, in order."""

    def __init__(self, groups: list[list[Completion]] | None = None, ids: Sequence[int] = (20, 2)):
        self._groups, self._ids = groups, list(ids)
        self.calls: list[tuple[str, Any]] = []

    def update(self, model: Any) -> None:
        self.calls.append(("update", model))

    def sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        self.calls.append(("sample", (list(rows), sampling, list(seeds), pixels)))
        if self._groups is not None:
            return self._groups
        completion = Completion(self._ids, [0.0] * len(self._ids), True)
        return [[completion] * sampling.num_generations for _ in rows]

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        self.calls.append(("answer", (list(rows), max_new_tokens)))
        return [self._ids for _ in rows]

    def close(self) -> None:
        self.calls.append(("close", None))
