"""The driver of a run: prepare the job, open the run folder, launch the workers, record how the run ended."""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_vlm.cluster.environment import read_environment
from ray_vlm.config.load import dump_job, fill_defaults
from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.paths import absolute_paths
from ray_vlm.config.resume import check_resume, keep_formats, keep_shuffle
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.balance import describe_balance
from ray_vlm.data.index import ROWS_VERSION, Index, share_plan
from ray_vlm.data.measure import NONE_KNOWN
from ray_vlm.data.parts import Parts
from ray_vlm.data.plan_files import hash_values, values_of
from ray_vlm.data.rows import SIZES_FILE, Rows, describe_lost, pack_sizes, unpack_sizes
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.sources.detect import settle_formats
from ray_vlm.data.stream import mean_bytes, mean_pixels
from ray_vlm.errors import ConfigError, Interrupted, RunError
from ray_vlm.logs import run_output
from ray_vlm.runs.log_file import log_to_file
from ray_vlm.runs.manifest import (
    cannot_write,
    check_free,
    check_not_driven,
    check_own,
    claim_run,
    find_run,
    finish_manifest,
    last_attempt,
    start_attempt,
    start_manifest,
    tell_attempts,
    this_process,
)
from ray_vlm.runs.monitor import write_training_log
from ray_vlm.runs.paths import RunPaths, write_bad_rows, write_json
from ray_vlm.runs.trackers import adopt_wandb_login
from ray_vlm.train.launch import launch
from ray_vlm.train.prepare import Prepared, prepare
from ray_vlm.train.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)
_SAMPLED = 500  # rows whose sizes stand for all


@dataclass(frozen=True)
class TrialContext:
    """What a sweep passes to a trial. `parts`: rows that were read once for all trials; `stop`: returns whether the
    trial should end; `at_once`: how many trials share the cluster."""

    parts: Parts | None = None
    stop: Callable[[], bool] | None = None
    at_once: int = 1


ALONE = TrialContext()  # of a run outside a sweep


def train(
    job: JobConfig,
    job_text: str,
    overwrite: bool = False,
    command: Sequence[str] = (),
    resume: bool = False,
    trial: TrialContext = ALONE,
) -> RunPaths:
    """Run the job to the end and return its folder. An error is written into `run.json` before it is raised.

    `resume`: continue the run of that name, or the newest one of its kind; start a new one if there is none. `trial`:
    of the sweep that the run belongs to. Raises `Interrupted` if a signal stopped the run; there is a checkpoint then.
    """
    job = absolute_paths(job)
    logger.info(describe_job(job))  # before anything that takes long
    if job.track.wandb:
        adopt_wandb_login()  # before `read_environment` takes it to the workers
    stem = f"{job.method.name}-{Path(job.model.name).name.lower()}-{job.task.name}"
    paths = find_run(job.run.output_dir, job.run.name, stem) if resume else None
    if paths is not None:
        check_goes_on(paths, dump_job(job))
        earlier = json.loads(paths.resolved.read_text())
        job = keep_formats(earlier, keep_shuffle(earlier, job))
    elif job.run.name is not None:
        check_free(job.run.output_dir, job.run.name, overwrite)  # before an hour of indexing
    with run_output():  # its line is the second one, and a reader may have left after the first
        job = settle_formats(job)
    known = _read_sizes(paths) if paths is not None else NONE_KNOWN
    prepared = prepare(job, trial.parts, known)
    if paths is not None and _is_done(paths, prepared):
        logger.info(f"{paths.address} is finished; for more steps raise train.num_epochs or train.max_steps")
        return paths
    if paths is None:
        paths = claim_run(job.run.output_dir, job.run.name, stem, overwrite)
        _start(prepared, paths, job_text, list(command or sys.argv))
    else:
        with _refusals(paths):
            write_json(paths.resolved, dump_job(prepared.job))
            paths.publish(paths.resolved)
            start_attempt(paths)
    with run_output(), log_to_file(paths, "driver" if job.cluster.num_workers else "rank-0"):
        with _refusals(paths):
            if not known and job.data.on_bad_row == "quarantine":
                paths.store.write(SIZES_FILE, pack_sizes(prepared.train.file_sizes()))
            _write_bad_rows(prepared, paths)
            _write_balance(prepared, paths)
        logger.info(describe_plan(prepared, paths))
        logger.info(prepared.shuffle)
        _run(prepared, paths, trial)
    return paths


def describe_job(job: JobConfig) -> str:
    """Return a line on what the job is about to do."""
    sources = [job.data.train, *job.data.mix, job.data.eval]
    files = dict.fromkeys(s.name for s in sources if s is not None and s.path)
    return f"{job.method.name} of {job.model.name} for {job.task.name}: reading {', '.join(files)}"


def describe_plan(prepared: Prepared, paths: RunPaths) -> str:
    """Return a line on the run's folder, rows and steps."""
    plan, held_out = prepared.plan, f" and {len(prepared.eval):,} eval" if prepared.eval is not None else ""
    return (
        f"run folder {paths.address}: {len(prepared.train):,} training{held_out} rows; {plan.num_steps:,} steps of "
        f"{plan.global_batch_size:,} rows, {plan.steps_per_epoch:,} an epoch"
    )


def _start(prepared: Prepared, paths: RunPaths, job_text: str, command: list[str]) -> None:
    """Write the first files of a new run. If that fails, remove what was written so that the name is free again."""
    try:
        start_manifest(paths, dump_job(prepared.job), job_text, command, ROWS_VERSION)
    except OSError as error:
        with suppress(OSError):
            paths.store.remove("")
        paths.discard()
        raise cannot_write(prepared.job.run.output_dir, error) from error


@contextmanager
def _refusals(paths: RunPaths) -> Iterator[None]:
    """Turn an `OSError` of the run's storage in the body into a `RunError` that says how to continue."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{paths.address}: {error}. Fix the cause, then go on with --resume.") from error


def check_goes_on(paths: RunPaths, resolved: Mapping[str, Any]) -> None:
    """Raise if the job that `dump_job` returned as `resolved` may not resume the run in `paths`: another process drives
    it, or settings of learning differ."""
    with _refusals(paths):
        check_not_driven(paths.store, "--resume")
    if problems := check_resume(fill_defaults(json.loads(paths.resolved.read_text())), resolved):
        raise ConfigError(problems)


def _read_sizes(paths: RunPaths) -> Mapping[str, tuple[int, int]]:
    """Return the image sizes that the run stored at its start."""
    data = None
    with _refusals(paths):
        data = paths.store.read(SIZES_FILE)
    return unpack_sizes(data or b"")


def _is_done(paths: RunPaths, prepared: Prepared) -> bool:
    """Return whether the run is finished with at least the job's number of steps, also by early stopping."""
    run = json.loads(paths.run.read_text())
    return run["status"] == "finished" and run["result"].get("num_steps", 0) >= prepared.plan.num_steps


def _write_bad_rows(prepared: Prepared, paths: RunPaths) -> None:
    bad = {"train": prepared.train.bad, "eval": prepared.eval.bad if prepared.eval else ()}
    if any(bad.values()):
        write_bad_rows(paths.bad_rows, bad)
        paths.publish(paths.bad_rows)
        logger.info(f"{sum(map(len, bad.values()))} bad rows left out; see {paths.uri('bad_rows.jsonl')}")


def _write_balance(prepared: Prepared, paths: RunPaths) -> None:
    """Log the notes on the data and the mix of classes, and write the mix to `balance.json`."""
    for note in prepared.notes:
        logger.warning(note)
    if prepared.balance.repeat_factors is not None or prepared.balance.token_weights:
        logger.info("\n".join(describe_balance(prepared.balance)))
    write_json(paths.balance, {"rows_per_epoch": prepared.plan.rows_per_epoch, "mix": prepared.balance.table})
    paths.publish(paths.balance)


def _longest_prompt(index: Index) -> int:
    """Return the tokens of the longest prompt with its images."""
    return int((index.image_tokens + index.prompt_tokens).max()) if len(index) else 0


def _most_images(method: Method, parts: Sequence[Rows]) -> int:
    """Return the most images of a row, for jobs whose answers another engine samples than the package's own loop; 1 for
    others, where nothing needs it and all rows would be read."""
    if not isinstance(method, GrpoMethod) or method.rollouts == "transformers":
        return 1
    return max((len(rows[number].images) for rows in parts for number in range(len(rows))), default=1) or 1


def _fingerprint_rows(prepared: Prepared, version: int) -> str:
    """Return the fingerprint of the training rows, and with windows of what is read together: the same rows in other
    row groups have another order."""
    rows, units = prepared.train.fingerprint(version), prepared.plan.unit_starts
    return rows if units is None or not prepared.plan.window else f"{rows}-{hash_values(values_of(units))[:8]}"


def _run(prepared: Prepared, paths: RunPaths, trial: TrialContext = ALONE) -> None:
    """Launch the workers and record how the run ended."""
    job, rows = prepared.job, prepared.train.records
    some = rows[:: max(1, len(rows) // _SAMPLED)]
    spec = WorkerSpec(
        job=dump_job(job),
        run=paths.address,
        sample_spec=prepared.spec,
        plan=share_plan(prepared.plan, rows) if job.cluster.num_workers else prepared.plan,
        train=rows,
        eval=prepared.eval.records if prepared.eval else None,
        attempt=last_attempt(paths),
        driver=this_process(),
        rows=_fingerprint_rows(prepared, _rows_version(paths)),
        row_bytes=mean_bytes(some, load_sample_builder(prepared.spec).image_spec),
        image_pixels=mean_pixels(some),
        probe=prepared.probe,
        prompt_tokens=_longest_prompt(prepared.train),
        eval_prompt_tokens=_longest_prompt(prepared.eval) if prepared.eval else 0,
        prompt_images=_most_images(job.method, [rows, prepared.eval.records] if prepared.eval else [rows]),
        environment=read_environment(),
    )
    status, error, result, stopped_by = "failed", "", None, None
    try:
        with _refusals(paths):
            result, stopped_by = launch(job, spec, paths, trial.stop, trial.at_once)
        status = "interrupted" if result["stopped"] else "finished"
    except (KeyboardInterrupt, Interrupted):
        status = "interrupted"
        raise
    except Exception as failure:  # recorded in run.json, then raised
        error = str(failure)[-2000:]
        raise
    finally:
        _end(paths, status, result, error)
    if lost := result.get("lost_rows"):
        logger.info(describe_lost(lost))
    if result["stopped"]:
        raise Interrupted(
            f"stopped at step {result['steps']} of {prepared.plan.num_steps}, with a checkpoint; --resume goes on "
            f"(run.name={paths.name}).",
            stopped_by or signal.SIGINT,
        )


def _rows_version(paths: RunPaths) -> int:
    """Return the version of the rows' fingerprint that the run began with."""
    return json.loads(paths.run.read_text()).get("rows_version", 1)


def _end(paths: RunPaths, status: str, result: dict[str, Any] | None, error: str) -> None:
    """Record how the run ended; `run.json` last, so that a run with status `finished` is complete.

    Raises `RunError` and writes nothing if another driver has taken over the run.
    """

    def allowed() -> AbstractContextManager[None]:  # a full disk must not hide the first error
        return suppress(OSError) if status == "failed" else _refusals(paths)

    with allowed():
        check_own(paths.store)
        paths.refresh(paths.metrics)
        write_training_log(paths, status, result["best"] if result else None)
    with allowed():
        finish_manifest(paths, status, result, error)
        if summary := tell_attempts(json.loads(paths.run.read_text())["attempts"]):
            logger.info(summary)
