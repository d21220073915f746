"""Asynchronous validation (`evaluate.asynchronous`): rank 0 saves the weights, a Ray actor validates them, and training
continues meanwhile.

One validation runs at a time. Its weights stay in the run folder as `.validate-<step>` until the metrics are in
`metrics.jsonl`; if the run ends before that, the next attempt validates them. Ray Train's own asynchronous validation
needs checkpoints that Ray manages, and this package writes its own (`train/report.py`).
"""

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.errors import RayVlmError, RunError
from ray_vlm.models.load import load_adapted
from ray_vlm.runs.checkpoints import MANIFEST, Damaged, fetch_folder, open_checkpoint, replace_folder
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.store import Store, join
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.planned_trainer import open_stream
from ray_vlm.train.trainer import build_args, build_context, build_trainer, prepare_process

_PREFIX = ".validate-"


@dataclass(frozen=True)
class Measured:
    """Metrics of the weights of `step`, and `pictures`: captions and images, on rank 0 only."""

    step: int
    metrics: dict[str, float]
    pictures: tuple[tuple[str, Any], ...] = ()


class AsyncValidator:
    """Starts validations in an actor. Every rank calls `resume`, `begin` and `collect` at the same steps; only rank 0
    talks to the actor.

    `task`: a `WorkerSpec`. `step`: the step of the weights that are being validated, or None.
    """

    def __init__(self, task: Any, job: JobConfig, paths: RunPaths, context: DistributedContext):
        self.step: int | None = None
        self._task, self._job, self._paths, self._context = task, job, paths, context
        self._actor: Any = None
        self._pending: Any = None

    def resume(self, step: int, measured: Collection[int]) -> None:
        """Validate weights up to `step` that an earlier attempt left and whose steps are not in `measured`."""
        left = find_left(self._paths.store, step, measured) if self._context.rank == 0 else []
        left = self._context.broadcast(left)
        if left:
            self._start(left[-1])

    def begin(self, step: int, save: Callable[[Path], None]) -> None:
        """Start the validation of the weights that `save` writes."""
        if self._context.rank == 0:
            replace_folder(self._paths.store, f"{_PREFIX}{step}", save, step)
        self._start(step)

    def ready(self) -> bool:
        """Return whether `collect` would return without waiting. Call it on rank 0 only."""
        if self._pending is None:
            return False
        import ray

        return bool(ray.wait([self._pending], timeout=0)[0])

    def collect(self) -> Measured:
        """Return the result on all ranks. Raises the actor's `RayVlmError`, or `RuntimeError` if it failed or died."""
        assert self.step is not None
        metrics, pictures = self._get() if self._context.rank == 0 else (None, ())
        measured = Measured(self.step, self._context.broadcast(metrics), tuple(pictures))
        self.step = self._pending = None
        return measured

    def save(self, step: int) -> Callable[[Path], None]:
        """Return a function that writes the validated weights of `step` into a folder."""

        def copy(folder: Path) -> None:
            source = Path(fetch_folder(self._address(step)))
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
            self._discard(source)

        return copy

    def forget(self, step: int) -> None:
        """Delete the weights of `step` once their metrics have been written."""
        if self._context.rank == 0:
            self._paths.store.remove(f"{_PREFIX}{step}")

    def _address(self, step: int) -> str:
        return join(self._paths.address, f"{_PREFIX}{step}")

    def _discard(self, folder: Path) -> None:
        if self._paths.remote is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, step: int) -> None:
        self.step = step
        if self._context.rank > 0:
            return
        import ray

        if self._actor is None:
            cluster = self._job.cluster
            actor = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)(_Validator)
            # outside the workers' placement group, which has no free resources
            self._actor = actor.options(scheduling_strategy="DEFAULT").remote(self._task)
        self._pending = self._actor.measure.remote(self._address(step))

    def _get(self) -> tuple[dict[str, float], list[tuple[str, Any]]]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
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


class _Validator:
    """The Ray actor: a trainer that only validates. It loads the model at the first call, because Ray loses the type of
    an error that an actor's constructor raises."""

    def __init__(self, task: Any):
        self._task = task
        self._trainer: Any = None

    def measure(self, address: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """Return the metrics of the weights at `address`, and sample images if the run has trackers."""
        from ray_vlm.evaluate.draw import draw_predictions
        from ray_vlm.runs.monitor import as_python_numbers

        if self._trainer is None:
            self._trainer = _build_trainer(self._task)
        started, trainer, folder = time.monotonic(), self._trainer, fetch_folder(address)
        trainer._load_from_checkpoint(folder)
        if folder != address:
            shutil.rmtree(folder, ignore_errors=True)
        metrics = trainer.validate(trainer) | {"background_s": time.monotonic() - started}
        track = load_resolved(self._task.job).track
        wanted = track.wandb or track.tensorboard
        return as_python_numbers(metrics), draw_predictions(getattr(trainer, "shown", ())) if wanted else []


def _build_trainer(task: Any) -> Any:
    """Build the trainer of a worker, for a single process."""
    task.environment.apply()
    job = load_resolved(task.job)
    method = job.method.model_copy(
        update={"rollouts": "transformers"}
    )  # a second vLLM engine does not pay for a few greedy answers
    cluster = job.cluster.model_copy(update={"deepspeed": None})
    job = job.model_copy(update={"method": method, "cluster": cluster})
    prepare_process(job, in_ray=False)
    context, builder = build_context(job, in_ray=False), load_sample_builder(task.spec)
    args = build_args(job, task, Attempt(0, ""))
    model = load_adapted(job.model, job.lora, job.train, builder.family, context.device, job.seed, job.tune.resident)
    stream = open_stream(job, task, context, 0)  # never read
    trainer = build_trainer(job, task, args, model, builder, context, 0, stream)
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # for the mixed precision of training
    return trainer
