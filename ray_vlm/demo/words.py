"""Write the tiny base's last lessons: box answers and texts of many words, as chat rows (`messages` JSONL).

Without them the base knows only the tokens of its box answers, and fine-tuning would spend its steps on the syntax of
JSON. Half of the rows or more are box answers, so that these are not forgotten; the others are questions about scenes,
answered in JSON with many keys, and texts to copy. No row is of a kind that the demos train on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ray_vlm.demo.shapes import DOMAINS, draw_scene
from ray_vlm.tasks.detection import PROMPT

_LABELS = tuple(DOMAINS["studio"].classes)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = (
    *("star", "object", "none", "photo", "image", "class", "condition", "goal", "click", "type", "scroll", "done"),
    *("clear", "blocked", "yes", "no"),
    *_LABELS,
)
_KEYS = ("object", "class", "shape", "condition", "answer", "action", "target", "goal", "type", "place")


def write_rows(folder: str | Path, num_rows: int, seed: int = 0, boxes: float = 0.5) -> Path:
    """Write `<folder>/words.jsonl` and the images that it names; return the file. `boxes`: share of box answers."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 11])
    rows = []
    for i in range(num_rows):
        kind = rng.choice(["boxes", "about", "copy"], p=[boxes, 0.4 * (1 - boxes), 0.6 * (1 - boxes)])
        rows.append(_copy(rng) if kind == "copy" else _scene(kind == "boxes", folder, f"images/{i:05d}.jpg", rng))
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def _scene(boxes: bool, folder: Path, name: str, rng: np.random.Generator) -> dict[str, Any]:
    domain = DOMAINS["studio"] if boxes or rng.random() < 0.3 else DOMAINS["lesson_1"]
    image, objects = draw_scene(domain, rng)
    image.save(folder / name, quality=int(rng.integers(60, 96)))
    objects.sort(key=lambda o: (o[1][1], o[1][0], o[0]))
    if boxes:
        lines = [f'\n\t{{"bbox_2d": <bbox>, "label": "{label}"}}' for label, _ in objects]
        answer = "```json\n[" + ",".join(lines) + "\n]\n```"
        refs: dict[str, Any] = {"ref": [], "bbox": [box for _, box in objects]}
        return _row("<image>" + PROMPT.replace("{labels}", ", ".join(_LABELS)), answer, images=[name], objects=refs)
    label, box = objects[0]
    keys = rng.permutation(_KEYS)[: int(rng.integers(1, 4))]
    x, y = (box[0] + box[2]) / 2 / image.width, (box[1] + box[3]) / 2 / image.height
    values = {"place": ("left" if x < 0.5 else "right") if rng.random() < 0.5 else ("up" if y < 0.5 else "down")}
    values |= {"condition": "yes" if len(objects) > 1 else "no"}
    answer = json.dumps({str(key): values.get(str(key), label) for key in keys})
    return _row(f"<image>What is shown? Answer in JSON with {', '.join(keys)}.", answer, images=[name])


def _copy(rng: np.random.Generator) -> dict[str, Any]:
    """Build a row that asks to repeat a text or JSON, with words inside and outside of the tokenizer's vocabulary."""
    if rng.random() < 0.5:
        text = " ".join(_word(rng) for _ in range(int(rng.integers(1, 7))))
    else:
        pairs = {_word(rng): _word(rng) if rng.random() < 0.7 else int(rng.integers(0, 1000)) for _ in range(3)}
        text = json.dumps(pairs)
    first, second = _word(rng), _word(rng)
    question, answer = [
        (f"Copy: {text}", text),
        (f"Copy the first: {first}, then {second}", first),
        (f"Copy the second: {first}, then {second}", second),
        (f"Answer in JSON. object: {first}; condition: {second}", json.dumps({"object": first, "condition": second})),
    ][int(rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]))]
    return _row(question, answer)


def _word(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return str(rng.choice(_WORDS))
    word = "".join(rng.choice(list(_LETTERS), int(rng.integers(2, 9))))
    return word.upper() if rng.random() < 0.1 else f"{word}_{word[:3]}" if rng.random() < 0.2 else word
