"""Atomic checkpoints: a checkpoint is complete or is not used.

A checkpoint is a folder `checkpoint-<step>-a<attempt>-<id>`, a name that no other attempt uses. Its `manifest.json` is
written last and lists every file with size and SHA-256. The manifest is the commit, which needs no rename and so works
in object stores: without it, or with a missing, altered or additional file, the previous checkpoint is used. In an
object store `best/` and `final/` have a manifest too. Imports nothing heavy.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_vlm import __version__
from ray_vlm.distributed import DistributedContext
from ray_vlm.errors import RunError
from ray_vlm.storage import Store, is_remote, making, split_address, whole_or_gone

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1  # version of the manifest and of the files of a checkpoint
_NAME = re.compile(r"checkpoint-(\d+)-a(\d+)-([0-9a-f]+)")
# Files that only the rank of that number reads: its random state, and its partition under DeepSpeed. Some versions of
# DeepSpeed read the model states of rank 0 on every rank.
_OF_RANK = re.compile(
    r"(?:.*/)?(?:rng_state_|(?:bf16_)?zero_pp_rank_(?!0_\w+_model_states))(\d+)(?:_\w+_states)?\.(?:pth|pt)"
)

_PASSED_OVER = "{name} cannot be used: {reason}. Looking for the one before it."

Files = dict[str, tuple[int, str]]  # name -> (bytes, SHA-256)


class Damaged(Exception):
    """Raised for a folder that is not a complete checkpoint; the text is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `score`: of the validation at its step, higher is better, or None.

    `about`: free data of the writer, such as the base's fingerprint and the run's progress.
    """

    name: str
    step: int
    attempt: int
    score: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)


def checkpoint_name(step: int, attempt: int, token: str) -> str:
    """Return the name of a checkpoint's folder. `token`: hexadecimal, drawn once for each attempt."""
    return f"checkpoint-{step}-a{attempt}-{token}"


def write_part(store: Store, name: str, part: str, fill: Callable[[Path], None]) -> Files:
    """Write one rank's files of folder `name`, made by `fill(empty folder)`. Return their sizes and hashes.

    Several ranks may write parts with different file names. The folder is no checkpoint before `commit`.
    """
    staging = store.staging(f"{name}-{part}")
    with whole_or_gone(staging):
        with making(staging):
            fill(staging)
        files = {p.relative_to(staging).as_posix(): _digest(p) for p in sorted(staging.rglob("*")) if p.is_file()}
        store.put(staging, name)
    return files


def commit(
    store: Store,
    name: str,
    files: Files,
    step: int,
    attempt: int = 1,
    score: float | None = None,
    **about: object,
) -> None:
    """Write the manifest for `files`, after all of them are written. `score` and `about`: see `Checkpoint`."""
    body = {
        "format": FORMAT,
        "writer": f"ray_vlm {__version__}",
        "step": step,
        "attempt": attempt,
        "score": score if score is not None and math.isfinite(score) else None,
        "about": about,
        "files": {file: {"size": size, "sha256": digest} for file, (size, digest) in sorted(files.items())},
    }
    store.write(f"{name}/{MANIFEST}", json.dumps(body | {"sha256": _seal(body)}, indent=1).encode() + b"\n")
    logger.debug(f"{name} is committed with {len(files)} files, score {score}")


def read_checkpoint(store: Store, name: str) -> Checkpoint:
    """Return the checkpoint in folder `name`; compare its files with the manifest by name and size but not by hash.

    Raises `Damaged`, or `RunError` if a newer version of this package wrote it.
    """
    data = _read_manifest(store, name)
    if data is None:
        raise Damaged("it was never finished (no manifest)")
    try:
        body = json.loads(data)
        seal = body.pop("sha256")
        if body["format"] > FORMAT:
            raise RunError(
                f"{store.address}: {name} was written by a newer version ({body['writer']}, format {body['format']}; "
                f"this is ray_vlm {__version__}, format {FORMAT}). Update ray_vlm to go on from it."
            )
        if seal != _seal(body):
            raise Damaged("its manifest was altered")
        files = {file: (entry["size"], entry["sha256"]) for file, entry in body["files"].items()}
        checkpoint = Checkpoint(name, body["step"], body["attempt"], body["score"], body["about"], files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("its manifest is cut off or altered") from None
    there = {file: size for file, size in store.files(name).items() if file != MANIFEST}
    if missing := sorted(set(files) - set(there)):
        raise Damaged(f"{missing[0]} is missing")
    if extra := sorted(set(there) - set(files)):
        raise Damaged(f"{extra[0]} does not belong to it")
    for file, (size, _) in files.items():
        if there[file] != size:
            raise Damaged(f"{file} has {there[file]} bytes instead of {size}")
    return checkpoint


def _read_manifest(store: Store, name: str) -> bytes | None:
    """Return the bytes of the manifest, or None without one."""
    try:
        return store.read(f"{name}/{MANIFEST}")
    except (IsADirectoryError, NotADirectoryError):
        return None


def open_checkpoint(store: Store, name: str) -> tuple[Checkpoint, Path]:
    """Return the checkpoint and a local folder with its files, after comparing every file with its hash.

    The folder is the checkpoint itself on a disk, or a temporary copy of one in an object store. Raises `Damaged`.
    """
    checkpoint = read_checkpoint(store, name)
    return checkpoint, _open_files(store, name, checkpoint.files)


def _open_files(store: Store, name: str, files: Mapping[str, tuple[int, str]]) -> Path:
    """Return a local folder with these files of the folder `name`, after comparing each with its hash."""
    with ExitStack() as copying:
        if store.local is not None:
            folder = store.local / name
        else:
            folder = Path(tempfile.mkdtemp(prefix="ray_vlm-"))
            copying.enter_context(whole_or_gone(folder))
            copying.enter_context(making(folder))
        for file, (size, digest) in files.items():
            try:
                if store.local is None:
                    store.fetch(name, folder, [file])
                digest_now = _digest(folder / file, sync=False)
            except FileNotFoundError:
                raise Damaged(f"{file} is missing") from None
            if digest_now != (size, digest):
                raise Damaged(f"{file} was altered")
    return folder


def open_newest(store: Store, context: DistributedContext | None = None) -> tuple[Checkpoint, Path] | None:
    """Return the newest complete checkpoint and its folder, or None. All ranks of `context` return the same one.

    Rank 0 reads the manifest and the names of the files. Each rank opens the files that every rank reads and those
    that it alone reads, and `Checkpoint.files` has only these. If one rank finds a file altered, no rank uses the
    checkpoint.
    """
    context = context or DistributedContext()
    whole = _readable(store) if context.rank == 0 else iter(())
    while (checkpoint := _share(next(whole, None), context)) is not None:
        opened: Path | Damaged
        try:
            opened = _open_files(store, checkpoint.name, checkpoint.files)
        except Damaged as damage:
            opened = damage
        (damaged,) = context.any_rank(isinstance(opened, Damaged))
        if isinstance(opened, Path) and not damaged:
            return checkpoint, opened
        if isinstance(opened, Path) and store.local is None:
            shutil.rmtree(opened, ignore_errors=True)
        reasons = context.gather(str(opened) if isinstance(opened, Damaged) else "")
        if reason := next(filter(None, reasons), None):
            logger.info(_PASSED_OVER.format(name=checkpoint.name, reason=reason))
    return None


def _readable(store: Store) -> Iterator[Checkpoint]:
    """Yield the checkpoints whose manifest and names of files are in order, newest first."""
    for name in checkpoint_names(store):
        try:
            yield read_checkpoint(store, name)
        except Damaged as damage:
            logger.info(_PASSED_OVER.format(name=name, reason=damage))


def _share(checkpoint: Checkpoint | None, context: DistributedContext) -> Checkpoint | None:
    """Return rank 0's checkpoint on every rank, with the files that the rank reads."""
    shared: Files = {}
    own: list[Files] = [{} for _ in range(context.world_size)]
    for file, entry in checkpoint.files.items() if checkpoint is not None else ():
        match = _OF_RANK.fullmatch(file)
        if match is None:
            shared[file] = entry
        elif int(match[1]) < context.world_size:  # the run may go on with fewer ranks
            own[int(match[1])][file] = entry
    checkpoint = context.broadcast(checkpoint and replace(checkpoint, files=shared))
    return checkpoint and replace(checkpoint, files={**checkpoint.files, **context.scatter(own)})


def checkpoint_names(store: Store) -> list[str]:
    """Return the names of all checkpoint folders, complete or not, newest first."""
    matches = [(int(m[1]), int(m[2]), name) for name in store.names() if (m := _NAME.fullmatch(name))]
    return [name for _, _, name in sorted(matches, reverse=True)]


def plan_retention(checkpoints: Sequence[Checkpoint], keep: int, keep_best: int) -> list[str]:
    """Return the names to delete: all except the `keep` newest (at least one) and the `keep_best` highest scores."""
    newest = sorted(checkpoints, key=lambda c: (c.step, c.attempt), reverse=True)
    scored = [c for c in newest if c.score is not None]
    best = sorted(scored, key=lambda c: c.score or 0.0, reverse=True)[:keep_best]
    stay = {c.name for c in (*newest[: max(1, keep)], *best)}
    return [c.name for c in reversed(newest) if c.name not in stay]


def prune(store: Store, keep: int, keep_best: int) -> None:
    """Delete the checkpoints of `plan_retention`. Damaged folders are neither counted nor deleted."""
    checkpoints = []
    for name in checkpoint_names(store):
        try:
            checkpoints.append(read_checkpoint(store, name))
        except (Damaged, RunError):
            continue
    for name in plan_retention(checkpoints, keep, keep_best):
        remove_checkpoint(store, name)


def remove_checkpoint(store: Store, name: str) -> None:
    """Delete a checkpoint, its manifest first, so that no partly deleted folder counts as one."""
    store.remove(f"{name}/{MANIFEST}")
    store.remove(name)


def sweep(store: Store) -> None:
    """Delete the unfinished checkpoints and staging folders of killed writers."""
    for name in store.names():
        if name.startswith(".staging-") or (_NAME.fullmatch(name) and _read_manifest(store, name) is None):
            store.remove(name)


def replace_folder(store: Store, name: str, fill: Callable[[Path], None], step: int) -> None:
    """Replace `best/` or `final/` in an object store, which cannot rename: the manifest is written again at the end."""

    def make(folder: Path) -> None:
        fill(folder)
        store.remove(f"{name}/{MANIFEST}")  # as late as possible, so that the old folder stays valid meanwhile

    files = write_part(store, name, "new", make)
    for left in set(store.files(name)) - set(files):
        store.remove(f"{name}/{left}")
    commit(store, name, files, step)


def fetch_folder(address: str) -> str:
    """Return a local folder with the weights at `address`: the folder itself, or a copy from an object store.

    Raises `RunError` if there are none or they are not complete.
    """
    if not is_remote(address):
        return address
    parent, name = split_address(address)
    try:
        return str(open_checkpoint(Store(parent), name)[1])
    except (Damaged, OSError) as error:
        raise RunError(f"{address} cannot be used: {error}. Give a run's best/ or final/.") from None


def _digest(path: Path, sync: bool = True) -> tuple[int, str]:
    """Return the size and SHA-256 of a file; with `sync` also flush it to the disk."""
    with open(path, "r+b") if sync else open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        if sync:
            os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
