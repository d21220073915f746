"""Images behind an object store are fetched ahead: the rows of a disk, few at a time, and no error is lost."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data import rows as data_rows
from ray_vlm.data.parts import build_index
from ray_vlm.data.plan import Plan
from ray_vlm.data.read_ahead import count_ahead, fetch_ahead, lie_remotely
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.data.stream import StreamSpec, stream_local
from ray_vlm.errors import DataError
from tests.support.object_server import serving

ROWS = 24
PAUSE_S = 0.02


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a bucket `photos` behind a server that is slow and answers in pieces."""
    folder = tmp_path_factory.mktemp("s3")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(ROWS):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 128, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg", quality=95)
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(ROWS)]
    (photos / "rows.json").write_text(json.dumps(rows))
    with serving(folder, PAUSE_S) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield photos


@pytest.fixture
def spec(tiny_models: dict[str, str]) -> SampleSpec:
    return SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), ())


def _stream(path: str, spec: SampleSpec, folder: Path, root: str | None = None) -> StreamSpec:
    source = Source(path=path, format="llava", image_root=root)
    index = build_index(source, Data(), load_sample_builder(spec), str(folder))
    plan = Plan(len(index), 2, 2, 1, seed=3)
    return StreamSpec(index.records, spec, plan, 0, 0, plan.num_steps)


def _pixels(rows: list[list[Sample]]) -> list[np.ndarray]:
    return [image for micro in rows for row in micro for image in row.images]


def test_rows_from_a_slow_store_are_those_from_the_disk(bucket: Path, spec: SampleSpec, tmp_path: Path) -> None:
    here = _stream(str(bucket / "rows.json"), spec, tmp_path)
    there = _stream("s3://photos/rows.json", spec, tmp_path)
    assert (lie_remotely(here.rows), lie_remotely(there.rows)) == (False, True)
    expected, started = _pixels(list(stream_local(here))), time.monotonic()
    streamed = _pixels(list(stream_local(there, threads=2)))
    took = time.monotonic() - started
    assert len(streamed) == ROWS
    assert all(np.array_equal(a, b) for a, b in zip(streamed, expected, strict=True))
    assert took < 0.75 * ROWS * 2 * PAUSE_S, "requests do not wait for one another"


@pytest.mark.parametrize("fault", ["gone", pytest.param("breaks-off", marks=pytest.mark.slow)])  # the client retries
def test_an_image_that_cannot_be_fetched_is_not_lost_in_silence(
    fault: str, bucket: Path, spec: SampleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_rows, "WAITS_S", (0.0, 0.0))
    broken = bucket.parent / fault
    shutil.copytree(bucket, broken)
    source = Source(path=str(broken / "rows.json"), format="llava")
    index = build_index(source, Data(), load_sample_builder(spec), str(tmp_path))
    (broken / "3.jpg").rename(broken / "breaks-off.jpg")
    names = [f"{fault}.jpg" if number == 3 else f"{number}.jpg" for number in range(ROWS)]
    listed = data_rows.ListedRows(
        [replace(record, images=(f"s3://{fault}/{name}",)) for record, name in zip(index.records, names, strict=True)]
    )
    plan = Plan(ROWS, 2, 2, 1, shuffle=False)
    stream = StreamSpec(listed, spec, plan, 0, 0, plan.num_steps, replace_unreadable=True)
    numbers = [row.number for micro in stream_local(stream) for row in micro]
    assert numbers == [4 if number == 3 else number for number in range(ROWS)], "another row is there, and says so"
    with pytest.raises(DataError, match=rf"{fault}\.jpg"):
        list(stream_local(StreamSpec(listed, spec, plan, 0, 0, plan.num_steps)))


def test_few_rows_are_ahead_if_their_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def done(size: int) -> Future:
        future: Future = Future()
        future.set_result((bytes(size),))
        return future

    assert count_ahead([done(2**20)] * 2, before=8) == 64
    assert count_ahead([done(2**26)], before=64) == 8
    assert count_ahead([done(10)], before=8) == 128
    failed: Future = Future()
    failed.set_exception(OSError())
    assert count_ahead([failed, Future()], before=17) == 17, "nothing is known yet"


def test_a_consumer_that_leaves_ends_the_threads(bucket: Path, spec: SampleSpec, tmp_path: Path) -> None:
    import threading

    stream = _stream("s3://photos/rows.json", spec, tmp_path)
    micros = (stream.plan.micro_batch(number, 0) for number in range(stream.last))
    with fetch_ahead(stream.rows, micros, remote=True) as fetching:
        next(fetching)
    until = time.monotonic() + 5
    while (
        left := [t for t in threading.enumerate() if t.name.startswith("ray-vlm-fetch")]
    ) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left
