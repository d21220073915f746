"""What is to answer, found by name: a run, its `best/`, an exported adapter, a merged model, a base, or a job file.

Names are folders, addresses in an object store, or names on the hub. How images are resized and questions worded comes
from the `preprocessing.json` beside weights, where there is one, else from a job.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.config.load import load_job, load_resolved
from ray_vlm.config.paths import is_hub_name
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.data.preprocessing import PREPROCESSING, Asking, Saved, read_saved
from ray_vlm.errors import ConfigError, ModelError, RunError
from ray_vlm.models.adapter import CONFIG, is_whole_model, named_base
from ray_vlm.models.load import fetch_from_hub, resolve_name
from ray_vlm.models.precision import fastest_precision
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.read import MARKS, Run, read_run
from ray_vlm.runs.store import Store, is_remote, join, local_path

BASE = "base"  # of a run: what it began with
_JOB_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Answerer:
    """What is to answer. `job`: the base, the task and limits; `weights`: address of an adapter on that base, or of a
    whole model in its place, None for the base alone; `wording`: a folder with the `preprocessing.json` to ask by, None
    for that of the weights, or the job's own words where they have none."""

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
    """What `name` stands for.

    `weights`: of a run, `best`, `final` or `base`. `base`: that of an adapter, where it lies elsewhere than when it was
    trained. `job`, or `task` alone, says how to ask weights that do not say it themselves. `device`: `cpu` or `cuda`,
    None for where a run trained, or a card if there is one. Raises `RunError` where nothing is found, and `ConfigError`
    or `ModelError` that say what is needed.
    """
    if (found := _of_job_file(name) or _of_run(name, weights)) is None:
        if weights is not None:
            raise ConfigError(f"--weights {weights}: {name} is no run, so there is nothing to choose. Leave it out.")
        return _of_weights(name, base, job, task, device)
    return Answerer(_on_device(_with_base(found.job, base), device), found.weights, found.wording)


def weights_of(run: Run, weights: str | None) -> str:
    """The address of a run's `best/` or `final/`. Raises `RunError` where it has not what is asked for."""
    there = [name for name in ("best", "final") if name in run.folders]
    if weights not in (None, *there) or not there:
        wanted = weights or "best/ or final/"
        raise RunError(f"{run.address} has no {wanted}. There is: {', '.join(there) or 'no weights yet'}.")
    return join(run.address, weights or there[0])


def trained_weights(name: str) -> str:
    """The weights that `evaluate --adapter` names: of a run its `best/`, or `final/` where there is no best; else the
    folder of that name."""
    run = _read_run(name)
    return weights_of(run, None) if run is not None else name


def _of_job_file(name: str) -> Answerer | None:
    """The base that a job file names, with the adapter that it begins with."""
    if Path(name).suffix.lower() not in _JOB_FILES or not Path(name).is_file():
        return None
    job = load_job(name)
    return Answerer(job, job.model.adapter)


def _of_run(name: str, weights: str | None) -> Answerer | None:
    """A run, or one of the folders of weights in it."""
    if (run := _read_run(name)) is not None:
        if weights != BASE:
            return _trained(_job_of(run), weights_of(run, weights))
        return Answerer(_job_of(run), None, fetch_folder(weights_of(run, None)))  # class names come from the data
    around = _read_run(_parent(name))
    if weights is not None or around is None or not around.job or not _holds_weights(name):
        return None
    return _trained(_job_of(around), name)


def _trained(job: JobConfig, weights: str) -> Answerer:
    """The weights of a run of this job. A whole model that is here needs no base beside it."""
    if is_remote(weights) or not is_whole_model(local_path(weights)):
        return Answerer(job, weights)
    folder = local_path(weights)
    whole = Model(name=folder, load_in_4bit=False)
    return Answerer(job.model_copy(update={"model": whole}), None, folder)


def _of_weights(name: str, base: str | None, job: JobConfig | None, task: str | None, device: str | None) -> Answerer:
    """Weights that lie outside of a run."""
    folder, on_hub = _fetch(name)
    saved, adapter = read_saved(folder), (Path(folder) / CONFIG).is_file()
    if base is not None and not adapter:
        raise ConfigError(f"--base {base}: {name} is a whole model and needs no base. Leave it out.")
    model = _base_of_adapter(name, folder, base, job) if adapter else name if on_hub or name == "tiny" else folder
    if job is not None:
        quantised = job.model.load_in_4bit and (adapter or saved is None)  # a merged model is loaded as it was written
        asked = _on_device(_as_job_asks(job, model, quantised), device)
    elif saved is None and task is None:
        raise ConfigError(
            f"{name} does not say how to ask it (no {PREPROCESSING} beside the weights). Name a job file that has the "
            "task and its wording: --job JOB. Or ask a question of your own: --question TEXT."
        )
    else:
        told = saved.asking if saved is not None else Asking()
        section: dict[str, Any] = {"name": model, "load_in_4bit": adapter and told.load_in_4bit}
        section |= {"revision": told.revision} if adapter and base is None else {}
        asked = _as_weights_say(saved, task, section, device)
    return Answerer(asked, folder if adapter else None, folder if saved is not None else None)


def _with_base(job: JobConfig, base: str | None) -> JobConfig:
    """The job with another base, as far as one is given."""
    if base is None:
        return job
    return job.model_copy(update={"model": job.model.model_copy(update={"name": base, "revision": None})})


def _on_device(job: JobConfig, device: str | None) -> JobConfig:
    if device is None:
        return job
    cards = 0 if device == "cpu" else max(1.0, job.cluster.gpus_per_worker)
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"gpus_per_worker": cards})})


def _job_of(run: Run) -> JobConfig:
    if not run.job:
        raise RunError(f"{run.address}: resolved.json cannot be read, so its model is not known.")
    return load_resolved(dict(run.job))


def _read_run(address: str) -> Run | None:
    """The run in a folder or at an address; None where there is none."""
    place = address if is_remote(address) else local_path(address)
    try:
        there = set(MARKS) & set(Store(place).names())
    except OSError as error:
        raise RunError(f"{place} cannot be read ({error}).") from None
    return read_run(place) if there else None


def _parent(address: str) -> str:
    """The folder around a folder, where a run keeps `best/` and `final/`."""
    if not is_remote(address):
        return str(Path(local_path(address)).parent)
    place, mark, options = address.partition("?")
    return f"{place.rstrip('/').rpartition('/')[0]}{mark}{options}"


def _holds_weights(name: str) -> bool:
    """Whether a folder is an adapter's or a whole model's; in a store that is seen once it is fetched."""
    if is_remote(name):
        return True
    return (Path(local_path(name)) / CONFIG).is_file() or is_whole_model(local_path(name))


def _fetch(name: str) -> tuple[str, bool]:
    """A folder of this machine with what is needed to know what `name` is, and whether it comes from the hub."""
    if is_remote(name):
        return fetch_folder(name), False
    folder = local_path(resolve_name(name))
    if Path(folder).is_dir():
        if not _holds_weights(folder):
            raise RunError(
                f"{name}: no run here ({' or '.join(MARKS)}), no adapter ({CONFIG}) and no model (config.json). "
                "`ray-vlm runs list` shows runs."
            )
        return folder, False
    if is_hub_name(name):
        return fetch_from_hub(name), True
    raise RunError(
        f"{name}: no run, folder or job file of that name, nor is it a name on the hub (owner/name). `ray-vlm runs "
        "list` shows runs."
    )


def _base_of_adapter(name: str, folder: str, base: str | None, job: JobConfig | None) -> str:
    """The base that an adapter goes on."""
    found = base or (job.model.name if job is not None else named_base(folder))
    if not found:
        raise ModelError(f"{name} does not say what its base is. Give a folder or a hub name: --base NAME.")
    if base is None and Path(found).is_absolute() and not Path(found).exists():
        raise ModelError(
            f"{name} was trained on {found}, which is not on this machine. Say where it is, a folder or a hub name: "
            "--base NAME."
        )
    return found


def _as_job_asks(job: JobConfig, model: str, quantised: bool) -> JobConfig:
    """The job with another base in its model's place."""
    revision = job.model.revision if model == job.model.name else None
    changed = {"name": model, "revision": revision, "load_in_4bit": quantised, "adapter": None}
    return job.model_copy(update={"model": job.model.model_copy(update=changed)})


def _as_weights_say(saved: Saved | None, task: str | None, model: dict[str, Any], device: str | None) -> JobConfig:
    """A job for weights outside of a run, by what lies beside them. `model`: its section."""
    import torch

    on_card = torch.cuda.is_available() if device is None else device == "cuda"
    told = saved.asking if saved is not None else Asking()
    own = told.precision == "fp32"  # a narrower one is the device's choice: cards differ in which they have
    sections: dict[str, Any] = {
        "task": saved.task if saved is not None else task,
        "model": model,
        "data": {"max_image_pixels": told.max_image_pixels},
        "train": {"precision": "fp32" if own else fastest_precision("cuda:0" if on_card else "cpu")},
        "evaluate": {"max_new_tokens": told.max_new_tokens},
        "cluster": {"num_workers": 0, "gpus_per_worker": int(on_card)},
    }
    known = {
        name: {k: v for k, v in told.items() if v is not None} for name, told in sections.items() if name != "task"
    }
    return JobConfig.model_validate(known | {"task": sections["task"]})
