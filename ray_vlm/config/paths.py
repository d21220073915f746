"""Resolve the relative paths of a job: in the current folder first, then in the folder of the job file.

Code that reads files or imports functions gets a name without the job, sometimes in another process. So this module
holds the folder of the job file that this process runs, and the names that are in neither folder.
"""

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.schema import JobConfig

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_job_folder: str | None = None
_missing: set[str] = set()  # names that are in neither folder, as absolute paths in the current one


def job_folder() -> str | None:
    """Return the folder of the job file that this process runs, or None."""
    return _job_folder


def use_job_folder(folder: str | None) -> None:
    """Set the folder in which names are looked for after the current one. A worker gets it from the driver."""
    global _job_folder
    _job_folder = folder


def resolve_paths(job: JobConfig, job_file: str | Path) -> JobConfig:
    """Return the job with full paths for the files and folders that are beside the job file and not in the current
    folder."""
    beside = Path(job_file).parent
    use_job_folder(str(beside.absolute()))
    _missing.clear()

    def resolve(name: str | None, is_file: bool) -> str | None:
        if not name or "://" in name or name.startswith(("/", "~")) or os.path.exists(name):
            return name
        if os.path.exists(beside / name):
            return str(beside / name)
        if is_file:
            _missing.add(str(Path(name).absolute()))
        return name

    def source(value: Source | None) -> Source | None:
        if value is None or not value.path:
            return value
        changed = {"path": resolve(value.path, is_file=True), "image_root": resolve(value.image_root, is_file=True)}
        return value.model_copy(update=changed)

    data: dict[str, Any] = {name: source(getattr(job.data, name)) for name in ("train", "eval", "test")}
    data["mix"] = tuple(source(value) for value in job.data.mix)
    model = {"name": resolve(job.model.name, is_file=False), "adapter": resolve(job.model.adapter, is_file=True)}
    return job.model_copy(
        update={"data": job.data.model_copy(update=data), "model": job.model.model_copy(update=model)}
    )


def is_hub_name(name: str) -> bool:
    """Whether a name may be a repository on the Hugging Face hub, `owner/name`."""
    return _HUB_NAME.fullmatch(name) is not None


def describe_search(name: str) -> str:
    """Return a sentence on where a missing relative name was looked for, and the fix; empty for any other name."""
    if str(Path(name).absolute()) not in _missing:
        return ""
    if (beside := _folder_beside()) is None:
        return f" It was looked for in {os.getcwd()}: give a path relative to it, or an absolute one."
    return (
        f" It was looked for in {os.getcwd()} and in {beside}, beside the job file: give a path relative to "
        "one of them, or an absolute one."
    )


def _folder_beside() -> str | None:
    """Return the job file's folder if it is not the current folder, else None."""
    return None if _job_folder is None or os.path.realpath(_job_folder) == os.path.realpath(".") else _job_folder


def import_function(name: str) -> Any:
    """Import `module:function`.

    The module is looked for in the current folder, among the installed packages, and in the job file's folder. Raises
    `ModuleNotFoundError` with these, and whatever the module itself raises.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        imported = _import(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, and what it imports does not
        beside = _folder_beside()
        where = (
            f"{os.getcwd()}, among the installed packages and in {beside}"
            if beside
            else f"{os.getcwd()} and among the installed packages"
        )
        raise ModuleNotFoundError(
            f"there is no module {error.name}: it was looked for in {where}. A function in my_code.py in one of these "
            "folders is named my_code:function"
        ) from None
    return getattr(imported, attribute)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = _job_folder in sys.path
        if _job_folder is None or known or not f"{module}.".startswith(f"{error.name}."):
            raise
    assert _job_folder is not None
    sys.path.append(_job_folder)  # last, so that its modules hide no installed ones
    importlib.invalidate_caches()
    return importlib.import_module(module)
