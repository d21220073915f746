"""Token ids made in batches are those that rows had when each was tokenized by itself."""

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask, ClassificationTask, DetectionTask, GuiStepsTask, Task
from ray_vlm.data.records import PreferenceRecord, PromptRecord, Record, SftRecord
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import IGNORED, EncodedRow, Sample, SampleSpec, _tag_tokens
from ray_vlm.tasks.answers import IMAGE, Answer
from tests.support.tiny_families import BUILDERS

STOCK = ("llama4", "gemma3", "internvl")
SIZES = ((120, 70), (64, 150), (96, 96), (180, 40))
LABELS = ("dog", "black cat", "Löwe", "object=dog", "object=cat", "condition=wet")
WEIGHTS = (("dog", 2.5), ("Löwe", 0.25), ("object=dog", 4.0), ("action=click", 0.5))


@pytest.fixture(scope="module")
def bases(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with the processors of three families of ours and of three stock ones."""
    folders = dict(tiny_models)
    for family in STOCK:
        folder = tmp_path_factory.mktemp(family)
        for part in BUILDERS[family]():
            part.save_pretrained(folder)
        folders[family] = str(folder)
    return folders


def _png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


FILES = {size: _png(size) for size in SIZES}


def _images(*numbers: int) -> dict[str, Any]:
    sizes = tuple(SIZES[i] for i in numbers)
    return {"images": tuple(FILES[size] for size in sizes), "sizes": sizes}


def _chats() -> Iterator[Record]:
    """Chats of one and several turns: one, several, adjacent and no images, and boxes and names in texts."""
    turns: list[tuple[tuple[int, ...], Any]] = [
        ((0,), (("user", f"{IMAGE}\nWhat is it, é?"),)),
        ((), (("user", "Who painted it? "),)),
        ((0, 1, 2), (("user", f"{IMAGE}{IMAGE} and\t{IMAGE}\n\n what?"),)),
        ((3, 1), (("user", f"First {IMAGE}"), ("assistant", "  A ring.\n"), ("user", f"\n{IMAGE} And now?"))),
        ((2,), (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", f"See {IMAGE}"))),
        ((1,), (("user", IMAGE),)),
    ]
    for i, (numbers, before) in enumerate(turns):
        yield SftRecord(
            f"c{i}", i, **_images(*numbers), truth={"answer": f"A ring, no {i}. 物体"}, context={"turns": before}
        )
    boxes = {"boxes": ((1.0, 2.0, 30.0, 40.0), (5.0, 5.0, 60.0, 60.0)), "refs": ("dog",), "image_of": (0, 1)}
    context = {"turns": (("user", f"{IMAGE}{IMAGE} Where is the <ref-object>, at <bbox>?"),), **boxes}
    yield SftRecord("boxes", 9, **_images(0, 1), truth={"answer": "No, at <bbox>."}, context=context)


def _detections() -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        corners = rng.uniform(0, 0.5, (i * 3, 4)) * [*size, *size] + [0, 0, size[0] / 2, size[1] / 2]
        boxes = tuple(tuple(map(float, box)) for box in corners)
        names = tuple(LABELS[j % 3] for j in range(len(boxes)))
        yield SftRecord(f"d{i}", i, **_images(i), truth={"boxes": boxes, "labels": names})


def _classifications() -> Iterator[Record]:
    for i in range(2):
        attributes = {"object": ("dog", "cat")[i], "condition": "wet"}
        context = {"box": (1.0, 2.0, 30.0, 40.0)} if i else {}
        yield SftRecord(f"k{i}", i, **_images(*range(i + 1)), truth={"attributes": attributes}, context=context)


def _steps() -> Iterator[Record]:
    for i in range(3):
        output = {"action": ("click", "type", "scroll")[i], "text": 'say "é"\n'}
        truth = {
            "output": output,
            "box": (1.0, 2.0, 30.0, 40.0) if i == 0 else None,
            "point": None if i < 2 else (5.0, 6.0),
        }
        history = tuple(f'{{"action":"click","number":{j}}}' for j in range(4 * i))
        context = {"instruction": "Open the menu.", "task": "t", "step": i, "history": history}
        yield SftRecord(f"g{i}", i, **_images(i), truth=truth, context=context)


def _asked(records: Sequence[Record]) -> Iterator[Record]:
    """Pairs and prompts of the chats."""
    for i, record in enumerate(records):
        assert isinstance(record, SftRecord)
        about: Any = {"images": record.images, "sizes": record.sizes, "prompt": record.context["turns"]}
        yield PreferenceRecord(f"p{i}", i, chosen="Yes, a ring.", rejected="No" + "!" * i, **about)
        yield PromptRecord(f"q{i}", i, **about)


CASES: list[tuple[Task, list[Record]]] = [
    (ChatTask(), [*_chats(), *_asked([*_chats()][:-1])]),
    (ChatTask(system="Look closely."), [*_chats()]),
    (DetectionTask(), [*_detections()]),
    (ClassificationTask(position=True), [*_classifications()]),
    (GuiStepsTask(), [*_steps()]),
]


class Reference:
    """Rows as they were made before there was an index, each text tokenized by itself."""

    def __init__(self, builder: SampleBuilder):
        self.builder = builder

    def layout(self, record: Record) -> tuple[list[list[int]], str]:
        builder, mark = self.builder, "\x00"
        turns = [(role, mark if role == "assistant" else text) for role, text in builder.turns(record)]
        messages = []
        for role, text in [*turns, ("assistant", mark)]:
            parts: list[dict[str, str]] = []
            for number, piece in enumerate(text.split(IMAGE)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": piece}] if piece else []
            messages.append({"role": role, "content": parts})
        pieces = builder._layouts._render(messages, False).split(mark)
        close = pieces.pop()
        heads = [pieces[0], *(piece[len(close) :] for piece in pieces[1:])]
        if builder.stock is not None:
            sizes = [builder.image_spec.place(size).resized for size in record.sizes]
            texts = iter([text for text, _ in builder.stock.expand(sizes)])
            split = [head.split(builder.image_token) for head in heads]
            heads = [first + "".join(next(texts) + more for more in rest) for first, *rest in split]
        return [self.ids(head) for head in heads], close

    def ids(self, text: str) -> list[int]:
        return self.builder._encode(text, add_special_tokens=False).ids

    def weighted(self, answer: Answer, close: str) -> tuple[list[int], list[float]]:
        weight_of = dict(self.builder.spec.token_weights)
        encoded = self.builder._encode(answer.text + close, add_special_tokens=False)
        weights = [1.0] * len(encoded.ids)
        for start, end, tag in answer.spans if weight_of else ():
            for i, (first, last) in enumerate(encoded.offsets):
                if first < end and last > start:
                    weights[i] = weight_of.get(tag, 1.0)
        return encoded.ids, weights

    def tokens(self, record: Record, answer: Answer) -> tuple[list[int], list[int], list[bool], list[float]]:
        builder = self.builder
        heads, close = self.layout(record)
        earlier = [Answer(text) for role, text in builder.turns(record) if role == "assistant"]
        counts = iter([builder.num_image_tokens(size) for size in record.sizes])
        every: list[int] = []
        trained: list[bool] = []
        weights: list[float] = []
        prompt: list[int] = []
        for head, one in zip(heads, [*earlier, answer], strict=True):
            for token in head:
                repeated = builder.stock is None and token == builder.image_token_id
                every += [token] * (next(counts) if repeated else 1)
            trained += [False] * (len(every) - len(trained))
            weights += [1.0] * (len(every) - len(weights))
            prompt = list(every)
            ids, of_ids = self.weighted(one, close)
            every, trained, weights = every + ids, trained + [True] * len(ids), weights + of_ids
        return prompt, every, trained, weights

    def row(self, record: Record) -> dict[str, Any]:
        """Input ids, labels, weights and completions."""
        spec = self.builder.spec
        if spec.kind == "prompt" or not isinstance(record, SftRecord):
            prompt = np.array(self.tokens(record, Answer(""))[0], np.int32)
            both = self.builder.answers(record) if spec.kind != "prompt" else ()
            close = self.layout(record)[1]
            completions = tuple(np.array(self.ids(answer.text + close), np.int32) for answer in both)
            return {"input_ids": prompt, "labels": np.zeros(0, np.int32), "weights": None, "completions": completions}
        _, every, trained, weights = self.tokens(record, self.builder.answer(record))
        ids = np.array(every, np.int32)
        labels = ids.copy()
        if spec.loss_on == "answer":
            labels[~np.array(trained)] = IGNORED
        labels[ids == self.builder.image_token_id] = IGNORED
        of_ids = np.array(weights, np.float32) if spec.token_weights else None
        return {"input_ids": ids, "labels": labels, "weights": of_ids, "completions": ()}

    def counts(self, record: Record) -> tuple[int, int, int]:
        answers = self.builder.answers(record)
        prompt, every, _, _ = self.tokens(record, answers[0] if answers else Answer(""))
        images = sum(self.builder.num_image_tokens(size) for size in record.sizes)
        more = sum(len(self.ids(answer.text + self.layout(record)[1])) for answer in answers[1:])
        return images, len(prompt) - images, (len(every) - len(prompt) if answers else 0) + more


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b is None or (a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b))


def _assert_same(row: Sample, wanted: dict[str, Any]) -> None:
    assert all(_same(getattr(row, name), wanted[name]) for name in ("input_ids", "labels", "weights"))
    assert len(row.completions) == len(wanted["completions"])
    assert all(map(_same, row.completions, wanted["completions"]))


@pytest.mark.parametrize("task", range(len(CASES)))
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen2_vl", *STOCK])
def test_rows_are_those_of_before(family: str, task: int, bases: dict[str, str]) -> None:
    options, records = CASES[task]
    plain = SampleSpec(Model(name=bases[family], load_in_4bit=False), options, LABELS)
    builder = SampleBuilder(plain)
    builder._load()
    first: list[EncodedRow | str] = []
    for changes in (
        {"token_weights": WEIGHTS},
        {"loss_on": "whole_sequence"},
        {"kind": "prompt"},
        {"kind": "pair", "split": "x"},
    ):
        spec = replace(plain, **changes)
        builder.spec, builder._weight_of = spec, dict(spec.token_weights)
        reference = Reference(builder)
        fitting = [r for r in records if not (spec.kind == "prompt" and isinstance(r, PreferenceRecord))]
        encoded = builder.encode(fitting)
        for record, row in zip(fitting, encoded, strict=True):
            assert isinstance(row, EncodedRow), row
            assert row.counts == reference.counts(record) == builder.token_counts(record)
            wanted = reference.row(record)
            sample = builder.sample(row, record.images, record.sizes, "row")
            _assert_same(sample, wanted)
            if not isinstance(record, PromptRecord) or spec.kind == "prompt":
                _assert_same(builder.row(record), wanted)
            prompt = builder.sample(row, record.images, record.sizes, "row", prompt_only=True)
            assert _same(prompt.input_ids, np.array(reference.tokens(record, Answer(""))[0], np.int32))
            assert len(prompt.labels) == 0
            assert prompt.completions == ()
            assert sum(map(len, (row.ids, row.image_runs))) < 500  # no run of image tokens is written out
        if not first:
            first = encoded
        elif spec.kind == "answer":
            assert all(map(_same_encoded, first, encoded))


def _same_encoded(a: EncodedRow | str, b: EncodedRow | str) -> bool:
    assert isinstance(a, EncodedRow)
    assert isinstance(b, EncodedRow)
    arrays = all(_same(getattr(a, name), getattr(b, name)) for name in ("ids", "image_runs", "trained"))
    rest = (a.prompt_length, a.tagged, a.counts) == (b.prompt_length, b.tagged, b.counts)
    return arrays and rest and all(map(_same, a.completions, b.completions))


def test_bad_rows_have_the_reason_and_leave_the_others(bases: dict[str, str]) -> None:
    builder = SampleBuilder(SampleSpec(Model(name=bases["qwen3_vl"], load_in_4bit=False), ChatTask(), ()))
    good = [*_chats()]
    user = (("user", f"{IMAGE}What?"),)
    thin = replace(good[0], sizes=((2000, 1),), images=(b"",))
    bad: list[Record] = [
        SftRecord("a", 0, **_images(0, 1), truth={"answer": "A"}, context={"turns": user}),
        SftRecord("b", 0, **_images(0), truth={"answer": " "}, context={"turns": user}),
        SftRecord("c", 0, **_images(0), truth={"answer": "A<|im_end|>"}, context={"turns": user}),
        SftRecord("d", 0, **_images(0), truth={"answer": "A"}, context={"turns": (("user", f"<|image_pad|>{IMAGE}"),)}),
        PreferenceRecord("e", 0, **_images(0), prompt=(("user", "What?"),), chosen="A", rejected="B"),
        PreferenceRecord("f", 0, **_images(0), prompt=user, chosen="A", rejected="\x00"),
    ]
    wanted = [builder.problem(record) for record in bad]
    assert all(wanted)
    mixed = builder.encode([good[0], *bad, thin, *good])
    assert mixed[1 : -len(good)] == [*wanted, "image is 2000x1 px; one side is over 200 times the other"]
    alone = [builder.encode([record])[0] for record in good]
    for a, b in zip([mixed[0], *mixed[-len(good) :]], [alone[0], *alone], strict=True):
        assert _same_encoded(a, b)
    assert builder.encode([]) == []


def test_a_template_that_refuses_or_looks_into_turns(bases: dict[str, str], tmp_path: Path) -> None:
    """Rows that a template refuses are bad, and texts that it changes are those that it writes."""
    folder = Path(shutil.copytree(bases["qwen3_vl"], tmp_path / "base"))
    template = (folder / "chat_template.jinja").read_text()
    refuse = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
    shout = template.replace(
        "{{ part['text'] }}", "{{ part['text'] | upper if 'loud' in part['text'] else part['text'] }}"
    )
    (folder / "chat_template.jinja").write_text(refuse + shout)
    builder = SampleBuilder(SampleSpec(Model(name=str(folder), load_in_4bit=False), ChatTask(), ()))
    records = [
        SftRecord("a", 0, **_images(0), truth={"answer": "A"}, context={"turns": (("user", f"{IMAGE}{text}"),)})
        for text in ("What?", "Be loud.", "And now?")
    ]
    refused = replace(records[0], context={"turns": (("system", "x"), *records[0].context["turns"])})
    rows = builder.encode([*records, refused])
    texts = [row if isinstance(row, str) else builder.tokenizer.decode(row.ids) for row in rows]
    assert ["What?" in texts[0], "BE LOUD." in texts[1], "And now?" in texts[2]] == [True] * 3
    assert "refuses its turns (TemplateError: no system)" in texts[3]


def test_tokens_of_a_span_are_those_that_cover_any_of_its_characters() -> None:
    draw = np.random.default_rng(0)
    for in_order in (True, False) * 50:
        ends = np.cumsum(draw.integers(0, 4, 12))
        offsets = [(int(end - draw.integers(0, 3)), int(end)) for end in (ends if in_order else draw.permutation(ends))]
        spans = [(int(start), int(start + draw.integers(0, 6)), str(start)) for start in draw.integers(0, 20, 3)]
        tagged = _tag_tokens(offsets, spans, 7)
        for start, end, tag in spans:
            wanted = {7 + i for i, (first, last) in enumerate(offsets) if first < end and last > start}
            tokens = {i for low, high, name in tagged if name == tag for i in range(low, high)}
            assert tokens == wanted or len({name for _, _, name in spans}) < len(spans)
