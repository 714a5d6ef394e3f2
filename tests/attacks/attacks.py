"""Every attack that the tests try, by class."""

from __future__ import annotations

from tests.attacks import by_models, by_outputs, by_settings
from tests.attacks.attack import KINDS, Attack

ATTACKS: list[Attack] = [*by_settings.ATTACKS, *by_models.ATTACKS, *by_outputs.ATTACKS]
__all__ = ["ATTACKS", "KINDS", "Attack"]
