"""What the callbacks of a run share: its folder, the attempt, its plan and progress, and the weights to write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ray_vlm.data.plan import Plan
from ray_vlm.data.preprocessing import PREPROCESSING
from ray_vlm.distributed import DistributedContext
from ray_vlm.runs.checkpoints import replace_folder
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths, write_folder, write_json
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.deepspeed import gather_weights


@dataclass
class Progress:
    """The state of a run that goes into every checkpoint, which the callbacks share.

    `best`: `{"step", "metrics", "path"}` of the best validation, or None; `since_best`: validations since the metric
    last improved; `last`: step and metrics of the last validation; `epoch_losses`: of the current epoch; `lost`: the
    rows of all ranks that could not be read, each with its replacement.
    """

    best: dict[str, Any] | None = None
    since_best: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    last: dict[str, Any] | None = None
    lost: list[Sequence[int]] = field(default_factory=list)

    @classmethod
    def load(cls, attempt: Attempt, best_path: str) -> "Progress":
        """Return the progress of the checkpoint that the attempt resumes from. `best_path`: of `best/` by now."""
        progress = cls(**attempt.checkpoint.about["progress"]) if attempt.checkpoint is not None else cls()
        if progress.best is not None:
            progress.best = {**progress.best, "path": best_path}
        return progress

    def keep(self, best: dict[str, Any] | None, since_best: int, last: dict[str, Any] | None = None) -> None:
        """Keep the state after a validation."""
        self.best, self.since_best, self.last = best, since_best, last or self.last


class WeightsWriter:
    """Writes what is trained, and its preprocessing, into a folder. All ranks call `gather`, then rank 0 `save`.

    `processor`: saved with a model without an adapter. `partitioned`: under ZeRO-3 every rank has a slice of each
    weight. `preprocessing`: of `describe_preprocessing`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        has_adapter: bool,
        partitioned: bool,
        rank: int,
        preprocessing: Mapping[str, Any],
    ):
        self._model, self._processor, self._has_adapter = model, processor, has_adapter
        self._partitioned, self._rank, self._preprocessing = partitioned, rank, preprocessing
        self._gathered: dict[str, Any] = {}  # under ZeRO-3: the complete weights

    def gather(self) -> None:
        """Collect the complete weights, if every rank has a part of them."""
        if self._partitioned:
            self._gathered = {"state_dict": gather_weights(self._model, self._has_adapter, self._rank)}

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`."""
        # TRL may have another adapter for the reference.
        only: dict[str, Any] = {"selected_adapters": ["default"]} if self._has_adapter else {}
        self._model.save_pretrained(folder, **only, **self._gathered)
        if not self._has_adapter:
            self._processor.save_pretrained(folder)
        write_json(folder / PREPROCESSING, self._preprocessing)


def publish_weights(paths: RunPaths, folder: Path, save: Callable[[Path], None], step: int) -> None:
    """Replace `best/` or `final/` of the run."""
    if paths.remote is None:
        write_folder(folder, save)
    else:
        replace_folder(paths.store, folder.name, save, step)


@dataclass(frozen=True)
class RunContext:
    """A rank's view of its run. `monitor`: of rank 0, None on the others."""

    paths: RunPaths
    attempt: Attempt
    plan: Plan
    distributed: DistributedContext
    weights: WeightsWriter
    progress: Progress
    monitor: Monitor | None

    def write(self, kind: str, step: int, epoch: float | None, values: dict[str, float]) -> None:
        """Write a line of metrics, on rank 0."""
        if self.monitor is not None:
            self.monitor.write(kind, step, epoch or 0.0, values, self.progress.best)

    def publish(self) -> None:
        """Copy the metrics to the object store, if any, on rank 0."""
        if self.monitor is not None:
            self.monitor.publish()
