"""Paths of a run's files, and claiming a run's folder.

<output_dir>/<name>/
  job.yaml  resolved.json  run.json  metrics.jsonl  training_log.json  bad_rows.jsonl
  checkpoint-<step>-a<attempt>-<id>/  best/  final/  evaluate/

Files are written to a local folder. If `run.output_dir` is an object store, that folder is temporary and `publish`
copies changed files to the store.
"""

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.runs.drivers import check_not_driven
from ray_vlm.runs.schema import check_whole
from ray_vlm.runs.store import Store, is_remote, join, local_path, making, whole_or_gone

CLAIMED = ".claimed"  # reserves a name in an object store until the run's first files are written
_SEE_S = 15.0  # how long a network file system may take to show another node's new file
_KEPT = (
    *("job.yaml", "resolved.json", "run.json", "metrics.jsonl", "training_log.json"),
    *("bad_rows.jsonl", "bad_steps.jsonl"),
)


@dataclass(frozen=True)
class RunPaths:
    """The files of one run: the local folder `root`, and the address `remote` of a run in an object store."""

    root: Path
    remote: str | None = None

    @property
    def job(self) -> Path:
        return self.root / "job.yaml"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.json"

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def training_log(self) -> Path:
        return self.root / "training_log.json"

    @property
    def bad_rows(self) -> Path:
        return self.root / "bad_rows.jsonl"

    @property
    def bad_steps(self) -> Path:
        return self.root / "bad_steps.jsonl"

    @property
    def balance(self) -> Path:
        return self.root / "balance.json"

    @property
    def best(self) -> Path:
        return self.root / "best"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def evaluate(self) -> Path:
        return self.root / "evaluate"

    @property
    def address(self) -> str:
        """The address of the run, which every process can open and messages show."""
        return self.remote or str(self.root)

    @property
    def name(self) -> str:
        return self.address.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def store(self) -> Store:
        """The store of the run's address."""
        return Store(self.address)

    def uri(self, name: str) -> str:
        """Return the address of the run's file or folder `name`."""
        return join(self.address, name)

    def publish(self, *files: Path) -> None:
        """Copy files of `root` to the object store; do nothing for a run on a disk."""
        if self.remote is not None:
            for file in files:
                if file.is_file():
                    self.store.write(file.relative_to(self.root).as_posix(), file.read_bytes())

    def refresh(self, *files: Path) -> None:
        """Copy files from the object store to `root`, the opposite of `publish`."""
        for file in files if self.remote is not None else ():
            if (data := self.store.read(file.relative_to(self.root).as_posix())) is not None:
                with making(file):
                    file.write_bytes(data)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write rank 0's result for the driver."""
        self.store.write(".result.json", json.dumps(finite(result)).encode())

    def take_result(self) -> dict[str, Any]:
        """Return and remove the result of `write_result`. Raises `RunError` if the workers ended without one."""
        until = time.monotonic() + _SEE_S
        while (data := self.store.read(".result.json")) is None and time.monotonic() < until:
            time.sleep(0.5)
        if data is None:
            raise RunError(
                f"{self.address}: the workers ended without a result. Their logs are in the Ray session folder."
            )
        self.store.remove(".result.json")
        return json.loads(data)

    def discard(self) -> None:
        """Remove the temporary folder of a run in an object store."""
        if self.remote is not None:
            shutil.rmtree(self.root, ignore_errors=True)


def open_run(address: str) -> RunPaths:
    """Return the paths of the run at `address`."""
    if not is_remote(address):
        return RunPaths(Path(local_path(address)))
    return RunPaths(Path(tempfile.mkdtemp(prefix="ray_vlm-")), address)


def claim_run(output_dir: str, name: str | None, stem: str, overwrite: bool = False) -> RunPaths:
    """Create the run's folder and return its paths. Without `name` it is called `stem` with the next free number.

    Raises `RunError` if the folder already holds a run; with `overwrite` that run is deleted.
    """
    try:
        base = Store(output_dir)
        if base.local is None:
            return _claim_remote(base, name, stem, overwrite)
        base.local.mkdir(parents=True, exist_ok=True)
        if name is None:
            return RunPaths(_next_free(base.local, stem))
        root = base.local / name
        check_free(output_dir, name, overwrite)
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()  # of two simultaneous launches one fails here
    except FileExistsError:
        raise RunError(f"run.name={name!r}: another launch has just taken {root}. Give another run.name.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_write(output_dir, error) from None
    return RunPaths(root)


def cannot_write(output_dir: str, error: Exception) -> RunError:
    """Return the error for an output folder that cannot be written to."""
    return RunError(f"run.output_dir={output_dir!r} cannot be written to ({error}). Give another folder.")


def _claim_remote(base: Store, name: str | None, stem: str, overwrite: bool) -> RunPaths:
    name = name or f"{stem}-{max(_numbers(base.names(), stem), default=0) + 1:03d}"
    check_free(base.address, name, overwrite)
    base.remove(name)
    paths = open_run(join(base.address, name))
    paths.store.write(CLAIMED, b"")
    return paths


def find_run(output_dir: str, name: str | None, stem: str) -> RunPaths | None:
    """Return the run to resume, or None: the one called `name`, or the newest one of `stem`.

    Raises `RunError` if there is something other than a run, or if it cannot be read.
    """
    try:
        return _find(output_dir, name, stem)
    except OSError as error:
        raise RunError(
            f"run.output_dir={output_dir!r} cannot be read ({error}). Fix the cause and try again."
        ) from None


def _find(output_dir: str, name: str | None, stem: str) -> RunPaths | None:
    if name is None:
        numbers = _numbers(Store(output_dir).names(), stem)
        name = f"{stem}-{max(numbers):03d}" if numbers else None
    if name is None or not (store := Store(join(output_dir, name))).names():
        return None
    check_whole(store)
    paths = open_run(store.address)
    try:
        paths.refresh(*(paths.root / file for file in _KEPT))
    except OSError:
        paths.discard()
        raise
    return paths


def check_free(output_dir: str, name: str, overwrite: bool) -> None:
    """Raise `RunError` unless run `name` may be written: it does not exist, or `overwrite` is set and no other process
    trains it. Changes nothing."""
    store = Store(join(output_dir, name))
    if store.local is not None and (store.local.is_symlink() or (store.local.exists() and not store.local.is_dir())):
        raise RunError(f"run.name={name!r}: {store.local} is a link or a file. Give another run.name.")
    try:
        names = store.names()
    except OSError as error:
        raise cannot_write(output_dir, error) from None
    if not names:
        return
    if not overwrite:
        raise RunError(
            f"run.name={name!r}: {store.address} is already in use. Go on with it by --resume, give another run.name, "
            "or start with --overwrite to delete what is there."
        )
    if "run.json" not in names:
        raise RunError(f"--overwrite: {store.address} is not a run folder (run.json is missing), so it is not deleted.")
    try:
        check_not_driven(store, "--overwrite")
    except OSError as error:
        raise cannot_write(output_dir, error) from None


def _numbers(names: Iterable[str], stem: str) -> list[int]:
    return [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", name))]


def _next_free(base: Path, stem: str) -> Path:
    number = max(_numbers(os.listdir(base), stem), default=0) + 1
    while True:  # of two simultaneous launches mkdir succeeds in one
        root = base / f"{stem}-{number:03d}"
        try:
            root.mkdir()
            return root
        except FileExistsError:
            number += 1


def write_bad_rows(path: Path, rows: Mapping[str, Iterable[Any]]) -> None:
    """Write one JSON line for each bad row: source (train, mix[0], eval or test), row, id, reason."""
    with open(path, "w", encoding="utf-8") as file:
        for source, bad in rows.items():
            for b in bad:
                name = f"mix[{b.source - 1}]" if b.source else source
                file.write(json.dumps({"source": name, "row": b.row, "id": b.id, "reason": b.reason}) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinity become null."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with making(path):
            temporary.write_text(json.dumps(finite(value), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return the value with None for every NaN and infinity in it, which JSON cannot represent."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Create folder `path` by `fill(temporary folder)`; an older one is replaced only when the new one is complete."""
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    with whole_or_gone(new), making(new):
        fill(new)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)
