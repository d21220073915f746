"""Paths of a run's files, and writing them atomically.

<output_dir>/<name>/
  job.yaml  resolved.json  run.json  metrics.jsonl  training_log.json  bad_rows.jsonl
  checkpoint-<step>-a<attempt>-<id>/  best/  final/  evaluate/  logs/

Files are written to a local folder. If `run.output_dir` is an object store, that folder is temporary and `publish`
copies changed files to the store.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_vlm.errors import RunError
from ray_vlm.storage import Store, is_remote, join, local_path, making, replacing, split_address, whole_or_gone

_SEE_S = 15.0  # how long a network file system may take to show another node's new file


class _Name:
    """The path of the file or folder of this name in a run's local folder, as an attribute of `RunPaths`."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, paths: "RunPaths", owner: type) -> Path:
        return paths.root / self._name


@dataclass(frozen=True)
class RunPaths:
    """The files of one run: the local folder `root`, and the address `remote` of a run in an object store."""

    root: Path
    remote: str | None = None

    job = _Name("job.yaml")
    resolved = _Name("resolved.json")
    run = _Name("run.json")
    metrics = _Name("metrics.jsonl")
    training_log = _Name("training_log.json")
    bad_rows = _Name("bad_rows.jsonl")
    bad_steps = _Name("bad_steps.jsonl")
    balance = _Name("balance.json")
    best = _Name("best")
    final = _Name("final")
    evaluate = _Name("evaluate")
    logs = _Name("logs")

    @property
    def address(self) -> str:
        """The address of the run, which every process can open and messages show."""
        return self.remote or str(self.root)

    @property
    def name(self) -> str:
        return split_address(self.address)[1]

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


def write_bad_rows(path: Path, rows: Mapping[str, Iterable[Any]]) -> None:
    """Write one JSON line for each bad row: source (train, mix[0], eval or test), row, id, reason."""
    with open(path, "w", encoding="utf-8") as file:
        for source, bad in rows.items():
            for b in bad:
                name = f"mix[{b.source - 1}]" if b.source else source
                file.write(json.dumps({"source": name, "row": b.row, "id": b.id, "reason": b.reason}) + "\n")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically. NaN and infinity become null."""
    with making(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1) + "\n", encoding="utf-8")


def finite(value: object) -> Any:
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
