"""Fixtures of the tests of the report."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_corrections(little_garbage: None) -> None:
    """Every report corrects its verdicts with statsmodels."""
