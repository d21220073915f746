"""Trials get rows that were read once only where no setting of the space changes them, and old sweeps go on."""

import json
from pathlib import Path

import pytest

from ray_vlm.config.data import Data
from ray_vlm.config.load import dump_job, load_resolved
from ray_vlm.errors import ConfigError
from ray_vlm.tune.space import Setting, Space
from ray_vlm.tune.sweep import _check_sweep_folder, shares_rows


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


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It wrote the settings of all methods and tasks."""
    job = dump_job(load_resolved({"model": {"name": "x"}, "data": {"train": {"path": "/a.json"}}}))
    space = Space((Setting("lora.rank", "choice", (8, 16)),))
    old = job | {
        "method": job["method"] | {"beta": None, "num_generations": 8},
        "task": job["task"] | {"short_memory": 3},
    }
    settings = [{"key": "lora.rank", "kind": "choice", "args": [8, 16]}]
    (tmp_path / "sweep.json").write_text(json.dumps({"job": old, "space": settings, "trials": []}))
    _check_sweep_folder(str(tmp_path), job, space, resume=True, overwrite=False)
    changed = job | {"seed": 1}
    with pytest.raises(ConfigError, match="`seed` was 0 and is now 1"):
        _check_sweep_folder(str(tmp_path), changed, space, resume=True, overwrite=False)
