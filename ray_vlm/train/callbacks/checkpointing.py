"""Checkpoints of a run: what they hold, how they are written, and whether one fits the job that resumes from it.

A checkpoint holds the adapter (or the whole model), optimizer, scheduler, the loss scale of float16 and each rank's
random state, in the files that `transformers.Trainer` reads. Its step is its position in the plan.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ray_vlm.config.schema import Checkpoint as CheckpointOptions
from ray_vlm.data.preprocessing import RULES, describe_preprocessing, rules_since
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ModelError, RunError
from ray_vlm.methods.trainer import PlannedBatches, PlannedTrainer
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, remove_checkpoint, write_part
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.best import score_of
from ray_vlm.train.callbacks.metrics import StepTimer
from ray_vlm.train.run_context import RunContext

_SAMPLE = 16  # weights of each tensor that enter the base's fingerprint
# Keys of `preprocessing.json` that decide how a row becomes a prompt, and their names in messages.
_QUESTION = {"task": "task", "labels": "class names", "hints": "hints", "images": "image sizes"}


class CheckpointCallback(TrainerCallback):
    """Writes checkpoints into the run, and a line of each. `about`: of `describe_run`; `metric`: `evaluate.metric`."""

    def __init__(
        self,
        run: RunContext,
        options: CheckpointOptions,
        metric: str,
        about: Mapping[str, Any],
        batches: PlannedBatches,
        timer: StepTimer,
    ):
        self._timer = timer
        self._run, self._store, self._options, self._metric = run, run.paths.store, options, metric
        self._about, self._batches = about, batches
        self._lost_before = list(run.progress.lost)
        self._seconds = 0.0  # of the last checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the line of the checkpoint that was just written."""
        self._run.write("checkpoint", state.global_step, state.epoch, {"checkpoint_s": self._seconds})
        self._run.publish()
        self._timer.restart()  # last: nothing of a checkpoint is part of the next step

    def gather_lost_rows(self) -> list[Sequence[int]]:
        """Return on rank 0 the rows of all ranks that could not be read, each with its replacement. Every rank must
        call it; other ranks return the rows of earlier attempts."""
        gathered = self._run.distributed.gather(self._batches.lost)
        lost = [*self._lost_before, *(pair for pairs in gathered for pair in pairs)]
        self._run.progress.lost = lost
        return lost

    def write(self, trainer: PlannedTrainer) -> None:
        """Write a checkpoint; every rank calls this at the same step.

        When it returns on rank 0, the checkpoint is committed. Raises `RunError` if it cannot be written.
        """
        started, step, last = time.monotonic(), trainer.state.global_step, self._run.progress.last
        self._run.weights.gather()
        self.gather_lost_rows()
        score = score_of(self._metric, last["metrics"]) if last and last["step"] == step else None
        attempt, ranks, store = self._run.attempt, self._run.distributed, self._store
        name = checkpoint_name(step, attempt.number, attempt.token)

        def fill(folder: Path) -> None:
            trainer.save_training_state(folder)
            if ranks.rank == 0:
                self._run.weights.save(folder)
                trainer.state.save_to_json(str(folder / "trainer_state.json"))

        try:
            if ranks.rank == 0:
                check_owner(store, attempt)
            parts = ranks.gather(write_part(store, name, f"rank{ranks.rank}", fill))
            if ranks.rank == 0:
                files = {file: entry for part in parts for file, entry in part.items()}
                about = {**self._about, "world_size": ranks.world_size, "progress": asdict(self._run.progress)}
                commit(store, name, files, step, attempt=attempt.number, score=score, **about)
                with suppress(OSError):  # the new one is already committed; old ones that cannot be deleted stay
                    prune(store, self._options.keep, self._options.keep_best)
        except OSError as error:
            raise self._describe_failure(name, step, error) from error
        self._seconds = time.monotonic() - started

    def _describe_failure(self, name: str, step: int, error: OSError) -> RunError:
        """Return the error for a checkpoint that cannot be written."""
        fix = "make room or fix the store"
        if self._store.local is None and error.errno is not None:
            # An object store's errors have no errno, so this one is of the local disk.
            fix = f"make room in {tempfile.gettempdir()}, where files are made, or set TMPDIR"
        elif self._store.local is not None and self._run.distributed.rank == 0:
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
