"""Chat: free text about one or several images, over one or several turns (questions, captions).

Every assistant turn is trained; the last one is what is generated and scored.

`truth` is `{"answer": text}`; `context` is `{"turns": ((role, text), ...)}`, all turns before the answer, with an
`<image>` for every image. Where the texts refer to objects, `context` also has `boxes` and `refs`, which replace
`<bbox>` and `<ref-object>` in order of appearance, and `image_of`, the index of each box's image.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_vlm.data.records import SftRecord
from ray_vlm.tasks.answers import IMAGE, Answer, Parsed, PromptContext, Turns, final_text
from ray_vlm.tasks.boxes import Frame, box_problem, write_region

_PLACEHOLDER = re.compile(r"<bbox>|<ref-object>")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORDS = re.compile(r"[^\w\s]")


def check(record: SftRecord, labels: Sequence[str]) -> str | None:
    """Return why a record cannot be trained on, or None."""
    num_tags = sum(text.count(IMAGE) for _, text in record.context["turns"]) + record.truth["answer"].count(IMAGE)
    if num_tags != len(record.images):
        return f"{num_tags} <image> tags for {len(record.images)} images; there must be one tag for each image"
    if not record.truth["answer"].strip():
        return "the last answer is empty, so there is nothing to learn"
    for box, image in zip(record.context.get("boxes", ()), record.context.get("image_of", ()), strict=False):
        if reason := box_problem(box, record.sizes[image]):
            return f"{reason}; mend the box, or say what its numbers mean with box_units"
    return None


def tags(record: SftRecord) -> tuple[str, ...]:
    """Return no tags: free text has no classes."""
    return ()


def ask(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Turns:
    """Return all turns before the last answer."""
    turns = _fill(record, frames)[:-1]
    if context.options.system and not (turns and turns[0][0] == "system"):
        turns = (("system", context.options.system), *turns)
    return turns


def answer(record: SftRecord, frames: Sequence[Frame], context: PromptContext) -> Answer:
    """Return the last answer."""
    return Answer(_fill(record, frames)[-1][1])


def _fill(record: SftRecord, frames: Sequence[Frame]) -> Turns:
    """Return all turns, with the placeholders replaced by boxes and names."""
    turns = (*record.context["turns"], ("assistant", record.truth["answer"]))
    boxes, names = record.context.get("boxes", ()), iter(record.context.get("refs", ()))
    if not boxes and "refs" not in record.context:
        return turns
    image_of = record.context.get("image_of") or (0,) * len(boxes)
    regions = (write_region(box, frames[i], i) for box, i in zip(boxes, image_of, strict=True))

    def write_value(placeholder: re.Match) -> str:
        return next(regions if placeholder.group() == "<bbox>" else names, placeholder.group())

    return tuple((role, _PLACEHOLDER.sub(write_value, text)) for role, text in turns)


def parse(text: str, frames: Sequence[Frame]) -> Parsed:
    """Parse `answer`: the text without the reasoning before it and the spaces around it."""
    final = final_text(text).strip()
    return Parsed({"answer": final}, bool(final), () if final else ("empty answer",))


def score(parsed: Parsed, truth: Mapping[str, Any]) -> dict[str, Any]:
    """Score an answer against the truth.

    `exact`: equal texts; `normalised`: equal apart from case, punctuation, articles and spaces (as SQuAD and VQA do);
    `anls`: one minus the edit distance over the longer length, 0 where that is below 0.5 (Biten et al. 2019,
    arXiv:1905.13648).
    """
    predicted, right = parsed.values.get("answer", ""), final_text(truth["answer"]).strip()
    return {
        "exact": predicted == right,
        "normalised": _normal(predicted) == _normal(right),
        "anls": anls(predicted, right),
    }


def _normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", _NOT_WORDS.sub(" ", text.casefold())).split())


def anls(predicted: str, right: str) -> float:
    """Return the normalised Levenshtein similarity of one answer to the right one, 0..1, ignoring case."""
    a, b = predicted.casefold().strip(), right.casefold().strip()
    if not a and not b:
        return 1.0
    longest = max(len(a), len(b))
    if 2 * abs(len(a) - len(b)) > longest:  # the difference in length is a lower bound of the edits
        return 0.0
    similarity = 1.0 - _edits(a, b) / longest
    return similarity if similarity >= 0.5 else 0.0


def _edits(a: str, b: str) -> int:
    """Return the Levenshtein distance, computed one row of the table at a time."""
    letters = np.frombuffer(b.encode("utf-32-le", "surrogatepass"), np.uint32)
    columns = np.arange(len(b) + 1)
    row = columns
    for i, x in enumerate(a, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != ord(x)))])
        # row[j] is the least best[k] + (j - k) over k <= j: insertions from the left, without a loop over columns
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])
