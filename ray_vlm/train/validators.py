"""Validation of a run's weights: in the training processes, or beside them (`evaluate.asynchronous`).

Asynchronous: rank 0 saves the weights, a Ray actor validates them, and training continues meanwhile. One validation
runs at a time. Its weights stay in the run folder as `.validate-<step>` until the metrics are in `metrics.jsonl`; if
the run ends before that, the next attempt validates them. Ray Train's own asynchronous validation needs checkpoints
that Ray manages, and this package writes its own.
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.load import load_resolved
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.runs.checkpoints import MANIFEST, Damaged, fetch_folder, open_checkpoint, replace_folder
from ray_vlm.runs.monitor import as_python_numbers
from ray_vlm.storage import Store, join
from ray_vlm.train.worker_spec import WorkerSpec

# The actor's process imports this module before it has the driver's environment, which libraries read when they load.
if TYPE_CHECKING:
    from PIL.Image import Image
    from ray import ObjectRef

    from ray_vlm.evaluate.validate import Validation
    from ray_vlm.methods.trainer import PlannedTrainer
    from ray_vlm.train.run_context import RunContext

_PREFIX = ".validate-"

Pictures = Sequence[tuple[str, "Image"]]  # captions and images


@dataclass(frozen=True)
class ValidationResult:
    """The metrics of the weights of `step`. On rank 0, `draw` returns sample images and `save` writes the weights."""

    step: int
    metrics: dict[str, float]
    draw: Callable[[], Pictures]
    save: Callable[[Path], None]


class Validator(ABC):
    """Validates one state of the weights at a time. All ranks call `submit` and `result` at the same steps.

    `step`: the step of the weights whose result was not taken yet, or None. `waits`: whether `submit` returns only
    when the result is there.
    """

    step: int | None = None
    waits: bool

    @abstractmethod
    def resume(self, step: int, measured: Collection[int]) -> None:
        """Validate weights up to `step` that an earlier attempt left and whose steps are not in `measured`."""

    @abstractmethod
    def submit(self, trainer: "PlannedTrainer", since: float) -> None:
        """Start the validation of the trainer's weights. `since`: the `time.monotonic()` since which training waits."""

    @abstractmethod
    def ready(self) -> bool:
        """Return whether `result` would return without waiting."""

    @abstractmethod
    def result(self) -> ValidationResult:
        """Return the result, on all ranks."""

    def discard(self, step: int) -> None:  # noqa: B027  (nothing may have been kept)
        """Delete what was kept of the weights of `step`, once their metrics have been written."""


class SyncValidator(Validator):
    """Validates in the training processes, which wait."""

    waits = True

    def __init__(self, validation: "Validation", run: "RunContext"):
        self._validation, self._run = validation, run
        self._result: ValidationResult | None = None

    def resume(self, step: int, measured: Collection[int]) -> None:
        """Delete weights that an earlier, asynchronous attempt left: nothing will validate them."""
        if self._run.distributed.rank == 0:
            find_left(self._run.paths.store, -1)

    def submit(self, trainer: "PlannedTrainer", since: float) -> None:
        """Validate the trainer's weights."""
        from ray_vlm.evaluate.prediction import draw_predictions

        self.step = trainer.state.global_step
        metrics, predictions = self._validation.measure(trainer)
        draw = partial(draw_predictions, predictions)
        self._result = ValidationResult(self.step, metrics, draw, self._run.weights.save)

    def ready(self) -> bool:
        return self._result is not None

    def result(self) -> ValidationResult:
        result, self._result, self.step = self._result, None, None
        assert result is not None
        return result


class AsyncValidator(Validator):
    """Starts validations in an actor, to which only rank 0 talks.

    `spec`: of the workers; `resources`: the actor's number of CPUs and of GPUs.
    """

    waits = False

    def __init__(self, spec: WorkerSpec, resources: tuple[float, float], run: "RunContext"):
        self._spec, self._resources, self._run = spec, resources, run
        self._paths, self._context = run.paths, run.distributed
        self._submit_s = 0.0
        self._actor: Any = None  # Ray's handle of the `_ValidationActor`
        self._pending: ObjectRef | None = None  # its current answer

    def resume(self, step: int, measured: Collection[int]) -> None:
        left = find_left(self._paths.store, step, measured) if self._context.rank == 0 else []
        left = self._context.broadcast(left)
        if left:
            self._start(left[-1])

    def submit(self, trainer: "PlannedTrainer", since: float) -> None:
        """Save the weights and start their validation."""
        step = trainer.state.global_step
        self._run.weights.gather()
        if self._context.rank == 0:
            replace_folder(self._paths.store, f"{_PREFIX}{step}", self._run.weights.save, step)
        self._start(step)
        self._submit_s = time.monotonic() - since

    def ready(self) -> bool:
        """Return whether `result` would return without waiting; False on other ranks than 0."""
        if self._pending is None:
            return False
        import ray

        return bool(ray.wait([self._pending], timeout=0)[0])

    def result(self) -> ValidationResult:
        """Return the result on all ranks. Raises the actor's `RayVlmError`, or `RuntimeError` if it failed or died.

        `validation_s` is the time that training waited.
        """
        assert self.step is not None
        step = self.step
        metrics, pictures = self._get() if self._context.rank == 0 else ({}, [])
        metrics = self._context.broadcast(metrics) | {"validation_s": self._submit_s}
        self.step = self._pending = None
        return ValidationResult(step, metrics, lambda: pictures, partial(self._copy, step))

    def discard(self, step: int) -> None:
        if self._context.rank == 0:
            self._paths.store.remove(f"{_PREFIX}{step}")

    def _copy(self, step: int, folder: Path) -> None:
        """Write the validated weights of `step` into a folder."""
        source = Path(fetch_folder(self._address(step)))
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        if self._paths.remote is not None:
            shutil.rmtree(source, ignore_errors=True)

    def _address(self, step: int) -> str:
        return join(self._paths.address, f"{_PREFIX}{step}")

    def _start(self, step: int) -> None:
        self.step = step
        if self._context.rank > 0:
            return
        import ray

        if self._actor is None:
            num_cpus, num_gpus = self._resources
            actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_ValidationActor)
            # Outside the workers' placement group, which has no free resources.
            self._actor = actor.options(scheduling_strategy="DEFAULT").remote(self._spec)
        self._pending = self._actor.measure.remote(self._address(step))

    def _get(self) -> tuple[dict[str, float], Pictures]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            assert self._pending is not None
            return ray.get(self._pending)
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RuntimeError(f"validation failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:  # a constant text: the same failure twice at one step ends the run (restarts.py)
            raise RuntimeError("the process that validates beside training died") from error


def find_left(store: Store, step: int, measured: Collection[int] = ()) -> list[int]:
    """Return the steps, in order, of complete weights up to `step` that still need a validation; delete all others."""
    left: list[int] = []
    for name in store.names():
        if not name.startswith(_PREFIX):
            continue
        number = int(name.removeprefix(_PREFIX)) if name.removeprefix(_PREFIX).isdigit() else step + 1
        if number <= step and number not in measured and _is_whole(store, name):
            left.append(number)
        else:
            store.remove(name)
    return sorted(left)


def _is_whole(store: Store, name: str) -> bool:
    try:
        _, folder = open_checkpoint(store, name)
    except (Damaged, RunError):
        return False
    if store.local is None:
        shutil.rmtree(folder, ignore_errors=True)
    return True


class _ValidationActor:
    """The Ray actor: a trainer that only validates. It loads the model at the first call, because Ray loses the type of
    an error that an actor's constructor raises."""

    def __init__(self, spec: WorkerSpec):
        self._spec = spec
        self._loaded: tuple[PlannedTrainer, Validation] | None = None

    def measure(self, address: str) -> tuple[dict[str, Any], Pictures]:
        """Return the metrics of the weights at `address`, and sample images if the run has trackers."""
        from ray_vlm.evaluate.prediction import draw_predictions

        if self._loaded is None:
            self._loaded = _load(self._spec)
        trainer, validation = self._loaded
        started, folder = time.monotonic(), fetch_folder(address)
        trainer.load_weights(Path(folder))
        if folder != address:
            shutil.rmtree(folder, ignore_errors=True)
        metrics, predictions = validation.measure(trainer)
        metrics |= {"background_s": time.monotonic() - started}
        track = load_resolved(self._spec.job).track
        return as_python_numbers(metrics), draw_predictions(predictions) if track.wandb or track.tensorboard else []


def _load(spec: WorkerSpec) -> "tuple[PlannedTrainer, Validation]":
    """Build the trainer of a worker, for a single process, and the validation of all eval rows."""
    from ray_vlm.train.beside import load_beside
    from ray_vlm.train.build import build_validation

    cluster = load_resolved(spec.job).cluster
    beside = load_beside(spec, (cluster.cpus_per_worker, cluster.gpus_per_worker))
    trainer = beside.trainer
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # for the mixed precision of training
    return trainer, build_validation(beside.job, spec, beside.builder, beside.context)
