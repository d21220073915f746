"""Each family by each method, in float32 and in 4 bit. Run with `make test-families`.

`WRITE_FAMILIES=1` writes what was seen to `matrix.json`; without it, it must be what the file says.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.family_matrix import (
    COLUMNS,
    FAST,
    PAGE,
    PASSES,
    PRECISIONS,
    RULES,
    read_results,
    render,
    replace_table,
    run_family,
    write_result,
)
from tests.support.tiny_families import ALL, BUILDERS, REFUSED

QUICK = [("internvl", "fp32"), ("paligemma", "fp32"), ("qwen3_vl_moe", "nf4")]
CELLS = [(family, precision) for family in ALL for precision in PRECISIONS]


def _check(family: str, precision: str, folder: Path, base: str, scenes: Path, columns: tuple[str, ...]) -> None:
    seen = run_family(base, precision == "nf4", folder, scenes, columns)
    if os.environ.get("WRITE_FAMILIES"):
        write_result(family, precision, seen)
    expected = read_results()[family][precision]
    assert seen == {column: expected[column] for column in columns}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), CELLS)
def test_every_cell_passes_or_is_refused(
    family: str, precision: str, family_folder: Callable[[str], str], scenes: Path, tmp_path: Path
) -> None:
    _check(family, precision, tmp_path, family_folder(family), scenes, COLUMNS)


@pytest.mark.parametrize(("family", "precision"), QUICK)
def test_a_sample_of_the_cells(
    family: str, precision: str, family_folder: Callable[[str], str], scenes: Path, tmp_path: Path
) -> None:
    _check(family, precision, tmp_path, family_folder(family), scenes, ("dpo",))


def test_every_cell_has_a_result_of_a_listed_rule() -> None:
    results = read_results()
    assert set(results) == set(ALL)
    for family, of_family in results.items():
        for precision in PRECISIONS:
            assert set(of_family[precision]) == set(COLUMNS)
            assert set(of_family[precision].values()) <= {PASSES, *RULES}
        assert (FAST in of_family) == (family not in REFUSED)


def test_a_family_is_few_lines() -> None:
    lines = {name: len(inspect.getsource(build).splitlines()) for name, build in BUILDERS.items()}
    assert max(lines.values()) <= 25, lines


def test_the_table_in_the_documents_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert replace_table(page, render(read_results())) == page, "run: python -m tests.support.family_matrix"
