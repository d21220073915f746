"""A tiny checkpoint of each family on disk, made when a test asks for it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.tiny_families import write_tiny


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that returns the folder of a family's tiny checkpoint."""
    root = Path(tmp_path_factory.mktemp("families"))
    return cache(lambda family: str(write_tiny(root / family, family)))
