"""`ray-vlm tune`: a job and a space -> trials, each an ordinary run -> the best one, measured and exported.

<output_dir>/<job>-<space>/
  sweep.json  trials/<number>/  report.html  export/adapter|merged/

`sweep.json` describes the sweep and how its trials ended; it is made from the trials' folders and written again
whenever they change. No state of Ray Tune is kept.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_vlm.cluster.connect import find_resources, start_ray
from ray_vlm.cluster.environment import read_environment
from ray_vlm.cluster.nodes import check_shared
from ray_vlm.cluster.preflight import build_demand
from ray_vlm.config.check import tune_metrics
from ray_vlm.config.check_method import TASK_METRICS
from ray_vlm.config.data import Data
from ray_vlm.config.load import dump_job, fill_defaults, load_job, load_resolved
from ray_vlm.config.paths import absolute_paths
from ray_vlm.config.resume import check_resume, keep_formats, keep_shuffle, touches
from ray_vlm.config.schema import Evaluate, JobConfig, Tune
from ray_vlm.data.parts import load_parts
from ray_vlm.data.sources.detect import settle_formats
from ray_vlm.errors import ConfigError, Interrupted, RunError
from ray_vlm.evaluate.export import export_run, kind_of
from ray_vlm.evaluate.run import evaluate
from ray_vlm.evaluate.weights import weights_of
from ray_vlm.runs.card import MERGED
from ray_vlm.runs.manifest import finish_manifest, refuse_living, this_process
from ray_vlm.runs.monitor import write_training_log
from ray_vlm.runs.paths import open_run
from ray_vlm.runs.read import Run, read_run
from ray_vlm.runs.text import format_number
from ray_vlm.runs.trackers import adopt_wandb_login
from ray_vlm.storage import Store, is_remote, join, split_address
from ray_vlm.train.driver import describe_job
from ray_vlm.train.prepare import prepare, wanted_parts
from ray_vlm.tune.report import write_report
from ray_vlm.tune.search import SweepPlan, draw_trials, plan_sweep, run_tune
from ray_vlm.tune.space import Space, load_space, own_values
from ray_vlm.tune.trial import PRUNED, Sweep, build_trial_job, name_trial
from ray_vlm.tune.trials import Trial, rank_trials, read_trials, trial_address

logger = logging.getLogger(__name__)
SWEEP, REPORT = "sweep.json", "report.html"
_OVER = ("finished", PRUNED, "failed")
_DRAWS = ("search", "default_first")  # settings of `tune` that decide what a number draws
# Settings that change neither which rows there are nor how they are read.
_SAME_ROWS = (
    *("train", "lora", "evaluate", "checkpoint", "seed", "method", "data.oversample", "data.class_weights"),
    *("data.condition_weights", "data.shuffle", "data.balance_lengths", "data.num_loaders", "data.loaders"),
)
_OTHER_ROWS = ("method.name", "method.loss_on")  # what a row of the method is, and which of its tokens are trained


def tune(
    job_path: str, overrides: Sequence[str], space_path: str, resume: bool = False, overwrite: bool = False
) -> str:
    """Run a sweep to its end and return its folder. Raise before any trial starts where one of them could not run.

    `resume`: continue the sweep of that name, or start it where there is none. `overwrite`: delete it first. Raise
    `Interrupted` when a signal stopped it, and `RunError` where no trial reached a finite metric.
    """
    space = load_space(space_path, job_path, overrides)
    job = absolute_paths(load_job(job_path, overrides))
    job = job.model_copy(update={"evaluate": _ranked(job.data, job.tune, job.evaluate)})
    logger.info(describe_job(job))
    address = join(job.run.output_dir, f"{job.run.name or Path(job_path).stem}-{Path(space_path).stem}")
    if _check_sweep_folder(address, dump_job(job), space, resume, overwrite):
        earlier = read_sweep(address)["job"]
        job = keep_formats(earlier, keep_shuffle(earlier, job))
    job = settle_formats(job)
    resolved, metric = dump_job(job), job.evaluate.metric
    if job.track.wandb:
        adopt_wandb_login()
    known = read_trials(address, space) if resume else []
    parts = load_parts(job, wanted_parts(job.data)) if shares_rows(space, job.data) else None
    steps = prepare(job, parts).plan  # raises for what would stop every trial, before any starts
    demand = build_demand(job)
    with start_ray(demand):
        plan = plan_sweep(job, space, *find_resources(demand, job.tune.max_concurrent or 1))
        draws: tuple[dict[str, Any], ...] = ()
        if job.tune.search == "random":
            draws = draw_trials(space, plan.num_trials, job.seed, job.tune.default_first)
        sweep = Sweep(resolved, space, address, metric, plan.at_once, parts, draws, read_environment())
        _check_draws(sweep)
        if overwrite:
            Store(address).remove("")
        write_sweep(sweep, known, "running")
        check_shared(address)
        logger.info(describe(sweep, plan, job.tune))
        own = own_values(space, resolved) if job.tune.default_first else None  # None too where the space lacks them
        points = {int(trial.name): trial.values for trial in known} or ({0: own} if own else {})
        first = job.evaluate.every_steps or steps.steps_per_epoch
        ended, failed = run_tune(sweep, plan, job.tune, first, points)
    _settle(address, ended)
    trials = _with_failed(read_trials(address, space), failed, metric)
    over = len(trials) >= plan.num_trials and all(trial.status in _OVER for trial in trials)
    write_sweep(sweep, trials, "finished" if over else "interrupted")
    for number, text in failed.items():
        logger.info(f"trial {name_trial(number)} failed: {text}")
    if not over:
        done = sum(trial.status in _OVER for trial in trials)
        raise Interrupted(f"stopped with {done} of {plan.num_trials} trials over; --resume goes on ({address})")
    if not rank_trials(trials):
        raise RunError(f"{address}: no trial reached a finite {metric}. See the errors in the run.json of its trials.")
    finish_sweep(address, job, space, trials)
    return address


def _ranked(data: Data, tune: Tune, evaluate: Evaluate) -> Evaluate:
    """Return the settings of evaluation with the metric that ranks the trials."""
    if data.eval is None:
        raise ConfigError("`data.eval` is missing: trials are ranked on rows that they do not train on. Give it.")
    return evaluate.model_copy(update={"metric": tune_metrics(tune, evaluate)[0]})


def shares_rows(space: Space, data: Data) -> bool:
    """Return whether no setting of the space changes which rows a trial has or how they are read."""
    cut = any(source is not None and source.ratio is not None for source in (data.eval, data.test))
    other = (*_OTHER_ROWS, *(("seed",) if cut else ()))  # a share of rows is drawn by the seed
    return all(
        any(touches(s.key, same) and len(s.key) >= len(same) for same in _SAME_ROWS)
        and not any(touches(s.key, changed) for changed in other)
        for s in space.settings
    )


def _check_sweep_folder(address: str, job: Mapping[str, Any], space: Space, resume: bool, overwrite: bool) -> bool:
    """Return whether the folder holds a sweep to resume. Raise where it holds one that is not to be deleted, one that
    another process runs, or, to resume, one of another job or space. `job`: resolved."""
    if not Store(address).names():
        return False
    if not resume and not overwrite:
        raise RunError(f"{address} exists. Continue it with --resume, or delete it with --overwrite.")
    sweep = read_sweep(address)
    refuse_living(sweep.get("driver"), address, "--resume" if resume else "--overwrite")
    if not resume:
        return False
    if sweep["space"] != json.loads(json.dumps(asdict(space)["settings"])):
        raise ConfigError(
            f"--resume: {address} was started with another space, so its trials would not be comparable. Give the old "
            "space, or another run.name."
        )
    fixed = {key: sweep["job"]["tune"][key] for key in _DRAWS}  # the rest of the section may change
    if problems := check_resume(fill_defaults(sweep["job"] | {"tune": job["tune"] | fixed}), job):
        raise ConfigError(problems)
    return True


def _check_draws(sweep: Sweep) -> None:
    """Raise `ConfigError` with every problem that would stop a trial at its start, where the draws are known and the
    trials share their rows."""
    problems: list[str] = []
    for number, drawn in enumerate(sweep.draws if sweep.parts is not None else ()):
        try:
            prepare(build_trial_job(sweep, number, drawn)[0], sweep.parts)
        except ConfigError as error:
            problems += [f"trial {name_trial(number)}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def read_sweep(address: str) -> dict[str, Any]:
    """Read `sweep.json`. Raise `RunError` where there is no sweep."""
    try:
        sweep = json.loads(Store(address).read(SWEEP) or b"")
        if not isinstance(sweep, dict) or not {"job", "space", "trials"} <= set(sweep):
            raise ValueError("fields are missing")
        return sweep
    except (OSError, ValueError) as error:
        raise RunError(f"{address}: no sweep here ({SWEEP}: {error}). Give another run.name.") from None


def find_best(address: str) -> str:
    """Return the run of a sweep's best trial; `address` itself where it is no sweep. Raise `RunError` for a sweep
    without a best trial."""
    if SWEEP not in Store(address).names():
        return address
    if not (best := read_sweep(address).get("best")):
        raise RunError(f"{address}: no trial of this sweep has been validated yet. Wait for its first validation.")
    return trial_address(address, str(best))


def write_sweep(sweep: Sweep, trials: Sequence[Trial], status: str) -> None:
    """Write `sweep.json`."""
    order = rank_trials(trials)
    values = {
        "status": status,
        "job": sweep.job,
        "space": asdict(sweep.space)["settings"],
        "metric": sweep.metric,
        "written": time.time(),
        "driver": this_process() if status == "running" else None,
        "best": trials[order[0]].name if order else None,
        "trials": [asdict(trial) for trial in trials],
    }
    store = Store(sweep.address)
    if store.local is not None:
        store.local.mkdir(parents=True, exist_ok=True)
    store.write(SWEEP, json.dumps(values, indent=1).encode())


def describe(sweep: Sweep, plan: SweepPlan, options: Tune) -> str:
    """Describe the sweep in two lines, before it starts."""
    each = f"{plan.cpus:g} CPU" + (f" and {plan.gpus:g} GPU" if plan.gpus else "")
    return (
        f"sweep {sweep.address}: {plan.num_trials} trials, {plan.at_once} at a time, {each} each; {options.search} "
        f"search, scheduler {options.scheduler}, best by {sweep.metric}\nsearched: "
        + ", ".join(f"{s.key} {s.kind} {list(s.args)}" for s in sweep.space.searched)
    )


def _settle(address: str, ended: Sequence[int]) -> None:
    """Mark as pruned the runs that the scheduler ended: complete for Tune, but not finished by their own record."""
    for number in ended:
        paths = open_run(trial_address(address, name_trial(number)))
        paths.refresh(paths.run, paths.metrics, paths.resolved)
        if paths.run.is_file() and json.loads(paths.run.read_text())["status"] not in ("finished", PRUNED):
            finish_manifest(paths, PRUNED)
            write_training_log(paths, PRUNED)
        paths.discard()


def _with_failed(trials: Sequence[Trial], failed: Mapping[int, str], metric: str) -> list[Trial]:
    """Return the trials, with those that failed before they had a folder."""
    names = {trial.name for trial in trials}
    lost = [name_trial(n) for n in failed if name_trial(n) not in names]
    none = [Trial(name, {}, "failed", 0, None, metric) for name in lost]
    return sorted([*trials, *none], key=lambda trial: trial.name)


def finish_sweep(address: str, job: JobConfig, space: Space, trials: Sequence[Trial]) -> None:
    """Measure and export the best trial as the job says, and write the report. Existing files are replaced."""
    best = trials[rank_trials(trials)[0]]
    run = read_run(trial_address(address, best.name))
    logger.info(
        f"best: trial {best.name}, {best.metric} {format_number(best.metrics[best.metric])} at step {best.best_step}: "
        + ", ".join(f"{key}={value}" for key, value in best.values.items())
    )
    notes = [f"Ranked by {best.metric} on the eval rows."]
    if job.data.tested is not None:
        notes.append(_measure(run))
    if job.tune.export is not None:
        kind = kind_of(run, job.tune.export == "merged")
        name = f"export/{kind}"
        Store(address).remove(name)
        _make(address, name, lambda folder: export_run(run.address, str(folder), kind == MERGED))
        notes.append(f"The best trial is exported in {name}/.")
        logger.info(f"exported: {join(address, name)}")
    begun = [trial for trial in trials if trial.values]
    runs = [read_run(trial_address(address, trial.name)) for trial in begun]
    page = write_report(
        f"Sweep {split_address(address)[1]}", space, tune_metrics(job.tune, job.evaluate), begun, runs, notes
    )
    Store(address).write(REPORT, page.encode())
    logger.info(f"report {join(address, REPORT)}")


def _measure(run: Run) -> str:
    """Evaluate the best trial on the test rows and return a sentence with the numbers."""
    weights = weights_of(run, None)
    name = f"evaluate/{split_address(weights)[1]}"
    job, metrics = load_resolved(dict(run.job)), dict[str, Any]()
    _make(run.address, name, lambda folder: metrics.update(evaluate(job, weights, folder)))
    names = [name for name in TASK_METRICS[metrics["task"]] if name in metrics["overall"]]
    numbers = ", ".join(f"{name} {format_number(metrics['overall'][name])}" for name in names[:4])
    rows = (
        "validation rows, which also chose it" if metrics.get("rows_chose_best") else "test rows, which chose nothing"
    )
    sentence = f"The best trial on {metrics['num_rows']} {rows}: {numbers}."
    logger.info(sentence)
    return sentence


def _make(address: str, name: str, make: Callable[[Path], object]) -> None:
    """Call `make` with the folder `name` under `address`; for an object store with a temporary folder, which is then
    copied there."""
    if not is_remote(address):
        make(Path(address) / name)
        return
    with tempfile.TemporaryDirectory(prefix="ray_vlm-") as root:
        folder = Path(root) / "made"
        make(folder)
        Store(address).put(folder, name)
