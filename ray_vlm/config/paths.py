"""Resolve the paths of a job, in the current folder first, then in the folder of the job file; make them absolute.

Code that reads files or imports functions gets a name without the job, sometimes in another process. So this module
holds the folder of the job file that this process runs, and the names that are in neither folder.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_vlm.config.data import Source
from ray_vlm.config.row_files import ROW_SUFFIXES, is_pattern, match_files, split_suffix
from ray_vlm.config.schema import JobConfig
from ray_vlm.errors import ConfigError
from ray_vlm.storage import full_address, is_absolute, local_path

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DATA_SUFFIXES = (*ROW_SUFFIXES, ".tar", ".tgz", ".xml", ".yaml", ".yml", ".txt", ".zip", ".tfrecord")
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

    def resolve(name: str) -> str:
        if is_absolute(name) or _exists(name) or not _exists(str(beside / name)):
            return name
        return str(beside / name)

    def resolve_file(name: str) -> str:
        resolved = resolve(name)
        if not is_absolute(name) and not _exists(resolved):
            _missing.add(str(Path(name).absolute()))
        return resolved

    return _replace_inputs(job, resolve_file, resolve_file, resolve, resolve_file)


def _exists(name: str) -> bool:
    """Return whether a local name stands for a file or a folder, or is a pattern that a file matches."""
    if os.path.exists(name):
        return True
    try:
        return is_pattern(name) and bool(match_files(name).files)
    except (OSError, ValueError):
        return False


def absolute_paths(job: JobConfig) -> JobConfig:
    """Return the job with absolute local paths, which hold in every process; one that has them already stays as it is.

    A command makes them absolute once, after it has shown the job as it was written and before it works with it: Ray
    workers have another current folder. Raises `ConfigError` for a relative `run.output_dir` in a Ray job.
    """
    address, cache = job.run.output_dir, job.train.vision_cache
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and (problems := check_output_dir(address)):
        raise ConfigError(problems)
    index = job.data.index_dir
    changes = {
        "data": job.data.model_copy(update={"index_dir": index and full_address(index)}),
        "train": job.train.model_copy(update={"vision_cache": cache and local_path(cache)}),
        "run": job.run.model_copy(update={"output_dir": full_address(address)}),
    }
    job = job.model_copy(update=changes)
    return _replace_inputs(job, _absolute_rows, full_address, _absolute_folder, _absolute_folder)


def _absolute_rows(name: str) -> str:
    """Return the absolute path of rows; a data set on the hub keeps its name."""
    return name if is_hub_data_set(name) else full_address(name)


def _replace_inputs(
    job: JobConfig,
    rows: Callable[[str], str],
    images: Callable[[str], str],
    base: Callable[[str], str],
    adapter: Callable[[str], str],
) -> JobConfig:
    """Return the job with other names of what it reads. `rows`, `images`, `base` and `adapter` return the new name of
    files of rows, of a folder of images, of `model.name` and of `model.adapter`."""

    def source(value: Source | None) -> Source | None:
        if value is None or not value.path:
            return value
        root = images(value.image_root) if value.image_root else None
        paths = tuple(map(images if value.create else rows, value.paths))  # what is created is a file
        path = paths[0] if isinstance(value.path, str) else paths
        return value.model_copy(update={"path": path, "image_root": root})

    data: dict[str, Any] = {name: source(getattr(job.data, name)) for name in ("train", "eval", "test")}
    data["mix"] = tuple(source(value) for value in job.data.mix)
    model = {"name": base(job.model.name), "adapter": job.model.adapter and adapter(job.model.adapter)}
    return job.model_copy(
        update={"data": job.data.model_copy(update=data), "model": job.model.model_copy(update=model)}
    )


def _absolute_folder(name: str) -> str:
    """Return the absolute path of a model's folder; a name of no local folder is one on the hub and stays."""
    return local_path(name) if os.path.exists(os.path.expanduser(name)) else name


def check_output_dir(address: str, name: str = "run.output_dir") -> list[str]:
    """Return why a Ray job may not write to `address`, or an empty list: a relative path is in a temporary copy."""
    if is_absolute(address):
        return []
    return [
        f"{name}={address!r} is relative, and a Ray job runs in a copy of the folder that is deleted afterwards. "
        "Give an absolute path on a file system that all nodes share, or s3://..."
    ]


def is_hub_name(name: str) -> bool:
    """Whether a name may be a repository on the Hugging Face hub, `owner/name`."""
    return _HUB_NAME.fullmatch(name) is not None


def is_hub_data_set(path: str) -> bool:
    """Whether a path of rows may be a data set on the Hugging Face hub: `owner/name`, and nothing here by that name. A
    name with the suffix of a data file, such as data/rows.csv, is a file that is missing."""
    suffix, packed = split_suffix(path)
    is_file = packed or suffix in _DATA_SUFFIXES
    return is_hub_name(path) and not is_file and not os.path.exists(path)


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
