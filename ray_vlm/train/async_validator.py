"""Validation beside training (`evaluate.asynchronous`): rank 0 writes the weights down, a Ray actor measures them, and
the ranks go on meanwhile.

One validation is under way at a time. Its weights lie in the run as `.validate-<step>` until what was found of them is
in `metrics.jsonl`: where a run is cut off before that, the next attempt has them measured. Ray Train's own
asynchronous validation belongs to checkpoints that Ray keeps, and ours are not (`train/report.py`).
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
from ray_vlm.runs.checkpoints import MANIFEST, Damaged, fetch_folder, open_checkpoint, replace_folder
from ray_vlm.runs.paths import RunPaths
from ray_vlm.runs.store import Store, join
from ray_vlm.train.attempt import Attempt
from ray_vlm.train.context import DistributedContext
from ray_vlm.train.planned_trainer import open_stream
from ray_vlm.train.trainer import build_args, build_context, build_trainer, load_adapted, prepare_process

_PREFIX = ".validate-"


@dataclass(frozen=True)
class Measured:
    """What was found of the weights of `step`; `pictures`: captions and images, on rank 0 alone."""

    step: int
    metrics: dict[str, float]
    pictures: tuple[tuple[str, Any], ...] = ()


class AsyncValidator:
    """Every rank has one and calls `resume`, `begin` and `collect` at the same steps; rank 0's does the work.

    `task`: a `train.worker.WorkerSpec`. `step`: of the weights that are being measured, None while there are none.
    """

    def __init__(self, task: Any, job: JobConfig, paths: RunPaths, context: DistributedContext):
        self.step: int | None = None
        self._task, self._job, self._paths, self._context = task, job, paths, context
        self._actor: Any = None
        self._found: Any = None

    def resume(self, step: int, measured: Collection[int]) -> None:
        """Go on with what an earlier attempt left: weights up to `step` that are not among those `measured`."""
        left = find_left(self._paths.store, step, measured) if self._context.rank == 0 else []
        left = self._context.broadcast(left)
        if left:
            self._start(left[-1])

    def begin(self, step: int, save: Callable[[Path], None]) -> None:
        """Have the weights that `save` writes measured."""
        if self._context.rank == 0:
            replace_folder(self._paths.store, f"{_PREFIX}{step}", save, step)
        self._start(step)

    def ready(self) -> bool:
        """Whether `collect` would not have to wait; on rank 0 alone."""
        if self._found is None:
            return False
        import ray

        return bool(ray.wait([self._found], timeout=0)[0])

    def collect(self) -> Measured:
        """What was found, on all ranks. Raises what the actor refused, or Ray's error where it died."""
        assert self.step is not None
        metrics, pictures = self._get() if self._context.rank == 0 else (None, ())
        found = Measured(self.step, self._context.broadcast(metrics), tuple(pictures))
        self.step = self._found = None
        return found

    def save(self, step: int) -> Callable[[Path], None]:
        """A function that writes the weights of `step`, those that were measured, into a folder."""

        def copy(folder: Path) -> None:
            source = Path(fetch_folder(self._address(step)))
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
            self._discard(source)

        return copy

    def forget(self, step: int) -> None:
        """Delete the weights of `step`: what was found of them is written down."""
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
            # not in the workers' placement group, which has no room for it
            self._actor = actor.options(scheduling_strategy="DEFAULT").remote(self._task)
        self._found = self._actor.measure.remote(self._address(step))

    def _get(self) -> tuple[dict[str, float], list[tuple[str, Any]]]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(self._found)
        except RayTaskError as error:
            if isinstance(error.cause, RayVlmError):
                raise error.cause from None
            raise RuntimeError(f"validation failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:  # in words that are the same each time: a second one at this step is the last
            raise RuntimeError("the process that validates beside training died") from error


def find_left(store: Store, step: int, measured: Collection[int] = ()) -> list[int]:
    """Steps, in order, of whole weights that wait to be measured, up to `step`; what else lies there is deleted."""
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
    """The actor: a trainer of its own that never trains. Loads nothing before it is asked, since an error in an actor's
    constructor would arrive without its type."""

    def __init__(self, task: Any):
        self._task = task
        self._trainer: Any = None

    def measure(self, address: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """Metrics of the weights there, and sample images where the run has trackers."""
        from ray_vlm.evaluate.draw import draw_predictions
        from ray_vlm.train.report import plain

        if self._trainer is None:
            self._trainer = _build_trainer(self._task)
        started, trainer, folder = time.monotonic(), self._trainer, fetch_folder(address)
        trainer._load_from_checkpoint(folder)
        if folder != address:
            shutil.rmtree(folder, ignore_errors=True)
        metrics = trainer.validate(trainer) | {"background_s": time.monotonic() - started}
        track = load_resolved(self._task.job).track
        wanted = track.wandb or track.tensorboard
        return plain(metrics), draw_predictions(getattr(trainer, "shown", ())) if wanted else []


def _build_trainer(task: Any) -> Any:
    """The trainer as a worker builds it, alone in its process."""
    task.environment.apply()
    job = load_resolved(task.job)
    method = job.method.model_copy(update={"rollouts": "transformers"})  # no second vLLM for a few greedy answers
    cluster = job.cluster.model_copy(update={"deepspeed": None})
    job = job.model_copy(update={"method": method, "cluster": cluster})
    prepare_process(job, in_ray=False)
    context, builder = build_context(job, in_ray=False), load_sample_builder(task.spec)
    args, model = build_args(job, task, Attempt(0, "")), load_adapted(job, builder.family, context)
    stream = open_stream(job, task, context, 0)  # which nobody takes anything from
    trainer = build_trainer(job, task, args, model, builder, context, 0, stream)
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # mixed precision, as training has it
    return trainer
