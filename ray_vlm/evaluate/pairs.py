"""Preference data from a model's own answers: `ray-vlm pairs JOB --output pairs.jsonl [--adapter DIR]`.

Several answers to each row are sampled and scored by the task; the best and the worst are a pair if their rewards
differ by enough, written as a row of format `preference`. A row's random numbers depend only on the seed and its
position, so the file is the same for any number of workers.
"""

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ray_vlm.config.check_method import PROMPT_FORMATS, known_formats
from ray_vlm.config.data import Data
from ray_vlm.config.method import GrpoMethod, Method
from ray_vlm.config.schema import JobConfig, Pairs
from ray_vlm.data.index import Index
from ray_vlm.data.parts import load_parts
from ray_vlm.data.preprocessing import ABOUT, describe_preprocessing, read_preprocessing
from ray_vlm.data.records import PreferenceRecord, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.sources.tables import text_fault
from ray_vlm.data.spec import sample_spec
from ray_vlm.engines.interface import Completion, Sampling
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, open_adapter, run_batches
from ray_vlm.evaluate.weights import trained_weights
from ray_vlm.methods.reward_check import check_rewards
from ray_vlm.methods.rewards import Rewards, load_rewards, score_answers, total
from ray_vlm.runs.checkpoints import fetch_folder
from ray_vlm.runs.paths import write_json
from ray_vlm.storage import is_remote, local_path, replacing, split_options
from ray_vlm.tasks.answers import IMAGE, Turns

logger = logging.getLogger(__name__)
REASONS = {  # why a row gives no pair, with the text of messages
    "all_alike": "with all answers alike",
    "small_margin": "with too small a margin",
    "cut_off": "with every answer cut off",
    "unusable": "with fewer than two answers that text can hold",
}
_SAME = 1e-9  # rewards that differ by no more are equal
_PROGRESS_S = 5.0  # seconds between progress lines


@dataclass(frozen=True)
class ScoredAnswer:
    """A sampled answer and its reward. `whole`: False for one that was cut off at `evaluate.max_new_tokens`."""

    text: str
    reward: float
    whole: bool = True


def make_pairs(job: JobConfig, adapter: str | None, part: str, output: str, overwrite: bool = False) -> dict[str, Any]:
    """Write pairs from the rows of `data.<part>` to `output`, and beside them `<output>.about.json`, which is returned.

    `job` has absolute paths. `adapter`: a run, its `best/` or `final/`; None samples `model.adapter`, or the base where
    the job has none. Workers on other machines open it, the base and the images themselves: give folders that all of
    them see, or addresses such as `s3://`. Raise `RunError` where there is no adapter of that name, and where no row
    gives a pair; nothing is then written.
    """
    path = check_output(output, overwrite)
    check_rows(job.data, part, job.task.name, known_formats(job.method.name, job.task.name, "test"))
    adapter = trained_weights(adapter) if adapter else job.model.adapter
    weights = fetch_folder(adapter) if adapter is not None else None
    parts = load_parts(job, [part], read_preprocessing(weights, sample_spec(job, [])) if weights is not None else None)
    index: Index = getattr(parts, part)
    names, root = name_images(index.records)
    builder = load_sample_builder(parts.spec)
    rewards = load_scoring(job.task.name, job.pairs, job.method, parts.spec.labels)
    for note in (*parts.notes, *check_rewards(rewards)):
        logger.warning(note)
    if index.bad:
        logger.info(f"{len(index.bad)} bad rows left out; `ray-vlm data check` names them")
    alone = not job.cluster.num_workers or job.evaluate.engine == "samplers"
    workers = 0 if alone else job.cluster.most_workers
    uri = open_adapter(job, adapter, weights, workers)
    batches = plan_prompts(len(index), job.evaluate.batch_size, job.pairs.num_samples)
    inference = InferenceJob(job, parts.spec, index.records, uri, batches)
    with closing(sample_answers(inference, workers)) as sampled:
        rows = build_rows(index.records, sampled, builder, names, job.pairs.min_margin)
        summary = write_rows(path, rows, len(index))
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
    describe_pairs(path, about)
    return about


def check_rows(data: Data, part: str, task: str, formats: Sequence[str]) -> None:
    """Raise `ConfigError` where the part's rows have no truth to score answers by. `formats`: those that have one."""
    if part == "eval" and data.eval is not None and data.eval.path:
        sources: dict[str, Any] = {"data.eval": data.eval}
    else:
        sources = {"data.train": data.train, **{f"data.mix[{i}]": source for i, source in enumerate(data.mix)}}
    problems = [
        f"{key}.format={source.format}: answers are scored against a truth, and such rows have none. Use a job with "
        f"rows of {task}, such as the one that the model was trained by: {', '.join(formats)}."
        for key, source in sources.items()
        if source is not None and source.format in ("preference", *PROMPT_FORMATS)
    ]
    if problems:
        raise ConfigError(problems)


def load_scoring(task: str, options: Pairs, method: Method, labels: Sequence[str]) -> Rewards:
    """Load the rewards that score the answers, boxes as a GRPO job does. Raise `ConfigError` for one that does not
    apply."""
    box_quality = method.box_quality if isinstance(method, GrpoMethod) else "iou"
    try:
        return load_rewards(task, options.rewards, box_quality, labels=labels)
    except ConfigError as error:
        raise ConfigError([text.replace("method.rewards", "pairs.rewards") for text in error.problems]) from None


def plan_prompts(num_records: int, batch_size: int, num_samples: int) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the records of each batch, which has `batch_size` answers, `num_samples` a record."""
    size = max(1, batch_size // num_samples)
    return tuple(tuple(range(i, min(i + size, num_records))) for i in range(0, num_records, size))


def sample_answers(inference: InferenceJob, num_actors: int) -> Generator[list[list[ScoredAnswer]]]:
    """Yield the answers to every record, batch by batch in order."""
    for _, groups in run_batches(inference, _sample_batch, range(len(inference.batches)), num_actors):
        yield [[ScoredAnswer(*answer) for answer in group] for group in groups]


def _sample_batch(
    worker: InferenceWorker, records: Sequence[SftRecord], positions: Sequence[int]
) -> list[list[tuple[Any, ...]]]:
    """Sample and score the answers to a batch; return the fields of the `ScoredAnswer`s of each record."""
    job, builder = worker.inference.job, worker.builder
    rows = [builder.prompt_row(record) for record in records]
    sampling = _build_sampling(job.pairs, job.evaluate.max_new_tokens)
    groups = worker.engine.sample(rows, sampling, [(job.seed, i) for i in positions])
    texts = [[builder.text(answer.ids) for answer in group] for group in groups]
    rewards = load_scoring(job.task.name, job.pairs, job.method, builder.spec.labels)
    scores = iter(_score(rewards, builder, records, texts, groups))
    return [
        [astuple(ScoredAnswer(text, next(scores), a.finished)) for text, a in zip(group_texts, group, strict=True)]
        for group_texts, group in zip(texts, groups, strict=True)
    ]


def _build_sampling(options: Pairs, max_new_tokens: int) -> Sampling:
    """Build the options of sampling; with two temperatures those of a row's answers are evenly spaced between them."""
    temperature: float | tuple[float, ...]
    if isinstance(options.temperature, list):
        first, last = options.temperature
        temperature = tuple(np.linspace(first, last, options.num_samples).tolist())
    else:
        temperature = options.temperature
    return Sampling(options.num_samples, max_new_tokens, temperature, options.top_p)


def _score(
    rewards: Rewards,
    builder: SampleBuilder,
    records: Sequence[SftRecord],
    texts: Sequence[list[str]],
    groups: Sequence[list[Completion]],
) -> list[float]:
    """Return the reward of every answer, group by group."""
    turns = [[{"role": role, "content": text} for role, text in builder.turns(record)] for record in records]
    scores = score_answers(
        rewards,
        [record for record, group in zip(records, groups, strict=True) for _ in group],
        [text for group_texts in texts for text in group_texts],
        [answer.ids for group in groups for answer in group],
        [prompt for prompt, group in zip(turns, groups, strict=True) for _ in group],
        builder,
    )
    return [total(rewards, parts) for parts in scores]


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


def pair_of(samples: Sequence[ScoredAnswer], min_margin: float) -> dict[str, Any] | str:
    """Return `chosen` and `rejected` with their rewards, or why there is no pair (a key of `REASONS`)."""
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
    batches: Iterable[list[list[ScoredAnswer]]],
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


def check_output(output: str, overwrite: bool) -> Path:
    """Check and return the file to write, before anything is read or sampled. Raise `ConfigError` or `RunError`."""
    if is_remote(output):
        raise ConfigError(f"--output {output}: pairs are written to a local folder. Give a path, then copy the file.")
    path = Path(local_path(output))
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(f"--output {output}: pairs are JSON lines. Give a name that ends in .jsonl.")
    if path.is_dir():
        raise ConfigError(f"--output {output} is a folder. Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise RunError(f"--output {output} is there already. Give another name, or --overwrite.")
    return path


def name_images(records: Sequence[SftRecord]) -> tuple[dict[str, str], str | None]:
    """Return the name of each image relative to `image_root`, and `image_root`, the folder around all of them, None
    without images.

    Raise `ConfigError` for images that are bytes, and for images without a common folder.
    """
    rest: dict[str, str] = {}  # image -> its address without scheme and options
    kinds: dict[tuple[str, str], str] = {}  # (scheme, options) -> an image of that kind
    for record in records:
        for image in record.images:
            if not isinstance(image, str):
                raise ConfigError(
                    f"row {record.row} (id {record.id}): its image has no file of its own, and pairs name images. "
                    "Write the images to files, and give their paths in the rows."
                )
            uri, options = split_options(image)
            scheme, colon, rest[image] = uri.rpartition("://")
            kinds.setdefault((scheme + colon, options), image)
    if not rest:
        return {}, None
    common = os.path.commonprefix(list(rest.values()))  # noqa: RUF071  (cut at a slash in the next line)
    folder = common[: common.rfind("/") + 1]
    if len(kinds) > 1 or not folder:
        apart = list(kinds.values()) if len(kinds) > 1 else sorted(rest)
        raise ConfigError(
            f"{apart[0]} and {apart[-1]} have no folder in common, and the pairs of a file have one image_root. Make "
            "pairs of one source at a time."
        )
    ((scheme, options),) = kinds
    root = f"{scheme}{folder.rstrip('/') or '/'}{options}"
    return {image: inside[len(folder) :] for image, inside in rest.items()}, root


def write_rows(path: Path, rows: Iterable[dict[str, Any] | str], num_records: int) -> dict[str, Any]:
    """Write the rows to a temporary file, rename it to `path`, and return the counts and mean rewards.

    Texts among `rows` are the reasons (keys of `REASONS`) of records without a pair.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                summary = _write(file, rows, num_records)
            _about(path).unlink(missing_ok=True)  # a description of other pairs must never lie beside these
    except OSError as error:
        raise RunError(f"{path} was not written ({error}). Fix the cause, or give another --output.") from error
    return summary


def _write(file: TextIO, rows: Iterable[dict[str, Any] | str], num_records: int) -> dict[str, Any]:
    without: Counter[str] = Counter()
    chosen, rejected, pairs = 0.0, 0.0, 0
    started, last_line = time.monotonic(), -math.inf
    for done, row in enumerate(rows, 1):
        if isinstance(row, str):
            without[row] += 1
        else:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            chosen, rejected = chosen + row["chosen_reward"], rejected + row["rejected_reward"]
            pairs += 1
        now = time.monotonic()
        if now - last_line >= _PROGRESS_S or done == num_records:
            rate = done / max(now - started, 1e-9)
            left = (num_records - done) / rate
            logger.info(f"sampled {done}/{num_records} rows, {rate:.1f}/s, {left:.0f} s left, {pairs} pairs")
            last_line = now
    reasons = {name: without[name] for name in REASONS}
    if not pairs:
        raise RunError(
            f"no pair: of {num_records} rows {_describe_reasons(reasons)}. Lower pairs.min_margin, or raise "
            "pairs.temperature, pairs.num_samples or evaluate.max_new_tokens."
        )
    means = {"mean_chosen_reward": chosen / pairs, "mean_rejected_reward": rejected / pairs}
    return {"num_pairs": pairs, "without_pair": reasons, **means}


def _describe_reasons(without: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {REASONS[name]}" for name, count in without.items() if count)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ABOUT)


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Write the description of the pairs in `path` beside them."""
    write_json(_about(path), dict(about))


def describe_pairs(path: Path, about: Mapping[str, Any]) -> None:
    """Log a summary of the pairs, and the YAML with which a job reads them."""
    import yaml

    chosen, rejected = about["mean_chosen_reward"], about["mean_rejected_reward"]
    logger.info(
        f"{about['num_pairs']} pairs of {about['num_records']} rows: chosen {chosen:.3f}, rejected {rejected:.3f}"
    )
    if without := _describe_reasons(about["without_pair"]):
        logger.info(f"no pair: {without}")
    source = {"path": str(path), "format": "preference"}
    source |= {"image_root": about["image_root"]} if about["image_root"] is not None else {}
    inline = yaml.safe_dump(source, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    logger.info(f"data:\n  train: {inline.strip()}")
