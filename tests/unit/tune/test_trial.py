"""A trial that is started again after its card had no room."""

import json
import time
from pathlib import Path

import pytest

from ray_vlm.tune.trial import _had_no_room


@pytest.mark.parametrize(
    ("error", "after", "again"),
    [
        ("worker 0 ran out of GPU memory after step 3: CUDA out of memory.", True, False),
        ("worker 0 ran out of GPU memory after step 3: CUDA out of memory.", False, True),  # an earlier call's
        ("worker 0 died", True, True),
    ],
)
def test_the_same_settings_are_not_tried_again_on_a_card_without_room(
    tmp_path: Path, error: str, after: bool, again: bool
) -> None:
    began, address = time.time(), str(tmp_path / "000")
    assert _had_no_room(address, began) is None
    attempt = {"attempt": 1, "status": "failed", "error": error, "ended": began + (1 if after else -60)}
    (tmp_path / "000").mkdir()
    (tmp_path / "000" / "run.json").write_text(json.dumps({"status": "failed", "attempts": [attempt]}))
    assert _had_no_room(address, began) == (None if again else error)
