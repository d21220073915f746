"""Generate answers, batch by batch, left-padded and greedy; the same code for every base and every adapter.

`answer_all` goes on where an earlier call was killed: each batch of answers is written down as it comes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm import __version__
from ray_vlm.data.collate import collate
from ray_vlm.data.records import Record, SftRecord
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample
from ray_vlm.evaluate.actors import InferenceJob, InferenceWorker, do_batches
from ray_vlm.evaluate.walks import walk
from ray_vlm.methods.decoding import decode_greedy, end_ids
from ray_vlm.models.adapter import is_whole_model
from ray_vlm.models.backbone import base_of
from ray_vlm.models.dequantize import dequantised
from ray_vlm.models.load import resolve_name
from ray_vlm.runs.monitor import whole_lines

ANSWERS = "answers.jsonl"  # a key, then each batch as it came
_TELL_S = 5.0  # between lines on how far it is


def generate_answers(
    model: Any,
    records: Sequence[Record],
    builder: SampleBuilder,
    batch_size: int,
    max_new_tokens: int,
    device: str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to each record, in their order. Leaves the model in evaluation mode."""
    import torch

    model.eval()
    tokens_of = _generate if _needs_generate(builder) else decode_greedy
    answers: list[str] = []
    for start in range(0, len(records), batch_size):
        rows = [builder.prompt_row(record) for record in records[start : start + batch_size]]
        with torch.inference_mode(), dequantised(model):
            tokens = tokens_of(model, rows, builder, max_new_tokens, device)
        answers += [builder.text(ids) for ids in tokens]
        if on_progress is not None:
            on_progress(len(answers))
    return answers


def _needs_generate(builder: SampleBuilder) -> bool:
    """Whether answers come from transformers' `generate`: for families whose caches and masks only it knows, and under
    ZeRO-3, where all ranks go through the model until the last of them has answered."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return builder.stock is not None or is_deepspeed_zero3_enabled()


def _generate(
    model: Any, rows: Sequence[Sample], builder: SampleBuilder, max_new_tokens: int, device: str
) -> list[list[int]]:
    """The new tokens of each prompt row by transformers' `generate`, greedy, with what pads them after their end."""
    batch = collate(rows, builder, device, side="left")
    tokens = model.generate(
        **{k: v for k, v in batch.items() if k != "labels"},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # hub models bring their own; it would punish repeated digits and labels
        use_cache=True,
        eos_token_id=end_ids(base_of(model), builder),
        pad_token_id=builder.tokenizer.pad_token_id,
    )
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def plan_batches(costs: Sequence[float], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Positions of the rows of each batch: the longest first, so that rows of one batch are about as long as each
    other and what needs the most memory comes at once. A pure function of the rows."""
    order = np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist()
    return tuple(tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size))


def answer_all(
    work: InferenceJob,
    path: Path | None,
    num_actors: int,
    say: Callable[[str], None] | None = None,
    weights: str | None = None,
) -> list[str]:
    """The greedy answer to each record, in their order.

    `path`: a file that grows; answers that are there, made from the same inputs, are not made again. `say` is told how
    far it is. `weights`: a folder with the files of `work.adapter`, which may lie elsewhere.
    """
    key = describe_work(work, weights or work.adapter) if path is not None else {}
    known = _read_answers(path, key, work) if path is not None else {}
    left = [number for number in range(len(work.batches)) if number not in known]
    total, done = len(work.records), sum(len(work.batches[number]) for number in known)
    if known and say is not None:
        say(f"{done} of {total} answers were there already, in {path}")
    started, told, first = time.monotonic(), 0.0, done
    file = _open_answers(path, key, known) if path is not None else None
    try:
        for number, answers in do_batches(work, _answer, left, num_actors):
            known[number] = answers
            done += len(answers)
            if file is not None:
                file.write(json.dumps({"batch": number, "answers": answers}) + "\n")
                file.flush()
            if say is not None and (time.monotonic() - told > _TELL_S or done == total):
                told = time.monotonic()
                rate = (done - first) / (told - started)
                say(f"predicted {done}/{total} rows, {rate:.1f}/s, {(total - done) / rate:.0f} s left")
    finally:
        if file is not None:
            file.close()
    texts = [""] * total
    for number, answers in known.items():
        for position, text in zip(work.batches[number], answers, strict=True):
            texts[position] = text
    return texts


def answer_records(loaded: InferenceWorker, records: Sequence[Record]) -> list[str]:
    """The greedy answers to records, as one batch, by what `evaluate.engine` says."""
    job, builder = loaded.work.job, loaded.builder
    if job.evaluate.engine == "vllm":
        return loaded.answer([builder.prompt_row(record) for record in records])
    limit = job.evaluate.max_new_tokens
    return generate_answers(loaded.model, records, builder, len(records), limit, loaded.device)


def _answer(loaded: InferenceWorker, records: Sequence[SftRecord], positions: Sequence[int]) -> list[str]:
    if loaded.work.memory == "model":
        return walk(records, loaded.builder, partial(answer_records, loaded))
    return answer_records(loaded, records)


def describe_work(work: InferenceJob, weights: str | None) -> dict[str, str]:
    """What the answers depend on, as hashes by name, and whose memory: where all are equal, so are the answers.
    `weights`: the adapter's folder on this machine."""
    job, builder = work.job, load_sample_builder(work.spec)
    rows = hashlib.sha256()
    for r in work.records:
        images = [i if isinstance(i, str) else hashlib.sha256(i).hexdigest() for i in r.images]
        told = (r.id, images, [_stamp(i) for i in images], r.sizes, builder.turns(r), r.context.get("task"))
        rows.update(repr(told).encode())
    loading = (
        job.model.load_in_4bit,
        job.train.precision,
        job.cluster.gpus_per_worker > 0,
        job.model.revision,
        job.evaluate.engine,
    )
    packages = [metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    inputs = {
        "base": (job.model.name, loading, _files(resolve_name(job.model.name))),
        "adapter": _trained(weights) if weights else None,
        "preprocessing": (asdict(replace(work.spec, model=None)), asdict(builder.image_spec)),  # type: ignore[arg-type]
        "batches": (work.batches, job.evaluate.max_new_tokens),
        "versions": (__version__, packages),
    }
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in inputs.items()}
    return hashes | {"rows": rows.hexdigest()[:16], "memory": work.memory}


def _stamp(path: str) -> tuple[int, int] | None:
    """Size and time of a file here; None elsewhere."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _files(folder: str) -> list[tuple[str, Any]]:
    """Names with sizes and times of a folder's weights; the name alone of what is not here."""
    root = Path(folder)
    return [(folder, None)] if not root.is_dir() else [(p.name, _stamp(str(p))) for p in sorted(root.glob("*.*"))]


def _trained(folder: str) -> list[tuple[str, Any]]:
    """What stands for trained weights: of an adapter names and hashes of files, since a copy gives the same answers; of
    a whole model, which is large, names, sizes and times."""
    if is_whole_model(folder):
        return _files(folder)
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def _read_answers(path: Path, key: Mapping[str, str], work: InferenceJob) -> dict[int, list[str]]:
    """Batches that were answered from the same inputs; a line cut off by a crash is left out."""
    found: dict[int, list[str]] = {}
    if not path.is_file():
        return found
    first, *rest = whole_lines(path.read_bytes()) or [None]
    if not isinstance(first, dict) or first.get("key") != key:
        return found
    for line in rest:
        if not isinstance(line, dict):
            continue
        number, answers = line.get("batch"), line.get("answers")
        if not isinstance(number, int) or not 0 <= number < len(work.batches) or not isinstance(answers, list):
            continue
        if [type(text) for text in answers] == [str] * len(work.batches[number]):
            found[number] = answers
    return found


def _open_answers(path: Path, key: Mapping[str, str], known: Mapping[int, list[str]]) -> Any:
    """The file, written anew with what is known, and open for more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [{"key": key}, *({"batch": number, "answers": answers} for number, answers in known.items())]
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")
