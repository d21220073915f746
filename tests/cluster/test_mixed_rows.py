"""Rows with and without images on two workers: a rank whose batch shows none does not leave the others waiting."""

import json
from pathlib import Path

import pytest

from ray_vlm.config.load import load_job
from ray_vlm.errors import ConfigError
from ray_vlm.train.prepare import prepare
from tests.cluster.test_ray_train import file_names
from tests.cluster.test_recovery import _steps, _train

pytestmark = pytest.mark.cluster
ALL = "lora.target=[language,connector,vision]"
IN_4BIT = "model.load_in_4bit=true"


@pytest.fixture
def mixed(job_file, scenes: Path, tmp_path: Path) -> Path:
    """Chats in which every other row has no image: in order, one worker gets those and the other the rest."""
    photos = [row["file_name"] for row in json.loads((scenes / "train.json").read_text())["images"]]
    rows = []
    for number in range(16):
        question = {"from": "human", "value": "<image>\nWhat is it?" if number % 2 else "What is it?"}
        row = {"conversations": [question, {"from": "gpt", "value": "A ring."}]}
        rows.append(row | ({"image": photos[number]} if number % 2 else {}))
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    data = {"train": {"path": str(tmp_path / "mixed.json"), "format": "llava", "image_root": str(scenes)}}
    train = {"max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1}
    return job_file(task="chat", data=data | {"shuffle": False}, train=train)


@pytest.mark.parametrize(
    "options",
    [
        (ALL, IN_4BIT),
        pytest.param((ALL,), marks=pytest.mark.slow),
        pytest.param(("cluster.deepspeed=zero2", "lora.target=[language]"), marks=pytest.mark.slow),
    ],
)
def test_a_worker_without_images_goes_on(ray_cluster, mixed: Path, options: tuple[str, ...]) -> None:
    alone = _train(mixed, "run.name=alone", *[o for o in options if "deepspeed" not in o])
    two = _train(mixed, "run.name=two", "cluster.num_workers=2", *options)
    for a, b in zip(_steps(alone), _steps(two), strict=True):
        assert b[1:] == pytest.approx(a[1:], rel=1e-4, abs=1e-6)
    assert file_names(two) == file_names(alone)


def test_where_it_would_wait_for_ever_the_rows_are_named(mixed: Path) -> None:
    two = ("cluster.num_workers=2", "model.load_in_4bit=true")
    for options in (("cluster.deepspeed=zero3",), ("cluster.deepspeed=zero2", ALL)):
        with pytest.raises(ConfigError, match="8 rows, the first with id '0', have no image"):
            prepare(load_job(mixed, [*two, *options]))
    prepare(load_job(mixed, [*two, "cluster.deepspeed=zero2"]))
    prepare(load_job(mixed, [*two, ALL]))
