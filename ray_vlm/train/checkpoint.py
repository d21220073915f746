"""Writing checkpoints of a trainer, and checking that one fits the job that resumes from it.

A checkpoint holds the adapter (or the whole model), optimizer, scheduler, the loss scale of float16 and each rank's
random state, in the files that `transformers.Trainer` reads. Its step is its position in the plan.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import RULES, describe_preprocessing, rules_since
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ModelError, RunError
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, remove_checkpoint, write_part
from ray_vlm.runs.store import Store
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.context import DistributedContext

_SAMPLE = 16  # weights of each tensor that enter the base's fingerprint
# Keys of `preprocessing.json` that decide how a row becomes a prompt, and their names in messages.
_QUESTION = {"task": "task", "labels": "class names", "hints": "hints", "images": "image sizes"}


class CheckpointWriter:
    """Writes checkpoints into the run. `keep`: how many of the newest and of the best stay. `about`: `describe_run`."""

    def __init__(
        self,
        store: Store,
        context: DistributedContext,
        attempt: Attempt,
        keep: tuple[int, int],
        about: dict[str, Any],
    ):
        self.store, self.context, self.attempt, self.keep, self.about = store, context, attempt, keep, about

    def write(self, trainer: Any, save: Any, score: float | None, progress: dict[str, Any]) -> None:
        """Write a checkpoint; every rank calls this at the same step. `save(folder)` writes the weights.

        When it returns on rank 0, the checkpoint is committed. Raises `RunError` if it cannot be written.
        """
        step = trainer.state.global_step
        name = checkpoint_name(step, self.attempt.number, self.attempt.token)

        def fill(folder: Path) -> None:
            trainer._save_rng_state(str(folder))
            trainer._save_optimizer_and_scheduler(
                str(folder)
            )  # written by rank 0; under DeepSpeed each rank writes its part
            trainer._save_scaler(str(folder))  # written by rank 0, for float16 only
            if self.context.rank == 0:
                save(folder)
                trainer.state.save_to_json(str(folder / "trainer_state.json"))

        try:
            if self.context.rank == 0:
                check_owner(self.store, self.attempt)
            parts = self.context.all_gather(write_part(self.store, name, f"rank{self.context.rank}", fill))
            if self.context.rank == 0:
                files = {file: entry for part in parts for file, entry in part.items()}
                about = self.about | {"world_size": self.context.world_size, "progress": progress}
                commit(self.store, name, files, step, attempt=self.attempt.number, score=score, **about)
                with suppress(OSError):  # the new one is already committed; old ones that cannot be deleted stay
                    prune(self.store, *self.keep)
        except OSError as error:
            fix = "make room or fix the store"
            if (
                self.store.local is None and error.errno is not None
            ):  # an object store's errors have no errno, so this one is of the local disk
                fix = f"make room in {tempfile.gettempdir()}, where files are made, or set TMPDIR"
            elif self.store.local is not None and self.context.rank == 0:
                with suppress(OSError):  # so that a full disk has room for the error message
                    remove_checkpoint(self.store, name)
            raise RunError(
                f"checkpoint at step {step} cannot be written to {self.store.address} ({error}). Earlier ones are "
                f"untouched: {fix}, then go on with --resume."
            ) from error


def base_fingerprint(model: Any) -> str:
    """Return a hash of a few values of every frozen unquantised weight: the same for the same base at any path."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad and weight.is_floating_point():
            digest.update(name.replace("base_layer.", "").encode())
            weight = getattr(weight, "ds_tensor", weight)  # under ZeRO-3 each rank has a slice, rank 0 the first one
            digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_run(base: str, rows: str, job: JobConfig, builder: SampleBuilder) -> dict[str, Any]:
    """Return what a checkpoint stores so that `check_fits` can compare it with the job that resumes from it.

    `base`, `rows`: fingerprints of the base's weights and of the training rows.
    """
    question = describe_preprocessing(builder)
    return {
        "base": base,
        "rows": rows,
        "model": job.model.name,
        "deepspeed": job.cluster.deepspeed,
        "rules": RULES,
        "formats": sorted({source.format for source in (job.data.train, *job.data.mix) if source is not None}),
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
