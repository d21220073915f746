"""What the ranks agree on before anything is loaded: that all of them share the run's storage, the number of this
attempt, and the checkpoint that it resumes from.

The newest attempt owns the run. An older one that is still alive, for example after a network failure, notices this
before it commits anything.
"""

import json
import logging
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.data.preprocessing import own_settings
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import RunError
from ray_vlm.runs.checkpoints import Checkpoint, open_checkpoint, open_newest, sweep
from ray_vlm.runs.manifest import check_own
from ray_vlm.storage import Store

logger = logging.getLogger(__name__)
_OWNER = ".attempt.json"
_SEE_S = 15.0  # how long a network file system may take to show a new file to other nodes


@dataclass(frozen=True)
class Attempt:
    """One launch of the workers. `token` is unique. `checkpoint`, `folder`: what it resumes from, or None."""

    number: int
    token: str
    checkpoint: Checkpoint | None = None
    folder: Path | None = None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def begin_attempt(
    store: Store,
    context: DistributedContext,
    at_least: int,
    driver: Mapping[str, Any] | None = None,
) -> Attempt:
    """Check the storage, take over the run and find its newest complete checkpoint. All ranks return the same attempt.

    `at_least`: the number that the driver gave; workers that Ray restarted by itself count on from the last one.
    `driver`: the process that must still drive the run, as in `run.json`.
    """
    token = context.broadcast(uuid.uuid4().hex[:8])
    if context.ray:
        prove_storage(store, context, token)
    if context.rank > 0:
        number, name = context.broadcast((0, None))
        checkpoint, folder = open_checkpoint(store, name) if name else (None, None)
        return Attempt(number, token, _as_now(checkpoint), folder)
    if driver is not None:
        _check_driver(store, driver)
    owner = json.loads(store.read(_OWNER) or b"{}")
    number = max(at_least, owner.get("attempt", 0) + 1)
    store.write(_OWNER, json.dumps({"attempt": number, "token": token}).encode())
    with suppress(OSError):  # incomplete checkpoints are never used, so deleting them is optional
        sweep(store)
    checkpoint, folder = open_newest(store) or (None, None)
    name = checkpoint.name if checkpoint else None
    logger.debug(f"attempt {number} of {context.world_size} workers resumes from {name or 'no checkpoint'}")
    context.broadcast((number, name))
    return Attempt(number, token, _as_now(checkpoint), folder)


def _as_now(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return a checkpoint of an earlier version with the keys of this one, so that a job can be compared with it."""
    if checkpoint is None or "question" not in checkpoint.about:
        return checkpoint
    question = own_settings(checkpoint.about["question"])
    return replace(checkpoint, about={**checkpoint.about, "question": question})


def check_owner(store: Store, attempt: Attempt) -> None:
    """Raise `RunError` if a newer attempt has taken over the run. Call it before every commit."""
    owner = json.loads(store.read(_OWNER) or b"{}")
    if owner.get("token") != attempt.token:
        by = f"taken over by attempt {owner.get('attempt')}" if owner else "deleted"
        by += " of another driver" if owner and owner.get("attempt", 0) <= attempt.number else ""
        raise RunError(f"attempt {attempt.number} of {store.address} was {by}, so it writes nothing more.")


def _check_driver(store: Store, driver: Mapping[str, Any], wait_s: float = _SEE_S) -> None:
    """Raise `RunError` if another driver has taken over the run: workers that Ray restarted must not take it back."""
    until = time.monotonic() + wait_s
    while True:
        try:
            return check_own(store, driver)
        except RunError:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def prove_storage(store: Store, context: DistributedContext, token: str, wait_s: float = _SEE_S) -> None:
    """Have every rank write a file and read those of all others and of the driver. Raises `RunError` on all ranks."""
    own, host = f".proof-{token}-{context.rank}", platform.node()
    problems = context.all_gather((host, _problem(lambda: store.write(own, token.encode()))))
    messages = [f"worker {r} on {h} cannot write to {store.address}: {p}" for r, (h, p) in enumerate(problems) if p]
    if not messages:
        names = {".proof-" + f"{token}-{r}": f"worker {r} on {h}" for r, (h, _) in enumerate(problems)}
        names["run.json"] = "the driver"
        unseen = context.all_gather([who for name, who in names.items() if not _sees(store, name, wait_s)])
        messages = [
            f"worker {r} on {problems[r][0]} does not see what {who} wrote to {store.address}"
            for r, missing in enumerate(unseen)
            for who in missing
        ]
    context.all_gather(None)  # a barrier: every rank has read all files before they are removed
    if not _problem(lambda: store.read(own)):
        store.remove(own)
    if messages:
        fix = "Give a run.output_dir on a file system that all nodes share and may write to, or s3://..."
        raise RunError([*messages, f"run.output_dir: {fix}"])


def _problem(do: Callable[[], Any]) -> str | None:
    try:
        do()
    except OSError as error:
        return str(error)
    return None


def _sees(store: Store, name: str, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        try:
            if store.read(name) is not None:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
