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
from ray_vlm.runs.checkpoints import Checkpoint, open_newest, sweep
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
    number = context.broadcast(_take_over(store, token, at_least, driver) if context.rank == 0 else 0)
    checkpoint, folder = open_newest(store, context) or (None, None)
    name = checkpoint.name if checkpoint else "no checkpoint"
    logger.debug(f"attempt {number} of {context.world_size} workers resumes from {name}")
    return Attempt(number, token, _as_now(checkpoint), folder)


def _take_over(store: Store, token: str, at_least: int, driver: Mapping[str, Any] | None) -> int:
    """Make the attempt with this token the owner of the run and return its number."""
    if driver is not None:
        _check_driver(store, driver)
    owner = json.loads(store.read(_OWNER) or b"{}")
    number = max(at_least, owner.get("attempt", 0) + 1)
    store.write(_OWNER, json.dumps({"attempt": number, "token": token}).encode())
    with suppress(OSError):  # incomplete checkpoints are never used, so deleting them is optional
        sweep(store)
    return number


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
    """Prove that all ranks and the driver share one storage. Raises `RunError` on all ranks.

    Every rank writes a file and reads those of the driver and of rank 0, and rank 0 lists the files of all. If every
    rank looked for the file of every other one, 256 ranks would ask the storage 65,536 times.
    """
    folder, host = f".proof-{token}", platform.node()
    problem = _problem(lambda: store.write(f"{folder}/{context.rank}", token.encode()))
    written = context.gather((host, problem))
    messages = [f"worker {r} on {h} cannot write to {store.address}: {p}" for r, (h, p) in enumerate(written) if p]
    messages = context.broadcast(messages)  # every file is written now
    if not messages:
        names = {"run.json": "the driver"} | ({f"{folder}/0": "worker 0"} if context.rank > 0 else {})
        unseen = [who for name, who in names.items() if not _sees(store, name, wait_s)]
        if context.rank == 0:
            unseen += [f"worker {r} on {written[r][0]}" for r in _unlisted(store, folder, context.world_size, wait_s)]
        messages = [
            f"worker {r} on {written[r][0]} does not see what {who} wrote to {store.address}"
            for r, missing in enumerate(context.gather(unseen))
            for who in missing
        ]
        messages = context.broadcast(messages)  # every rank has read the files now
    if context.rank == 0 or messages:  # without messages all ranks share this folder
        _problem(lambda: store.remove(folder))
    if messages:
        fix = "Give a run.output_dir on a file system that all nodes share and may write to, or s3://..."
        raise RunError([*messages, f"run.output_dir: {fix}"])


def _unlisted(store: Store, folder: str, world_size: int, wait_s: float) -> list[int]:
    """Return the ranks whose files are not in `folder` after `wait_s`."""
    missing = list(range(world_size))

    def all_there() -> bool:
        nonlocal missing
        listed = store.files(folder)
        missing = [rank for rank in missing if str(rank) not in listed]
        return not missing

    _wait_until(all_there, wait_s)
    return missing


def _problem(do: Callable[[], Any]) -> str | None:
    try:
        do()
    except OSError as error:
        return str(error)
    return None


def _sees(store: Store, name: str, wait_s: float) -> bool:
    return _wait_until(lambda: store.read(name) is not None, wait_s)


def _wait_until(is_true: Callable[[], bool], wait_s: float) -> bool:
    """Return whether the condition comes true within `wait_s`. An error of the storage counts as not yet."""
    until = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if is_true():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
