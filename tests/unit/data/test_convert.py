"""`data convert`: whatever is written is read again as it was, and nothing is lost without a word."""

import io
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image as Pillow

from ray_vlm.cli import main
from ray_vlm.config.data import Source
from ray_vlm.config.load import load_job
from ray_vlm.config.paths import absolute_paths
from ray_vlm.data.images import read_image, read_size
from ray_vlm.data.measure import measure_row
from ray_vlm.data.records import BadRow, PreferenceRecord, PromptRecord, Record, SftRecord, hash_bytes
from ray_vlm.data.sources.convert import WRITERS, Converted, convert, write_data_set
from ray_vlm.data.sources.detect import detect_format
from ray_vlm.data.sources.formats import FORMATS, read_rows
from ray_vlm.data.sources.losses import HOLDINGS, LossSurvey, kind_of, list_losses
from ray_vlm.data.sources.output import ImageFiles, RowsProfile, group_of
from ray_vlm.errors import ConfigError, DataError

CLASSES = ["dog", "traffic light", "Straße", "猫", 'the "best"', "a & b <c>", "it's", "yes", "1", "a,b", "x: y", "#"]
IDS = ["7", "8", "img 3", "v1.2-a_b", "ünï", 'x"y', "night/4", "a%20b", ".hidden", "no#2", "con", "A", "a"]
SIZES = [(40, 30), (17, 23), (64, 64), (3, 50), (1, 1)]
TEXTS = ["What is it?", 'Say "yes", or\nno.', "Größe? 猫 🐈", "[1, 2]", '{"a": 1}', "  spaces ", "a,b;c\td", "<b>&amp;"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str | bytes]:
    """Images of a few sizes: two files of one name, one turned by EXIF, one with a wrong suffix, one as bytes."""
    folder = tmp_path_factory.mktemp("images")
    made: list[str | bytes] = []
    for number, size in enumerate(SIZES):
        path = folder / str(number) / "1.png"
        path.parent.mkdir()
        Pillow.new("RGB", size, (number, 9, 9)).save(path)
        made.append(str(path))
    turned, exif = folder / "phöne 5.JPG", Pillow.Exif()
    exif[0x0112] = 6
    Pillow.new("RGB", (32, 20), (9, 9, 9)).save(turned, "JPEG", exif=exif)
    (folder / "wrong.png").write_bytes(turned.read_bytes())
    data = io.BytesIO()
    Pillow.new("RGB", (21, 12), (1, 2, 3)).save(data, "WEBP")
    return [*made, str(turned), str(folder / "wrong.png"), data.getvalue()]


@lru_cache
def _size(image: str | bytes) -> tuple[int, int]:
    return read_size(image, 10**6)


def _common(draw: random.Random, row: int, pool: Sequence[str | bytes], count: int) -> dict[str, Any]:
    name = draw.choice(IDS)
    chosen = tuple(draw.choice(pool) for _ in range(count))
    group = draw.choice(["", "", "north", "site 4"])
    sizes = tuple(map(_size, chosen))
    return {"id": f"{name}-{row}" if row >= len(IDS) else IDS[row], "row": row, "images": chosen} | {
        "sizes": sizes,
        "group": group,
    }


def _box(draw: random.Random, size: tuple[int, int]) -> tuple[float, float, float, float]:
    if draw.random() < 0.2:
        return 0.0, 0.0, float(size[0]), float(size[1])
    (x1, x2), (y1, y2) = (sorted((draw.uniform(0, side), draw.uniform(0, side))) for side in size)
    return x1, y1, x2, y2


def _detection(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> SftRecord:
    about = _common(draw, row, pool, 1)
    count = draw.choice([0, 1, 1, 2, 5])
    truth = {
        "boxes": tuple(_box(draw, about["sizes"][0]) for _ in range(count)),
        "labels": tuple(draw.choice(CLASSES) for _ in range(count)),
    }
    return SftRecord(**about, truth=truth)


def _classification(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> SftRecord:
    about = _common(draw, row, pool, 1)
    attributes = {"kind": draw.choice(CLASSES), "light of day": draw.choice(["yes", "nö", '"q"', "3.0"])}
    context = {"box": _box(draw, about["sizes"][0])} if draw.random() < 0.4 else {}
    return SftRecord(**about, truth={"attributes": attributes}, context=context)


def _folder(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> SftRecord:
    about, label = _common(draw, row, pool, 1), draw.choice(CLASSES)
    about |= {"group": "", "id": f"{label}/{about['id']}"}
    return SftRecord(**about, truth={"attributes": {"label": label}})


def _turns(draw: random.Random, num_images: int, rounds: int) -> list[tuple[str, str]]:
    """Turns that end with a question; the tags of the images lie in the questions."""
    turns = [("system", draw.choice(TEXTS))] if draw.random() < 0.4 else []
    for _ in range(rounds):
        turns += [("user", draw.choice(TEXTS)), ("assistant", draw.choice(TEXTS))]
    turns.append(("user", draw.choice(TEXTS)))
    asked = [number for number, (role, _) in enumerate(turns) if role == "user"]
    for _ in range(num_images):
        number = draw.choice(asked)
        text = turns[number][1]
        cut = draw.choice([0, 0, len(text)])
        turns[number] = ("user", f"{text[:cut]}<image>{text[cut:]}")
    return turns


def _chat(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> SftRecord:
    about = _common(draw, row, pool, draw.choice([0, 1, 1, 2, 3]))
    turns = _turns(draw, len(about["images"]), draw.choice([0, 0, 1, 2]))
    context: dict[str, Any] = {"turns": tuple(turns)}
    if about["images"] and draw.random() < 0.3:
        role, text = turns[-1]
        context["turns"] = (*turns[:-1], (role, f"{text} <ref-object> at <bbox>?"))
        number = draw.randrange(len(about["images"]))
        point = tuple(draw.uniform(2, 3) for _ in range(2))
        region = draw.choice([_box(draw, about["sizes"][number]), point])
        context |= {"refs": (draw.choice(CLASSES),), "boxes": (region,), "image_of": (number,)}
    return SftRecord(**about, truth={"answer": draw.choice(TEXTS)}, context=context)


def _preference(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> PreferenceRecord:
    about = _common(draw, row, pool, draw.choice([0, 1, 2]))
    prompt = tuple(_turns(draw, len(about["images"]), draw.choice([0, 1])))
    return PreferenceRecord(**about, prompt=prompt, chosen=draw.choice(TEXTS), rejected="No idea.")


def _prompt(draw: random.Random, row: int, pool: Sequence[str | bytes]) -> PromptRecord:
    about = _common(draw, row, pool, draw.choice([0, 1, 2]))
    prompt = tuple(_turns(draw, len(about["images"]), draw.choice([0, 1])))
    solution = draw.choice([[1.5, 2, 3, 4], "<answer>4</answer>", {"box": [1, 2]}, 7])
    columns = {"solution": solution, "level": draw.choice([1, 2.5, None, "hard", "", [1, "x"], {"a": [None]}])}
    return PromptRecord(**about, prompt=prompt, columns=columns)


def _steps(draw: random.Random, count: int, pool: Sequence[str | bytes]) -> list[Record]:
    """Steps of tasks that take turns, some with ids of their own."""
    records: list[Record] = []
    history: dict[str, list[str]] = {}
    files = [image for image in pool if isinstance(image, str) and min(_size(image)) > 1]
    for row in range(count):
        task = draw.choice(["1", "2", "täsk"])
        earlier = history.setdefault(task, [])
        output = {"action": draw.choice(["click", "type"]), "text": draw.choice(TEXTS), "n": draw.choice([1, 2.5])}
        image = draw.choice(files)
        size = _size(image)
        point = (draw.uniform(1.1, size[0]), draw.uniform(0, size[1])) if draw.random() < 0.5 else None
        box = (0.0, 0.0, *map(float, size)) if draw.random() < 0.5 else None
        truth = {"output": output, "box": box, "point": point}
        context = {"instruction": draw.choice(TEXTS), "task": task, "step": len(earlier), "history": tuple(earlier)}
        name = f"own {row}" if draw.random() < 0.3 else f"{task}/{len(earlier)}"
        records.append(SftRecord(name, row, (image,), (size,), truth, context, task))
        earlier.append(json.dumps(output, ensure_ascii=False, separators=(",", ":")))
    return records


Make = Callable[[random.Random, int, Sequence[str | bytes]], Record]
RINGS: dict[str, tuple[Make, list[str]]] = {
    "detection": (_detection, [name for name, holding in HOLDINGS.items() if "detection" in holding.kinds]),
    "classification": (_classification, ["image_csv"]),
    "folder": (_folder, ["image_csv", "image_folder"]),
    "chat": (_chat, [name for name, holding in HOLDINGS.items() if "chat" in holding.kinds]),
    "preferences": (_preference, ["preference"]),
    "prompts": (_prompt, ["prompt", "rec"]),
}
PAIRS = [(ring, *pair) for ring, (_, names) in RINGS.items() for pair in itertools.product(names, names)]


def _content(record: Record) -> dict[str, Any]:
    """What a record has, with its images by their bytes; its position may change."""
    images = [f"{hash_bytes(read_image(image)):x}" for image in record.images]
    return {**vars(record), "images": images, "row": 0, "group": group_of(record), "id": _id(record)}


def _id(record: Record) -> str:
    """The id of a row without the folders that some readers put before the name of its image."""
    return re.sub(r"^images/((train|val|test)/)?", "", record.id)


def _same(value: Any, expected: Any) -> bool:
    """Whether two values are the same, but for the rounding of shares of an image."""
    if isinstance(expected, float) and isinstance(value, float | int):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(expected, list | tuple):
        return type(value) is type(expected) and len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(_same(value[k], expected[k]) for k in value)
        )
    return bool(value == expected)


def _check_same(rows: Sequence[Record], expected: Sequence[Record]) -> None:
    by_id = {_id(row): row for row in rows}
    assert by_id.keys() == {record.id for record in expected}
    assert len(rows) == len(expected)
    for record in expected:
        assert _same(_content(by_id[record.id]), _content(record)), (by_id[record.id], record)


def _write(records: Sequence[Record], format: str, folder: Path, labels: Sequence[str] = ()) -> Converted:
    survey = LossSurvey(format, labels)
    for record in records:
        survey.add(record)
    assert survey.lines() == []
    return write_data_set(records, format, folder, survey.profile())


def _read(source: Source) -> tuple[list[Record], list[str]]:
    rows, labels = read_rows(source)
    measured = [measure_row(row, 10**6) for row in rows]
    assert [row for row in measured if isinstance(row, BadRow)] == []
    return [row for row in measured if not isinstance(row, BadRow)], labels


def _has_json(record: Record) -> bool:
    """Whether a text of a chat is JSON, which a detector of formats may take for a list or an object."""
    if not isinstance(record, SftRecord) or "answer" not in record.truth:
        return False
    texts = [record.truth["answer"], *(text for _, text in record.context["turns"])]
    return any(text.removeprefix("<image>")[:1] in ("[", "{") for text in texts)


@pytest.mark.parametrize("format", [*WRITERS])
def test_a_written_data_set_is_recognised(format: str, images: list[str | bytes], tmp_path: Path) -> None:
    kind = HOLDINGS[format].kinds[0]
    ring = next((name for name, (_, formats) in RINGS.items() if format in formats and name != "classification"), "")
    records = _rows_of(ring, 40, images) if ring else _steps(random.Random(3), 20, images)
    records = [record for record in records if kind_of(record) == kind and (not ring or _holds(format, record))]
    records = list({record.id.casefold(): record for record in records if not _has_json(record)}.values())
    written = _write(records, format, tmp_path / "out", _labels_of(records, [format]))
    assert detect_format(written.source.model_copy(update={"format": "auto"})).format == format


def test_every_format_is_written_and_read() -> None:
    assert WRITERS.keys() == HOLDINGS.keys() == FORMATS.keys()


def _labels_of(records: Sequence[Record], formats: Sequence[str]) -> list[str]:
    """The class names of a data set: in an order of their own, one of them unused, if the formats list classes."""
    used = {label for r in records if isinstance(r, SftRecord) for label in r.truth.get("labels", ())}
    if all(HOLDINGS[name].lists_labels for name in formats):
        return [*sorted(used, reverse=True), "unused"]
    return sorted(used)


def _check_ring(records: Sequence[Record], first: str, second: str, folder: Path) -> None:
    """Write as `first`, read, write as `second`, read: the records that both hold are as they were."""
    pair = (first, second)
    chosen = [record for record in records if all(_holds(format, record) for format in pair)]
    if any(HOLDINGS[format].name for format in pair):  # names that differ in case alone are one on some systems
        chosen = list({record.id.casefold(): record for record in chosen}.values())
    assert len(chosen) >= len(records) / 8
    labels = _labels_of(chosen, pair)
    rows: Sequence[Record] = chosen
    for number, format in enumerate(pair):
        written = _write(rows, format, folder / f"{number}-{format}", labels)
        rows, declared = _read(written.source)
        _check_same(rows, chosen)
        assert declared == labels or not labels


def _holds(format: str, record: Record) -> bool:
    labels = sorted(set(record.truth.get("labels", ["dog"]))) if isinstance(record, SftRecord) else []
    return kind_of(record) in HOLDINGS[format].kinds and not list_losses([record], format, labels)


def _rows_of(ring: str, count: int, images: Sequence[str | bytes]) -> list[Record]:
    draw = random.Random(f"{ring} {count}")
    return [RINGS[ring][0](draw, row, images) for row in range(count)]


@pytest.mark.parametrize(("ring", "first", "second"), PAIRS, ids=map("-".join, PAIRS))
def test_ring(ring: str, first: str, second: str, images: list[str | bytes], tmp_path: Path) -> None:
    _check_ring(_rows_of(ring, 40, images), first, second, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("ring", "first", "second"), PAIRS, ids=map("-".join, PAIRS))
def test_ring_of_many(ring: str, first: str, second: str, images: list[str | bytes], tmp_path: Path) -> None:
    _check_ring(_rows_of(ring, 1000, images), first, second, tmp_path)


def test_ring_of_gui_steps(images: list[str | bytes], tmp_path: Path) -> None:
    records = _steps(random.Random(3), 60, images)
    rows, _ = _read(_write(records, "gui_csv", tmp_path / "a").source)
    rows, _ = _read(_write(rows, "gui_csv", tmp_path / "b").source)
    assert [row.id for row in rows] == [record.id for record in records]
    _check_same(rows, records)


def _job(folder: Path, train: Source | dict[str, Any], task: str = "detection", **data: Any) -> Any:
    """A job that reads `train`, as the command line loads it."""
    section = train if isinstance(train, dict) else train.model_dump(mode="json", exclude_defaults=True)
    method = {"preference": "dpo", "prompt": "grpo", "rec": "grpo"}.get(section.get("format", ""), "sft")
    job = {"model": {"name": "tiny"}, "task": task, "method": method, "data": {"train": section, **data}}
    job |= {"run": {"output_dir": str(folder / "runs")}, "train": {"max_steps": 1, "global_batch_size": 8}}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return absolute_paths(load_job(path, []))


def _boxed(image: str | bytes, *boxes: tuple[Any, ...], **about: Any) -> SftRecord:
    """A detection row of (x1, y1, x2, y2, label)."""
    truth = {"boxes": tuple(box[:4] for box in boxes), "labels": tuple(box[4] for box in boxes)}
    size = about.pop("size", None) or _size(image)
    return SftRecord(**{"id": "7", "row": 0, "images": (image,), "sizes": (size,), "truth": truth, **about})


def _classed(image: str | bytes, attributes: dict[str, str], **context: Any) -> SftRecord:
    return SftRecord("a", 0, (image,), (_size(image),), {"attributes": attributes}, context)


def _asked(text: str, **columns: Any) -> PromptRecord:
    return PromptRecord("a", 0, (), (), (("user", text),), columns)


Lost = tuple[str, str, Callable[[list[str | bytes]], list[Record]], str]
BOX = (2.0, 3.0, 9.0, 9.0, "dog")
LOSSES: list[Lost] = [  # the format of the source, that to write, the rows, and what is lost
    ("objects", "yolo", lambda i: [_boxed(i[0], BOX, group="north")], "the group"),
    ("objects", "voc", lambda i: [_boxed(i[0], BOX, id="a:b")], "the id, which is no name"),
    ("objects", "cvat", lambda i: [_boxed(i[0], BOX, id="A"), _boxed(i[1], BOX, id="a", row=1)], "the id, which"),
    ("objects", "yolo", lambda i: [_boxed(i[0], BOX, id="a/images/b")], "the id, which is no name"),
    ("objects", "yolo", lambda i: [_boxed(i[0], BOX, BOX)], "a box that is there twice"),
    ("objects", "yolo", lambda i: [_boxed(i[0], (-0.5, 0.0, 40.5, 30.0, "dog"))], "parts outside its image"),
    ("objects", "coco", lambda i: [_boxed(i[0], BOX, group="image 9")], "the group, whose name"),
    ("coco", "objects", lambda i: [_boxed(i[0], BOX)], "1 class name that no row uses ('unused')"),
    ("coco", "voc", lambda i: [_boxed(i[0], (*BOX[:4], " dog"))], "spaces around the name of a class"),
    ("coco", "cvat", lambda i: [_boxed(i[0], (*BOX[:4], "a\ufffe"))], "that XML does not have"),
    ("yolo", "coco", lambda i: [_boxed(i[4], (0.0, 0.0, 1.0, 1.0, "dog"))], "the unit of its boxes"),
    ("image_csv", "image_folder", lambda i: [_classed(i[0], {"label": "a", "time": "b"})], "beside the first (time)"),
    ("image_csv", "image_folder", lambda i: [_classed(i[0], {"kind": "a"})], "the name of the attribute, 'kind'"),
    ("image_csv", "image_folder", lambda i: [_classed(i[0], {"label": "a"}, box=BOX[:4])], "the box"),
    ("image_csv", "image_folder", lambda i: [_classed(i[0], {"label": "a/b"})], "no name of a folder"),
    ("prompt", "rec", lambda i: [_asked("Where?", solution="4", messages="m")], "the columns messages"),
]  # fmt: skip
TASK_OF = {"image_csv": "classification", "prompt": "chat", "messages": "chat", "gui_csv": "gui_steps"}


@pytest.mark.parametrize(
    ("source", "format", "make", "lost"), LOSSES, ids=[f"{b}-{lost[:20]}" for _, b, _, lost in LOSSES]
)
def test_what_would_be_lost_is_named_and_not_written(
    source: str, format: str, make: Callable[..., list[Record]], lost: str, images: list[str | bytes], tmp_path: Path
) -> None:
    records = make(images)
    labels = [label for record in records if isinstance(record, SftRecord) for label in record.truth.get("labels", ())]
    labels = [*dict.fromkeys(labels), *(["unused"] if source == "coco" else [])]
    job = _job(tmp_path, _write(records, source, tmp_path / "in", labels).source, TASK_OF.get(source, "detection"))
    with pytest.raises(DataError) as refused:
        convert(job, format, str(tmp_path / "out"))
    assert lost in refused.value.problems[0]
    assert "--allow-loss" in refused.value.problems[-1]
    assert not (tmp_path / "out").exists()
    written = convert(job, format, str(tmp_path / "out"), allow_loss=True)
    assert lost in " ".join(written.losses)
    assert f"lost: {written.losses[0]}" in written.describe()
    if "the unit of its boxes" not in lost:
        assert len(_read(written.source)[0]) == len(records)


def test_a_column_that_json_does_not_have(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    rows = [{"id": "a", "prompt": "What?", "day": datetime.date(2024, 5, 1), "level": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    job = _job(tmp_path, {"path": str(tmp_path / "rows.parquet"), "format": "prompt"}, "chat")
    with pytest.raises(DataError, match="the column 'day' as it is: it would be a text"):
        convert(job, "prompt", str(tmp_path / "out"))
    read, _ = _read(convert(job, "prompt", str(tmp_path / "out"), allow_loss=True).source)
    assert isinstance(read[0], PromptRecord)
    assert read[0].columns == {"day": "2024-05-01", "level": 3}


def test_steps_whose_earlier_ones_are_bad(images: list[str | bytes], tmp_path: Path) -> None:
    records = _steps(random.Random(3), 12, images)
    written = _write(records, "gui_csv", tmp_path / "in")
    first = (tmp_path / "in" / "rows.csv").read_text().split("images/")[1].split(",")[0]
    Path(tmp_path / "in" / "images" / first).unlink()
    job = _job(tmp_path, written.source, "gui_steps", on_bad_row="quarantine")
    with pytest.raises(DataError, match="its number and earlier steps, which are not among the rows"):
        convert(job, "gui_csv", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "format", "record", "reason"),
    [
        ("messages", "llava", "regions", "cannot be written as llava. Use one of: messages, query_response."),
        ("messages", "yolo", "chat", "cannot be written as yolo. Use one of: llava, messages, openai,"),
        ("prompt", "rec", _asked("Where?"), "it has no solution, which rec does not read"),
        ("messages", "alpaca", "blank", "it has a blank question, which alpaca does not read"),
        ("objects", "labelme", "ignored", "it has the class __ignore__, which labelme does not read"),
        ("objects", "yolo", "nothing", "no row has a box, and yolo needs at least one class"),
    ],
)
def test_rows_that_a_format_cannot_hold(
    source: str, format: str, record: Any, reason: str, images: list[str | bytes], tmp_path: Path
) -> None:
    chat = SftRecord("a", 0, (images[0],), ((40, 30),), {"answer": "Yes."}, {"turns": (("user", "<image>A dog?"),)})
    regions = {"turns": (("user", "<image>Is <ref-object> at <bbox>?"),), "refs": ("dog",), "boxes": (BOX[:4],)}
    records = {
        "chat": chat,
        "regions": replace(chat, context={**regions, "image_of": (0,)}),
        "blank": replace(chat, images=(), sizes=(), context={"turns": (("user", " "),)}),
        "ignored": _boxed(images[0], (*BOX[:4], "__ignore__")),
        "nothing": _boxed(images[0]),
    }
    record = records.get(record, record) if isinstance(record, str) else record
    job = _job(tmp_path, _write([record], source, tmp_path / "in").source, TASK_OF.get(source, "detection"))
    with pytest.raises(DataError) as refused:
        convert(job, format, str(tmp_path / "out"), allow_loss=True)
    assert reason in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_blank_system_turn(images: list[str | bytes]) -> None:
    turns = {"turns": (("system", " "), ("user", "Well?"))}
    record = SftRecord("a", 0, (), (), {"answer": "Yes."}, turns)
    assert "the blank system turn" in list_losses([record], "query_response")[0]
    assert list_losses([record], "messages") == []


def test_losses_are_counted_with_the_first_id(images: list[str | bytes]) -> None:
    rows = [_boxed(images[0], BOX, id=f"r{i}", group="north" if i else "") for i in range(4)]
    (line,) = list_losses(rows, "yolo", ["dog"])
    assert line.startswith("3 of 4 rows (the first: 'r1'): the group")


@pytest.fixture
def boxes(images: list[str | bytes], tmp_path: Path) -> Source:
    """A COCO file of three images, the first and the third of which are one file, whose ids are numbers."""
    rows = [_boxed(images[5], BOX, id="3"), _boxed(images[0], BOX, id="0"), _boxed(images[5], id="1")]
    return _write(rows, "coco", tmp_path / "in", ["dog", "cat"]).source


def test_an_image_is_stored_once_with_its_bytes(images: list[str | bytes], boxes: Source, tmp_path: Path) -> None:
    written = convert(_job(tmp_path, boxes), "coco", str(tmp_path / "out"))
    stored = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.name for path in stored] == ["1.png", "phöne 5.JPG"]
    assert [path.read_bytes() for path in stored] == [read_image(images[0]), read_image(images[5])]
    assert (written.rows, written.images, written.files, written.bad) == (3, 2, 1, 0)
    file = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert file["images"][0] == {"id": 3, "file_name": "images/phöne 5.JPG", "width": 20, "height": 32}
    box = {"category_id": 1, "bbox": [2, 3, 7, 6], "area": 42, "iscrowd": 0}
    assert file["annotations"][0] == {"id": 1, "image_id": 3, **box}
    assert file["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def test_images_of_one_name_keep_their_contents(images: list[str | bytes], tmp_path: Path) -> None:
    rows = [_boxed(image, BOX, id=str(n)) for n, image in enumerate(images)]
    written = _write(rows, "objects", tmp_path / "out", ["dog"])
    names = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert names == ["1-2.png", "1-3.png", "1-4.png", "1-5.png", "1.png", "7.webp", "phöne 5.JPG", "wrong.jpg"]
    read, _ = read_rows(written.source)
    assert [read_image(row.images[0]) for row in read if isinstance(row, SftRecord)] == list(map(read_image, images))


def test_names_that_some_disks_take_for_one(images: list[str | bytes], tmp_path: Path) -> None:
    """macOS knows no difference between an accent in one character and in two, nor between cases."""
    rows = [_boxed(image, BOX, id=name) for image, name in zip(images, ("\u00e9", "e\u0301", "E\u0301"), strict=False)]
    (line,) = list_losses(rows, "voc", ["dog"])
    assert line.startswith("2 of 3 rows")
    write_data_set(rows, "voc", tmp_path / "out", RowsProfile(("dog",)))
    names = [path.name for path in (tmp_path / "out/JPEGImages").iterdir()]
    assert sorted(len(name) for name in names) == [5, 8, 8], names


def test_images_are_linked(images: list[str | bytes], boxes: Source, tmp_path: Path) -> None:
    convert(_job(tmp_path, boxes), "yolo", str(tmp_path / "out"), images="link")
    linked = tmp_path / "out" / "images" / "train" / "0.png"
    assert linked.stat().st_ino == (tmp_path / "in" / "images" / "1.png").stat().st_ino


def test_a_parquet_file_with_images_and_classes(images: list[str | bytes], tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = [_boxed(image, BOX, id=str(n), group="north" if n else "") for n, image in enumerate(images)]
    rows[1] = _boxed(images[1], id="1")
    survey = LossSurvey("hf_objects", ["cat", "dog"])
    for row in rows:
        survey.add(row)
    written = write_data_set(rows, "hf_objects", tmp_path / "out", survey.profile(), images="inside")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert (written.images, written.files) == (len(images), 1)
    _check_same(_read(written.source)[0], rows)
    loaded = load_dataset("parquet", data_files=written.source.path, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["objects"]["category"].feature.names == ["cat", "dog"]
    assert loaded[0]["image"].size == (40, 30)
    assert loaded[0]["objects"] == {"bbox": [[2.0, 3.0, 7.0, 6.0]], "category": [1]}
    with pytest.raises(ConfigError, match="--images inside is for hf_objects"):
        convert(_job(tmp_path, written.source), "yolo", str(tmp_path / "other"), images="inside")


def test_images_of_a_tar_and_of_a_parquet_file(images: list[str | bytes], boxes: Source, tmp_path: Path) -> None:
    import tarfile

    import pyarrow
    from pyarrow import parquet

    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "in" / "images", "images")
    job = _job(tmp_path, boxes.model_copy(update={"image_root": str(tmp_path / "images.tar")}))
    convert(job, "voc", str(tmp_path / "voc"), allow_loss=True)
    assert (tmp_path / "voc" / "JPEGImages" / "3.JPG").read_bytes() == read_image(images[5])
    assert "<width>20</width>" in (tmp_path / "voc" / "Annotations" / "3.xml").read_text()

    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"id": "a/b", "image": {"bytes": read_image(image)}, "conversations": turns} for image in images[:2]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    job = _job(tmp_path, {"path": str(tmp_path / "rows.parquet"), "format": "llava"}, "chat")
    written = convert(job, "messages", str(tmp_path / "messages"))
    first, second = (tmp_path / "messages" / "rows.jsonl").read_text().splitlines()
    assert json.loads(first)["images"] == ["images/a_b.png"]
    named = {name: json.loads(second)[name] for name in ("id", "group", "images")}
    assert named == {"id": "a/b#2", "group": "a/b", "images": ["images/a_b#2.png"]}
    assert [read_image(row.images[0]) for row in _read(written.source)[0]] == list(map(read_image, images[:2]))


def test_images_of_an_object_store_are_fetched_once(images: list[str | bytes], boxes: Source, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for path in [*(tmp_path / "in" / "images").iterdir(), tmp_path / "in" / "annotations.json"]:
        store.pipe_file(f"/converted/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    job = _job(tmp_path, boxes.model_copy(update={"path": "memory://converted/annotations.json"}))
    for format, count in (("coco", 2), ("yolo", 3)):  # YOLO names an image by each row's id
        written = convert(job, format, str(tmp_path / format), images="link")
        assert written.images == count
        contents = {path.read_bytes() for path in (tmp_path / format / "images").rglob("*.*")}
        assert contents == {read_image(images[0]), read_image(images[5])}
    repeated = [_boxed("memory://converted/images/1.png", BOX, id=str(n), size=(40, 30)) for n in range(90)]
    files = ImageFiles(tmp_path / "store")
    names = {files.add(record) for record in files.fetch_ahead(repeated)}
    assert (names, len(files), files.waiting) == ({"images/1.png"}, 1, 0)


def test_bad_rows(images: list[str | bytes], boxes: Source, tmp_path: Path) -> None:
    path = tmp_path / "in" / "annotations.json"
    path.write_text(path.read_text().replace("images/1.png", "images/gone.png"))
    with pytest.raises(DataError, match=r"row 1 \(id 0\): image file is missing"):
        convert(_job(tmp_path, boxes), "yolo", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    written = convert(_job(tmp_path, boxes, on_bad_row="quarantine"), "yolo", str(tmp_path / "out"))
    assert (written.rows, written.bad) == (2, 1)
    assert "left out as bad: 1" in written.describe()


def test_a_box_outside_its_image_is_a_bad_row(images: list[str | bytes], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / "a.png").write_bytes(read_image(images[0]))
    objects = {"ref": ["dog"], "bbox": [[2, 3, 99, 9]], "bbox_type": "real"}
    path.write_text(json.dumps({"images": ["a.png"], "objects": objects}))
    source = {"path": str(path), "format": "objects"}
    with pytest.raises(DataError, match=r"lies outside its 40x30 image; mend it, or set data.on_bad_box"):
        convert(_job(tmp_path, source), "yolo", str(tmp_path / "out"))
    written = convert(_job(tmp_path, source, on_bad_box="clip"), "yolo", str(tmp_path / "out"))
    assert "clip" in " ".join(written.notes)


@pytest.mark.parametrize("format", ["yolo", "voc", "coco"])
def test_parts(format: str, boxes: Source, tmp_path: Path) -> None:
    section = boxes.model_dump(mode="json", exclude_defaults=True)
    job = _job(tmp_path, {**section, "path": "none.json"}, eval={**section, "format": "coco"})
    written = convert(job, format, str(tmp_path / "out"), part="eval", allow_loss=True)
    assert {_id(row) for row in _read(written.source)[0]} == {"0", "1", "3"}
    if format == "yolo":
        assert (tmp_path / "out" / "labels" / "val" / "1.txt").read_text() == ""
    with pytest.raises(ConfigError, match=r"data.test` is missing"):
        convert(job, format, str(tmp_path / "other"), part="test")


def test_what_is_no_source_of_its_own_is_refused(boxes: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.eval is a share of the rows of data.train"):
        convert(_job(tmp_path, boxes, eval=0.5), "yolo", str(tmp_path / "out"), part="eval")
    mixed = _job(tmp_path, boxes, mix=[boxes.model_dump(mode="json", exclude_defaults=True)])
    with pytest.raises(ConfigError, match=r"data.mix has 1 more source,"):
        convert(mixed, "yolo", str(tmp_path / "out"))


def test_only_a_new_or_an_empty_folder_is_written(boxes: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(_job(tmp_path, boxes), "yolo", str(out))
    before = sorted(out.rglob("*"))
    for path in (out, out / "data.yaml"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            convert(_job(tmp_path, boxes), "coco", str(path))
    with pytest.raises(ConfigError, match="a folder of this machine"):
        convert(_job(tmp_path, boxes), "coco", "s3://bucket/out")
    assert sorted(out.rglob("*")) == before


def test_a_folder_inside_the_one_that_is_read_is_refused(images: list[str | bytes], tmp_path: Path) -> None:
    """Its files would be rows of the source from then on."""
    source = _write([_boxed(images[0], BOX)], "labelme", tmp_path / "in").source
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in" / "images" / "new", tmp_path / "link" / "images" / "new"):
        with pytest.raises(ConfigError, match=r"is inside .*images, whose files are the rows"):
            convert(_job(tmp_path, source), "labelme", str(folder))
    convert(_job(tmp_path, source), "labelme", str(tmp_path / "images"))


def test_a_parquet_file_keeps_classes_that_no_row_uses(images: list[str | bytes], tmp_path: Path) -> None:
    source = _write([_boxed(images[0], BOX)], "yolo", tmp_path / "in", ["zebra", "dog", "cat"]).source
    written = convert(_job(tmp_path, source), "hf_objects", str(tmp_path / "out"), images="inside")
    assert (written.losses, written.labels) == ((), ())
    assert _read(written.source)[1] == ["zebra", "dog", "cat"]
    with pytest.raises(DataError, match="the list with 2 class names that no row uses"):
        convert(_job(tmp_path, source), "hf_objects", str(tmp_path / "other"))


def test_nothing_is_left_of_a_data_set_that_was_not_finished(images: list[str | bytes], tmp_path: Path) -> None:
    gone = SftRecord("8", 1, (str(tmp_path / "gone.png"),), ((9, 9),), {"boxes": (), "labels": ()})
    with pytest.raises(DataError, match=r"row 1 \(id 8\): image cannot be read: .*gone.png"):
        _write([_boxed(images[0], BOX), gone], "coco", tmp_path / "folder" / "out", ["dog"])
    assert list((tmp_path / "folder").iterdir()) == []


def test_the_section_that_is_printed_reads_the_rows(boxes: Source, tmp_path: Path) -> None:
    job = _job(tmp_path, {**boxes.model_dump(mode="json", exclude_defaults=True)})
    for format in ("coco", "hf_objects", "labelme"):
        written = convert(job, format, str(tmp_path / format), allow_loss=True)
        printed = yaml.safe_load(written.describe().partition("\n\n")[2])
        assert len(_read(Source(**printed["data"]["train"]))[0]) == 3
    assert printed["task"] == {"name": "detection", "labels": ["dog", "cat"]}


def test_command(boxes: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _job(tmp_path, boxes)
    command = ["data", "convert", str(tmp_path / "job.yaml"), "--to", "yolo", str(tmp_path / "out")]
    assert main([*command, "data.on_bad_row=quarantine"]) == 0
    assert f"{tmp_path / 'out'}: 3 rows, 3 images, 4 files with rows" in capsys.readouterr().out
    assert main([*command[:4], "chess", str(tmp_path / "other")]) == 2
    assert "'chess' is no format. Use one of: coco, yolo," in capsys.readouterr().err
