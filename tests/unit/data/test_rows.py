"""Sizes of images that a run keeps, for the day when a file is gone."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_vlm.data.rows import describe_lost, pack_sizes, unpack_sizes

_SIZES = {"/a.jpg": (640, 480), "/b \u00fc.jpg": (7, 9)}


def test_sizes_come_back_as_they_were() -> None:
    assert unpack_sizes(pack_sizes(_SIZES)) == _SIZES
    assert unpack_sizes(pack_sizes({})) == {}


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_what_is_damaged_is_of_no_use(cut: int) -> None:
    assert unpack_sizes(pack_sizes(_SIZES)[:cut]) == {}


def test_columns_of_another_kind_are_no_sizes(tmp_path) -> None:
    for number, columns in enumerate([{"image": ["/a.jpg"]}, {"image": [1], "width": ["x"], "height": [2.5]}, {}]):
        pq.write_table(pa.table(columns), tmp_path / str(number))
        assert not unpack_sizes((tmp_path / str(number)).read_bytes())


def test_the_first_few_are_named() -> None:
    sentence = describe_lost([(str(i), str(i + 1)) for i in range(11)])
    assert sentence.startswith("11 rows could not be read any more, and others took their place: 0 (1), 1 (2)")
    assert sentence.endswith("7 (8) and 3 more")
