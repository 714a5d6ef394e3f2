"""The attacks of `tests/attacks`, counted."""

from __future__ import annotations

from tests.attacks.attacks import ATTACKS, KINDS
from tests.attacks.ground import Commands, Ground
from tests.faults.fault import Count, Draw, FaultClass


def attacks(draw: Draw) -> Count:
    """Try every attack, or a draw of them."""
    count, commands = Count(), Commands()
    tried = draw.dice.sample(ATTACKS, min(len(ATTACKS), draw.times(len(ATTACKS))))
    try:
        for number, attack in enumerate(tried):
            try:
                attack.run(Ground(draw.folder / str(number), commands))
            except Exception as error:
                count.fail(f"{attack.kind}-{attack.id}: {str(error)[:300]}")
            else:
                count.add("refused or harmless")
    finally:
        commands.close()
    count.notes.append(f"{len({attack.kind for attack in tried})} of {len(KINDS)} classes")
    return count


# `tests/attacks` runs all of them in every test run
ATTACKED = FaultClass("attacks", "attacks of docs/security.md", attacks, is_slow=True)
