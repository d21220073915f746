"""On the driver: job -> index -> plan -> workers -> run folder. Decides, launches, and writes down how it ended."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.cluster.environment import read_environment
from ray_vlm.config.data import Source
from ray_vlm.config.load import dump_job, fill_defaults
from ray_vlm.config.resume import check_output_dir, check_resume
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.balance import Balance, describe_balance, plan_balance
from ray_vlm.data.index import Index
from ray_vlm.data.plan import Plan
from ray_vlm.data.preprocessing import changed_since
from ray_vlm.data.records import Image, PreferenceRecord, Record, SftRecord
from ray_vlm.data.rows import load_preparer
from ray_vlm.data.spec import RowSpec
from ray_vlm.data.splits import load_parts, row_tags
from ray_vlm.errors import ConfigError, Interrupted, RunError
from ray_vlm.methods import METHODS
from ray_vlm.models.quiet import quiet_libraries
from ray_vlm.runs.manifest import (
    finish_manifest,
    is_running,
    last_attempt,
    start_attempt,
    start_manifest,
    write_training_log,
)
from ray_vlm.runs.paths import RunPaths, check_free, claim_run, find_run, write_bad_rows, write_json
from ray_vlm.runs.store import full_address
from ray_vlm.train.energy import check_energy
from ray_vlm.train.launch import launch
from ray_vlm.train.worker import WorkerTask


@dataclass(frozen=True)
class Prepared:
    """All that is decided before anything starts."""

    job: JobConfig
    spec: RowSpec
    train: Index
    eval: Index | None
    plan: Plan
    balance: Balance
    notes: tuple[str, ...] = ()


def prepare(job: JobConfig) -> Prepared:
    """Read and check all rows, and plan the run. Touches no run folder; raises on anything that cannot work."""
    if job.data.train is None:
        raise ConfigError("`data.train` is missing. Give it a path and a format.")
    quiet_libraries()
    METHODS[job.method.name].check_options(job)
    check_energy(job)
    job = absolute_paths(job)
    parts = load_parts(job, ["train", "eval"] if job.data.eval is not None else ["train"])
    assert parts.train is not None
    assert job.data.train is not None
    sources = [job.data.train, *job.data.mix]
    weights = np.array([sources[record.source].weight for record in parts.train.records])
    notes = _check_scores(job, parts.train)
    _check_pairs(job, parts.spec)
    balance = plan_balance(
        [row_tags(job, record) for record in parts.train.records], weights, job.data, job.task.name != "detection"
    )
    spec = replace(parts.spec, token_weights=balance.token_weights)
    plan = plan_run(job, len(parts.train), balance.factors, parts.train.costs)
    return Prepared(job, spec, parts.train, parts.eval, plan, balance, (*parts.notes, *notes))


def _check_scores(job: JobConfig, train: Index) -> list[str]:
    """The self-test of GRPO's rewards: raises `ConfigError` where they reward something else than the truth."""
    if job.method.name != "grpo":
        return []
    from ray_vlm.methods.grpo import job_rewards
    from ray_vlm.methods.rewards import check_rewards

    return check_rewards(job_rewards(job, train.labels))


def _check_pairs(job: JobConfig, spec: RowSpec) -> None:
    """Raise where pairs were sampled at other image sizes: places in their answers would be wrong."""
    if job.method.name != "dpo":
        return
    sources = [s for s in (job.data.train, *job.data.mix, job.data.eval) if s is not None and s.path]
    changed = [(s.path, text) for s in sources for text in changed_since(s.path, load_preparer(spec))]
    if changed:
        raise ConfigError(
            [
                f"{path}: its answers were sampled with another {text}. Use those, or make it again."
                for path, text in changed
            ]
        )


def plan_run(job: JobConfig, num_rows: int, factors: np.ndarray | None = None, costs: np.ndarray | None = None) -> Plan:
    """The job's plan over `num_rows` rows; `factors` and `costs` as `Plan` has them.

    GRPO's batch sizes count answers, and a worker samples for all prompts of its step at once.
    """
    train, workers = job.train, max(1, job.cluster.num_workers)
    whole, micro = train.global_batch_size, train.micro_batch_size
    if job.method.name == "grpo":
        whole //= job.method.num_generations
        micro = whole // workers
    return Plan(
        num_rows=num_rows,
        global_batch_size=whole,
        micro_batch_size=micro,
        world_size=workers,
        whole_steps=job.method.name != "sft",
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        shuffle=job.data.shuffle,
        seed=job.seed,
        factors=factors,
        costs=costs if job.data.balance_lengths else None,
    )


def absolute_paths(job: JobConfig) -> JobConfig:
    """The job with its local paths made absolute: a Ray worker's current folder is another one."""

    def source(value: Source | None) -> Source | None:
        if value is None or not value.path:
            return value
        root = full_address(value.image_root) if value.image_root else None
        return value.model_copy(update={"path": full_address(value.path), "image_root": root})

    data: dict[str, Any] = {name: source(getattr(job.data, name)) for name in ("train", "eval", "test")}
    data["mix"] = tuple(source(value) for value in job.data.mix)
    model = {k: _absolute(v) for k in ("name", "adapter") if (v := getattr(job.model, k)) and _is_local(v)}
    return job.model_copy(
        update={
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update=model),
            "run": job.run.model_copy(update={"output_dir": _output_dir(job.run.output_dir)}),
        }
    )


def _output_dir(address: str) -> str:
    """Where runs go, for every process. Raises `ConfigError` for a relative path under a Ray job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and (problems := check_output_dir(address)):
        raise ConfigError(problems)
    return full_address(address)


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def _is_local(name: str) -> bool:
    """Whether a model's name is a folder here; anything else is a name on the hub."""
    return os.path.exists(os.path.expanduser(name))


def train(
    job: JobConfig, job_text: str, overwrite: bool = False, command: Sequence[str] = (), resume: bool = False
) -> RunPaths:
    """Run the job to the end and return its folder. Raises after writing the reason into `run.json`.

    `resume`: go on with the run of that name, or the newest one of its kind; where there is none it starts.
    Raises `Interrupted` when a signal stopped it; a checkpoint is then on the disk.
    """
    job = absolute_paths(job)
    stem = f"{job.method.name}-{Path(job.model.name).name.lower()}-{job.task.name}"
    paths = find_run(job.run.output_dir, job.run.name, stem) if resume else None
    if paths is not None:
        check_goes_on(paths, job)
    elif job.run.name is not None:
        check_free(job.run.output_dir, job.run.name, overwrite)  # before an hour of indexing
    prepared = prepare(job)
    if paths is not None and _is_done(paths, prepared):
        print(f"{paths.address} is finished; for more steps raise train.num_epochs or train.max_steps", flush=True)
        return paths
    if paths is None:
        paths = claim_run(job.run.output_dir, job.run.name, stem, overwrite)
        start_manifest(paths, dump_job(prepared.job), job_text, list(command or sys.argv))
    else:
        write_json(paths.resolved, dump_job(prepared.job))
        paths.publish(paths.resolved)
        start_attempt(paths)
    _write_bad_rows(prepared, paths)
    _write_balance(prepared, paths)
    _run(prepared, paths)
    return paths


def check_goes_on(paths: RunPaths, job: JobConfig) -> None:
    """Raise unless the run in `paths` may be resumed by `job`: nothing drives it now, and both learn the same."""
    if driver := is_running(paths):
        raise RunError(
            f"--resume: {paths.address} is being trained by process {driver['pid']} on {driver['host']}. Wait for it, "
            "or stop it first."
        )
    if problems := check_resume(fill_defaults(json.loads(paths.resolved.read_text())), dump_job(job)):
        raise ConfigError(problems)


def _is_done(paths: RunPaths, prepared: Prepared) -> bool:
    """Whether the run reached what the job asks for, or had stopped early on its way there."""
    run = json.loads(paths.run.read_text())
    return run["status"] == "finished" and run["result"].get("num_steps", 0) >= prepared.plan.num_steps


def _write_bad_rows(prepared: Prepared, paths: RunPaths) -> None:
    bad = {"train": prepared.train.bad, "eval": prepared.eval.bad if prepared.eval else ()}
    if any(bad.values()):
        write_bad_rows(paths.bad_rows, bad)
        paths.publish(paths.bad_rows)
        print(f"{sum(map(len, bad.values()))} bad rows left out; see {paths.place('bad_rows.jsonl')}", flush=True)


def _write_balance(prepared: Prepared, paths: RunPaths) -> None:
    """Show and keep what is odd about the data, and the mix of classes that training sees."""
    for note in prepared.notes:
        print(f"note: {note}", flush=True)
    if prepared.balance.factors is not None or prepared.balance.token_weights:
        print("\n".join(describe_balance(prepared.balance)), flush=True)
    write_json(paths.balance, {"rows_per_epoch": prepared.plan.rows_per_epoch, "mix": prepared.balance.table})
    paths.publish(paths.balance)


def _run(prepared: Prepared, paths: RunPaths) -> None:
    """Launch the workers and write down how it ended."""
    job = prepared.job
    task = WorkerTask(
        job=dump_job(job),
        run=paths.address,
        spec=prepared.spec,
        plan=prepared.plan,
        train=prepared.train.records,
        eval=prepared.eval.records if prepared.eval else None,
        attempt=last_attempt(paths),
        rows=rows_fingerprint(prepared.train.records),
        environment=read_environment(),
    )
    status, error, result, stopped_by = "failed", "", None, None
    try:
        result, stopped_by = launch(job, task, paths)
        status = "interrupted" if result["stopped"] else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as failure:  # the edge of a run: written down, then raised
        error = str(failure)[-2000:]
        if isinstance(failure, OSError):
            raise RunError(f"{paths.address}: {failure}. Mend that, then go on with --resume.") from failure
        raise
    finally:
        with suppress(OSError) if status == "failed" else nullcontext():  # a full disk must not hide the cause
            paths.refresh(paths.metrics)
            finish_manifest(paths, status, result, error)
            write_training_log(paths, result["best"] if result else None)
    if result["stopped"]:
        raise Interrupted(
            f"stopped at step {result['steps']} of {prepared.plan.num_steps}, with a checkpoint; --resume goes on "
            f"(run.name={paths.name}).",
            stopped_by or signal.SIGINT,
        )


def rows_fingerprint(records: Sequence[Record]) -> str:
    """A hash of what the plan's row numbers mean: ids, images by name and size, and answers, in order."""
    digest = hashlib.sha256()
    for r in records:
        names = [_image_name(image) for image in r.images]
        if isinstance(r, SftRecord):
            told: tuple = (sorted(r.truth.items()), sorted(r.context.items()))
        elif isinstance(r, PreferenceRecord):
            told = (r.prompt, r.chosen, r.rejected)
        else:
            told = (r.prompt, sorted(r.columns.items()))
        digest.update(repr((r.id, r.row, names, r.sizes, told)).encode())
    return digest.hexdigest()[:16]


def _image_name(image: Image) -> str:
    return Path(image).name if isinstance(image, str) else hashlib.sha256(image).hexdigest()
