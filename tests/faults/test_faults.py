"""A small draw of every class of faults; `make faults` injects all of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.all_classes import CLASSES
from tests.faults.fault import Draw, FaultClass

SHARES = {"damage": 0.02, "kills": 0.05, "disk": 0.02, "crashes": 0.1}
SHARE = 0.02


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "fault", [each for each in CLASSES if not each.is_slow], ids=lambda each: each.name
)
def test_nothing_is_lost_doubled_or_silent(fault: FaultClass, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    (tmp_path / "whole").mkdir()
    share = SHARES.get(fault.name, SHARE)
    count = fault.run(Draw(tmp_path, random.Random(seed), share))
    assert count.injected and not count.wrong, f"seed {seed}: {count.wrong[:10]}"
