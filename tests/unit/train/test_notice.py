"""When workers check for preemptions, and the reason that they give."""

import time

import pytest
from ray.train.v2.api.preemption import PreemptionInfo

from ray_vlm.train.callbacks.preemption import Notice


def test_it_is_asked_now_and_then() -> None:
    notice = Notice(lambda: None, every_s=1.0)
    assert not notice.is_due()
    time.sleep(1.05)
    assert notice.is_due()
    assert notice.look() is None
    assert not notice.is_due()


@pytest.mark.parametrize(("deadline", "end"), [(None, "taken away"), (12.4, "taken away in 12 s"), (-3, "in 0 s")])
def test_who_goes_and_when(deadline: float | None, end: str) -> None:
    at = None if deadline is None else int((time.time() + deadline) * 1000)
    reason = Notice(lambda: PreemptionInfo(at, {"node": [2, 0]})).look()
    assert reason is not None
    assert reason.startswith("the machine of worker 0, 2 will be taken away")
    assert reason.endswith(end)
