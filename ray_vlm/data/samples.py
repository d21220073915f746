"""Turn one record into token ids, labels and resized pixels: the work of a loader, in a thread or a Ray Data process.

`SampleSpec` is plain data that says how; `SampleBuilder` holds the processor and does it. Training, validation and
prediction use the same `SampleBuilder`, so they cannot resize or word anything differently. If the base's files say
enough (`models/processor.py`), rows are checked and counted without the processor, which would import torch.
"""

import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ray_vlm.config.task import prompt_of
from ray_vlm.data.images import ImageSpec, build_image_spec, decode, resize
from ray_vlm.data.processor_images import ProcessorImages, load_processor_images
from ray_vlm.data.records import Image, PreferenceRecord, PromptRecord, Record, SftRecord
from ray_vlm.data.spec import (
    EncodedRow,
    Kept,
    RowTexts,
    Sample,
    SampleSpec,
    build_labels,
    build_weights,
    encode_texts,
    expand_images,
    expand_runs,
    hash_images,
)
from ray_vlm.errors import DataError, ModelError
from ray_vlm.models.families import Family
from ray_vlm.models.libraries import quiet_libraries
from ray_vlm.models.load import family_of, resolve_name
from ray_vlm.models.processor import (
    MARK,
    Messages,
    PromptText,
    Render,
    load_config_and_processor,
    read_prompt_text,
    take_prompt_text,
)
from ray_vlm.models.vision_inputs import EncoderShape, encoder_shape
from ray_vlm.tasks import TASKS
from ray_vlm.tasks.answers import IMAGE, Answer, Parsed, PromptContext, Turns
from ray_vlm.tasks.boxes import Frame
from ray_vlm.tasks.classification import attributes_of, check_attributes
from ray_vlm.tasks.codecs import ANSWER_TOKENS, CODECS, choose_codec
from ray_vlm.tasks.detection import name_classes

_MARK = "\x00"  # stands for an assistant's text while a conversation is laid out
_LOADING = threading.Lock()
_SIZES, _STEPS = 4096, 4096  # sizes of images, and steps of memories, whose tokens are kept
_SHAPES = 1024  # shapes of conversations that are kept
Shape = tuple[tuple[str, tuple[bool, ...]], ...]  # of each turn: the role, and whether there is text around its images


class SampleBuilder:
    """Turns records into rows. Loads the processor when a row with pixels, or the processor itself, is needed."""

    def __init__(self, spec: SampleSpec):
        quiet_libraries()
        self.spec = spec
        self.task = TASKS[spec.task.name]
        self.prompt_context = PromptContext(spec.task, spec.labels, spec.hints, lambda text: self._count(text))
        self.stock: ProcessorImages | None = None
        self.encoder: EncoderShape | None = None  # known with the processor, of families whose encoder is planned for
        self._weight_of = dict(spec.token_weights)
        self._processor: Any = None
        if (prompt_text := read_prompt_text(spec.model, resolve_name(spec.model.name))) is not None:
            self._use(*prompt_text)
        else:
            self._load()
        self._check_wording()

    def _use(self, text: PromptText, family: Family) -> None:
        """Tokenize with `text` from now on."""
        self.family = family
        self.codec_name = choose_codec(self.spec.task.codec, family.codec, text.tokenizer.token_to_id)
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
        self.kind_ids = (token_id,) if self.stock is None else self.stock.kind_ids
        self._encode = text.tokenizer.encode  # not transformers' wrapper, which takes longer than the work itself
        self._tokenizer = text.tokenizer
        self._layouts = _Layouts(text)
        special = (token for token in text.special if not ANSWER_TOKENS.fullmatch(token))
        self._reserved_texts = tuple(filter(None, (*special, self.image_token, _MARK)))
        self._reserved_pattern = re.compile("|".join(map(re.escape, self._reserved_texts)))
        self._frame = lru_cache(_SIZES)(self._build_frame)
        self._num_tokens = lru_cache(_SIZES)(self.num_image_tokens)
        self._count = lru_cache(_STEPS)(lambda text: len(self._ids(text)))

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
            self._use(take_prompt_text(processor, family, getattr(self.stock, "head", "")), family)
            self.encoder = encoder_shape(config)
            self._treatment = repr(processor.image_processor.to_dict())
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
        if self._reserved_pattern.search(text) is None:  # quicker than one by one, of which there may be a thousand
            return None
        return next((token for token in self._reserved_texts if token in text), None)

    def frames(self, record: Record) -> tuple[Frame, ...]:
        """Return the coordinate frame of each image."""
        return tuple([self._frame(size) for size in record.sizes])

    def _build_frame(self, size: tuple[int, int]) -> Frame:
        placement = self.image_spec.place(size)
        padded = placement.content != placement.resized
        return Frame(size, placement.resized, self.codec, placement.content if padded else None, placement.offset)

    def num_image_tokens(self, size: tuple[int, int], spec: ImageSpec | None = None) -> int:
        """Return the visual tokens of an image of (width, height) before resizing, at the limits of `spec` if given."""
        spec = spec or self.image_spec
        return spec.num_tokens(size) if self.stock is None else self.stock.expand([spec.place(size).resized])[0][1]

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
            return (self.answer(record),)
        return (Answer(record.chosen), Answer(record.rejected)) if isinstance(record, PreferenceRecord) else ()

    def problem(self, record: Record) -> str | None:
        """Return why a record with known sizes cannot be trained, or None."""
        checked = self._check(record)
        return checked if isinstance(checked, str) else None

    def question_problem(self, record: Record) -> str | None:
        """Return why a record's question cannot be used, or None; its answer does not matter."""
        return self._turns_problem(self.turns(record), len(record.images))

    def _check(self, record: Record) -> tuple[Turns, tuple[Answer, ...]] | str:
        """Return the turns and the answers of a record, or why it cannot be trained."""
        if isinstance(record, SftRecord):
            if reason := self.task.check(record, self.spec.labels):
                return reason
        elif not record.images and self.spec.task.name != "chat":
            return f"its prompt has no image, and {self.spec.task.name} needs one; add it or remove the row"
        turns = self.turns(record)
        if reason := self._turns_problem(turns, len(record.images)):
            return reason
        answers = self.answers(record)
        return self._text_problem([answer.text for answer in answers]) or (turns, answers)

    def _turns_problem(self, turns: Turns, num_images: int) -> str | None:
        tags = sum(text.count(IMAGE) for _, text in turns)
        if tags != num_images:
            return f"its text holds {tags} {IMAGE} tags for {num_images} images; remove those that are too many"
        return self._text_problem([text.replace(IMAGE, "\n") for _, text in turns])  # some families' own placeholder

    def _text_problem(self, texts: Sequence[str]) -> str | None:
        token = next(filter(None, map(self._reserved, texts)), None)
        return f"its text holds {token!r}, which the tokenizer does not read as text; remove it" if token else None

    def token_counts(self, record: Record) -> tuple[int, int, int]:
        """Return the tokens of (images, prompt without images, answers); read no pixels."""
        return self._encode_one(record, self.answers(record), "prompt").counts

    @property
    def num_closing_tokens(self) -> int:
        """Tokens that close an answer; `token_counts` includes them."""
        return len(self._ids(self._layouts.split((("user", "?"),))[1]))

    def encode(self, records: Sequence[Record]) -> list[EncodedRow | str]:
        """Return the token ids of each record with known sizes, or why it cannot be trained. Read no pixels.

        The tokenizer is called once for all. The result does not depend on the weights or the split of the spec.
        """
        texts: list[RowTexts | str] = []
        for record in records:
            try:
                checked = self._check(record)
                texts.append(checked if isinstance(checked, str) else self._texts(record, *checked, self._kept(record)))
            except ValueError as error:
                texts.append(str(error))
        rows = iter(self._encode_texts([row for row in texts if not isinstance(row, str)]))
        return [row if isinstance(row, str) else next(rows) for row in texts]

    def _kept(self, record: Record) -> Kept:
        """Return which of a record's tokens its rows have."""
        if self.spec.kind == "prompt" or isinstance(record, PromptRecord):
            return "prompt"
        return "pair" if isinstance(record, PreferenceRecord) else "answer"

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
        return self._row(record, "pair")

    def train_row(self, record: SftRecord) -> Sample:
        """Return prompt and answer with pixels."""
        return self._row(record, "answer")

    def prompt_row(self, record: Record) -> Sample:
        """Return the prompt with pixels, for generation."""
        return self._row(record, "prompt")

    def _row(self, record: Record, kept: Kept) -> Sample:
        self._load()
        answers = () if kept == "prompt" else self.answers(record)
        encoded = self._encode_one(record, answers, kept)
        return self.sample(encoded, record.images, record.sizes, f"row {record.row} (id {record.id})")

    def sample(
        self,
        encoded: EncodedRow,
        images: Sequence[Image],
        sizes: Sequence[tuple[int, int]],
        name: str,
        prompt_only: bool = False,
    ) -> Sample:
        """Return the row of a record that `encode` returned, with the pixels of its images.

        `sizes`: (width, height) of each image when the row was encoded. `name`: the row's, in errors. `prompt_only`:
        return the prompt alone, for generation. Raise `DataError` if an image cannot be read or has changed.
        """
        pixels = self._pixels(images, sizes, name)
        keys = hash_images(pixels, self._treatment) if self.spec.image_keys and self.encoder else ()
        if prompt_only or not len(encoded.trained):
            ids = expand_runs(encoded, self.image_token_id, encoded.ids[: encoded.prompt_length])
            completions = () if prompt_only else tuple(np.array(ids, np.int32) for ids in encoded.completions)
            return Sample(ids, np.zeros(0, np.int32), pixels, completions=completions, image_keys=keys)
        labels = build_labels(encoded, self.spec.loss_on, self.image_token_id)
        weights = build_weights(encoded, self._weight_of) if self._weight_of else None
        return Sample(
            expand_runs(encoded, self.image_token_id, encoded.ids),
            expand_runs(encoded, self.image_token_id, labels),
            pixels,
            None if weights is None else expand_runs(encoded, self.image_token_id, weights),
            image_keys=keys,
        )

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer from its token ids, up to its end. Special tokens before the end stay: Qwen2-VL writes boxes
        with them."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for end in (self.tokenizer.eos_token, self.tokenizer.pad_token):
            text = text.partition(end)[0]
        return text

    def _texts(self, record: Record, turns: Turns, answers: tuple[Answer, ...], kept: Kept) -> RowTexts:
        # Of each image, the text that stands for it in the prompt, and its tokens.
        if self.stock is None:
            expanded = tuple(("", self._num_tokens(size)) for size in record.sizes)
        else:
            expanded = self.stock.expand([self.image_spec.place(size).resized for size in record.sizes])
        heads, close = self._layout(turns, [text for text, _ in expanded])
        earlier = [text + close for role, text in turns if role == "assistant"]
        closed = [(answer.text + close, answer.spans) for answer in answers]
        return RowTexts(heads, earlier, closed, kept, [count for _, count in expanded])

    def _encode_one(self, record: Record, answers: tuple[Answer, ...], kept: Kept) -> EncodedRow:
        return self._encode_texts([self._texts(record, self.turns(record), answers, kept)])[0]

    def _encode_texts(self, rows: Sequence[RowTexts]) -> list[EncodedRow]:
        return encode_texts(rows, self._tokenizer, self.image_token_id, written_out=self.stock is not None)

    def _ids(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def _layout(self, turns: Turns, expansions: Sequence[str] = ()) -> tuple[Sequence[str], str]:
        """Return the text before each assistant's text, and the text that closes such texts. An image is its
        placeholder, or its entry in `expansions`."""
        heads, close = self._layouts.split(turns)
        _check_image_tags(heads, turns, self.image_token)
        return heads if self.stock is None else expand_images(heads, self.image_token, expansions), close

    def _pixels(self, sources: Sequence[Image], sizes: Sequence[tuple[int, int]], row: str) -> tuple[np.ndarray, ...]:
        images = []
        for image, size in zip(sources, sizes, strict=True):
            name = "its image" if isinstance(image, bytes) else str(image)
            try:
                pixels = decode(image, size[0] * size[1], fast=True)
            except Exception as error:  # decoders raise exceptions of any type
                raise DataError(f"{row}: {name} cannot be decoded ({error}).") from None
            if (pixels.shape[1], pixels.shape[0]) != tuple(size):
                raise DataError(f"{row}: {name} has changed size since the run started.")
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


class _Outline(NamedTuple):
    """How a template lays out conversations of one shape: the texts before each assistant's text and the closing text,
    each as what is the same for all and the numbers of texts. `absent`: strings that these texts must not hold."""

    heads: Sequence[Sequence[str | int]]
    close: Sequence[str | int]
    absent: Collection[str]


class _Layouts:
    """Lays out conversations as the base's chat template does.

    A template is slower than a tokenizer. So if it only writes texts out (`TemplateTracer`), it renders each shape of
    conversation once: its roles, images and places of texts.
    """

    def __init__(self, text: PromptText):
        self._render, self._tracer = text.render, text.tracer
        self._split = lru_cache(64)(lambda turns: _split_layout(_messages(turns), self._render))
        self._outlines: dict[Shape, _Outline | None] = {}

    def split(self, turns: Turns) -> tuple[Sequence[str], str]:
        """Return the text before each assistant's text, including an answer to the last turn, and the text that closes
        them. What earlier answers hold does not matter. Raise `ModelError` as `_split_layout`, and `ValueError` if the
        template refuses the turns."""
        shape, texts = _take_texts(turns)
        try:
            outline = self._outlines[shape]
        except KeyError:
            outline = self._learn(shape, turns, texts)
        if outline is None or any(word in text for text in texts for word in outline.absent):
            return self._split(_mark_answers(turns))
        return _fill(outline, texts)

    def _learn(self, shape: Shape, turns: Turns, texts: Sequence[str]) -> _Outline | None:
        """Return and keep the outline of a shape; None if it has none that is the rendering of these turns too."""
        turns, outline = _mark_answers(turns), None
        rendered = self._split(turns)
        if self._tracer is not None and (
            traced := self._tracer.trace(lambda mark, render: _split_layout(_messages(turns, mark), render))
        ):
            (heads, close), absent = traced
            outline = _Outline(
                [_find_marks(head, len(texts)) for head in heads], _find_marks(close, len(texts)), {*absent, _MARK}
            )
            outline = outline if _fill(outline, texts) == rendered else None
        if len(self._outlines) >= _SHAPES:
            self._outlines.clear()
        self._outlines[shape] = outline
        return outline


def _take_texts(turns: Turns) -> tuple[Shape, list[str]]:
    """Return the shape of a conversation, and its texts in order, without those of the assistant."""
    shape: list[tuple[str, tuple[bool, ...]]] = []
    texts: list[str] = []
    for role, text in turns:
        pieces = [] if role == "assistant" else text.split(IMAGE)
        shape.append((role, tuple([piece != "" for piece in pieces])))
        texts += [piece for piece in pieces if piece]
    return tuple(shape), texts


def _find_marks(text: str, shift: int) -> list[str | int]:
    """Return a traced text as literal pieces and numbers of texts; `shift` higher for a text that is stripped."""
    first, *rest = MARK.split(text)
    pieces: list[str | int] = [first]
    for number, stripped, literal in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        pieces += [int(number) + (shift if stripped else 0), literal]
    return pieces


def _fill(outline: _Outline, texts: Sequence[str]) -> tuple[list[str], str]:
    """Return the layout of a conversation with these texts."""
    values = [*texts, *[text.strip() for text in texts]]
    heads = ["".join([values[p] if isinstance(p, int) else p for p in head]) for head in outline.heads]
    return heads, "".join([values[p] if isinstance(p, int) else p for p in outline.close])


def _mark_answers(turns: Turns) -> Turns:
    """Replace each assistant's text by a mark, since it does not change the layout of the rest."""
    return tuple((role, _MARK if role == "assistant" else text) for role, text in turns)


def _split_layout(messages: Messages, render: Render) -> tuple[list[str], str]:
    """Return what `_Layouts.split` does. Raise `ModelError` if the template does not keep this order."""
    prompt = render(messages, True)
    answer = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
    conversation = render([*messages, answer], False)
    pieces = conversation.split(_MARK)
    num_answers = 1 + sum(message["role"] == "assistant" for message in messages)
    if not conversation.startswith(prompt) or len(pieces) != 1 + num_answers:
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
    """Raise `ValueError` if the template writes another number of images than the questions have."""
    written = sum(head.count(image_token) for head in heads)
    wanted = sum(text.count(IMAGE) for role, text in turns if role != "assistant")
    if written != wanted:
        raise ValueError(
            f"the base's chat template writes {written} images ({image_token}) for {wanted}; use the template that its "
            "publisher gives for images, or another base"
        )


def _messages(turns: Turns, mark: Callable[[int], str] | None = None) -> list[dict[str, Any]]:
    """Return turns as the chat template takes them, with `<image>` tags as images; with `mark`, in place of each text
    its mark."""
    messages: list[dict[str, Any]] = []
    numbers = count()
    for role, text in turns:
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(text.split(IMAGE)):
            if number:
                parts.append({"type": "image"})
            if piece:
                parts.append(
                    {"type": "text", "text": piece if mark is None or role == "assistant" else mark(next(numbers))}
                )
        messages.append({"role": role, "content": parts})
    return messages
