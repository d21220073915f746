"""What a trainer's state becomes on disk, and that it fits what is loaded.

A checkpoint holds the adapter (or the whole model), optimizer, scheduler, the loss scale of float16 and each rank's
random state, in the files that `transformers.Trainer` reads back; where it stands in the plan is its step.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_vlm.config.schema import JobConfig
from ray_vlm.data.preprocessing import describe_preprocessing
from ray_vlm.data.rules import RULES, rules_since
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.errors import ModelError, RunError
from ray_vlm.runs.checkpoints import checkpoint_name, commit, prune, remove_checkpoint, write_part
from ray_vlm.runs.store import Store
from ray_vlm.train.attempt import Attempt, check_owner
from ray_vlm.train.context import DistributedContext

_SAMPLE = 16  # weights of each tensor that enter the base's fingerprint
# What of `preprocessing.json` decides how a row is asked, and what it is called.
_QUESTION = {"task": "task", "labels": "class names", "hints": "hints", "images": "image sizes"}


class CheckpointWriter:
    """Writes checkpoints of `trainer` into the run. `save(folder)` writes weights; `keep`, `keep_best`: retention."""

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
        """Called by every rank at the same step; when it returns on rank 0, the checkpoint counts."""
        step = trainer.state.global_step
        name = checkpoint_name(step, self.attempt.number, self.attempt.token)

        def fill(folder: Path) -> None:
            trainer._save_rng_state(str(folder))
            trainer._save_optimizer_and_scheduler(str(folder))  # rank 0's; under DeepSpeed each rank has its part
            trainer._save_scaler(str(folder))  # rank 0's, where float16 needs one
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
                with suppress(OSError):  # the new one counts already; what could not be deleted stays
                    prune(self.store, *self.keep)
        except OSError as error:
            fix = "make room or mend the store"
            if self.store.local is None and error.errno is not None:  # no store's number: this machine's
                fix = f"make room in {tempfile.gettempdir()}, where files are made, or set TMPDIR"
            elif self.store.local is not None and self.context.rank == 0:
                with suppress(OSError):  # so that a full disk has room for what went wrong
                    remove_checkpoint(self.store, name)
            raise RunError(
                f"checkpoint at step {step} cannot be written to {self.store.address} ({error}). Earlier ones are "
                f"untouched: {fix}, then go on with --resume."
            ) from error


def base_fingerprint(model: Any) -> str:
    """A hash of a few values of every frozen unquantised weight: the same for the same base, whatever its path."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad and weight.is_floating_point():
            digest.update(name.replace("base_layer.", "").encode())
            weight = getattr(weight, "ds_tensor", weight)  # under ZeRO-3 each rank has a slice; rank 0 the first
            digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_run(base: str, rows: str, job: JobConfig, builder: SampleBuilder) -> dict[str, Any]:
    """What a checkpoint keeps so that `check_fits` can tell whether it belongs to a run. `base`, `rows`: fingerprints
    of the base's weights and of the training rows."""
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
    """Raise where the checkpoint belongs to another base, other rows or another question, lies behind the run's end,
    or where DeepSpeed cut it into other pieces. `about`: as `describe_run` gives it."""
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
            f"{name} was written by {cut[1]} workers under cluster.deepspeed={cut[0]}, each its part, and now there "
            f"are {cuts[1]} under {cuts[0]}. Go on as it was, or start a new run with model.adapter."
        )
    if attempt.step > num_steps:
        raise RunError(
            f"{name} is of step {attempt.step}, behind the {num_steps} steps of this job. Raise train.num_epochs or "
            "train.max_steps, or start a new run."
        )


def _rows_problem(old: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    """What training would see otherwise than when the checkpoint was written, and which rules changed since."""
    if old.get("rows") != about["rows"]:
        problem = (
            f"on other rows (fingerprint {old.get('rows')}, data.train has {about['rows']}), so the next unseen row is "
            "not known"
        )
    elif changed := [name for name in _QUESTION if name in old.get("question", {}) and not _same(name, old, about)]:
        told = (f"{_QUESTION[name]} {old['question'][name]!r}, now {about['question'][name]!r}" for name in changed)
        problem = f"with another question: {'; '.join(told)}"
    else:
        return None
    rules = rules_since(old.get("rules", 0), about["formats"])
    since = f". Since it was written these rules have changed: {'; '.join(rules)}" if rules else ""
    return problem + since


def _same(name: str, old: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    return old["question"][name] == about["question"][name]
