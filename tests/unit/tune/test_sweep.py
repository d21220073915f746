"""Trials get rows that were read once only where no setting of the space changes them."""

import pytest

from ray_vlm.config.data import Data
from ray_vlm.tune.space import Setting, Space
from ray_vlm.tune.sweep import shares_rows


@pytest.mark.parametrize(
    ("key", "evaluated", "shared"),
    [
        ("train.learning_rate", {"path": "b"}, True),
        ("data.oversample", {"path": "b"}, True),
        ("method.beta", {"path": "b"}, True),
        ("seed", {"path": "b"}, True),
        ("seed", {"ratio": 0.1}, False),
        ("method.loss_on", {"path": "b"}, False),
        ("method.name", {"path": "b"}, False),
        ("method", {"path": "b"}, False),
        ("data.max_pixels", {"path": "b"}, False),
        ("data.train.max_rows", {"path": "b"}, False),
        ("task.prompt", {"path": "b"}, False),
        ("model.adapter", {"path": "b"}, False),
        ("data", {"path": "b"}, False),
    ],
)
def test_rows_are_shared_where_nothing_changes_them(key: str, evaluated: dict, shared: bool) -> None:
    data = Data.model_validate({"train": {"path": "a"}, "eval": evaluated})
    space = Space((Setting("lora.rank", "choice", (8, 16)), Setting(key, "choice", (1, 2))))
    assert shares_rows(space, data) is shared
