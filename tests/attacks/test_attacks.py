"""Each attack is tried for real: it is refused, or does no harm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.attacks import ATTACKS, KINDS, Attack
from tests.attacks.ground import Commands, Ground


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.kind}-{a.id}")
def test_an_attack_is_refused_or_harmless(
    attack: Attack, commands: Commands, tmp_path: Path
) -> None:
    attack.run(Ground(tmp_path / "ground", commands))


def test_every_class_of_attacks_is_tried() -> None:
    tried = Counter(attack.kind for attack in ATTACKS)
    assert set(tried) == set(KINDS) and sum(tried.values()) >= 80
    assert len({(attack.kind, attack.id) for attack in ATTACKS}) == len(ATTACKS)
