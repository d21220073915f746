"""Orders in windows, what decides them, and what a step is said to read: rows of one row group stay near, every row is
shown as often, and all other orders are what they were."""

import io
import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ray_vlm.config.data import Data, Shuffle, Source, Window
from ray_vlm.config.load import load_job
from ray_vlm.config.schema import Model
from ray_vlm.config.task import ChatTask
from ray_vlm.data import build, parts, shards
from ray_vlm.data import plan as module
from ray_vlm.data.index import Index
from ray_vlm.data.inner_images import CACHE_BYTES, read_group_bytes, read_inner
from ray_vlm.data.plan import Plan
from ray_vlm.data.read_order import Reading, Units, choose_shuffle, describe_shuffle, estimate_bytes
from ray_vlm.data.samples import SampleBuilder, load_sample_builder
from ray_vlm.data.sources import tables
from ray_vlm.data.spec import SampleSpec
from ray_vlm.train import prepare as preparation

MB = 1_000_000


def _plan(counts: Sequence[int], window: int, **options: Any) -> Plan:
    """A plan in windows over units of so many rows."""
    starts = np.cumsum([0, *counts[:-1]]).astype(np.int32)
    return Plan(sum(counts), 8, 4, 1, unit_starts=starts, window=window, **options)


def _draw(rng: np.random.Generator) -> Plan:
    counts = rng.choice([1, 1, 3, 7, 20], int(rng.integers(1, 40))).tolist()
    factors = rng.choice([0.3, 1.0, 1.5, 3.0], sum(counts)) if rng.random() < 0.5 else None
    return _plan(counts, int(rng.integers(2, 60)), seed=int(rng.integers(99)), repeat_factors=factors)


def _windows(plan: Plan, order: np.ndarray) -> list[dict[int, Counter[int]]]:
    """Cut an order into windows as the definition has it, one unit after another: of each window the rows of each unit,
    repeats counted. Units are taken in the order that they are drawn in, which only sums of their rows show."""
    assert isinstance(plan.unit_starts, np.ndarray)
    unit_of = np.searchsorted(plan.unit_starts, order, side="right") - 1
    whole = Counter(unit_of.tolist())
    cut: list[dict[int, Counter[int]]] = []
    open_units: dict[int, Counter[int]] = {}
    for row, unit in zip(order.tolist(), unit_of.tolist(), strict=True):
        open_units.setdefault(unit, Counter())[row] += 1
        if all(rows.total() == whole[unit] for unit, rows in open_units.items()):
            cut.append(open_units)
            open_units = {}
    assert not open_units
    return cut


def test_every_row_is_shown_as_often_as_with_a_full_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 16)
    rng = np.random.default_rng(0)
    for _ in range(60):
        plan = _draw(rng)
        full = replace(plan, unit_starts=None, window=0)
        for epoch in (0, 3):
            order = plan.epoch_rows(epoch)
            assert order.dtype == np.int32
            assert sorted(order.tolist()) == sorted(full.epoch_rows(epoch).tolist())


def test_the_rows_of_a_unit_lie_within_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order falls into stretches of whole units that are no longer than a window and its last unit."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 16)
    rng = np.random.default_rng(1)
    for _ in range(60):
        plan = _draw(rng)
        order = plan.epoch_rows(0)
        unit_of = np.searchsorted(plan.unit_starts, order, side="right") - 1  # type: ignore[call-overload]
        largest = max(Counter(unit_of.tolist()).values())
        sizes = [sum(rows.total() for rows in cut.values()) for cut in _windows(plan, order)]
        assert max(sizes) < plan.window + largest


def test_windows_mix_units_and_take_them_from_everywhere() -> None:
    plan = _plan([50] * 400, 1024, seed=5)
    order = plan.epoch_rows(0)
    cut = _windows(plan, order)
    sizes = [sum(rows.total() for rows in units.values()) for units in cut]
    assert 18 <= len(cut) <= 20
    assert all(1000 <= size <= 1050 for size in sizes[:-1])
    first = np.array(sorted(cut[0]))
    assert np.abs(np.diff(first)).max() < 120, "its units are from all parts of the files"
    assert first.max() - first.min() > 300
    within = order[:1000] // 50
    assert (within[1:] == within[:-1]).mean() < 0.1, "rows of a unit do not follow each other"


def test_a_row_may_come_at_any_time_of_an_epoch() -> None:
    """Its position is uniform over seeds and epochs, also within its window."""
    positions = np.array(
        [np.flatnonzero(_plan([5] * 40, 30, seed=s).epoch_rows(e) == 17)[0] for s in range(100) for e in range(4)]
    )
    assert 85 < positions.mean() < 115
    assert all(70 < ((positions >= low) & (positions < low + 50)).sum() < 130 for low in range(0, 200, 50))


def test_an_order_in_windows_stays_what_it_is() -> None:
    """A run that is resumed by a later version goes on with its rows."""
    assert _plan([3, 1, 4, 1, 3], 5, seed=3).epoch_rows(1).tolist() == [3, 0, 11, 9, 10, 1, 2, 6, 5, 4, 7, 8]
    factors = np.array([2.0, 1.0, 0.5, 1.5, 1.0, 1.0])
    assert _plan([3, 3], 2, seed=3, repeat_factors=factors).epoch_rows(0).tolist() == [2, 0, 0, 1, 4, 3, 5]


def test_the_steps_are_the_same_on_any_number_of_workers_and_after_a_stop(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        plan = replace(_draw(rng), num_epochs=2.0)
        steps = [plan.step_rows(step).tolist() for step in range(plan.num_steps)]
        for world in (2, 3):
            other = replace(plan, world_size=world).store(tmp_path)
            for step in reversed(range(plan.num_steps)):  # as a resumed run asks for a step without those before
                rows = [
                    row for rank in range(world) for b in other.rank_step(step, rank) if not b.padding for row in b.rows
                ]
                assert sorted(rows) == sorted(steps[step])
                assert other.step_rows(step).tolist() == steps[step]


def test_the_names_of_other_orders_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """A run that goes on finds the order that it has stored; one in windows has a name of its own."""
    full, repeated = Plan(1000, 8, 2, 1, seed=3), Plan(10, 4, 2, 1, seed=3, repeat_factors=np.full(10, 1.5))
    assert full._order_key == "5caeab310dbe0f3ccbdbb466"
    assert replace(full, shuffle=False)._order_key == "b390da64343ce86a3f638632"
    assert repeated.store(tmp_path)._order_key == "dd49c6aef91e75abfe41368f"
    assert Plan(12, 4, 2, 1, seed=3).epoch_rows(1).tolist() == [0, 4, 11, 1, 2, 5, 10, 7, 9, 8, 6, 3]
    keys = {_plan(counts, window).store(tmp_path)._order_key for counts in ([5, 5], [4, 6]) for window in (2, 3)}
    assert len(keys | {Plan(10, 8, 4, 1)._order_key}) == 5


def _units(groups: int, rows: int, size: int, alone: int = 0) -> Units:
    """Units of row groups, and `alone` rows behind them that lie in none."""
    starts = np.concatenate([np.arange(groups) * rows, groups * rows + np.arange(alone)])
    return Units(starts, np.repeat([size, 0], [groups, alone]))


@pytest.mark.parametrize(
    ("groups", "rows", "size", "alone", "chosen"),
    [
        (0, 0, 0, 1000, "full"),  # files
        (30, 50, 5 * MB, 0, "full"),  # a process keeps them
        (40, 50, 5 * MB, 0, "full"),
        (41, 50, 5 * MB, 0, 1006),  # as many as half the cache holds
        (2800, 50, MB, 0, 1024),
        (280, 50, 5 * MB, 14_000, 1024),  # only half of the rows lie in groups
        (1000, 1, MB, 0, "full"),  # nothing is read together
        (100, 600, 5 * MB, 0, 2400),  # some units, so that more than two are mixed
        (100, 5000, 40 * MB, 0, 12_582),
        (100, 3, 48 * MB, 0, 6),
        (100, 2, 300 * MB, 0, 2),  # at least one unit
    ],
)
def test_what_decides_the_shuffle(groups: int, rows: int, size: int, alone: int, chosen: Any) -> None:
    wanted = chosen if chosen == "full" else Window(window=chosen)
    assert choose_shuffle(_units(groups, rows, size, alone), groups * rows + alone, CACHE_BYTES) == wanted


def _simulate(plan: Plan, units: Units, processes: int, cache: float) -> float:
    """Return the bytes that a step reads on average, by processes that keep the groups that they used last."""
    sizes = units.sizes
    rng, read = np.random.default_rng(0), 0
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(processes)]
    for step in range(plan.num_steps):
        for row in plan.step_rows(step).tolist():
            unit = int(np.searchsorted(units.starts, row, side="right")) - 1
            groups = kept[int(rng.integers(processes))]
            if sizes[unit] and unit not in groups:
                read += int(sizes[unit])
            groups[unit] = None
            groups.move_to_end(unit)
            while sum(sizes[group] for group in groups) > cache:
                groups.popitem(last=False)
    return read / plan.num_steps


@pytest.mark.parametrize("processes", [1, 3, 16])
@pytest.mark.parametrize("shuffle", ["full", "none", Window(window=100), Window(window=400)])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_estimate_is_what_processes_read(shuffle: Shuffle, processes: int, repeated: bool) -> None:
    """Within a tenth; a window that no cache holds costs more."""
    units, rng = _units(100, 12, MB, alone=300), np.random.default_rng(1)
    factors = rng.choice([1.0, 2.0], 1500) if repeated else None
    plan = Plan(1500, 10, 10, 1, shuffle=shuffle != "none", repeat_factors=factors)
    if isinstance(shuffle, Window):
        plan = replace(plan, unit_starts=units.starts, window=shuffle.window)
    if shuffle == "full":
        plan = replace(plan, num_epochs=4.0)  # so that the first reads of an empty cache count little
    shown = np.diff(units.starts, append=1500) if factors is None else units.sum_rows(factors)
    estimate = estimate_bytes(shuffle, Reading(units, 1500, shown, 10, processes, 20 * MB))
    assert estimate == pytest.approx(_simulate(plan, units, processes, 20 * MB), rel=0.1)


@pytest.mark.parametrize(
    ("shuffle", "chosen_here", "processes", "line"),
    [
        (
            *(Window(window=1006), True, 1),
            "shuffle: windows of 1,006 rows, since images lie in 280 row groups of about 50 rows and 5 MB: a step of "
            "16 rows reads about 1.6 MB; a full shuffle would read about 68 MB",
        ),
        (
            *(Window(window=512), False, None),
            "shuffle: windows of 512 rows; images lie in 280 row groups of about 50 rows and 5 MB: a step of 16 rows "
            "reads up to 1.6 MB in each process that loads images; a full shuffle would read about 68 MB in all",
        ),
        (
            *("full", False, 4),
            "shuffle: full; images lie in 280 row groups of about 50 rows and 5 MB: a step of 16 rows reads about 68 "
            "MB; windows of 1,006 rows would read about 6.4 MB",
        ),
        (
            *("none", False, 1),
            "shuffle: none; images lie in 280 row groups of about 50 rows and 5 MB: a step of 16 rows reads about 1.6 "
            "MB; a full shuffle would read about 68 MB",
        ),
    ],
)
def test_the_line_on_the_shuffle(shuffle: Shuffle, chosen_here: bool, processes: int | None, line: str) -> None:
    units = _units(280, 50, 5 * MB)
    reading = Reading(units, 14_000, np.diff(units.starts, append=14_000), 16, processes)
    assert describe_shuffle(shuffle, chosen_here, reading) == line


@pytest.mark.parametrize(
    ("units", "num_rows", "shuffle", "line"),
    [
        (_units(0, 0, 0, 9), 9, "full", "shuffle: full, since no images lie in row groups of Parquet files"),
        (
            *(_units(3, 4, 5 * MB), 12, "full"),
            "shuffle: full, since a process keeps all images that lie in row groups (3 row groups of about 4 rows and "
            "5 MB)",
        ),
        (_units(900, 1, MB), 900, "full", "shuffle: full, since no two rows lie in one row group"),
    ],
)
def test_the_line_names_why_a_full_shuffle_costs_nothing(
    units: Units, num_rows: int, shuffle: Shuffle, line: str
) -> None:
    reading = Reading(units, num_rows, np.diff(units.starts, append=num_rows), 16, 1)
    assert describe_shuffle(shuffle, True, reading) == line


def _photo(number: int, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (side, side, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def _row(number: int, **cells: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": "Noise."}]
    return {"id": f"r{number}", "conversations": turns, **cells}


def _write(folder: Path, count: int = 23, group: int = 5, broken: int | None = None) -> Source:
    """Rows with their images in row groups; of one row the image is cut off."""
    images = [_photo(i) for i in range(count)]
    if broken is not None:
        images[broken] = images[broken][:100]
    rows = [_row(i, image={"bytes": data, "path": f"{i}.png"}) for i, data in enumerate(images)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=group)
    return Source(path=str(folder / "rows.parquet"), format="llava")


@pytest.fixture
def builder(tiny_models: dict[str, str]) -> SampleBuilder:
    return load_sample_builder(SampleSpec(Model(name=tiny_models["qwen3_vl"], load_in_4bit=False), ChatTask(), ()))


def _index(source: Source, builder: SampleBuilder, folder: Path) -> Index:
    return parts.build_index(source, Data(on_bad_row="quarantine"), builder, str(folder / "index"))


@pytest.mark.parametrize("piece_rows", [1000, 3])
def test_the_units_of_an_index(
    piece_rows: int, tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of the index may cut a group; a row that is left out is read with its group all the same."""
    monkeypatch.setattr(build, "PIECE_ROWS", piece_rows)
    index = _index(_write(tmp_path, broken=6), builder, tmp_path)
    units = index.units()
    assert units.starts.tolist() == [0, 5, 9, 14, 19]
    before = read_group_bytes()
    for start, size in zip(units.starts.tolist(), units.sizes.tolist(), strict=True):
        read_inner(index.records[start].images[0])
        now = read_group_bytes()
        assert size == pytest.approx(now - before, rel=0.05)
        before = now


def test_rows_whose_images_are_files_or_copies_are_units_of_their_own(
    tmp_path: Path, builder: SampleBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(_photo(0))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(_row(i, image="a.png")) + "\n" for i in range(4)))
    units = _index(Source(path=str(tmp_path / "rows.jsonl"), format="llava"), builder, tmp_path).units()
    assert (units.starts.tolist(), units.sizes.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])
    monkeypatch.setattr(tables, "LARGEST_GROUP_BYTES", 100)
    units = _index(_write(tmp_path, 4), builder, tmp_path).units()
    assert (units.starts.tolist(), units.sizes.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])


def _mixed_job(job_file: Any, folder: Path, **data: Any) -> Path:
    """A job over five groups, the last of one row, then four files, then the groups once more."""
    (folder / "a.png").write_bytes(_photo(0))
    (folder / "rows.jsonl").write_text("".join(json.dumps(_row(i, image="a.png")) + "\n" for i in range(4)))
    table = {"path": _write(folder, 21).path, "format": "llava"}
    files = {"path": str(folder / "rows.jsonl"), "format": "llava"}
    return job_file(task="chat", data={"train": table, "mix": [files, {**table, "weight": 2.0}], **data})


def test_groups_among_mixed_sources(job_file: Any, tmp_path: Path) -> None:
    prepared = preparation.prepare(load_job(_mixed_job(job_file, tmp_path)))
    units = prepared.train.units()
    assert units.starts.tolist() == [0, 5, 10, 15, 20, 21, 22, 23, 24, 25, 30, 35, 40, 45]
    assert units.sizes[:5].tolist() == units.sizes[9:].tolist()
    assert (units.sizes > 0).tolist() == [True] * 5 + [False] * 4 + [True] * 5
    assert prepared.job.data.shuffle == "full"
    assert prepared.plan.unit_starts is None
    assert prepared.shuffle.startswith("shuffle: full, since a process keeps all images")


def test_a_job_whose_groups_no_process_keeps_gets_windows(
    job_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "CACHE_BYTES", 60_000)
    job = load_job(_mixed_job(job_file, tmp_path))
    prepared = preparation.prepare(job)
    window = prepared.job.data.shuffle
    assert isinstance(window, Window)
    assert prepared.plan.window == window.window
    assert prepared.plan.unit_starts.tolist() == prepared.train.units().starts.tolist()  # type: ignore[union-attr]
    assert prepared.shuffle.startswith(f"shuffle: windows of {window.window} rows, since images lie in 10 row groups")
    shown = Counter(prepared.plan.epoch_rows(0).tolist())
    assert shown == Counter({i: 2 if i >= 25 else 1 for i in range(46)})
    kept = preparation.prepare(prepared.job)
    assert kept.shuffle.startswith(f"shuffle: windows of {window.window} rows; images lie in")
    full = preparation.prepare(load_job(tmp_path / "job.yaml", ["data.shuffle=full"]))
    assert full.plan.unit_starts is None
    assert "would read" in full.shuffle


def test_a_window_over_files_is_a_full_shuffle(job_file: Any) -> None:
    windows = preparation.prepare(load_job(job_file(), ["data.shuffle.window=16"]))
    full = preparation.prepare(load_job(job_file(), ["data.shuffle=full"]))
    assert windows.job.data.shuffle == Window(window=16)
    assert windows.plan.epoch_rows(1).tolist() == full.plan.epoch_rows(1).tolist()
    assert windows.shuffle == "shuffle: windows of 16 rows; no images lie in row groups of Parquet files"


def test_shards_without_groups_have_no_columns_for_them(tmp_path: Path, builder: SampleBuilder) -> None:
    index = _index(_write(tmp_path), builder, tmp_path)
    shard = shards.load_shard(index.records.folder, index.records.where(0)[0])
    assert shard.has("row_group")
    assert len(np.unique(shard.numbers("row_group"))) == 5
