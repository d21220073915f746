"""Rows on their way to the model: nothing lost, doubled, reordered or changed, with and without Ray."""

import threading
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data import backpressure, stream
from ray_vlm.data.collate import collate
from ray_vlm.data.images import decode
from ray_vlm.data.index import Index
from ray_vlm.data.parts import build_index
from ray_vlm.data.plan import Plan
from ray_vlm.data.rows import ListedRows
from ray_vlm.data.samples import load_sample_builder
from ray_vlm.data.spec import IGNORED, Sample, SampleSpec
from ray_vlm.data.stream import (
    StartedStream,
    StreamSpec,
    make_rows,
    mean_bytes,
    pack,
    stream_local,
    stream_ray,
    task_size,
    unpack,
)
from ray_vlm.errors import DataError
from tests.conftest import FAMILIES
from tests.support.photos import SIZES, make_spec, write_images, write_rows
from tests.support.ray_processes import kill_process, processes, store_mib
from tests.support.twins import slow_but

LABELS = ("circle", "square", "triangle", "cross", "ring", "diamond")


def _index(scenes: Path, folder: str, **options) -> tuple[Index, SampleSpec]:
    spec = SampleSpec(Model(name=folder, load_in_4bit=False), DetectionTask(), LABELS, **options)
    return build_index(Source(path=str(scenes / "train.json")), Data(), load_sample_builder(spec)), spec


def _same(a: Sample, b: Sample) -> bool:
    pixels = all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    return np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels) and pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_and_tokens_equal_the_stock_processor(family: str, scenes: Path, tiny_models: dict[str, str]) -> None:
    index, spec = _index(scenes, tiny_models[family])
    builder = load_sample_builder(spec)
    records = index.records[:20]
    batch = collate([builder.train_row(record) for record in records], builder)
    from PIL import Image

    texts = []
    for record in records:
        question = {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": builder.turns(record)[-1][1].removeprefix("<image>")},
            ],
        }
        answer = {"role": "assistant", "content": [{"type": "text", "text": builder.answer(record).text}]}
        texts.append(builder.processor.apply_chat_template([question, answer], tokenize=False))
    images = [[Image.open(record.images[0])] for record in records]
    stock = builder.processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(batch[key], stock[key]), key


def test_pack_and_unpack_keep_every_byte(scenes: Path, tiny_models: dict[str, str]) -> None:
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    rows = [load_sample_builder(spec).train_row(record) for record in index.records[:5]]
    whole = pa.concat_tables([pack(7, rows[:3]), pack(8, rows[3:])])
    for tables in ([whole], [whole.slice(0, 3), whole.slice(3)]):  # Ray Data joins tables, and may cut them
        (first, back), (second, more) = unpack(tables)
        assert (first, second, len(back)) == (7, 8, 3)
        assert all(_same(a, b) for a, b in zip(rows, [*back, *more], strict=True))


def test_labels_train_the_answer_and_never_images_or_padding(scenes: Path, tiny_models: dict[str, str]) -> None:
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    _, whole_sequence = _index(scenes, tiny_models["qwen3_vl"], loss_on="whole_sequence")
    for one in (spec, whole_sequence):
        builder = load_sample_builder(one)
        batch = collate([builder.train_row(record) for record in index.records[:6]], builder)
        trained = batch["labels"] != IGNORED
        assert not (trained & (batch["input_ids"] == builder.image_token_id)).any()
        assert not (trained & (batch["attention_mask"] == 0)).any()
        text = builder.tokenizer.decode(batch["input_ids"][0][trained[0]])
        assert text.endswith("```<|im_end|>\n")
        assert text.startswith("```json" if one is spec else "<|im_start|>user")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_row_is_lost_doubled_or_reordered_locally(world: int, scenes: Path, tiny_models: dict[str, str]) -> None:
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    plan = Plan(len(index), 8, 3, world, num_epochs=2)
    made = {i: load_sample_builder(spec).train_row(record) for i, record in enumerate(index.records)}
    steps: list[list[int]] = [[] for _ in range(plan.num_steps)]
    for rank in range(world):
        stream_spec = StreamSpec(ListedRows(index.records), spec, plan, rank, 0, plan.num_steps * plan.accumulation)
        for number, rows in enumerate(stream_local(stream_spec)):
            micro = plan.micro_batch(number, rank)
            if micro.padding:
                assert all((row.labels == IGNORED).all() for row in rows)
                continue
            assert all(_same(row, made[i]) for row, i in zip(rows, micro.rows, strict=True))
            steps[number // plan.accumulation] += micro.rows
    assert [sorted(s) for s in steps] == [sorted(plan.step_rows(k).tolist()) for k in range(plan.num_steps)]


def test_an_error_in_the_loader_reaches_the_consumer(scenes: Path, tiny_models: dict[str, str], tmp_path: Path) -> None:
    from dataclasses import replace

    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    gone = replace(index.records[0], images=(str(tmp_path / "gone.jpg"),))
    stream_spec = StreamSpec(ListedRows((gone,)), spec, Plan(1, 1, 1, 1), 0, 0, 1)
    with pytest.raises(DataError, match=r"row 0 .*gone\.jpg"):
        list(stream_local(stream_spec))


def test_another_row_takes_the_place_of_a_lost_one(
    scenes: Path, tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from ray_vlm.data import rows as data_rows

    monkeypatch.setattr(data_rows, "WAITS_S", (0.0, 0.0))
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    records = list(index.records[:6])
    for number in (1, 2, 5):
        records[number] = replace(records[number], images=(str(tmp_path / "gone.jpg"),))
    plan = Plan(6, 2, 2, 1, shuffle=False)
    stream_spec = StreamSpec(ListedRows(records), spec, plan, 0, 0, 3, replace_unreadable=True)
    assert [[row.number for row in rows] for rows in stream_local(stream_spec)] == [[0, 3], [3, 3], [4, 0]]
    none = tuple(replace(record, images=(str(tmp_path / "gone.jpg"),)) for record in records)
    with pytest.raises(DataError, match=r"gone.jpg .*None of 5 other rows can be read either"):
        list(stream_local(replace(stream_spec, rows=ListedRows(none))))


def test_a_file_that_comes_back_is_waited_for(
    scenes: Path, tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time
    from dataclasses import replace

    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    late = tmp_path / "late.png"
    record = replace(index.records[0], images=(str(late),))
    monkeypatch.setattr(time, "sleep", lambda wait: late.write_bytes(Path(index.records[0].images[0]).read_bytes()))
    rows = list(stream_local(StreamSpec(ListedRows((record,)), spec, Plan(1, 1, 1, 1), 0, 0, 1)))
    assert rows[0][0].number == 0


def test_leaving_the_stream_early_ends_its_thread(scenes: Path, tiny_models: dict[str, str]) -> None:
    import threading

    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    stream = stream_local(StreamSpec(ListedRows(index.records), spec, Plan(50, 2, 2, 1), 0, 0, 25))
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "ray-vlm-loader"]


@pytest.mark.cluster
@pytest.mark.parametrize("rank", slow_but([1], [0, 1]))
def test_the_ray_stream_equals_the_local_one_byte_for_byte(rank: int, ray_cluster, scenes: Path, tiny_models) -> None:
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    plan = Plan(len(index), 8, 3, 2, num_epochs=1)
    stream_spec = StreamSpec(ListedRows(index.records), spec, plan, rank, 0, plan.num_steps * plan.accumulation)
    streamed = list(stream_ray(stream_spec, num_loaders=2, cpus_per_loader=0.5))
    assert len(streamed) == stream_spec.last
    for number, rows in enumerate(streamed):
        expected = make_rows(load_sample_builder(spec), stream_spec.rows, plan.micro_batch(number, rank))
        assert all(_same(a, b) for a, b in zip(rows, expected, strict=True))


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [
        (100, 1e4, 64),  # a short run
        (256 * 1000, 1e4, 1000),  # a long one of small rows: 256 tasks
        (256 * 1000, 2**20, 128),  # and of larger ones: what a loader may hold
        (100, 2**40, 2),
    ],
)
def test_a_task_is_small_in_bytes_and_few_where_a_run_is_long(rows: int, row_bytes: float, expected: int) -> None:
    plan = Plan(rows, 2, 2, 1)
    assert task_size(StreamSpec(ListedRows(()), None, plan, 0, 0, rows // 2, row_bytes)) * 2 == expected


@pytest.mark.cluster
def test_loaders_wait_for_a_slow_trainer(
    ray_cluster, tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they fill the object store, and then Ray Data's scheduler takes a core of the trainer's process."""
    from ray.data import DataContext

    monkeypatch.setattr(stream, "_BLOCK_BYTES", 2**21)
    monkeypatch.setattr(stream, "_TASK_BYTES", 16 * 2**20)
    monkeypatch.setattr(backpressure, "_STARVED_S", 600)
    folder = tmp_path / "images"
    write_images(folder, SIZES["0.3mp"], 4)
    source, spec = write_rows(folder, SIZES["0.3mp"], 4000, 4), make_spec(Path(tiny_models["qwen3_vl"]))
    records = build_index(source, Data(), load_sample_builder(spec)).records
    row_bytes = mean_bytes(records, load_sample_builder(spec).image_spec)
    stream_spec = StreamSpec(ListedRows(records), spec, Plan(4000, 2, 2, 1), 0, 0, 2000, row_bytes)
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 5)
    before, rows = store_mib(), stream_ray(stream_spec, num_loaders=1)
    next(rows)
    time.sleep(8.0)
    assert store_mib() - before < 96  # three tasks and what was fetched; 900 without
    used = time.process_time()
    time.sleep(2.0)
    assert time.process_time() - used < 0.6  # 2 without
    for _ in range(100):  # more than lay ready: the execution did not end for lack of progress
        next(rows)
    rows.close()


@pytest.mark.cluster
def test_tasks_in_another_order_and_a_bad_row_are_no_deadlock(
    ray_cluster, scenes: Path, tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loaders, begun in the middle of a plan. Killed together, they get their tasks back in any order. A row that
    cannot be read then ends the stream, and with it those that wait."""
    from dataclasses import replace

    monkeypatch.setattr(stream, "_TASK_ROWS", 6)
    index, spec = _index(scenes, tiny_models["qwen3_vl"])
    plan = Plan(len(index), 8, 3, 1, num_epochs=8)
    begins = {row: n for n in reversed(range(5, 80)) for row in plan.micro_batch(n, 0).rows}  # where each comes first
    row = max((row for n in range(5) for row in plan.micro_batch(n, 0).rows), key=lambda row: begins[row])
    gone = replace(index.records[row], images=(str(tmp_path / "gone.jpg"),))
    records = (*index.records[:row], gone, *index.records[row + 1 :])
    stream_spec = StreamSpec(ListedRows(records), spec, plan, 0, 5, plan.num_steps * plan.accumulation)
    came = []

    def follow() -> None:
        for number, rows in enumerate(stream_ray(stream_spec, num_loaders=2, cpus_per_loader=0.5), start=5):
            expected = make_rows(load_sample_builder(spec), stream_spec.rows, plan.micro_batch(number, 0))
            assert all(_same(a, b) for a, b in zip(rows, expected, strict=True))
            came.append(number)
            if number == 12:
                assert kill_process("MapWorker", 0)
                assert kill_process("MapWorker", 1)
            time.sleep(0.01)

    with pytest.raises(Exception, match=r"gone\.jpg"):
        follow()
    assert came == list(range(5, came[-1] + 1))
    assert 12 < came[-1] < begins[row]
    assert begins[row] > 30
    until = time.monotonic() + 20
    while (busy := processes("_Loader)).submit")) and time.monotonic() < until:
        time.sleep(0.2)
    assert not busy  # the actors themselves stay until Python collects Ray Data's cycles


def test_decode_is_what_the_stock_loader_decodes(scenes: Path, tiny_models: dict[str, str]) -> None:
    from transformers.image_utils import load_image

    index, _ = _index(scenes, tiny_models["qwen3_vl"])
    for record in index.records[:10]:
        assert np.array_equal(decode(record.images[0]), np.asarray(load_image(record.images[0])))


def test_a_started_stream_makes_its_first_batch_before_it_is_asked_for() -> None:
    made, ended = threading.Event(), threading.Event()

    def make() -> Generator[list]:
        try:
            made.set()
            yield ["first"]
            yield ["second"]
        finally:
            ended.set()

    batches = StartedStream(make())
    assert made.wait(10)
    assert list(batches) == [["first"], ["second"]]
    assert next(batches, None) is None
    unused = StartedStream(make())
    ended.clear()
    unused.close()
    assert ended.is_set()


def test_what_the_first_batch_raises_is_raised_where_it_is_taken() -> None:
    def fail() -> Generator[list]:
        raise DataError("row 3 is gone")
        yield []

    batches = StartedStream(fail())
    with pytest.raises(DataError, match="row 3 is gone"):
        next(batches)
    batches.close()
    StartedStream(fail()).close()  # which nobody took, so nobody is told


def test_a_first_batch_that_never_comes_does_not_hold_the_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_FIRST_S", 0.05)
    release = threading.Event()

    def wait_for_room() -> Generator[list]:
        release.wait(60)
        yield []

    started = time.monotonic()
    StartedStream(wait_for_room()).close()
    assert time.monotonic() - started < 10
    release.set()
