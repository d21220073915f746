"""Define what a row is, and how records become rows: plain data that every process shares, and the arithmetic from a
record's token ids to those of its row. `samples.py` makes both."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ray_vlm.config.method import SftMethod
from ray_vlm.config.schema import JobConfig, Model
from ray_vlm.config.task import Task, labels_of

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_FEW = 8  # texts that are tokenized one by one, since the tokenizer starts its threads for a batch
UNKNOWN = 0  # length of a run of image tokens that is known from the image alone
IGNORED = -100  # the label of a token that is not trained, as torch's cross-entropy has it
Kept = Literal["answer", "pair", "prompt"]
KINDS: dict[str, Kept] = {"sft": "answer", "dpo": "pair", "grpo": "prompt"}


@dataclass(frozen=True)
class SampleSpec:
    """How records become rows: base model, task, class names in prompt order, images, what is trained.

    `hints`: what the prompt says about the training data. `token_weights`: (tag, weight) of answer tokens in the loss.
    `split`: fingerprint of the rows that training leaves out as shares. `kind`: what the method trains of a record.
    `image_keys`: rows have a key of each image, for caches; it is not part of what an index is known by.
    """

    model: Model
    task: Task
    labels: tuple[str, ...]
    min_pixels: int | None = None
    max_pixels: int | None = None
    loss_on: Literal["answer", "whole_sequence"] = "answer"
    resize: Literal["stretch", "pad"] = "stretch"
    pad_color: tuple[int, int, int] | None = None
    pad_place: Literal["end", "center"] = "end"
    hints: str = ""
    token_weights: tuple[tuple[str, float], ...] = ()
    split: str = ""
    kind: Kept = "answer"
    image_keys: bool = field(default=False, repr=False)

    def with_labels(self, labels: Iterable[str]) -> "SampleSpec":
        """Return the spec with the class names of the data, each once; `task.labels` overrides them."""
        return replace(self, labels=labels_of(self.task) or tuple(dict.fromkeys(labels)))


def sample_spec(job: JobConfig, labels: Sequence[str] = ()) -> SampleSpec:
    """Return the job's `SampleSpec`. `labels` are the class names of the data; `task.labels` overrides them."""
    data = job.data
    return SampleSpec(
        model=job.model,
        task=job.task,
        labels=labels_of(job.task) or tuple(labels),
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        loss_on=job.method.loss_on if isinstance(job.method, SftMethod) else "answer",
        resize=data.resize,
        pad_color=data.pad_color,
        pad_place=data.pad_place,
        kind=KINDS[job.method.name],
        image_keys=job.train.vision_cache is not None or job.method.name != "sft",
    )


@dataclass(frozen=True)
class Sample:
    """What a model sees of one record. `labels` equals `input_ids` for trained tokens, and is -100 elsewhere.

    For generation `input_ids` is the prompt alone and `labels` is empty. For a pair it is the prompt, and `completions`
    are the preferred answer and the other. `images`: `uint8 [h, w, 3]` each. `weights`: `float32`, of each token in the
    loss; None if all are 1. `number`: the record's position in the index. `image_keys`: of each image, equal for equal
    pixels that the processor treats alike; empty if nothing is cached.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[np.ndarray, ...]
    weights: np.ndarray | None = None
    completions: tuple[np.ndarray, ...] = ()
    number: int = -1
    image_keys: tuple[str, ...] = ()


def hash_images(images: Iterable[np.ndarray], treatment: str) -> tuple[str, ...]:
    """Return a key of each image, `uint8 [h, w, 3]`: the SHA-256 of its pixels and of how the processor makes floats of
    them. Python's lock is released meanwhile."""
    keys = []
    for image in images:
        digest = hashlib.sha256(f"{image.shape} {treatment}".encode())
        digest.update(np.ascontiguousarray(image).data)
        keys.append(digest.hexdigest())
    return tuple(keys)


@dataclass(frozen=True)
class EncodedRow:
    """A record's text as token ids, as the index keeps it: `int32` throughout. A run of image tokens is one token.

    `ids`: the prompt, and for SFT the answer. `image_runs`: the length of each run of the image token in `ids`, in
    order. `prompt_length`: how many of `ids` are the prompt. `trained [spans, 2]`: start and end in `ids` of the tokens
    that SFT trains; none for a pair or a prompt. `tagged`: start, end and tag of answer tokens that name a class; a
    later one overrides an earlier one. `completions`: the preferred and the rejected answer of a pair. `counts`: tokens
    of (images, prompt without images, all answers), those of a prompt's right answer too, which `ids` lacks.
    """

    ids: np.ndarray
    image_runs: np.ndarray
    prompt_length: int
    trained: np.ndarray
    tagged: tuple[tuple[int, int, str], ...]
    completions: tuple[np.ndarray, ...]
    counts: tuple[int, int, int]


Spans = Sequence[tuple[int, int, str]]  # start, end, tag


class RowTexts(NamedTuple):
    """What is tokenized for a row: the text before each assistant's text, the earlier answers, the last ones with the
    characters that name a class; all answers closed. `kept`: what the row has of it. `num_image_tokens`: of each image.
    """

    heads: Sequence[str]
    earlier: Sequence[str]
    answers: Sequence[tuple[str, Spans]]
    kept: Kept
    num_image_tokens: Sequence[int]


class TokenizedText(NamedTuple):
    """The token ids of a text, with each run of the image token as one, the lengths of these runs, and the characters
    (start, end) of each token if they are needed."""

    ids: list[int]
    runs: Sequence[int]
    offsets: Sequence[tuple[int, int]] = ()


def encode_texts(
    rows: Sequence[RowTexts], tokenizer: "Tokenizer", image_token: int, written_out: bool
) -> list[EncodedRow]:
    """Tokenize the texts of all rows at once, each text once.

    `written_out`: a text holds as many image tokens as the encoder makes of its images, not one for each."""
    heads: dict[str, None] = {}
    others: dict[str, None] = {}
    spanned: dict[str, None] = {}  # texts whose tokens' characters are needed
    for row in rows:
        for head in row.heads:
            heads[head] = None
        for closed in row.earlier:
            others[closed] = None
        for closed, spans in row.answers:
            (spanned if spans and row.kept == "answer" else others)[closed] = None
    plain = [*heads, *(others.keys() - spanned.keys() - heads.keys())]
    text_of: dict[str, TokenizedText] = {}
    for text, encoding in zip(plain, _tokenize(tokenizer, plain), strict=True):
        ids = encoding.ids
        if image_token not in ids:
            text_of[text] = TokenizedText(ids, ())
        elif written_out and text in heads:
            text_of[text] = TokenizedText(*_shorten_runs(ids, image_token))
        else:
            text_of[text] = TokenizedText(ids, (UNKNOWN,) * ids.count(image_token))
    for text, encoding in zip(spanned, _tokenize(tokenizer, list(spanned), offsets=True), strict=True):
        text_of[text] = TokenizedText(encoding.ids, (UNKNOWN,) * encoding.ids.count(image_token), encoding.offsets)
    return _assemble_rows(rows, text_of)


def _tokenize(tokenizer: "Tokenizer", texts: list[str], offsets: bool = False) -> "Sequence[Encoding]":
    if len(texts) < _FEW:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    fast = None if offsets else getattr(tokenizer, "encode_batch_fast", None)
    return (fast or tokenizer.encode_batch)(texts, add_special_tokens=False)


def _assemble_rows(rows: Sequence[RowTexts], text_of: Mapping[str, TokenizedText]) -> list[EncodedRow]:
    joined = [_join_texts(row, text_of) for row in rows]
    ids, runs = _build_arrays([row[0] for row in joined]), _build_arrays([row[1] for row in joined])
    trained = _build_arrays([row[2] for row in joined])
    completions = [
        tuple(np.array(text_of[closed].ids, np.int32) for closed, _ in row.answers) if row.kept == "pair" else ()
        for row in rows
    ]
    return [
        EncodedRow(ids[i], runs[i], length, trained[i].reshape(-1, 2), tagged, completions[i], counts)
        for i, (_, _, _, length, tagged, counts) in enumerate(joined)
    ]


def _build_arrays(lists: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return each list as an array, `int32`; all are views of one."""
    ends = list(accumulate(map(len, lists), initial=0))
    values = np.fromiter(chain.from_iterable(lists), np.int32, ends[-1])
    return [values[start:end] for start, end in pairwise(ends)]


_Joined = tuple[list[int], list[int], list[int], int, tuple[tuple[int, int, str], ...], tuple[int, int, int]]


def _join_texts(row: RowTexts, text_of: Mapping[str, TokenizedText]) -> _Joined:
    """Return the ids, runs, trained spans (start, end, start, ...), prompt length, tags and counts of a row."""
    ids: list[int] = []
    runs: list[int] = []
    trained: list[int] = []
    num_image_tokens = iter(row.num_image_tokens)

    def add_answer(text: TokenizedText) -> None:
        trained.extend((len(ids), len(ids) + len(text.ids)))
        runs.extend([length or 1 for length in text.runs])
        ids.extend(text.ids)

    for number, head in enumerate(row.heads):
        text = text_of[head]
        runs += [length or next(num_image_tokens) for length in text.runs]
        ids += text.ids
        if number < len(row.earlier):
            add_answer(text_of[row.earlier[number]])
    images, length = sum(row.num_image_tokens), len(ids)
    prompt_tokens, answer_tokens = length - len(runs) + sum(runs) - images, 0
    tagged: list[tuple[int, int, str]] = []
    for closed, spans in row.answers:
        text = text_of[closed]
        answer_tokens += len(text.ids)
        if row.kept == "answer":
            tagged += _tag_tokens(text.offsets, spans, len(ids)) if spans else ()
            add_answer(text)
    if row.kept != "answer":
        trained = []
    return ids, runs, trained, length, tuple(tagged), (images, prompt_tokens, answer_tokens)


def _tag_tokens(offsets: Sequence[tuple[int, int]], spans: Spans, begin: int) -> list[tuple[int, int, str]]:
    """Return start, end and tag of the tokens that cover any character of a span. `begin`: position of the first
    token."""
    tagged = []
    firsts, lasts = [first for first, _ in offsets], [last for _, last in offsets]
    in_order = firsts == sorted(firsts) and lasts == sorted(lasts)
    for start, end, tag in spans:
        if in_order:
            low, high = bisect_right(lasts, start), bisect_left(firsts, end)
            tagged += [(begin + low, begin + high, tag)] if low < high else []
            continue
        position = begin
        for covered, group in groupby(first < end and last > start for first, last in offsets):
            length = len(list(group))
            tagged += [(position, position + length, tag)] if covered else []
            position += length
    return tagged


def _shorten_runs(ids: Sequence[int], token: int) -> tuple[list[int], list[int]]:
    """Return the ids with each run of `token` as one, and the lengths of the runs."""
    groups = [(value, len(list(group))) for value, group in groupby(ids)]
    short = [value for value, length in groups for _ in range(1 if value == token else length)]
    return short, [length for value, length in groups if value == token]


def expand_runs(row: EncodedRow, token: int, values: np.ndarray) -> np.ndarray:
    """Return values of a row's first tokens with those of its image tokens as often as the runs are long."""
    image = row.ids[: len(values)] == token
    repeats = np.ones(len(values), np.int64)
    repeats[image] = row.image_runs[: np.count_nonzero(image)]
    return np.repeat(values, repeats)


def expand_images(heads: Sequence[str], image_token: str, expansions: Sequence[str]) -> list[str]:
    """Replace each image placeholder by its expansion, in order."""
    remaining = iter(expansions)
    pieces = [head.split(image_token) for head in heads]
    return [first + "".join(next(remaining) + more for more in rest) for first, *rest in pieces]


def build_labels(row: EncodedRow, loss_on: Literal["answer", "whole_sequence"], image_token: int) -> np.ndarray:
    """Return the label of each of a row's tokens, its runs not expanded."""
    labels = row.ids.copy()
    if loss_on == "answer":
        labels[:] = IGNORED
        for start, end in row.trained:
            labels[start:end] = row.ids[start:end]
    labels[row.ids == image_token] = IGNORED
    return labels


def build_weights(row: EncodedRow, weight_of: Mapping[str, float]) -> np.ndarray:
    """Return the weight in the loss of each of a row's tokens, `float32`, its runs not expanded."""
    weights = np.ones(len(row.ids), np.float32)
    for start, end, tag in row.tagged:  # a token weighs as its span does if it covers any of its characters
        weights[start:end] = weight_of.get(tag, 1.0)
    return weights
