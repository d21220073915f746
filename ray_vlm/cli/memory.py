"""`ray-vlm memory`: estimate the GPU memory of a job before it is started."""

import argparse
from typing import TYPE_CHECKING

from ray_vlm.cli.parser import job_verb

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ray_vlm.config.schema import JobConfig, Model
    from ray_vlm.models.memory import RowSize


def add_memory_verb(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm memory JOB [key=value ...]`."""
    memory = job_verb(verbs, "memory", "the GPU memory that a job needs, and the largest batch that fits", _memory)
    memory.add_argument(
        "--tokens",
        type=_size,
        metavar="IMAGE,PROMPT,ANSWER",
        help="tokens of the largest row; then no rows are read, and a known base is not downloaded",
    )
    memory.add_argument("--card", type=float, action="append", metavar="GIB", help="memory of a GPU; may be repeated")


def _size(text: str) -> "RowSize":
    from ray_vlm.models.memory import RowSize

    try:
        image, prompt, answer = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: three numbers are needed, such as 1024,60,120") from None
    return RowSize(image, prompt, answer)


def _memory(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job

    job = load_job(args.job, args.overrides)
    size = args.tokens or _heaviest(job)  # errors in the job or its rows come before the slow import of torch
    from ray_vlm.machine import GIB
    from ray_vlm.models.card_memory import TARGET, usable_gib
    from ray_vlm.models.load import family_of
    from ray_vlm.models.memory import describe, micro_sizes
    from ray_vlm.models.rehearse import choose, estimate
    from ray_vlm.models.sampler_memory import estimate_sampler
    from ray_vlm.train.memory_plan import build_rehearsal, describe_choice, micro_batch_sizes

    config = _config(job.model, known=args.tokens is not None)
    family = family_of(config)
    cards = args.card or ([job.cluster.gpu_memory_gib] if job.cluster.gpu_memory_gib else [])
    rehearsal = build_rehearsal(job, family, config)
    room = TARGET * usable_gib(min(cards)) * GIB if cards else None
    parts = estimate(rehearsal, micro_sizes(job.method, job.train, size), room=room)
    print(
        f"{job.model.name}, {job.method.name}, {job.train.micro_batch_size} at a time; the heaviest row has "
        f"{size.image_tokens:,} image tokens, {size.prompt_tokens:,} of its prompt, {size.answer_tokens:,} answered"
    )
    print("\n".join(describe(parts, cards)))
    if not rehearsal.sees:
        print(f"note: what {family.model_type}'s image encoder makes in a step is not counted; its weights are")
    for card in cards:
        whole = usable_gib(card) * GIB
        choice = choose(rehearsal, size, micro_batch_sizes(rehearsal.settings), TARGET * whole)
        line = describe_choice(choice, rehearsal.num_layers, whole) if choice else "train.memory=auto: nothing fits"
        print(f"  {line}")
    if (sampler := estimate_sampler(rehearsal, size)) is not None:
        print("\n".join(["one sampler (method.samplers), beside the workers:", *describe(sampler, cards)]))


def _heaviest(job: "JobConfig") -> "RowSize":
    """Return the size of the training row with the most tokens."""
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.data.sources.detect import settle_formats
    from ray_vlm.train.memory_plan import row_size
    from ray_vlm.train.prepare import prepare

    unfitted = job.model_copy(update={"train": job.train.model_copy(update={"memory": None, "probe": False})})
    prepared = prepare(settle_formats(absolute_paths(unfitted)))
    return row_size(prepared.train, int(prepared.train.tokens.argmax()), load_sample_builder(prepared.spec))


def _config(model: "Model", known: bool) -> "PretrainedConfig":
    """Return the base's configuration; with `known`, that of a known model comes from the package itself."""
    from ray_vlm.models.architectures import load_preset, read_presets
    from ray_vlm.models.load import load_config

    return load_preset(model.name) if known and model.name in read_presets() else load_config(model)
