"""The environment variables that workers get from the driver."""

import os
from pathlib import Path

import pytest

from ray_vlm.cluster.environment import Environment


def test_a_path_that_a_machine_does_not_have_does_not_hide_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, away = tmp_path / "key.json", tmp_path / "not" / "here"
    key.write_text("{}")
    here = {"HF_HOME": "/cache/of/this/machine"}
    monkeypatch.setattr(os, "environ", here)
    Environment({"HF_TOKEN": "hf_x", "HF_HOME": str(away), "GOOGLE_APPLICATION_CREDENTIALS": str(key)}).apply()
    assert here == {
        "HF_TOKEN": "hf_x",
        "HF_HOME": "/cache/of/this/machine",
        "GOOGLE_APPLICATION_CREDENTIALS": str(key),
    }
