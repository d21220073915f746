"""Where the relative names of a job are looked for: in the current folder first, then beside the job file.

Readers of files and importers of functions know a name and no job, and some are in other processes. So the folder of
the job file that this process runs is kept here, and which names were in neither place.
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
_missing: set[str] = set()  # whole paths, in the current folder


def job_folder() -> str | None:
    """The folder of the job file that this process runs, if it has read one."""
    return _job_folder


def use_job_folder(folder: str | None) -> None:
    """Look there for what is not in the current folder; what a worker is told, which has no job file."""
    global _job_folder
    _job_folder = folder


def resolve_paths(job: JobConfig, job_file: str | Path) -> JobConfig:
    """The job with those of its files and folders that are beside the job file, and not here, named as they are."""
    beside = Path(job_file).parent
    use_job_folder(str(beside.absolute()))
    _missing.clear()

    def place(name: str | None, is_file: bool) -> str | None:
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
        changed = {"path": place(value.path, is_file=True), "image_root": place(value.image_root, is_file=True)}
        return value.model_copy(update=changed)

    data: dict[str, Any] = {name: source(getattr(job.data, name)) for name in ("train", "eval", "test")}
    data["mix"] = tuple(source(value) for value in job.data.mix)
    model = {"name": place(job.model.name, is_file=False), "adapter": place(job.model.adapter, is_file=True)}
    return job.model_copy(
        update={"data": job.data.model_copy(update=data), "model": job.model.model_copy(update=model)}
    )


def is_hub_name(name: str) -> bool:
    """Whether a name may be a repository of the Hugging Face hub, `owner/name`."""
    return _HUB_NAME.fullmatch(name) is not None


def describe_search(name: str) -> str:
    """Where a job's relative name was looked for in vain, and how to name it instead; empty for any other."""
    if str(Path(name).absolute()) not in _missing:
        return ""
    return (
        f" It was looked for in {os.getcwd()} and in {_job_folder}, beside the job file: name it from one of them, or "
        "by its whole path."
    )


def import_function(name: str) -> Any:
    """What is behind `module:function`.

    The module is looked for in the current folder and among what is installed, then beside the job file. Raises
    `ModuleNotFoundError` that says so, and whatever the module itself raises.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = _import(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and imports something that is not
        where = f"{os.getcwd()}, among what is installed" + (f" and in {_job_folder}" if _job_folder else "")
        raise ModuleNotFoundError(
            f"there is no module {error.name}: it was looked for in {where}. Of my_code.py in one of these folders the "
            "name is my_code:function"
        ) from None
    return getattr(found, attribute)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = _job_folder in sys.path
        if _job_folder is None or known or not f"{module}.".startswith(f"{error.name}."):
            raise
    assert _job_folder is not None
    sys.path.append(_job_folder)  # last, so that nothing in it hides what others import
    importlib.invalidate_caches()
    return importlib.import_module(module)
