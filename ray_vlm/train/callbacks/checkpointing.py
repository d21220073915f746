"""Checkpoints of a run: what they hold, how they are written, and whether one fits the job that resumes from it.

A checkpoint holds the adapter (or the whole model), optimizer, scheduler, the loss scale of float16 and each rank's
random state, in the files that `transformers.Trainer` reads. Its step is its position in the plan.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ray_vlm.config.schema import Checkpoint as CheckpointOptions
from ray_vlm.data.preprocessing import PREPROCESSING, RULES, describe_preprocessing, rules_since
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import ModelError, RunError
from ray_vlm.methods.trainer import PlannedBatches, PlannedTrainer
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, remove_checkpoint, replace_folder, write_part
from ray_vlm.runs.monitor import Monitor
from ray_vlm.runs.paths import RunPaths, write_folder, write_json
from ray_vlm.runs.store import Store
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.best import score_of
from ray_vlm.train.deepspeed import gather_weights

_SAMPLE = 16  # weights of each tensor that enter the base's fingerprint
# Keys of `preprocessing.json` that decide how a row becomes a prompt, and their names in messages.
_QUESTION = {"task": "task", "labels": "class names", "hints": "hints", "images": "image sizes"}


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
    def load(cls, attempt: Attempt) -> "Progress":
        """Return the progress of the checkpoint that the attempt resumes from."""
        return cls(**attempt.checkpoint.about["progress"]) if attempt.checkpoint is not None else cls()


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


class CheckpointCallback(TrainerCallback):
    """Writes checkpoints into the run, and a line of each. `about`: of `describe_run`; `metric`: `evaluate.metric`."""

    def __init__(
        self,
        store: Store,
        options: CheckpointOptions,
        metric: str,
        attempt: Attempt,
        about: Mapping[str, Any],
        weights: WeightsWriter,
        progress: Progress,
        batches: PlannedBatches,
        monitor: Monitor | None,
        context: DistributedContext,
    ):
        self._store, self._options, self._metric, self._attempt, self._about = store, options, metric, attempt, about
        self._weights, self._progress, self._batches = weights, progress, batches
        self._monitor, self._context = monitor, context
        self._lost_before = list(progress.lost)
        self._seconds = 0.0  # of the last checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the line of the checkpoint that was just written."""
        if self._monitor is not None:
            epoch = state.epoch or 0.0
            self._monitor.write("checkpoint", state.global_step, epoch, {"checkpoint_s": self._seconds})
            self._monitor.publish()

    def gather_lost_rows(self) -> list[Sequence[int]]:
        """Return the rows of all ranks that could not be read, each with its replacement. Every rank must call it."""
        gathered = self._context.all_gather(self._batches.lost)
        self._progress.lost = [*self._lost_before, *(pair for pairs in gathered for pair in pairs)]
        return self._progress.lost

    def write(self, trainer: PlannedTrainer) -> None:
        """Write a checkpoint; every rank calls this at the same step.

        When it returns on rank 0, the checkpoint is committed. Raises `RunError` if it cannot be written.
        """
        started, step, last = time.monotonic(), trainer.state.global_step, self._progress.last
        self._weights.gather()
        self.gather_lost_rows()
        score = score_of(self._metric, last["metrics"]) if last and last["step"] == step else None
        name = checkpoint_name(step, self._attempt.number, self._attempt.token)

        def fill(folder: Path) -> None:
            trainer.save_training_state(folder)
            if self._context.rank == 0:
                self._weights.save(folder)
                trainer.state.save_to_json(str(folder / "trainer_state.json"))

        try:
            self._commit(name, step, score, self._write_parts(name, fill))
        except OSError as error:
            raise self._describe_failure(name, step, error) from error
        self._seconds = time.monotonic() - started

    def _write_parts(self, name: str, fill: Callable[[Path], None]) -> dict[str, Any]:
        """Write this rank's files. Return the entries of all ranks' files for the manifest."""
        if self._context.rank == 0:
            check_owner(self._store, self._attempt)
        parts = self._context.all_gather(write_part(self._store, name, f"rank{self._context.rank}", fill))
        return {file: entry for part in parts for file, entry in part.items()}

    def _commit(self, name: str, step: int, score: float | None, files: dict[str, Any]) -> None:
        if self._context.rank != 0:
            return
        about = {**self._about, "world_size": self._context.world_size, "progress": asdict(self._progress)}
        commit(self._store, name, files, step, attempt=self._attempt.number, score=score, **about)
        with suppress(OSError):  # the new one is already committed; old ones that cannot be deleted stay
            prune(self._store, self._options.keep, self._options.keep_best)

    def _describe_failure(self, name: str, step: int, error: OSError) -> RunError:
        """Return the error for a checkpoint that cannot be written."""
        fix = "make room or fix the store"
        if self._store.local is None and error.errno is not None:
            # An object store's errors have no errno, so this one is of the local disk.
            fix = f"make room in {tempfile.gettempdir()}, where files are made, or set TMPDIR"
        elif self._store.local is not None and self._context.rank == 0:
            with suppress(OSError):  # so that a full disk has room for the error message
                remove_checkpoint(self._store, name)
        return RunError(
            f"checkpoint at step {step} cannot be written to {self._store.address} ({error}). Earlier ones are "
            f"untouched: {fix}, then go on with --resume."
        )


def base_fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of a few values of every frozen unquantised weight: the same for the same base at any path."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad and weight.is_floating_point():
            digest.update(name.replace("base_layer.", "").encode())
            weight = getattr(weight, "ds_tensor", weight)  # under ZeRO-3 each rank has a slice, rank 0 the first one
            digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_run(
    base: str, rows: str, model: str, deepspeed: str | None, formats: Iterable[str], builder: SampleBuilder
) -> dict[str, Any]:
    """Return what a checkpoint stores so that `check_fits` can compare it with the job that resumes from it.

    `base`, `rows`: fingerprints of the base's weights and of the training rows; `model`: `model.name`; `formats`: of
    the training sources.
    """
    question = describe_preprocessing(builder)
    return {
        "base": base,
        "rows": rows,
        "model": model,
        "deepspeed": deepspeed,
        "rules": RULES,
        "formats": sorted(set(formats)),
        "question": json.loads(json.dumps({name: question[name] for name in _QUESTION})),
    }


def check_fits(attempt: Attempt, about: dict[str, Any], num_steps: int, world_size: int) -> None:
    """Raise if the checkpoint belongs to another base, other rows or other prompts, is behind the job's last step, or
    was partitioned by DeepSpeed for other workers. `about`: the return value of `describe_run`."""
    if attempt.checkpoint is None:
        return
    old, name = attempt.checkpoint.about, attempt.checkpoint.name
    if old.get("base") != about["base"]:
        raise ModelError(
            f"{name} was trained on another base (fingerprint {old.get('base')}, model.name has {about['base']}). "
            "Use the same model.name and model.revision, or start a new run."
        )
    if problem := _rows_problem(old, about):
        raise RunError(f"{name} was trained {problem}. Use the same data, or start a new run with model.adapter.")
    cut, cuts = (old.get("deepspeed"), old.get("world_size")), (about["deepspeed"], world_size)
    if cut != cuts and (cut[0] or cuts[0]):
        raise RunError(
            f"{name} was written by {cut[1]} workers under cluster.deepspeed={cut[0]}, each a part, and now there "
            f"are {cuts[1]} under {cuts[0]}. Go on as it was, or start a new run with model.adapter."
        )
    if attempt.step > num_steps:
        raise RunError(
            f"{name} is of step {attempt.step}, behind the {num_steps} steps of this job. Raise train.num_epochs or "
            "train.max_steps, or start a new run."
        )


def _rows_problem(old: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    """Return how the training rows differ from those of the checkpoint and which rules have changed, or None."""
    before, now = old.get("question", {}), about["question"]
    if old.get("rows") != about["rows"]:
        problem = (
            f"on other rows (fingerprint {old.get('rows')}, data.train has {about['rows']}), so the next unseen row is "
            "not known"
        )
    elif changed := [name for name in _QUESTION if name in before and before[name] != now[name]]:
        changes = (f"{_QUESTION[name]} {before[name]!r}, now {now[name]!r}" for name in changed)
        problem = f"with another question: {'; '.join(changes)}"
    else:
        return None
    rules = rules_since(old.get("rules", 0), about["formats"])
    since = f". Since it was written these rules have changed: {'; '.join(rules)}" if rules else ""
    return problem + since
