"""On the driver: job -> index -> plan -> workers -> run folder. Decides, launches, and writes down how it ended."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_vlm.config.load import dump_job
from ray_vlm.config.schema import JobConfig, Source
from ray_vlm.data.index import Index, build_index, read_labels
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import RowSpec, row_spec
from ray_vlm.data.source import prepare_source
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.methods import METHODS
from ray_vlm.models.quiet import quiet_libraries
from ray_vlm.runs.console import Console, follow
from ray_vlm.runs.manifest import finish_manifest, start_manifest, update_manifest, write_training_log
from ray_vlm.runs.paths import RunPaths, check_free, claim_run, write_bad_rows
from ray_vlm.train.worker import WorkerTask, train_worker


@dataclass(frozen=True)
class Prepared:
    """All that is decided before anything starts."""

    job: JobConfig
    spec: RowSpec
    train: Index
    eval: Index | None
    plan: Plan


def prepare(job: JobConfig) -> Prepared:
    """Read and check all rows, and plan the run. Touches no run folder; raises on anything that cannot work."""
    if job.data.train is None:
        raise ConfigError("`data.train` is missing. Give it a path and a format.")
    quiet_libraries()
    METHODS[job.method.name].check_options(job)
    job = absolute_paths(job)
    sources = {name: getattr(job.data, name) for name in ("train", "eval")}
    for source in sources.values():
        if source is not None:
            prepare_source(source)
    spec = row_spec(job, read_labels(sources["train"]))
    train = build_index(sources["train"], job.data, spec)
    evaluation = build_index(sources["eval"], job.data, spec) if sources["eval"] else None
    return Prepared(job, spec, train, evaluation, plan_run(job, len(train)))


def plan_run(job: JobConfig, num_rows: int) -> Plan:
    """The job's plan over `num_rows` rows."""
    train = job.train
    return Plan(
        num_rows=num_rows,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        world_size=max(1, job.cluster.num_workers),
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        shuffle=job.data.shuffle,
        seed=job.seed,
    )


def absolute_paths(job: JobConfig) -> JobConfig:
    """The job with its local paths made absolute: a Ray worker's current folder is another one."""

    def source(value: Source | None) -> Source | None:
        if value is None:
            return None
        root = _absolute(value.image_root) if value.image_root else None
        return value.model_copy(update={"path": _absolute(value.path), "image_root": root})

    data = {name: source(getattr(job.data, name)) for name in ("train", "eval", "test")}
    model = {k: _absolute(v) for k in ("name", "adapter") if (v := getattr(job.model, k)) and _is_local(v)}
    return job.model_copy(
        update={
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update=model),
            "run": job.run.model_copy(update={"output_dir": _absolute(job.run.output_dir)}),
        }
    )


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def _is_local(name: str) -> bool:
    """Whether a model's name is a folder here; anything else is a name on the hub."""
    return os.path.exists(os.path.expanduser(name))


def train(job: JobConfig, job_text: str, overwrite: bool = False, command: Sequence[str] = ()) -> RunPaths:
    """Run the job to the end and return its folder. Raises after writing the reason into `run.json`."""
    if job.run.name is not None:
        check_free(absolute_paths(job).run.output_dir, job.run.name, overwrite)  # before an hour of indexing
    prepared = prepare(job)
    job = prepared.job
    stem = f"{job.method.name}-{Path(job.model.name).name.lower()}-{job.task.name}"
    paths = claim_run(job.run.output_dir, job.run.name, stem, overwrite)
    start_manifest(paths, dump_job(job), job_text, list(command or sys.argv))
    bad = {"train": prepared.train.bad, "eval": prepared.eval.bad if prepared.eval else ()}
    if any(bad.values()):
        write_bad_rows(paths.bad_rows, bad)
        print(f"{sum(map(len, bad.values()))} bad rows left out; see {paths.bad_rows}", flush=True)
    try:
        result = _launch(prepared, paths)
    except KeyboardInterrupt:
        finish_manifest(paths, "interrupted")
        write_training_log(paths, None)
        raise
    except Exception as error:  # the edge of a run: written down, then raised
        finish_manifest(paths, "failed", error=str(error)[-2000:])
        write_training_log(paths, None)
        raise
    finish_manifest(paths, "finished", result)
    write_training_log(paths, result["best"])
    return paths


def _launch(prepared: Prepared, paths: RunPaths) -> dict[str, Any]:
    job = prepared.job
    records = prepared.eval.records if prepared.eval else None
    task = WorkerTask(
        job=dump_job(job),
        run_dir=str(paths.root),
        spec=prepared.spec,
        plan=prepared.plan,
        train=prepared.train.records,
        eval=records,
        num_loaders=1,
    )
    if job.cluster.num_workers == 0:
        return train_worker(task)
    return _launch_ray(job, task, paths)


def _launch_ray(job: JobConfig, task: WorkerTask, paths: RunPaths) -> dict[str, Any]:
    """Run the task in Ray Train workers, showing their progress as it is written."""
    from ray_vlm.cluster.connect import connect

    with connect(job) as layout:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        task = replace(
            task,
            train=ray.put(task.train),
            eval=ray.put(task.eval) if task.eval is not None else None,
            num_loaders=layout.num_loaders,
            cpus_per_loader=layout.cpus_per_loader,
        )
        update_manifest(paths, cluster={k: v for k, v in ray.cluster_resources().items() if ":" not in k})
        each = {"CPU": job.cluster.cpus_per_worker, "GPU": job.cluster.gpus_per_worker}
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=job.cluster.num_workers,
                use_gpu=job.cluster.gpus_per_worker > 0,
                resources_per_worker={name: amount for name, amount in each.items() if amount},
            ),
            run_config=RunConfig(
                name=paths.root.name,
                storage_path=str(paths.root / ".ray"),
            ),
        )
        with follow(paths.metrics, Console(task.plan.num_steps, job.train.log_every_steps)):
            _fit(trainer)
    result = paths.take_result()
    shutil.rmtree(paths.root / ".ray", ignore_errors=True)  # Ray's own state; a finished run needs none
    return result


def _ray_worker(config: dict[str, Any]) -> None:
    train_worker(config["task"], in_ray=True)


def _fit(trainer: Any) -> None:
    """Run the trainer; Ctrl-C stops the workers and is a `KeyboardInterrupt` here.

    Ray Train installs a handler of its own for SIGINT, which would end this process with exit code 0 and stay behind.
    """
    from ray.train import TrainingFailedError

    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"training failed: {_cause(error)}") from error
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, handler)


def _cause(error: Exception) -> str:
    """What the workers raised, those first that this package raised on purpose; the others often only follow."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return str(error)
    told = [(rank, str(failure).strip()) for rank, failure in sorted(failures.items())]
    told.sort(key=lambda item: "ray_vlm.errors." not in item[1])
    return "\n".join(f"rank {rank}: {text[-3000:]}" for rank, text in told[:2])
