"""Preparation of a run: read and check every row, balance the classes, plan the steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ray_vlm.config.cluster import Cluster
from ray_vlm.config.data import Data, Window
from ray_vlm.config.method import AlignmentMethod, DpoMethod, GrpoMethod
from ray_vlm.config.schema import JobConfig, Track
from ray_vlm.data.balance import Balance, plan_balance
from ray_vlm.data.index import Index
from ray_vlm.data.inner_images import CACHE_BYTES
from ray_vlm.data.measure import NONE_KNOWN
from ray_vlm.data.parts import Parts, load_parts
from ray_vlm.data.plan import Plan
from ray_vlm.data.preprocessing import changed_since
from ray_vlm.data.read_order import Reading, choose_shuffle, describe_shuffle
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.sources.files import find_files
from ray_vlm.data.spec import SampleSpec
from ray_vlm.errors import ConfigError
from ray_vlm.methods.options import check_options
from ray_vlm.methods.reward_check import check_rewards
from ray_vlm.methods.rewards import job_rewards
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.models.lora import trains_images
from ray_vlm.models.prefix_sharing import why_not_packed
from ray_vlm.train.memory_plan import Probe, build_rehearsal, choose_micro_batch, plan_probe


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`. `job` has what was left to the data, such as the shuffle, of which `shuffle` is a
    line."""

    job: JobConfig
    spec: SampleSpec
    train: Index
    eval: Index | None
    plan: Plan
    balance: Balance
    notes: tuple[str, ...] = ()
    probe: Probe | None = None
    shuffle: str = ""


def prepare(job: JobConfig, parts: Parts | None = None, known: Mapping[str, tuple[int, int]] = NONE_KNOWN) -> Prepared:
    """Read and check all rows, unless `parts` has them, and plan the run. Writes nothing into a run folder.

    `known`: image sizes that a resumed run has stored. Raises if the job cannot work.
    """
    if job.data.train is None:
        raise ConfigError("`data.train` is missing. Give it a path and a format.")
    quiet_libraries()
    check_options(job.method)
    check_energy(job.track)
    parts = parts or load_parts(job, wanted_parts(job.data), known=known)
    assert parts.train is not None
    assert job.data.train is not None
    sources = [job.data.train, *job.data.mix]
    weights = np.array([source.weight for source in sources])[parts.train.sources]
    notes: list[str] = []
    if isinstance(job.method, GrpoMethod):
        notes = check_rewards(job_rewards(job.task.name, job.method, job.data.train, parts.train.labels))
    if isinstance(job.method, DpoMethod):
        _check_pairs(job.data, load_sample_builder(parts.spec))
    balance = plan_balance(*parts.train.kinds, weights, job.data, job.task.name != "detection")
    spec = replace(parts.spec, token_weights=balance.token_weights)
    builder = load_sample_builder(spec)
    if job.train.memory is not None:
        train, note = choose_micro_batch(build_rehearsal(job, builder.family), parts.train, builder)
        job = job.model_copy(update={"train": train})
        notes.append(note)
    _check_budget(job.train.tokens_per_micro_batch, parts.train)
    job, plan, shuffle = _plan_order(job, parts.train, balance)
    shares = isinstance(job.method, AlignmentMethod) and job.method.share_prefixes
    wanted = {"method.share_prefixes": shares, "train.packing": job.train.packing}
    if (reason := why_not_packed(job.lora, builder.family)) is not None and any(wanted.values()):
        keys = [key for key, is_wanted in wanted.items() if is_wanted]
        notes.append(f"{' and '.join(keys)}: without effect, since {reason}")
    if not isinstance(job.method, DpoMethod):  # DPO compares pairs and generates nothing
        notes += _describe_long_answers(parts, job.evaluate.max_new_tokens, builder.num_closing_tokens)
    _check_images(parts.train, job.cluster, trains_vision=trains_images(job.lora))
    probe = plan_probe(job, plan, parts.train, builder)
    return Prepared(job, spec, parts.train, parts.eval, plan, balance, (*parts.notes, *notes), probe, shuffle)


def _plan_order(job: JobConfig, train: Index, balance: Balance) -> tuple[JobConfig, Plan, str]:
    """Return the job with its shuffle, which depends on where the images lie if the job leaves it open, the plan, and a
    line on the shuffle."""
    units, named, factors = train.units(), job.data.shuffle, balance.repeat_factors
    shuffle = named or choose_shuffle(units, len(train), CACHE_BYTES)
    job = job.model_copy(update={"data": job.data.model_copy(update={"shuffle": shuffle})})
    together = len(units.starts) < len(train)
    plan = plan_run(
        job, len(train), factors, train.token_costs, train.tokens, unit_starts=units.starts if together else None
    )
    shown = np.diff(units.starts, append=len(train)) if factors is None else units.sum_rows(factors)
    loaders = job.data.num_loaders if job.cluster.num_workers else 1
    processes = None if loaders is None else plan.world_size * loaders
    reading = Reading(units, len(train), shown, plan.global_batch_size, processes, CACHE_BYTES)
    return job, plan, describe_shuffle(shuffle, named is None, reading)


def _check_budget(budget: int | None, train: Index) -> None:
    """Raise `ConfigError` if one row alone exceeds `train.tokens_per_micro_batch`, the `budget`."""
    longest = int(train.tokens.argmax())
    if budget is not None and (most := int(train.tokens[longest])) > budget:
        raise ConfigError(
            f"train.tokens_per_micro_batch={budget}: the row with id {train.records[longest].id!r} alone has {most} "
            f"tokens. Set it to {most} or more, or lower data.max_pixels."
        )


def _check_images(train: Index, cluster: Cluster, trains_vision: bool) -> None:
    """Raise `ConfigError` for rows without an image if a worker without images would block the others."""
    bare = np.flatnonzero(train.image_tokens == 0)
    if len(bare) and (cluster.zero_stage == 3 or (cluster.deepspeed and trains_vision)):
        raise ConfigError(
            f"cluster.deepspeed={cluster.deepspeed}: {len(bare)} rows, the first with id "
            f"{train.records[bare[0]].id!r}, have no image. A worker whose batch shows none would not run the image "
            "encoder, and the others would wait for it for ever. Leave those rows out, or leave cluster.deepspeed out."
        )


def wanted_parts(data: Data) -> list[str]:
    """Return the names of the data parts that training reads."""
    return ["train", "eval"] if data.eval is not None else ["train"]


def _describe_long_answers(parts: Parts, limit: int, num_closing: int) -> list[str]:
    """Return a note on answers longer than `evaluate.max_new_tokens`, the `limit`.

    `num_closing`: tokens that the chat template puts after an answer.
    """
    longest, counts = 0, []
    for name, index in (("train", parts.train), ("eval", parts.eval)):
        tokens = index.answer_tokens - num_closing if index is not None else np.zeros(0)
        if above := int((tokens > limit).sum()):
            counts.append(f"{above:,} of {len(tokens):,} rows of data.{name}")
            longest = max(longest, int(tokens.max()))
    if not counts:
        return []
    return [
        f"{' and '.join(counts)} have answers of more than evaluate.max_new_tokens={limit} tokens, so the model can "
        f"never write them in full; the longest has {longest:,}. Raise it, or shorten them."
    ]


def _check_pairs(data: Data, builder: SampleBuilder) -> None:
    """Raise `ConfigError` if pairs were sampled with other preprocessing: positions in their answers would be wrong."""
    sources = [source for source in (data.train, *data.mix, data.eval) if source is not None and source.path]
    paths = [path for source in sources for path in find_files(source)]
    problems = [
        f"{path}: its answers were sampled with another {text}. Use those, or make it again."
        for path in paths
        for text in changed_since(path, builder)
    ]
    if problems:
        raise ConfigError(problems)


def check_energy(track: Track) -> None:
    """Raise `ConfigError` if `track.energy` is set and energy cannot be estimated."""
    if not track.energy:
        return
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise ConfigError(
            f"track.energy: codecarbon is not installed ({error}). Run `pip install 'ray_vlm[energy]'`, or remove it."
        ) from None
    known = DataSource().get_global_energy_mix_data()
    if track.country not in known:
        raise ConfigError(
            f"track.country={track.country!r}: unknown country, on which the carbon dioxide of a kilowatt-hour "
            "depends. Give the three letters of ISO 3166, such as DEU, FRA, IND or USA."
        )


def plan_run(
    job: JobConfig,
    num_rows: int,
    repeat_factors: np.ndarray | None = None,
    token_costs: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    unit_starts: np.ndarray | None = None,
) -> Plan:
    """Return the job's plan over `num_rows` rows; `repeat_factors`, `token_costs`, `tokens` and `unit_starts`: see
    `Plan`. Without `unit_starts` a window is a full shuffle, as for units of one row.

    GRPO's batch sizes count answers, and a worker samples answers for all prompts of its step at once.
    """
    train, workers, shuffle = job.train, job.cluster.least_workers, job.data.shuffle
    global_batch, micro = train.global_batch_size, train.micro_batch_size
    if isinstance(job.method, GrpoMethod):
        global_batch //= job.method.num_generations
        micro = global_batch // workers
    window = shuffle.window if isinstance(shuffle, Window) and unit_starts is not None else 0
    row_type = np.int32 if num_rows < 2**31 else np.int64
    return Plan(
        num_rows=num_rows,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        world_size=workers,
        whole_steps=job.method.name != "sft",
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        shuffle=shuffle != "none",
        seed=job.seed,
        repeat_factors=repeat_factors,
        token_costs=token_costs if job.data.balance_lengths else None,
        tokens=tokens if train.tokens_per_micro_batch else None,
        max_tokens_per_micro_batch=train.tokens_per_micro_batch or 0,
        unit_starts=unit_starts.astype(row_type) if window and unit_starts is not None else None,
        window=window,
    )
