"""Mutations of rows and answers for `fuzz`: each `of_...(folder)` writes valid inputs once and returns an attempt.

An attempt breaks one input with its generator, reads it through the package's public API, and returns how many rows,
keys or files were lost silently. An input that the package refuses raises one of the package's own errors.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.config.data import Data
from ray_vlm.config.load import load_resolved
from ray_vlm.config.schema import JobConfig
from ray_vlm.data.inspect.check import check_sources, describe_check
from ray_vlm.data.parts import build_index
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.sources.formats import read_rows
from ray_vlm.data.spec import sample_spec
from tests.support.fuzz.mutations import break_bytes, break_text, break_tree, odd_value, pick, write_rows
from tests.support.jobs import check_inputs

Attempt = Callable[[np.random.Generator], int]
_HUMAN, _GPT = {"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dog."}
_USER = {"role": "user", "content": "<image>What is at <bbox>?"}
_SAID = {"role": "assistant", "content": "A <ref-object>."}
_SAID_PLAINLY = {"role": "assistant", "content": "A dog."}
_URL = {"type": "image_url", "image_url": {"url": "a.jpg"}}
_OBJECTS = {"ref": ["dog"], "bbox": [[10, 20, 60, 70]]}
_STEP = {"Instruction": "Go on.", "Output": '{"action": "tap", "text": "x"}', "Grounding": '{"bbox": [1, 2, 30, 40]}'}
GOOD: dict[str, dict[str, Any]] = {
    "llava": {"image": "a.jpg", "conversations": [_HUMAN, _GPT]},
    "messages": {"images": ["a.jpg"], "messages": [_USER, _SAID], "objects": _OBJECTS},
    "objects": {"images": ["a.jpg"], "objects": _OBJECTS},
    "hf_objects": {"image": "a.jpg", "objects": {"category": ["dog"], "bbox": [[10, 20, 60, 50]], "iscrowd": [0]}},
    "image_csv": {"image": "a.jpg", "label": "dog", "state": "wet", "bbox": "[10, 20, 60, 70]"},
    "gui_csv": {"Task_id": "1", "Image_id": "a.jpg", **_STEP},
    "preference": {"image": "a.jpg", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."},
    "prompt": {"images": ["a.jpg"], "prompt": "What?", "solution": "dog"},
    "openai": {"messages": [{"role": "user", "content": [_URL, {"type": "text", "text": "What?"}]}, _SAID_PLAINLY]},
    "query_response": {"images": ["a.jpg"], "query": "What?", "response": "A dog.", "history": [["Hi.", "Hello."]]},
    "alpaca": {"image": "a.jpg", "instruction": "Name it.", "input": "One word.", "output": "Dog."},
    "rec": {"image": "a.jpg", "problem": "Where is it?", "solution": [10, 20, 60, 70], "normal_caption": "the dog"},
}
_CATEGORIES = [{"id": 1, "name": "dog", "supercategory": "all"}, {"id": 2, "name": "cat", "supercategory": "all"}]
TASKS = dict.fromkeys(("coco", "objects", "hf_objects"), "detection")
TASKS |= {"image_csv": "classification", "gui_csv": "gui_steps"}
METHODS = {"preference": "dpo", "prompt": "grpo", "rec": "grpo"}
LABELS = {"detection": ["dog", "cat"], "classification": ["label=dog", "state=wet"]}


def whole_rows(format: str, count: int = 5) -> Any:
    """Return rows without a fault, as JSON holds them."""
    if format != "coco":
        return [GOOD[format] | {"id": f"r{i}"} for i in range(count)]
    images = [{"id": i, "file_name": "a.jpg", "width": 100, "height": 80} for i in range(count)]
    boxes: list[dict[str, Any]] = [
        {"id": i, "image_id": i % count, "category_id": 1 + i % 2, "bbox": [1, 2, 30, 40], "iscrowd": 0}
        for i in range(8)
    ]
    boxes[5] |= {"bbox": [], "segmentation": [[1, 1, 10, 1, 10, 10]]}  # as tools for masks write it
    boxes[6] |= {"bbox": None, "segmentation": {"size": [80, 100], "counts": [810, 20, 7170]}}
    boxes[7] |= {"bbox": None, "segmentation": {"size": [80, 100], "counts": "Zi0d0l1"}}
    categories = [{"id": 0, "name": "all", "supercategory": "none"}]  # as Roboflow does
    return {"images": images, "annotations": boxes, "categories": [*categories, *_CATEGORIES]}


def make_job(model: str, format: str, source: dict[str, Any], labels: list[str] | None = None) -> JobConfig:
    """Build a job that trains on the source."""
    task = TASKS.get(format, "chat")
    method = {"name": METHODS.get(format, "sft")}
    data = {"train": source, "index_dir": str(Path(source["path"]).parent / "index")}
    values: dict[str, Any] = {"method": method, "task": {"name": task, "labels": labels}, "data": data}
    return load_resolved(values | {"model": {"name": model, "load_in_4bit": False}})


def write_base(folder: Path) -> str:
    """Write a tiny base with random weights, and a picture."""
    from PIL import Image

    from ray_vlm.demo.tiny import write_untrained

    if not (folder / "a.jpg").exists():
        noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
        Image.fromarray(noise).save(folder / "a.jpg")
        write_untrained(folder / "base")
    return str(folder / "base")


def of_rows(folder: Path) -> Attempt:
    """Return an attempt on source rows of every format but those of files for each image, and of every file type, read
    by `data check` and by the index both ways."""
    model, formats = write_base(folder), sorted({*GOOD, "coco"})

    def attempt(rng: np.random.Generator) -> int:
        format = pick(rng, formats)
        suffix = ".json" if format == "coco" else pick(rng, [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
        rows, by_bytes = whole_rows(format), rng.random() < 0.3
        if not by_bytes:
            rows = break_tree(rows, rng, above=0 if suffix in (".json", ".jsonl") else 1)
        path = write_rows(folder, rows, suffix)
        if by_bytes:
            path.write_bytes(break_bytes(path.read_bytes(), rng))
        source = {"path": str(path), "format": format}
        if rng.random() < 0.1:
            source["box_units"] = pick(rng, ["relative_1", "relative_1000"])
        labels = LABELS.get(TASKS.get(format, "")) if rng.random() < 0.7 else None
        return read_all(make_job(model, format, source, labels), count_rows(rows, path, by_bytes))

    return attempt


def count_rows(rows: Any, path: Path, by_bytes: bool) -> int | None:
    """Return how many rows the file holds, where that can be counted without the package's own reader."""
    if by_bytes:
        data = path.read_bytes()
        if path.suffix != ".jsonl" or b"\n" not in data or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return None
        return sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    if isinstance(rows, dict):
        images, boxes = rows.get("images"), rows.get("annotations")
        if not isinstance(images, list) or not isinstance(boxes, list):
            return None
        ids = {str(image.get("id")) for image in images if isinstance(image, dict)}
        strays = [box for box in boxes if not isinstance(box, dict) or str(box.get("image_id")) not in ids]
        return None if strays else len(images)  # each annotation of no image is a bad row of its own
    return len(rows)


def read_all(job: JobConfig, expected: int | None) -> int:
    """Return the number of rows that are neither accepted nor reported."""
    source = job.data.train
    assert source is not None
    lost = 0
    for check in check_sources(*check_inputs(job), decode_images=True):
        describe_check(check).encode()
        lost += abs(check.rows - check.usable - len(check.bad))
        if not check.problems:
            lost += abs(check.rows - (check.rows if expected is None else expected))
    rows, labels = read_rows(source)
    lost += [row.row for row in rows] != list(range(len(rows)))
    spec = sample_spec(job, labels)
    index = build_index(source, Data(on_bad_row="quarantine"), load_sample_builder(spec))
    lost += abs(len(index) + len(index.bad) - len(rows))
    for record in index.records[:2]:
        load_sample_builder(spec).row(record)
    build_index(source, Data(on_bad_row="raise"), load_sample_builder(spec))
    return lost + len(index.bad)  # `raise` has just let them pass


def of_completions(folder: Path) -> Attempt:
    """Return an attempt on model answers to rows of every task: parsed, scored, measured and written."""
    from ray_vlm.evaluate.metrics import measure
    from ray_vlm.evaluate.prediction import build_predictions, in_words

    model, ready = write_base(folder), []
    for format in ("coco", "image_csv", "gui_csv", "llava", "messages"):
        path = write_rows(folder, whole_rows(format, 3), ".json")
        job = make_job(model, format, {"path": str(path), "format": format}, LABELS.get(TASKS.get(format, "")))
        for codec in (None, "qwen2_vl", "qwen2_5_vl", "gemma"):
            spec = replace(sample_spec(job, []), task=job.task.model_copy(update={"codec": codec}))
            builder = SampleBuilder(spec)
            ready.append((job.task.name, build_index(job.data.train, job.data, builder).records, builder))

    def attempt(rng: np.random.Generator) -> int:
        task, records, builder = pick(rng, ready)
        answers = []
        for record in records:
            right = builder.answer(record).text
            kind = rng.random()
            if kind < 0.3:
                answers.append(break_bytes(right.encode(), rng).decode(errors="replace"))
            elif kind < 0.5:
                answers.append(break_text(break_text(right, rng), rng))
            elif kind < 0.55:
                depth = int(rng.integers(1000))
                answers.append('{"action": "x", "label": "dog", "a": ' + "[" * depth + "]" * depth + "}")
            elif kind < 0.6:
                answers.append(pick(rng, ['{"', "[{", '[{"bbox_2d": [', "(", "{ ", "\\ud83d", "<|box_start|>"]) * 1500)
            else:
                value = odd_value(rng) if kind < 0.8 else {pick(rng, _KEYS): odd_value(rng) for _ in range(3)}
                answers.append(json.dumps(value if rng.random() < 0.5 else [value]))
        predictions = build_predictions(records, answers, builder)
        for prediction in predictions:
            json.dumps(prediction.as_dict())
            in_words(prediction.parsed)
        json.dumps(measure(task, predictions))
        return len(records) - len(predictions)

    return attempt


_KEYS = ["bbox_2d", "label", "point_2d", "action", "text", "state"]
