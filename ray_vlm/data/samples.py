"""Turn one record into token ids, labels and resized pixels: the work of a loader, in a thread or a Ray Data process.

`SampleSpec` is plain data that says how; `SampleBuilder` holds the processor and does it. Training, validation and
prediction use the same `SampleBuilder`, so they cannot resize or word anything differently. If the base's files say
enough (`models/processor.py`), rows are checked and counted without the processor, which would import torch.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ray_vlm.config.task import prompt_of
from ray_vlm.data.images import ImageSpec, ProcessorImages, build_image_spec, decode, load_processor_images, resize
from ray_vlm.data.records import PreferenceRecord, Record, SftRecord
from ray_vlm.data.spec import IGNORED, Sample, SampleSpec, Tokens
from ray_vlm.errors import DataError, ModelError
from ray_vlm.models.families import Family
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.models.load import family_of, resolve_name
from ray_vlm.models.processor import PromptText, Render, load_config_and_processor, read_prompt_text, take_prompt_text
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import IMAGE, Answer, Parsed, PromptContext, Turns
from ray_vlm.tasks.boxes import CODECS, Frame
from ray_vlm.tasks.classification import attributes_of, check_attributes
from ray_vlm.tasks.detection import name_classes

_PLACES = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")  # special tokens that answers may hold
_MARK = "\x00"  # stands for an assistant's text while a conversation is laid out
_LOADING = threading.Lock()


class SampleBuilder:
    """Turns records into rows. Loads the processor when a row with pixels, or the processor itself, is needed."""

    def __init__(self, spec: SampleSpec):
        quiet_libraries()
        self.spec = spec
        self.task = TASKS[spec.task.name]
        self.prompt_context = PromptContext(spec.task, spec.labels, spec.hints, lambda text: len(self._ids(text)))
        self.stock: ProcessorImages | None = None
        self._weight_of = dict(spec.token_weights)
        self._processor: Any = None
        self._last_answer: tuple[Record | None, Answer] = (None, Answer(""))
        if (prompt_text := read_prompt_text(spec.model, resolve_name(spec.model.name))) is not None:
            self._use(*prompt_text)
        else:
            self._load()
        self._check_wording()

    def _use(self, text: PromptText, family: Family) -> None:
        """Tokenize with `text` from now on."""
        self.family = family
        self.codec_name = self.spec.task.codec or family.codec
        self.codec = CODECS[self.codec_name]
        self.image_spec = build_image_spec(text.sizes, self.spec, family)
        self.image_token = text.image_token  # an image's placeholder in a prompt
        token_id = text.tokenizer.token_to_id(self.image_token) if self.stock is None else self.stock.token_id
        if token_id is None:
            raise DataError(
                f"model.name={self.spec.model.name!r}: its tokenizer does not know {self.image_token}, which stands "
                "for an image. Use a base whose files belong together."
            )
        self.image_token_id: int = token_id
        self.kinds = "mm_token_type_ids" if self.stock is None else self.stock.kinds
        self._encode = text.tokenizer.encode  # not transformers' wrapper, which takes longer than the work itself
        self._render = text.render
        self._layout = lru_cache(64)(self._lay_out)
        self._special = [token for token in text.special if not _PLACES.fullmatch(token)]

    def _load(self) -> None:
        """Load the processor once; training and prediction tokenize with it."""
        if self._processor is not None:
            return
        with _LOADING:
            if self._processor is not None:
                return
            config, processor = load_config_and_processor(self.spec.model)
            family = family_of(config)
            if family.stock_images:
                self.stock = load_processor_images(processor, config)
            self._use(take_prompt_text(processor, family), family)
            self._processor = processor

    @property
    def processor(self) -> Any:
        """The base's own processor."""
        self._load()
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def _check_wording(self) -> None:
        """Raise `DataError` for a prompt or a class name that the tokenizer would not read as plain text."""
        for text in (prompt_of(self.spec.task) or "", self.spec.task.system or "", self.spec.hints, *self.spec.labels):
            reserved = self._reserved(text) or (IMAGE if IMAGE in text else None)
            if reserved or (not text.isprintable() and not text.replace("\n", "").isprintable()):
                what = f"it holds {reserved!r}" if reserved else "it holds characters that cannot be written"
                raise DataError(f"prompt, hint or class name {text[:80]!r} cannot be used: {what}. Reword it.")

    def _reserved(self, text: str) -> str | None:
        """Return the first piece of `text` that the tokenizer does not read as text, or None."""
        return next((t for t in (*self._special, self.image_token, _MARK) if t in text), None)

    def frames(self, record: Record) -> tuple[Frame, ...]:
        """Return the coordinate frame of each image."""
        return tuple(self._frame(size) for size in record.sizes)

    def _frame(self, size: tuple[int, int]) -> Frame:
        placement = self.image_spec.place(size)
        padded = placement.content != placement.resized
        return Frame(size, placement.resized, self.codec, placement.content if padded else None, placement.offset)

    def num_image_tokens(self, size: tuple[int, int], spec: ImageSpec | None = None) -> int:
        """Return the visual tokens of an image of (width, height) before resizing, at the limits of `spec` if given."""
        spec = spec or self.image_spec
        return spec.num_tokens(size) if self.stock is None else self.stock.expand(spec.place(size).resized)[1]

    def turns(self, record: Record) -> Turns:
        """Return the turns before the answer."""
        if not isinstance(record, SftRecord):
            return record.prompt
        return self.task.ask(record, self.frames(record), self.prompt_context)

    def answer(self, record: SftRecord) -> Answer:
        """Return the right answer, with the character spans that name a class."""
        return self.task.answer(record, self.frames(record), self.prompt_context)

    def truth(self, record: SftRecord) -> dict[str, Any]:
        """Return the truth that an answer is scored against; in chat, with its placeholders filled as in training."""
        filled = {"answer": self.answer(record).text} if "answer" in record.truth else {}
        return {**record.truth, **filled}

    def answers(self, record: Record) -> tuple[Answer, ...]:
        """Return every answer of a record: the right one, the preferred and the rejected one, or none."""
        if isinstance(record, SftRecord):
            last, answer = self._last_answer  # each row is first checked and then counted, so keep its answer
            if last is not record:
                answer = self.answer(record)
                self._last_answer = (record, answer)
            return (answer,)
        return (Answer(record.chosen), Answer(record.rejected)) if isinstance(record, PreferenceRecord) else ()

    def problem(self, record: Record) -> str | None:
        """Return why a record with known sizes cannot be trained, or None."""
        if isinstance(record, SftRecord):
            if reason := self.task.check(record, self.spec.labels):
                return reason
        elif not record.images and self.spec.task.name != "chat":
            return f"its prompt has no image, and {self.spec.task.name} needs one; add it or remove the row"
        return self.question_problem(record) or self._text_problem([answer.text for answer in self.answers(record)])

    def question_problem(self, record: Record) -> str | None:
        """Return why a record's question cannot be used, or None; its answer does not matter."""
        turns = self.turns(record)
        tags = sum(text.count(IMAGE) for _, text in turns)
        if tags != len(record.images):
            return f"its text holds {tags} {IMAGE} tags for {len(record.images)} images; remove those that are too many"
        return self._text_problem([text for _, text in turns])

    def _text_problem(self, texts: Sequence[str]) -> str | None:
        token = next(filter(None, map(self._reserved, texts)), None)
        return f"its text holds {token!r}, which the tokenizer does not read as text; remove it" if token else None

    def token_counts(self, record: Record) -> tuple[int, int, int]:
        """Return the tokens of (images, prompt without images, answers); read no pixels."""
        answers = self.answers(record)
        tokens = self._tokens(record, answers[0] if answers else Answer(""))
        prompt_length = len(tokens.prompt)
        more = sum(len(self._closed(record, answer)) for answer in answers[1:])
        answer_length = len(tokens.all_ids) - prompt_length if answers else 0
        return tokens.num_image_tokens, prompt_length - tokens.num_image_tokens, answer_length + more

    @property
    def num_closing_tokens(self) -> int:
        """Tokens that close an answer; `token_counts` includes them."""
        return len(self._ids(self._layout((("user", "?"),), ())[1]))

    def row(self, record: Record) -> Sample:
        """Return what the spec's method trains of a record, with pixels."""
        if self.spec.kind == "prompt":
            return self.prompt_row(record)
        if isinstance(record, PreferenceRecord):
            return self.pair_row(record)
        assert isinstance(record, SftRecord)
        return self.train_row(record)

    def pair_row(self, record: PreferenceRecord) -> Sample:
        """Return the prompt with pixels, and both answers, the preferred one first."""
        prompt = self.prompt_row(record)
        both = tuple(np.array(self._closed(record, answer), np.int32) for answer in self.answers(record))
        return replace(prompt, completions=both)

    def train_row(self, record: SftRecord) -> Sample:
        """Return prompt and answer with pixels."""
        self._load()
        tokens = self._tokens(record, self.answer(record))
        ids = np.array(tokens.all_ids, np.int32)
        labels = ids.copy()
        if self.spec.loss_on == "answer":
            labels[~np.array(tokens.trained)] = IGNORED
        labels[ids == self.image_token_id] = IGNORED
        weights = np.array(tokens.weights, np.float32) if self._weight_of else None
        return Sample(ids, labels, self._pixels(record), weights)

    def prompt_row(self, record: Record) -> Sample:
        """Return the prompt with pixels, for generation."""
        self._load()
        prompt = self._tokens(record, Answer("")).prompt
        return Sample(np.array(prompt, np.int32), np.zeros(0, np.int32), self._pixels(record))

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer from its token ids, up to its end. Special tokens before the end stay: Qwen2-VL writes boxes
        with them."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for end in (self.tokenizer.eos_token, self.tokenizer.pad_token):
            text = text.partition(end)[0]
        return text

    def _tokens(self, record: Record, answer: Answer) -> Tokens:
        turns = self.turns(record)
        earlier_answers = [Answer(text) for role, text in turns if role == "assistant"]
        before, close = self._layout(mark_answers(turns), self._expansions(record))
        num_tokens = [self.num_image_tokens(size) for size in record.sizes]
        counts = iter(num_tokens)
        all_ids: list[int] = []
        trained: list[bool] = []
        weights: list[float] = []
        prompt: list[int] = []
        for head, turn_answer in zip(before, [*earlier_answers, answer], strict=True):
            # An image is one placeholder in the text, and as many of it in the prompt as the encoder makes tokens.
            for token in head:
                repeated = self.stock is None and token == self.image_token_id
                all_ids += [token] * (next(counts) if repeated else 1)
            trained += [False] * (len(all_ids) - len(trained))
            weights += [1.0] * (len(all_ids) - len(weights))
            prompt = list(all_ids)
            ids, token_weights = self._weighted(turn_answer, close)
            all_ids += ids
            trained += [True] * len(ids)
            weights += token_weights
        return Tokens(prompt, all_ids, trained, weights, sum(num_tokens))

    def _expansions(self, record: Record) -> tuple[str, ...]:
        """Return the text that stands for each image in the prompt; empty without a stock processor."""
        if self.stock is None:
            return ()
        return tuple(self.stock.expand(self.image_spec.place(size).resized)[0] for size in record.sizes)

    def _closed(self, record: Record, answer: Answer) -> list[int]:
        """Return the token ids of an answer and of the text that closes it."""
        _, close = self._layout(mark_answers(self.turns(record)), self._expansions(record))
        return self._ids(answer.text + close)

    def _weighted(self, answer: Answer, close: str) -> tuple[list[int], list[float]]:
        """Return the token ids of an answer and its closing text, and the weight of each in the loss."""
        if not self._weight_of or not answer.spans:
            ids = self._ids(answer.text + close)
            return ids, [1.0] * len(ids)
        encoded = self._encode(answer.text + close, add_special_tokens=False)
        weights = [1.0] * len(encoded.ids)
        for start, end, tag in answer.spans:
            weight = self._weight_of.get(tag, 1.0)
            for i, (first, last) in enumerate(encoded.offsets):
                if first < end and last > start:  # a token weighs as its span does if it covers any of its characters
                    weights[i] = weight
        return encoded.ids, weights

    def _ids(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def _lay_out(self, turns: Turns, expansions: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], str]:
        """Return the token ids before each assistant's text, and the text that closes such texts. An image is one
        token, or its entry in `expansions`."""
        heads, close = _split_layout(turns, self._render)
        _check_image_tags(heads, turns, self.image_token)
        if self.stock is not None:
            heads = _expand_images(heads, self.image_token, expansions)
        return tuple(tuple(self._ids(head)) for head in heads), close

    def _pixels(self, record: Record) -> tuple[np.ndarray, ...]:
        images = []
        for image, size in zip(record.images, record.sizes, strict=True):
            name = image if isinstance(image, str) else "its image"
            try:
                pixels = decode(image, size[0] * size[1])
            except Exception as error:  # decoders raise exceptions of any type
                raise DataError(f"row {record.row} (id {record.id}): {name} cannot be decoded ({error}).") from None
            if (pixels.shape[1], pixels.shape[0]) != size:
                raise DataError(f"row {record.row} (id {record.id}): {name} has changed size since the run started.")
            images.append(resize(pixels, self.image_spec, self.processor.image_processor))
        return tuple(images)


@lru_cache(maxsize=4)
def load_sample_builder(spec: SampleSpec) -> SampleBuilder:
    """Return the process's `SampleBuilder` for `spec`, made once."""
    return SampleBuilder(spec)


def parse_answer(text: str, record: Record, builder: SampleBuilder) -> Parsed:
    """Parse an answer to the record, with the classes of the job.

    A classification has the promised form if its attributes are those of the truth, or those of the labels if the
    record has no truth.
    """
    parsed, labels = builder.task.parse(text, builder.frames(record)), builder.spec.labels
    if builder.spec.task.name == "detection":
        return name_classes(parsed, labels)
    if builder.spec.task.name == "classification" and isinstance(record, SftRecord):
        return check_attributes(parsed, tuple(record.truth["attributes"]) or tuple(attributes_of(labels)))
    return parsed


def mark_answers(turns: Turns) -> Turns:
    """Replace each assistant's text by a mark, since it does not change the layout of the rest."""
    return tuple((role, _MARK if role == "assistant" else text) for role, text in turns)


def _split_layout(turns: Turns, render: Render) -> tuple[list[str], str]:
    """Return the text before each assistant's text, including an answer to the last turn, and the text that closes
    them.

    `turns`: the result of `mark_answers`. Raise `ModelError` if the template does not keep this order.
    """
    messages = [{"role": role, "content": _parts(text)} for role, text in turns]
    prompt = render(messages, True)
    conversation = render([*messages, {"role": "assistant", "content": _parts(_MARK)}], False)
    pieces = conversation.split(_MARK)
    if not conversation.startswith(prompt) or len(pieces) != 2 + sum(role == "assistant" for role, _ in turns):
        raise ModelError(
            "the base's chat template renders an answer that does not continue its own prompt, so the two cannot be "
            "separated. Mend the template, or use another base."
        )
    close = pieces.pop()
    if not all(piece.startswith(close) for piece in pieces[1:]):
        raise ModelError(
            "the base's chat template closes an earlier answer differently from the last one, so answers cannot be "
            "located in it. Mend the template, or use another base."
        )
    return [pieces[0], *(piece[len(close) :] for piece in pieces[1:])], close


def _check_image_tags(heads: Sequence[str], turns: Turns, image_token: str) -> None:
    """Raise `ValueError` if the template writes another number of images than the turns have."""
    written = sum(head.count(image_token) for head in heads)
    wanted = sum(text.count(IMAGE) for _, text in turns)
    if written != wanted:
        raise ValueError(
            f"the base's chat template writes {written} images ({image_token}) for {wanted}; use the template that its "
            "publisher gives for images, or another base"
        )


def _expand_images(heads: Sequence[str], image_token: str, expansions: Sequence[str]) -> list[str]:
    """Replace each image placeholder by its expansion, in order."""
    remaining = iter(expansions)
    pieces = [head.split(image_token) for head in heads]
    return [first + "".join(next(remaining) + more for more in rest) for first, *rest in pieces]


def _parts(text: str) -> list[dict[str, str]]:
    """Return a turn's text as the chat template takes it, with `<image>` tags as images."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
