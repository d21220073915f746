"""Settings that differ little: the quick suite runs some of them, `make test-all` the rest."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: those of `every` that are not in `quick` are marked slow.

    Raises `ValueError` for a quick one that is not among them, which would otherwise leave the quick suite unseen.
    """
    values = list(every)
    if strange := [value for value in quick if value not in values]:
        raise ValueError(f"{strange} are not among the settings {values}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in quick else pytest.mark.slow,
        )
        for value in values
    ]
