"""Real images through `datasets`: a set on disk, Parquet shards and an image folder are trained, evaluated and answered
for. scikit-learn's digits are classes, scikit-image's photos are chats, and its coins have boxes. `make test-real` sets
up both packages.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_vlm.cli import main
from tests.support.hub_server import Hub, using_hub
from tests.support.jobs import write_job

pytestmark = pytest.mark.slow
SHARDS = 3


def _digits() -> dict[str, Any]:
    """1,797 digits of 8 x 8 pixels, four times as large, by split."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[f"digit {i}" for i in range(10)])})
    pixels = np.kron(data.images * 15, np.ones((8, 8))).astype(np.uint8)
    images = [Image.fromarray(picture).convert("RGB") for picture in pixels]
    parts = {"train": slice(0, 1600), "test": slice(1600, 1640)}
    return {
        split: Dataset.from_dict({"image": images[part], "label": data.target[part].tolist()}, features=features)
        for split, part in parts.items()
    }


def _photos() -> dict[str, Any]:
    """Photos with a question about each."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    names = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "moon", "page", "horse", "brick", "grass")
    images = [Image.fromarray((getattr(data, name)() * np.uint8(1)).astype(np.uint8)).convert("RGB") for name in names]
    images = [image.resize((160, 120)) for image in images]
    turns = [
        [
            {"role": "user", "content": "<image>What is this?"},
            {"role": "assistant", "content": f"This is {name}."},
        ]
        for name in names
    ]
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(ImageFeature()), "messages": List(turn)})
    rows = {"images": [[image] for image in images], "messages": turns}
    return {
        split: Dataset.from_dict({name: column[part] for name, column in rows.items()}, features=features)
        for split, part in (("train", slice(0, 8)), ("test", slice(8, 11)))
    }


def _coins() -> dict[str, Any]:
    """Crops of a photo of coins, with the boxes of those that lie in them, as published detection sets have them."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops

    photo = data.coins()
    regions = [r.bbox for r in regionprops(label(photo > threshold_otsu(photo))) if r.area > 400]
    rng, rows = np.random.default_rng(0), []
    for _ in range(60):
        top, left = int(rng.integers(0, photo.shape[0] - 128)), int(rng.integers(0, photo.shape[1] - 160))
        inside = [
            [x1 - left, y1 - top, x2 - x1, y2 - y1]
            for y1, x1, y2, x2 in regions
            if x1 >= left and y1 >= top and x2 <= left + 160 and y2 <= top + 128
        ]
        picture = Image.fromarray(photo[top : top + 128, left : left + 160]).convert("RGB")
        rows.append({"image": picture, "objects": {"bbox": inside, "category": [0] * len(inside)}})
    objects = {"bbox": List(List(Value("float32"), 4)), "category": List(ClassLabel(names=["coin"]))}
    features = Features({"image": ImageFeature(), "objects": objects})
    return {
        "train": Dataset.from_list(rows[:48], features=features),
        "test": Dataset.from_list(rows[48:], features=features),
    }


def _write(folder: Path, container: str, parts: dict[str, Any]) -> Path:
    """Write the splits as `datasets` does."""
    from datasets import DatasetDict

    if container == "save_to_disk":
        DatasetDict(parts).save_to_disk(folder, num_shards=dict.fromkeys(parts, SHARDS))
        return folder
    for split, rows in parts.items():
        if container in ("parquet", "hub"):
            folder.mkdir(exist_ok=True)
            for number in range(SHARDS):
                shard = rows.shard(SHARDS, number, contiguous=True)
                shard.to_parquet(folder / f"{split}-{number:05d}-of-{SHARDS:05d}.parquet")
            continue
        names = rows.features["label"].names
        for number, row in enumerate(rows):
            path = folder / split / names[row["label"]] / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return folder


CASES = [
    ("digits", "save_to_disk"),
    ("digits", "parquet"),
    ("digits", "image_folder"),
    ("photos", "save_to_disk"),
    ("photos", "parquet"),
    ("coins", "save_to_disk"),
    ("coins", "parquet"),
    ("digits", "hub"),
]
TASKS = {"digits": "classification", "photos": "chat", "coins": "detection"}
FORMATS = {"digits": "image_csv", "photos": "messages", "coins": "hf_objects"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with using_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.mark.parametrize(("data_set", "container"), CASES)
def test_train_evaluate_predict(
    data_set: str,
    container: str,
    tmp_path: Path,
    scenes: Path,
    tiny_models: dict[str, str],
    hub: Hub,
    capsys: Any,
) -> None:
    parts = {"digits": _digits, "photos": _photos, "coins": _coins}[data_set]()
    folder = _write(tmp_path / "set", container, parts)
    path = str(folder)
    if container == "hub":
        path = "acme/digits"
        hub.commit(path, {f"data/{file.name}": file.read_bytes() for file in folder.iterdir()})
    source = {"path": path, "format": "auto"}
    job = write_job(
        tmp_path,
        scenes,
        tiny_models["qwen3_vl"],
        task={"name": TASKS[data_set]},
        data={"train": source, "test": {**source, "split": "test"}},
        evaluate={"max_new_tokens": 8, "batch_size": 20},
    )
    assert main(["data", "check", str(job)]) == 0, capsys.readouterr()
    assert main(["train", str(job)]) == 0
    run = tmp_path / "runs" / "run"
    resolved = json.loads((run / "resolved.json").read_text())
    named = FORMATS[data_set] if container != "image_folder" else "image_folder"
    assert resolved["data"]["train"]["format"] == named, "what was detected is kept"
    assert resolved["data"]["train"]["path"] == path
    measured = tmp_path / "measured"
    assert main(["evaluate", str(job), "--adapter", str(run / "final"), "--output", str(measured)]) == 0
    lines = (measured / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(parts["test"])
    inputs = str(folder / "test") if container not in ("parquet", "hub") else str(folder / "test-*.parquet")
    answers = tmp_path / "answers.jsonl"
    words = ["--question", "What is this?"] if data_set == "photos" else []
    assert main(["predict", str(run), inputs, "--output", str(answers), *words]) == 0
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(answered) == len(parts["test"])
    assert not any(row.get("error") for row in answered)
    if data_set != "photos":
        assert [row["answer"] for row in answered] == [json.loads(line)["answer"] for line in lines]
