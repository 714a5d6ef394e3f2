"""What strangers' files make a process compute has limits, and a caller's own timer goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tinyllama_lab.config.limited import limited
from tinyllama_lab.errors import ModelError


class Alarm(Exception):
    """The timer of a caller ran out."""


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_block_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(ModelError, match="the template must take at most 0.1 s .* leave it out"):
        with limited("the template", "leave it out", seconds=0.1):
            time.sleep(10)


def test_the_timer_of_a_caller_goes_on() -> None:
    signal.setitimer(signal.ITIMER_REAL, 50, 7)
    for _ in range(3):
        with limited("the template", "leave it out"):
            time.sleep(0.1)
    left_s, interval_s = signal.getitimer(signal.ITIMER_REAL)
    assert 40 < left_s < 49.8 and interval_s == 7


def test_a_timer_that_ran_out_meanwhile_comes_afterwards() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(Alarm):
        with limited("the template", "leave it out"):
            time.sleep(0.2)
        time.sleep(10)
