"""Resolve a name to the model that answers: a run, its `best/`, an exported adapter, a merged model, a base, or a job
file.

A name is a folder, an address in an object store, or a name on the hub. Image sizes and prompts come from the
`preprocessing.json` beside the weights, or from a job where there is no such file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.load import load_job, load_resolved
from ray_vlm.config.paths import is_hub_name
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.data.preprocessing import PREPROCESSING, Asking, Saved, read_saved
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.models.load import fetch_from_hub, resolve_name
from ray_vlm.models.lora import CONFIG, is_whole_model, named_base
from ray_vlm.models.precision import fastest_precision
from ray_vlm.runs.checkpoints import Damaged, fetch_folder, read_checkpoint
from ray_vlm.runs.read import MARKS, Run, read_run
from ray_vlm.storage import Store, is_remote, join, local_path, split_address

BASE = "base"  # `--weights base`: the model that a run started from
_JOB_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Answerer:
    """The model that answers. `job`: the base, the task and the limits; `weights`: address of an adapter for that base,
    or of a whole model that replaces it, None for the base alone; `wording`: a folder whose `preprocessing.json` gives
    the prompt, None to use that of the weights, or the job's own prompt where they have none."""

    job: JobConfig
    weights: str | None = None
    wording: str | None = None


def find_answerer(
    name: str,
    weights: str | None = None,
    base: str | None = None,
    job: JobConfig | None = None,
    task: str | None = None,
    device: str | None = None,
) -> Answerer:
    """Resolve `name` to an `Answerer`.

    `weights`: `best`, `final` or `base` of a run. `base`: the base of an adapter that has moved since training. `job`,
    or `task` alone, gives the task and the prompt for weights without a `preprocessing.json`. `device`: `cpu` or
    `cuda`; None is the device that a run trained on, otherwise a GPU if there is one. Raise `RunError` where nothing
    has that name, and `ConfigError` or `ModelError` where an option is missing or does not apply.
    """
    if (answerer := _of_job_file(name) or _of_run(name, weights)) is not None:
        changes = {"model": _with_base(answerer.job.model, base), "cluster": _on_device(answerer.job.cluster, device)}
        return replace(answerer, job=answerer.job.model_copy(update=changes))
    if weights is not None:
        raise ConfigError(f"--weights {weights}: {name} is no run, so there is nothing to choose. Leave it out.")
    files = _read_files(name, base, job.model.name if job is not None else None)
    if job is not None:
        changes = {"model": _with_files(job.model, files), "cluster": _on_device(job.cluster, device)}
        answering_job = job.model_copy(update=changes)
    else:
        answering_job = _build_job(files, base, task, device)
    wording = files.folder if files.saved is not None else None
    return Answerer(answering_job, files.folder if files.is_adapter else None, wording)


def weights_of(run: Run, weights: str | None) -> str:
    """Return the address of a run's `best/` or `final/`; `weights` None takes `best` where there is one.

    Raise `RunError` where the run does not have these weights; it names those that the run has.
    """
    existing = [name for name in ("best", "final") if name in run.folders]
    if existing and weights in (None, *existing):
        return join(run.address, weights or existing[0])
    missing = f"{run.address} has no {weights or 'best/ or final/'}"
    if existing:
        raise RunError(f"{missing}. There is: {', '.join(existing)}.")
    checkpoints = sorted((name for name in run.folders if name.startswith("checkpoint-")), key=_step_of)
    if checkpoints:
        raise RunError(
            f"{missing}, only {', '.join(checkpoints)}. Continue the run with `ray-vlm train JOB --resume`, or give "
            f"`predict` or `evaluate` the folder of a checkpoint: {join(run.address, checkpoints[-1])}"
        )
    raise RunError(f"{missing}, and no checkpoint yet. Wait for its first one, or continue it with --resume.")


def _step_of(checkpoint: str) -> int:
    """Return the step in the name of a checkpoint folder, `checkpoint-51-...`; 0 where there is none."""
    step = checkpoint.removeprefix("checkpoint-").partition("-")[0]
    return int(step) if step.isdecimal() else 0


def trained_weights(name: str) -> str:
    """Return the address of the weights that `--adapter` names: a run's `best/`, or `final/` where there is no best;
    otherwise the folder or address itself.

    Raise `RunError` where there are no weights. Nothing is loaded and nothing is copied from an object store.
    """
    run = _read_run(name)
    if run is not None:
        return weights_of(run, None)
    if is_remote(name):
        _check_remote(name)
    else:
        _check_folder(name)
    return name


def _check_remote(address: str) -> None:
    """Raise `RunError` where an address in an object store holds no complete weights. Only the manifest is read."""
    run, folder = split_address(address)
    try:
        read_checkpoint(Store(run), folder)
    except (Damaged, OSError) as error:
        raise RunError(f"{address} cannot be used: {error}. Give a run's best/ or final/.") from None


def _check_folder(name: str) -> None:
    """Raise `RunError` where `name` is no folder of this machine with an adapter or a whole model."""
    if not Path(local_path(name)).is_dir():
        _check_run_around(name)
        raise RunError(
            f"{name}: no such folder. Give a run, its best/ or final/, an exported adapter or a whole model; "
            "`ray-vlm runs list` shows runs."
        )
    if not _holds_weights(name):
        raise RunError(_describe_no_weights(name))


def _check_run_around(name: str) -> None:
    """Raise `RunError` where `name` is `best/` or `final/` of a run that has no such folder."""
    around, folder = split_address(name)
    if folder in ("best", "final") and (run := _read_run(around)) is not None:
        weights_of(run, folder)


def _describe_no_weights(name: str) -> str:
    return (
        f"{name}: no run here ({' or '.join(MARKS)}), no adapter ({CONFIG}) and no model (config.json). "
        "`ray-vlm runs list` shows runs."
    )


def _of_job_file(name: str) -> Answerer | None:
    """Return the base of a job file, with the adapter that training starts from; None for any other name."""
    if Path(name).suffix.lower() not in _JOB_FILES or not Path(name).is_file():
        return None
    job = load_job(name)
    return Answerer(job, job.model.adapter)


def _of_run(name: str, weights: str | None) -> Answerer | None:
    """Return the weights of a run, or of one of the folders in it; None for any other name."""
    if (run := _read_run(name)) is not None:
        if weights != BASE:
            return _trained(run, weights_of(run, weights))
        return Answerer(load_run_job(run), None, fetch_folder(weights_of(run, None)))  # class names come from the data
    around = _read_run(split_address(name)[0])
    if weights is not None or around is None or not around.job or not _holds_weights(name):
        return None
    return _trained(around, name)


def _trained(run: Run, weights: str) -> Answerer:
    """Return weights of the run. A whole model on this machine replaces the base."""
    job = load_run_job(run)
    if is_remote(weights) or not is_whole_model(local_path(weights)):
        return Answerer(job, weights)
    folder = local_path(weights)
    model = Model(name=folder, load_in_4bit=False)
    return Answerer(job.model_copy(update={"model": model}), None, folder)


@dataclass(frozen=True)
class _Files:
    """Weights that lie outside of a run: an adapter with the name of its base, or a whole model with its own name.
    `folder`: on this machine; `saved`: the `preprocessing.json` in it."""

    name: str
    folder: str
    is_adapter: bool
    model: str
    saved: Saved | None


def _read_files(name: str, base: str | None, job_base: str | None) -> _Files:
    """Find the weights that `name` stands for. `base`, or else `job_base`, replaces the base that an adapter names."""
    folder, on_hub = _fetch(name)
    saved = read_saved(folder)
    if (Path(folder) / CONFIG).is_file():
        return _Files(name, folder, True, _base_of_adapter(name, folder, base, job_base), saved)
    if base is not None:
        raise ConfigError(f"--base {base}: {name} is a whole model and needs no base. Leave it out.")
    return _Files(name, folder, False, name if on_hub or name == "tiny" else folder, saved)


def _with_files(section: Model, files: _Files) -> Model:
    """Return a job's `model` section with the weights in place of its own."""
    quantised = section.load_in_4bit and (files.is_adapter or files.saved is None)  # a merged model: as it was written
    revision = section.revision if files.model == section.name else None
    changed = {"name": files.model, "revision": revision, "load_in_4bit": quantised, "adapter": None}
    return section.model_copy(update=changed)


def _with_base(section: Model, base: str | None) -> Model:
    """Return the `model` section with another base; the section itself where `base` is None."""
    return section if base is None else section.model_copy(update={"name": base, "revision": None})


def _on_device(section: Cluster, device: str | None) -> Cluster:
    """Return the `cluster` section for `cpu` or `cuda`; the section itself where `device` is None."""
    if device is None:
        return section
    gpus = 0 if device == "cpu" else max(1.0, section.gpus_per_worker)
    return section.model_copy(update={"gpus_per_worker": gpus})


def load_run_job(run: Run) -> JobConfig:
    """Return the job of a run. Raise `RunError` where it cannot be read."""
    if not run.job:
        raise RunError(f"{run.address}: resolved.json cannot be read, so its model is not known.")
    return load_resolved(dict(run.job))


def _read_run(address: str) -> Run | None:
    """Read the run in a folder or at an address; None where there is none."""
    store = Store(address)
    try:
        marks = set(MARKS) & set(store.names())
    except OSError as error:
        raise RunError(f"{store.address} cannot be read ({error}).") from None
    return read_run(store.address) if marks else None


def _holds_weights(name: str) -> bool:
    """Return whether a folder holds an adapter or a whole model; an address in a store is checked once it is
    fetched."""
    if is_remote(name):
        return True
    return (Path(local_path(name)) / CONFIG).is_file() or is_whole_model(local_path(name))


def _fetch(name: str) -> tuple[str, bool]:
    """Return a folder of this machine with the files that tell what `name` is, and whether it comes from the hub."""
    if is_remote(name):
        return fetch_folder(name), False
    folder = local_path(resolve_name(name))
    if Path(folder).is_dir():
        if not _holds_weights(folder):
            raise RunError(_describe_no_weights(name))
        return folder, False
    _check_run_around(name)
    if is_hub_name(name):
        return fetch_from_hub(name), True
    raise RunError(
        f"{name}: no run, folder or job file of that name, nor is it a name on the hub (owner/name). `ray-vlm runs "
        "list` shows runs."
    )


def _base_of_adapter(name: str, folder: str, base: str | None, job_base: str | None) -> str:
    """Return the base of an adapter. Raise `ModelError` where it is unknown or not on this machine."""
    base_name = base or job_base or named_base(folder)
    if not base_name:
        raise ModelError(f"{name} does not name its base. Give a folder or a hub name: --base NAME.")
    if base is None and Path(base_name).is_absolute() and not Path(base_name).exists():
        raise ModelError(
            f"{name} was trained on {base_name}, which is not on this machine. Give its folder or its hub name: "
            "--base NAME."
        )
    return base_name


def _build_job(files: _Files, base: str | None, task: str | None, device: str | None) -> JobConfig:
    """Build a job for weights outside of a run from the files beside them. Raise `ConfigError` where neither they nor
    `task` say what to ask."""
    import torch

    saved = files.saved
    if saved is None and task is None:
        raise ConfigError(
            f"{files.name} does not say how to ask it (no {PREPROCESSING} beside the weights). Give a job file with "
            "the task and the prompt: --job JOB. Or ask your own question: --question TEXT."
        )
    asking = saved.asking if saved is not None else Asking()
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    full_precision = asking.precision == "fp32"  # otherwise the device decides: not every GPU has bf16
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "name": files.model,
            "load_in_4bit": files.is_adapter and asking.load_in_4bit,
            "revision": asking.revision if files.is_adapter and base is None else None,
        },
        "data": {"max_image_pixels": asking.max_image_pixels},
        "train": {"precision": "fp32" if full_precision else fastest_precision("cuda:0" if on_gpu else "cpu")},
        "evaluate": {"max_new_tokens": asking.max_new_tokens},
        "cluster": {"num_workers": 0, "gpus_per_worker": int(on_gpu)},
    }
    known = {name: {k: v for k, v in section.items() if v is not None} for name, section in sections.items()}
    return JobConfig.model_validate(known | {"task": saved.task if saved is not None else task})
