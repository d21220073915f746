"""Signals: what the first one does depends on whether there is anything to save."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ray_vlm.train.stop import StopRequest


@pytest.fixture(autouse=True)
def _same_handlers_after() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_the_first_signal_leaves_at_once(number: int) -> None:
    request = StopRequest(trained=False)
    with pytest.raises(KeyboardInterrupt), request:
        _send(number)
    assert request.left_early
    assert request.signal == number


def test_after_a_step_the_first_signal_is_a_request(capsys: pytest.CaptureFixture) -> None:
    with StopRequest(trained=False) as request:
        request.trained = True
        _send(signal.SIGTERM)
        assert request.wanted
        assert not request.left_early
    assert "a checkpoint is written" in capsys.readouterr().out


def test_signals_are_taken_back_from_whoever_took_them_meanwhile() -> None:
    """Ray installs its own handler as it starts."""
    with StopRequest() as request:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        request.listen()
        _send(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
