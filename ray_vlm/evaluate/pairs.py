"""Preference data from a model's own answers: `ray-vlm pairs JOB --output pairs.jsonl [--adapter DIR]`.

Several answers to each row are sampled and scored by the task (`samples.py`); the best and the worst are a pair if
their rewards differ by enough, written as a row of format `preference` (`pair_file.py`). A row's random numbers depend
only on the seed and its position, so the file is the same for any number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

from ray_vlm.config.check_method import known_formats
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.index import Index
from ray_vlm.data.preprocessing import describe_preprocessing, read_preprocessing
from ray_vlm.data.records import PreferenceRecord, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import sample_spec
from ray_vlm.data.splits import load_parts
from ray_vlm.data.tables import text_fault
from ray_vlm.errors import ConfigError
from ray_vlm.evaluate.pair_file import check_output, describe_pairs, name_images, write_about, write_rows
from ray_vlm.evaluate.samples import Sample, load_scoring, sample_answers
from ray_vlm.evaluate.weights import trained_weights
from ray_vlm.methods.reward_check import check_rewards
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.store import full_address
from ray_vlm.tasks.answers import IMAGE, Turns

_SAME = 1e-9  # rewards that differ by no more are equal


def make_pairs(
    job: JobConfig,
    adapter: str | None,
    part: str,
    output: str,
    say: Callable[[str], None] = print,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write pairs from the rows of `data.<part>` to `output`, and beside them `<output>.about.json`, which is returned.

    `job` has absolute paths. `adapter`: a run, its `best/` or `final/`; None samples `model.adapter`, or the base where
    the job has none. Workers on other machines open it, the base and the images themselves: give folders that all of
    them see, or addresses such as `s3://`. Raise `RunError` where there is no adapter of that name, and where no row
    gives a pair; nothing is then written.
    """
    path = check_output(output, overwrite)
    check_rows(job, part)
    adapter = trained_weights(adapter) if adapter else job.model.adapter
    weights = fetch_folder(adapter) if adapter is not None else None
    parts = load_parts(job, [part], read_preprocessing(weights, sample_spec(job, [])) if weights is not None else None)
    index: Index = getattr(parts, part)
    names, root = name_images(index.records)
    builder = load_sample_builder(parts.spec)
    rewards = load_scoring(job, parts.spec.labels)
    for note in (*parts.notes, *check_rewards(rewards)):
        say(f"note: {note}")
    if index.bad:
        say(f"{len(index.bad)} bad rows left out; `ray-vlm data check` names them")
    workers = job.cluster.most_workers if job.cluster.num_workers else 0
    uri = weights if workers == 0 or adapter is None else full_address(adapter)
    with closing(sample_answers(job, parts.spec, index.records, uri, workers)) as batches:
        rows = build_rows(index.records, batches, builder, names, job.pairs.min_margin)
        summary = write_rows(path, rows, len(index), say)
    about = {
        "adapter": adapter,
        "model": job.model.name,
        "seed": job.seed,
        "part": part,
        "pairs": job.pairs.model_dump(),
        "max_new_tokens": job.evaluate.max_new_tokens,
        "rewards": dict(rewards.weights),
        "num_records": len(index),
        "num_bad_rows": len(index.bad),
        **summary,
        "image_root": root,
        "preprocessing": describe_preprocessing(builder),
    }
    write_about(path, about)
    describe_pairs(path, about, say)
    return about


def check_rows(job: JobConfig, part: str) -> None:
    """Raise `ConfigError` where the part's rows have no truth to score answers by."""
    data = job.data
    if part == "eval" and data.eval is not None and data.eval.path:
        sources: dict[str, Any] = {"data.eval": data.eval}
    else:
        sources = {"data.train": data.train, **{f"data.mix[{i}]": source for i, source in enumerate(data.mix)}}
    formats = ", ".join(known_formats(job, "test"))
    problems = [
        f"{key}.format={source.format}: answers are scored against a truth, and such rows have none. Use a job with "
        f"rows of {job.task.name}, such as the one that the model was trained by: {formats}."
        for key, source in sources.items()
        if source is not None and source.format in ("preference", "prompt")
    ]
    if problems:
        raise ConfigError(problems)


def choose_pair(
    texts: Sequence[str], scores: Sequence[float], min_margin: float, complete: Sequence[bool] | None = None
) -> tuple[int, int] | None:
    """Return the positions of the best and the worst answer, the first among equals; None where they are no pair.

    They differ in text, apart from spaces around it, and by `min_margin` or more in score. `complete`: False for an
    answer that was cut off, which is never the best: the model would learn to stop there.
    """
    winners = [i for i in range(len(texts)) if complete is None or complete[i]]
    if not winners:
        return None
    best = max(winners, key=lambda i: scores[i])
    others = [i for i in range(len(texts)) if texts[i].strip() != texts[best].strip()]
    if not others:
        return None
    worst = min(others, key=lambda i: scores[i])
    return (best, worst) if scores[best] - scores[worst] >= min_margin - _SAME else None


def pair_of(samples: Sequence[Sample], min_margin: float) -> dict[str, Any] | str:
    """Return `chosen` and `rejected` with their rewards, or why there is no pair (a key of `pair_file.REASONS`)."""
    if len(samples) < 2:
        return "unusable"
    texts, complete = [sample.text for sample in samples], [sample.whole for sample in samples]
    positions = choose_pair(texts, [sample.reward for sample in samples], min_margin, complete)
    if positions is not None:
        best, worst = (samples[i] for i in positions)
        rewards = {"chosen_reward": best.reward, "rejected_reward": worst.reward}
        return {"chosen": best.text, "rejected": worst.text} | rewards
    if len({text.strip() for text in texts}) == 1:
        return "all_alike"
    return "small_margin" if any(complete) else "cut_off"


def build_rows(
    records: Sequence[SftRecord],
    batches: Iterable[list[list[Sample]]],
    builder: SampleBuilder,
    names: dict[str, str],
    min_margin: float,
) -> Iterator[dict[str, Any] | str]:
    """Yield for every record a row of format `preference`, or why there is none. `names`: of images in `image_root`."""
    ids = [record.id for record in records]
    if len(set(ids)) < len(ids):  # sources that are mixed may use an id twice
        ids = [f"{record.source}:{record.id}" for record in records]
    sampled = (samples for batch in batches for samples in batch)
    for record, name, samples in zip(records, ids, sampled, strict=True):
        turns = builder.turns(record)
        usable = [sample for sample in samples if can_be_kept(sample.text, record, turns, builder)]
        pair = pair_of(usable, min_margin)
        if isinstance(pair, str):
            yield pair
            continue
        images = [names[image] for image in record.images if isinstance(image, str)]
        prompt = [{"role": role, "content": text} for role, text in turns]
        yield {"id": name, "group": record.group, "images": images, "prompt": prompt, **pair}


def can_be_kept(text: str, record: SftRecord, turns: Turns, builder: SampleBuilder) -> bool:
    """Return whether a row of format `preference` can hold the answer: it is not empty and has no text read as
    markup."""
    if not text.strip() or IMAGE in text or text_fault(text):
        return False
    as_row = PreferenceRecord(record.id, record.row, record.images, record.sizes, turns, text, text)
    return builder.problem(as_row) is None
