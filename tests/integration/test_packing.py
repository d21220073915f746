"""Packed rows and budgets of tokens learn what padded rows learn."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import ConfigError
from ray_vlm.models.layouts import LayoutPlanner, PackedLayout, PaddedLayout
from ray_vlm.runs.monitor import read_metrics
from ray_vlm.runs.paths import RunPaths
from ray_vlm.train.driver import train
from ray_vlm.train.prepare import prepare
from tests.conftest import FAMILIES
from tests.support.twins import slow_but


@pytest.fixture
def uneven(job_file, scenes: Path, tmp_path: Path) -> Any:
    """A function that writes a job of chats with and without images, some of a few words and some of hundreds."""
    photos = [row["file_name"] for row in json.loads((scenes / "train.json").read_text())["images"]]
    rows = []
    for number in range(24):
        question = {"from": "human", "value": "<image>\nWhat is it?" if number % 3 else "What is it?"}
        row = {"conversations": [question, {"from": "gpt", "value": "A ring. " * (1 + 7 * (number % 5))}]}
        rows.append(row | ({"image": photos[number]} if number % 3 else {}))
    (tmp_path / "uneven.json").write_text(json.dumps(rows))
    data = {"train": {"path": str(tmp_path / "uneven.json"), "format": "llava", "image_root": str(scenes)}}

    def write(family: str) -> Path:
        train = {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 8}
        return job_file(family=family, task="chat", data=data, train=train)

    return write


def _losses(path: Path, *overrides: str) -> tuple[list[tuple[float, float]], RunPaths]:
    paths = train(load_job(path, overrides), path.read_text())
    lines = [line for line in read_metrics(paths.metrics) if line["kind"] == "train"]
    return [(line["loss"], line["grad_norm"]) for line in lines], paths


@pytest.mark.parametrize("family", slow_but(["qwen3_vl"], FAMILIES))
def test_packed_padded_and_budgeted_rows_learn_the_same(family: str, uneven, monkeypatch: pytest.MonkeyPatch) -> None:
    path, layouts, plan = uneven(family), [], LayoutPlanner.plan
    monkeypatch.setattr(LayoutPlanner, "plan", lambda *args: layouts.append(plan(*args)) or layouts[-1])
    padded, _ = _losses(path, "run.name=padded", "train.packing=false")
    assert {type(layout) for layout in layouts} <= {PaddedLayout}
    layouts.clear()
    packed, _ = _losses(path, "run.name=packed")
    assert [type(layout) for layout in layouts] == [PackedLayout] * len(layouts)
    longest = int(prepare(load_job(path)).train.tokens.max())
    budgeted, _ = _losses(path, "run.name=budgeted", f"train.tokens_per_micro_batch={longest}")
    for other in (packed, budgeted):
        for a, b in zip(padded, other, strict=True):
            assert b == pytest.approx(a, rel=1e-5)


def test_a_budget_that_a_row_is_over_names_it(uneven) -> None:
    with pytest.raises(ConfigError, match=r"tokens_per_micro_batch=50: the row with id '\d+' alone has \d+ tokens"):
        prepare(load_job(uneven("qwen3_vl"), ["train.tokens_per_micro_batch=50"]))


def test_dropout_falls_as_it_would_alone(uneven) -> None:
    """Packed, the masks would be others: such rows are padded."""
    path = uneven("qwen3_vl")
    padded, _ = _losses(path, "run.name=padded", "lora.dropout=0.2", "train.packing=false")
    assert _losses(path, "run.name=packed", "lora.dropout=0.2")[0] == padded
