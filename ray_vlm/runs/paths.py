"""Where a run's files lie, and who may write there.

<output_dir>/<name>/
  job.yaml  resolved.json  run.json  metrics.jsonl  training_log.json  bad_rows.jsonl
  checkpoint-<step>/  best/  final/  evaluate/
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.errors import RunError


@dataclass(frozen=True)
class RunPaths:
    """The files of one run."""

    root: Path

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
    def best(self) -> Path:
        return self.root / "best"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def evaluate(self) -> Path:
        return self.root / "evaluate"

    def write_result(self, result: dict[str, Any]) -> None:
        """Rank 0 leaves here what the driver writes into `run.json`."""
        write_json(self.root / ".result.json", result)

    def take_result(self) -> dict[str, Any]:
        """What `write_result` left, removing it. Raises `RunError` where the run ended without it."""
        path = self.root / ".result.json"
        if not path.is_file():
            raise RunError(
                f"{self.root}: the workers ended without a result. Their logs are in the Ray session folder."
            )
        result = json.loads(path.read_text())
        path.unlink()
        return result


def claim_run(output_dir: str, name: str | None, stem: str, overwrite: bool = False) -> RunPaths:
    """Make the run's folder and return its paths. `name` None: `stem` and the first free number.

    A folder that already holds a run is refused with `RunError`, or emptied under `overwrite`.
    """
    base = Path(output_dir).expanduser().absolute()
    try:
        base.mkdir(parents=True, exist_ok=True)
        if name is None:
            return RunPaths(_next_free(base, stem))
        root = base / name
        check_free(output_dir, name, overwrite)
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()  # of two launches at once one fails here
    except FileExistsError:
        raise RunError(f"run.name={name!r}: another launch has just taken {root}. Give another run.name.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"run.output_dir={output_dir!r} cannot be written to ({error}). Give another folder.") from None
    return RunPaths(root)


def check_free(output_dir: str, name: str, overwrite: bool) -> None:
    """Raise `RunError` unless run `name` may be written: nothing there, or a run and `overwrite`. Changes nothing."""
    root = Path(output_dir).expanduser().absolute() / name
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise RunError(f"run.name={name!r}: {root} is a link or a file. Give another run.name.")
    if not root.exists() or not any(root.iterdir()):
        return
    if not overwrite:
        raise RunError(
            f"run.name={name!r}: {root} is already in use. Give another run.name, or start with --overwrite to delete "
            "what is there."
        )
    if not (root / "run.json").is_file():
        raise RunError(f"--overwrite: {root} is not a run folder (run.json is missing), so it is not deleted.")


def _next_free(base: Path, stem: str) -> Path:
    taken = [int(m[1]) for p in base.glob(f"{stem}-*") if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", p.name))]
    number = max(taken, default=0) + 1
    while True:  # two launches at once: mkdir decides who has the number
        root = base / f"{stem}-{number:03d}"
        try:
            root.mkdir()
            return root
        except FileExistsError:
            number += 1


def write_bad_rows(path: Path, rows: Mapping[str, Iterable[Any]]) -> None:
    """One JSON line for each row that was left out: source (train, eval or test), row, id, reason."""
    with open(path, "w", encoding="utf-8") as file:
        for source, bad in rows.items():
            for b in bad:
                file.write(json.dumps({"source": source, "row": b.row, "id": b.id, "reason": b.reason}) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it. NaN and infinity become null."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(value), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make folder `path` by `fill(temporary folder)`; an older one there is replaced only when the new one is whole."""
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    fill(new)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)
