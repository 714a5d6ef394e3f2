"""The lowest of several losses is too low; its shrunken estimate is not, in simulations."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.simulated import World
from benchmarks.statistics import bias_of_the_best
from tinyllama_lab.report.analysis.luck import SeedSpread
from tinyllama_lab.report.analysis.shrunken import shrunken

EQUAL = [0.0] * 12
APART = list(np.linspace(0.0, 0.6, 12))


@pytest.mark.parametrize(("examples", "seeds"), [(32, 1), (16, 3), (128, 2)])
def test_the_best_of_twelve_equal_settings_is_not_estimated_too_low(
    examples: int, seeds: int
) -> None:
    raw, kept = bias_of_the_best(World(examples=examples, seeds=seeds, cells=12), EQUAL, 100)
    assert raw < -0.02 and abs(kept) < 0.01


@pytest.mark.parametrize("examples", [16, 64])
def test_settings_that_differ_hardly_move(examples: int) -> None:
    raw, kept = bias_of_the_best(World(examples=examples, cells=12), APART, 100)
    assert abs(kept - raw) < 0.01 and abs(kept) < 0.01


def test_the_shrinkage_is_that_of_empirical_bayes() -> None:
    """Compares with the formula, for clusters of one example and seeds without variance."""
    generator = np.random.default_rng(0)
    true = 2.0 + 0.1 * generator.normal(size=6)
    losses = true[:, None, None] + 0.5 * generator.normal(size=(6, 1, 400))
    names = [str(cell) for cell in range(6)]
    found = shrunken(losses, np.ones(400), None, names, SeedSpread(0.0, np.inf, 6))
    means = losses.mean(axis=(1, 2))
    variance = ((losses[:, 0] - losses[:, 0].mean(axis=0)).var(axis=1, ddof=1) / 400).sum()
    kept = 1 - variance / ((means - means.mean()) ** 2).sum()
    assert 0 < kept < 1
    assert found == pytest.approx(means.mean() + kept * (means - means.mean()), abs=2e-4)


def test_a_single_setting_is_not_shrunken() -> None:
    losses = np.random.default_rng(0).normal(2, 0.1, size=(1, 3, 20))
    found = shrunken(losses, np.ones(20), None, ["a"], SeedSpread(0.01, 4.0, 1))
    assert found.tolist() == pytest.approx([losses.mean()])
