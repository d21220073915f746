"""Answers by the samplers of a GRPO run while it goes on (`evaluate.engine: samplers`).

The run publishes its samplers in `run.json`. They get the adapter's weights beside those of the workers, and answer
what this process asks between the portions of the workers.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ray_vlm.cluster.authentication import token_here
from ray_vlm.cluster.connect import start_ray
from ray_vlm.cluster.preflight import build_demand
from ray_vlm.config.load import dump_job
from ray_vlm.config.paths import absolute_paths
from ray_vlm.config.schema import JobConfig, Lora
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.distributed import DistributedContext
from ray_vlm.engines.actors import SamplerPool
from ray_vlm.engines.ray_samplers import RaySamplers
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.models.load import build_adapter_alone
from ray_vlm.models.lora import fill_adapter, is_whole_model
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.keys import setting
from ray_vlm.runs.read import Run, read_run
from ray_vlm.storage import split_address

_SETTING = "evaluate.engine=samplers"
_OTHER = "or use evaluate.engine=transformers"
_SAME = ("model.name", "model.revision", "model.load_in_4bit", "train.precision")  # what a sampler has loaded


@dataclass(frozen=True)
class RunningSamplers:
    """The samplers of a run: the address of its Ray cluster, and the names and namespace of their actors."""

    address: str
    namespace: str
    names: tuple[str, ...]


def find_samplers(run: Run, job: JobConfig) -> RunningSamplers:
    """Return the samplers that a run has published. Raise `RunError` if it has none, if it does not go on, or if its
    base is not that of `job`, which has absolute paths."""
    where = f"{_SETTING}: {run.address}"
    if not setting(run.job, "method.samplers"):
        raise RunError(
            f"{where} has no samplers. Start a GRPO run with method.samplers=1 or more and give an adapter of it, "
            f"{_OTHER}."
        )
    if run.status != "running":
        raise RunError(
            f"{where}: the run does not go on (status {run.status}), so its samplers are gone. `ray-vlm train JOB "
            f"--resume` starts them again if it has steps left; else start another run, {_OTHER}."
        )
    values = dump_job(job)
    for key in _SAME:
        if (here := setting(values, key)) != (there := setting(run.job, key)):
            raise RunError(
                f"{where}: its samplers have loaded {key}={there}, and this job has {here}. Use a job of that base, "
                f"{_OTHER}."
            )
    about: Any = run.about.get("samplers") or {}
    address, namespace, names = (about.get(key) for key in ("address", "namespace", "names"))
    if not (isinstance(address, str) and isinstance(namespace, str) and isinstance(names, list) and names):
        raise RunError(f"{where}: its samplers are not there yet. Wait until the run has started, {_OTHER}.")
    return RunningSamplers(address, namespace, tuple(map(str, names)))


def join_samplers(job: JobConfig, adapter: str | None, builder: SampleBuilder) -> SamplerPool:
    """Return the samplers of the run that `adapter` is a folder of, as an engine that answers with this adapter.

    Raise `ConfigError` without an adapter or for a whole model, and `RunError` where there are no samplers for it."""
    if adapter is None:
        raise ConfigError(
            f"{_SETTING}: the samplers are those of the run that the adapter is of, and none is given. Give --adapter "
            f"with a folder of a run that goes on, {_OTHER}."
        )
    folder = fetch_folder(adapter)
    if is_whole_model(folder):
        raise ConfigError(f"{_SETTING}: {adapter} is a whole model, and samplers take adapters. Use another engine.")
    job = absolute_paths(job)
    try:
        run = read_run(split_address(adapter)[0])
    except RunError as error:
        raise RunError(f"{_SETTING}: {adapter} is no folder of a run: {error}") from None
    running = find_samplers(run, job)
    start = setting(run.job, "model.adapter")
    base = job.model.model_copy(update={"adapter": start})
    model = build_adapter_alone(base, Lora.model_validate(setting(run.job, "lora")), builder.family)
    fill_adapter(model, folder)
    return _Joined(job, running, run.address, model)


class _Joined(SamplerPool):
    """The samplers of a run, and the connection to its cluster."""

    def __init__(self, job: JobConfig, running: RunningSamplers, run: str, model: Any):
        demand = build_demand(job)
        demand = replace(demand, cluster=demand.cluster.model_copy(update={"address": running.address}))
        with ExitStack() as stack:
            stack.enter_context(token_here(running.address))
            try:
                stack.enter_context(start_ray(demand))
                samplers = RaySamplers(running.names, running.namespace, guest=True)
                if samplers.are_gone:
                    raise RunError(f"no actor has a name like {running.names[0]}")
            except RunError as error:
                reason, _, fix = str(error).partition(". ")
                token = f" {fix}" if "token" in reason else ""
                raise RunError(
                    f"{_SETTING}: the samplers of {run} cannot be reached ({reason}).{token} Ask on a machine of the "
                    f"run's cluster, while the run goes on, {_OTHER}."
                ) from None
            super().__init__(samplers, DistributedContext(), None, job.cluster.max_failures, guest=True)
            self.update(model)
            self._stack = stack.pop_all()

    def close(self) -> None:
        super().close()
        self._stack.close()
