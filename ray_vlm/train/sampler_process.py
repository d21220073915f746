"""The process of a sampler (`method.samplers`): a Ray actor that answers what workers ask, with their weights.

`train/samplers.py` starts it, and `engines/actors.py` asks it.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_vlm.config.load import load_resolved
from ray_vlm.config.method import GrpoMethod
from ray_vlm.config.schema import JobConfig
from ray_vlm.engines.actors import Answer, Answered, Missing, Version
from ray_vlm.engines.weights import Weights
from ray_vlm.train.beside import job_beside, load_beside
from ray_vlm.train.worker_spec import WorkerSpec

# The actor's process imports this module before it has the driver's environment, which libraries read when they load.
if TYPE_CHECKING:
    from torch.nn import Module

    from ray_vlm.data.spec import Sample
    from ray_vlm.engines.interface import Engine, Sampling

_KEPT = 3  # versions of the adapter: workers may be a step apart
_GUESTS = 3  # versions of those that ask beside the workers


@dataclass(frozen=True)
class _Loaded:
    """A model that takes the workers' weights, the engine that answers with it, and the one that answers guests: how
    many of their prompts fit into a GPU must not change the portions of the run."""

    model: "Module"
    engine: "Engine"
    guest_engine: "Engine"

    @property
    def has_ended(self) -> bool:
        """Whether an engine answers no more, since a call of it failed."""
        return self.engine.has_ended or self.guest_engine.has_ended


class Sampler:
    """The Ray actor. It loads the model at the first call, because Ray loses the type of an error that an actor's
    constructor raises."""

    def __init__(self, spec: WorkerSpec, number: int, resources: tuple[float, float]):
        self._spec, self._number, self._resources = spec, number, resources
        self._versions: dict[Version, Weights] = {}
        self._guests: dict[Version, Weights] = {}
        self._current: Version | None = None
        self._loaded: _Loaded | None = None
        self._free_since: float | None = None

    def ping(self) -> tuple[str, int]:
        """Return the host and the process of the sampler, which is ready to be asked."""
        return socket.gethostname(), os.getpid()

    def load(self) -> None:
        """Load the model and start the engine; again if the engine has ended, as the error of one who asked is not
        that of the next one."""
        if self._loaded is None or self._loaded.has_ended:
            self._loaded, self._current = None, None  # its memory is free before the next one takes some
            self._loaded = _load(self._spec, self._number, self._resources)

    def push(self, version: Version, weights: Weights) -> None:
        """Keep the weights of a version until it is asked for."""
        self._versions[version] = weights
        for old in list(self._versions)[:-_KEPT]:
            del self._versions[old]

    def lend(self, version: Version, weights: Weights) -> None:
        """Keep weights of another than the workers, such as an evaluation. They never replace the workers' own."""
        self._guests[version] = weights
        for old in list(self._guests)[:-_GUESTS]:
            del self._guests[old]

    def sample(
        self, version: Version, rows: "Sequence[Sample]", sampling: "Sampling", seeds: Sequence[Sequence[int]]
    ) -> Answered | Missing:
        """Sample with the weights of `version`; return `Missing` if these have not come."""
        return self._answer(version, lambda engine: list(engine.sample(rows, sampling, seeds)))

    def sample_base(
        self, version: Version, rows: "Sequence[Sample]", sampling: "Sampling", seeds: Sequence[Sequence[int]]
    ) -> Answered | Missing:
        """Sample without the adapter."""
        return self._answer(version, lambda engine: list(engine.sample_base(rows, sampling, seeds)))

    def answer(self, version: Version, rows: "Sequence[Sample]", max_new_tokens: int) -> Answered | Missing:
        """Answer greedily with the weights of `version`; return `Missing` if these have not come."""
        return self._answer(version, lambda engine: list(engine.answer(rows, max_new_tokens)))

    def _answer(self, version: Version, ask: "Callable[[Engine], list[Answer]]") -> Answered | Missing:
        self.load()
        assert self._loaded is not None
        started = time.monotonic()
        weights = self._versions.get(version) or self._guests.get(version)
        if weights is None:
            return Missing(version)
        engine = self._loaded.engine if version in self._versions else self._loaded.guest_engine
        if self._current != version:
            weights.write(self._loaded.model)
            engine.update(self._loaded.model)
            self._current = version
        answers = ask(engine)
        idle_s = started - (self._free_since or started)
        self._free_since = time.monotonic()
        return Answered(answers, self._free_since - started, idle_s)


def _load(spec: WorkerSpec, number: int, resources: tuple[float, float]) -> _Loaded:
    """Load what answers in a sampler: the trainer of a worker with the package's own loop, or vLLM."""
    spec.environment.apply()
    from ray_vlm.logs import PACKAGE, TERMINAL
    from ray_vlm.runs.log_file import log_to_file
    from ray_vlm.runs.paths import open_run

    PACKAGE.removeHandler(TERMINAL)  # the driver prints
    log = log_to_file(open_run(spec.run), f"sampler-{number}")
    log.__enter__()  # until the process ends
    method = load_resolved(spec.job).method
    assert isinstance(method, GrpoMethod)
    if method.rollouts == "vllm":
        return _load_vllm(spec, resources)
    beside = load_beside(spec, resources)
    trainer: Any = beside.trainer  # of GRPO
    return _Loaded(trainer.model, trainer.engine, copy(trainer.engine))


def _load_vllm(spec: WorkerSpec, resources: tuple[float, float]) -> _Loaded:
    """Start vLLM, beside a model that has no weights but the adapter's: those are all that is sent to vLLM."""
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.engines.vllm import build_training_engine
    from ray_vlm.engines.vllm_start import EngineSettings
    from ray_vlm.models.libraries import prepare_process, quiet_libraries
    from ray_vlm.models.load import build_adapter_alone
    from ray_vlm.models.sampler_memory import VLLM_SHARE
    from ray_vlm.train.build import build_args, plan_limits

    job = job_beside(spec, resources)
    quiet_libraries()
    prepare_process(job.seed, job.cluster.cpus_per_worker, in_ray=False)
    builder = load_sample_builder(spec.sample_spec)
    assert isinstance(job.method, GrpoMethod)
    assert job.lora is not None
    model = build_adapter_alone(job.model, job.lora, builder.family)
    device = "cuda:0" if job.cluster.gpus_per_worker else "cpu"
    settings = EngineSettings(job.model, job.train.precision, job.seed, device)
    limits = replace(plan_limits(job.method, job.evaluate, spec), sequences=count_sequences(load_resolved(spec.job)))
    named = "vllm_gpu_memory_utilization" in job.method.trl
    share = VLLM_SHARE if job.cluster.gpus_per_worker and not named else None  # the card is the engine's alone
    engine = build_training_engine(settings, limits, model, builder, build_args(job, spec), sleep=0, share=share)
    return _Loaded(model, engine, engine)


def count_sequences(job: JobConfig) -> int:
    """Return how many answers a sampler of vLLM samples at a time."""
    assert isinstance(job.method, GrpoMethod)
    group = job.method.num_generations
    prompts = job.train.global_batch_size // group // job.cluster.least_workers
    return group * (job.method.sampling_batch or -(-prompts // job.method.most_samplers))
