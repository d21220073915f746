"""Batches on their way to the trainer: made in order, some ahead, and uploaded without a read."""

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ray_vlm.config.data import Data, Source
from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.collate import ImageBytes, add_pixels, answered, collate, host_batch, upload
from ray_vlm.data.feed import Feed
from ray_vlm.data.parts import build_index
from ray_vlm.data.plan import Plan
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.spec import Sample, SampleSpec
from ray_vlm.errors import DataError
from ray_vlm.methods.clock import Clock
from ray_vlm.methods.trainer import PlannedBatches
from ray_vlm.train.start import close_stream
from tests.conftest import FAMILIES
from tests.support.twins import slow_but

DEPTHS = (0, 1, 3)
LABELS = ("circle", "square", "triangle", "cross", "ring", "diamond")


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ray-vlm-feed"]


def _wait_until(is_true: Any) -> None:
    until = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("depth", DEPTHS)
def test_batches_come_in_order_and_no_more_are_made_ahead_than_asked(depth: int) -> None:
    made: list[int] = []
    feed = Feed(iter(range(6)), lambda item: made.append(item) or 10 * item, depth=depth)  # type: ignore[func-returns-value,operator]
    for n in range(6):
        assert feed.take_item() == n
        assert feed.take_batch() == 10 * n
        ready = min(6, n + 1 + depth)
        _wait_until(lambda ready=ready: len(made) == ready)
    time.sleep(0.01)
    assert made == list(range(6))
    assert feed.take_item() is None
    assert feed.take_item() is None, "the end stays the end"
    assert len(_threads()) == min(depth, 1)
    assert feed.close()
    assert not _threads()


def _failing(kind: type[BaseException]) -> Iterator[int]:
    yield 0
    raise kind("the stream broke")


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_is_raised_where_its_batch_is_taken(depth: int) -> None:
    """With its class and the frames of the code that raised it."""

    def build(item: int) -> int:
        if item == 1:
            raise DataError("row 7 is bad")
        return item

    feed = Feed(_failing(OSError), build, depth=depth)
    assert (feed.take_item(), feed.take_batch()) == (0, 0)
    with pytest.raises(OSError, match="the stream broke") as caught:
        feed.take_item()
    assert "_failing" in "".join(traceback.format_exception(caught.value))
    assert feed.close()
    feed = Feed(iter(range(3)), build, depth=depth)
    assert (feed.take_item(), feed.take_batch()) == (0, 0)
    assert feed.take_item() == 1
    with pytest.raises(DataError, match="row 7 is bad"):
        feed.take_batch()
    assert feed.close()
    assert not _threads()


def test_closing_in_the_middle_waits_for_the_row_that_is_being_made() -> None:
    """A generator that runs in another thread cannot be closed, and its loaders would live on."""
    closed, entered = [], threading.Event()

    def stream() -> Iterator[list[Any]]:
        try:
            yield []
            entered.set()
            time.sleep(0.1)
            yield []
        finally:
            closed.append(True)

    plan, source = Plan(2, 1, 1, 1, shuffle=False), stream()
    built: list[object] = []
    feed = Feed(source, lambda rows: built.append(rows) or rows, depth=1)  # type: ignore[func-returns-value]
    batches = PlannedBatches(source, feed, plan, plan.accumulation, Clock("cpu"))  # type: ignore[arg-type]
    assert feed.take_item() == []
    feed.take_batch()
    assert entered.wait(10)
    batches.close()
    assert closed
    assert not _threads()
    assert built == [[]], "nothing is made of rows behind the end"


def test_a_stream_that_still_makes_rows_at_the_end_replaces_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, free = threading.Event(), threading.Event()

    def stream() -> Iterator[list[Any]]:
        entered.set()
        free.wait(10)
        yield []

    monkeypatch.setattr("ray_vlm.data.feed._CLOSE_S", 0.01)
    source = stream()
    feed = Feed(source, lambda rows: rows, depth=1)
    batches = PlannedBatches(source, feed, Plan(2, 1, 1, 1, shuffle=False), 1, Clock("cpu"))  # type: ignore[arg-type]
    feed._ask()
    assert entered.wait(10)
    batches.close()
    with pytest.raises(ValueError, match="already executing"):
        source.close()
    close_stream(source)  # type: ignore[arg-type]
    free.set()
    _wait_until(lambda: not _threads())


def _rows(model: str, scenes: Path) -> tuple[SampleBuilder, list[Sample]]:
    """Three rows of detection, and what made them."""
    spec = SampleSpec(Model(name=model, load_in_4bit=False), DetectionTask(), LABELS)
    builder = load_sample_builder(spec)
    records = build_index(Source(path=str(scenes / "train.json")), Data(), builder).records[:3]
    return builder, [builder.train_row(record) for record in records]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("family", slow_but(["qwen3_vl"], FAMILIES))
def test_an_upload_reads_nothing(kind: str, family: str, scenes: Path, tiny_models: dict[str, str]) -> None:
    """On the device "meta" a read raises. What arrives has the shapes of what a CPU gets."""
    builder, rows = _rows(tiny_models[family], scenes)
    copies = 1 + (kind == "dpo")
    rows = [answered(row, row.input_ids[:4]) for row in rows] * copies if kind == "dpo" else rows
    host = host_batch(rows, builder, copies=copies) | {"numbers": [1, 2, 3], "trained": 2.0}
    assert host["images"].values.dtype == torch.uint8
    assert host["images"].values.numel() == sum(image.size for row in rows for image in row.images)
    batch = add_pixels(upload(host, "meta"), builder)
    expected = collate(rows, builder, copies=copies) | {"numbers": [1, 2, 3], "trained": 2.0}
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (batch[name].shape, batch[name].dtype) == (value.shape, value.dtype), name
            assert batch[name].device.type == "meta"
        else:
            assert batch[name] == value


def test_on_a_gpu_batches_are_sent_from_pinned_memory_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's streams writes down what is asked of them; what it takes on a card is not seen here."""
    calls: list[Any] = []
    streams = {"copy": SimpleNamespace(record_event=lambda: calls.append("copied") or "end of the copy")}
    streams["trainer"] = SimpleNamespace(wait_event=lambda event: calls.append(("wait", event)))

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        calls.append("begin" if stream is streams["copy"] else stream)
        yield

    def move(tensor: torch.Tensor, device: str, non_blocking: bool = False) -> torch.Tensor:
        calls.append(("to", device, non_blocking, threading.current_thread().name, getattr(tensor, "pinned", False)))
        return tensor

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        tensor.pinned = True  # type: ignore[attr-defined]
        return tensor

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams["copy"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["trainer"])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(("keep", tensor.dtype)))
    images = ImageBytes.join([np.zeros((2, 2, 3), np.uint8)])
    feed = Feed(iter([[]]), lambda _: {"ids": torch.zeros(2), "images": images, "rows": [1]}, device="cuda", depth=1)
    assert feed.take_item() == []
    batch: Any = feed.take_batch()
    assert feed.close()
    assert (batch["rows"], batch["images"].sizes) == ([1], ((2, 2),))
    moved = ("to", "cuda:1", True, "ray-vlm-feed", True)
    kept = [("keep", torch.float32), ("keep", torch.uint8)]
    assert calls == ["begin", moved, moved, "copied", ("wait", "end of the copy"), *kept]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_a_card_gets_the_same_batch_and_is_never_waited_for(scenes: Path, tiny_models: dict[str, str]) -> None:
    builder, rows = _rows(tiny_models["qwen3_vl"], scenes)
    expected = collate(rows, builder)
    collate(rows, builder, "cuda:0")  # the processor copies its mean and standard deviation once
    feed = Feed(
        iter([rows] * 4),
        lambda item: host_batch(item, builder),
        device="cuda:0",
        depth=2,
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches: list[Any] = [feed.take_item() and add_pixels(feed.take_batch(), builder) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        assert feed.close()
    for batch in batches:
        assert all(torch.equal(batch[name].cpu(), value) for name, value in expected.items())
