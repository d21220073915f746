"""The page on the prior systems: every line has a place and a test, and both are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "prior_systems.md").read_text()
LINES = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| there ")]


def test_every_line_has_a_place_and_a_test() -> None:
    assert len(LINES) > 50
    for line in LINES:
        _, there, here, held, _ = line.split("|")
        assert there.strip(), line
        assert here.strip(), line
        assert "tests/" in held or held.strip() == "the same", line
    assert "partial" not in PAGE


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE))))
def test_the_tests_of_the_page_are_there(name: str) -> None:
    file, _, function = name.partition("::")
    text = (ROOT / file).read_text()
    assert f"def {function}(" in text if function else "def test_" in text


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:ray_vlm|jobs)/[\w/]+\.(?:py|yaml))`", PAGE))))
def test_the_places_of_the_page_are_there(path: str) -> None:
    assert (ROOT / path).is_file()
