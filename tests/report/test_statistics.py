"""Intervals, tests and power against simulated losses whose truth is known.

A small draw of `python -m benchmarks.statistics`, whose tables stand in the docs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.simulated import World, drawn
from benchmarks.statistics import coverage, false_winners, lost_winners, power
from tinyllama_lab.report.analysis.luck import SeedSpread, moderated, pooled
from tinyllama_lab.report.analysis.statistics import (
    Array,
    Estimate,
    Luck,
    Sample,
    adjusted,
    compare,
)

DRAWS = 1000
SLACK = 0.0125  # of a share of 0.05, drawn so often: almost two standard errors


def differences(generator: np.random.Generator, seeds: int, examples: int = 64) -> Array:
    """Return differences `[seeds, examples]`, summed over ten tokens with a mean of 0.03."""
    per_token = 0.03 + 0.1 * generator.normal(size=examples)
    return 10 * (per_token + 0.05 * generator.normal(size=(seeds, examples)))


@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(examples=16),
        World(examples=16, tails="skewed", lengths="log-normal"),
        World(tails="t3"),
        World(growth=0.05, lengths="log-normal"),
        World(examples=32, icc=0.5),
        World(icc=0.5, tails="t5", lengths="log-normal"),
        World(seeds=1),
        World(seeds=2, cells=2, of_seed=0.1),
        World(seeds=2, of_seed=0.05),
        World(seeds=5, cells=12, of_seed=0.0),
        World(seeds=5, cells=5, wild=5.0),
    ],
    ids=repr,
)
def test_the_coverage_of_the_interval_is_95_percent(world: World) -> None:
    assert 0.93 - SLACK <= coverage(world, DRAWS) <= 0.97 + SLACK


@pytest.mark.parametrize("cells", [3, 5, 12])
def test_the_coverage_is_nearly_kept_for_a_setting_of_larger_spread(
    cells: int,
) -> None:
    """By chance, three such runs look alike in every tenth study."""
    world = World(cells=cells, wild=5.0)
    assert 0.92 - SLACK <= coverage(world, DRAWS // 2) <= 0.97 + SLACK
    assert coverage(world, DRAWS // 2, cells - 1) >= 0.93 - SLACK


def test_a_setting_of_larger_spread_is_rarely_called_different() -> None:
    assert false_winners(World(cells=5, wild=10.0), DRAWS // 2) <= 0.06 + SLACK


@pytest.mark.parametrize(("cells", "seeds"), [(2, 1), (2, 3), (5, 2)])
def test_equal_settings_are_rarely_called_different(cells: int, seeds: int) -> None:
    assert false_winners(World(cells=cells, seeds=seeds), DRAWS) <= 0.06 + SLACK


@pytest.mark.parametrize(("cells", "seeds"), [(3, 1), (5, 3)])
def test_the_best_is_among_those_that_cannot_be_told_apart(cells: int, seeds: int) -> None:
    assert lost_winners(World(cells=cells, seeds=seeds), DRAWS // 2) <= 0.05


@pytest.mark.parametrize(("seeds", "size"), [(1, 0.1), (2, 0.06), (3, 0.06), (5, 0.05)])
def test_the_power_is_the_requested_one(seeds: int, size: float) -> None:
    shown, promised = power(World(seeds=seeds), size, DRAWS // 2)
    assert promised == pytest.approx(shown, abs=0.1 + SLACK)


def test_the_power_of_two_seeds_of_two_settings_is_the_requested_one() -> None:
    """Their margins are added, in a plan as in the interval."""
    steady = World(cells=2, seeds=2, of_seed=0.001, of_example=0.08, of_both=0.0)
    for size in (0.03, 0.06):
        shown, promised = power(steady, size, DRAWS // 2)
        assert promised == pytest.approx(shown, abs=0.1 + SLACK)


@pytest.mark.filterwarnings("error")
def test_a_plan_with_fewer_rows_than_a_cluster_has_no_power() -> None:
    generator = np.random.default_rng(2)
    few = World(examples=16, icc=0.5, seeds=3)
    estimate = drawn(few, (0.0, 0.03), generator).estimate(0, 1)
    powers = [estimate.power(0.05, 3, rows) for rows in (1, 2, 3, 4, 8, 16, 64)]
    assert powers == sorted(powers)


def test_a_difference_of_the_margin_is_rarely_called_equivalent() -> None:
    generator = np.random.default_rng(6)
    world = World(of_example=0.03, of_seed=0.005)
    studies = (drawn(world, (0.0, -0.02), generator).estimate(0, 1) for _ in range(DRAWS))
    assert np.mean([each.p_equivalent(0.02) < 0.05 for each in studies]) <= 0.06


def test_the_proposed_numbers_reach_the_power_and_smaller_ones_do_not() -> None:
    estimate = compare(differences(np.random.default_rng(1), 1), np.full(64, 10.0))
    examples = estimate.examples_needed(0.03)
    assert examples is not None
    assert estimate.power(0.03, 1, examples) >= 0.8 > estimate.power(0.03, 1, examples - 1)
    lucky = compare(differences(np.random.default_rng(1), 3), np.full(64, 10.0), Luck(2e-3, 6, 4))
    seeds = lucky.seeds_needed(0.08)
    assert seeds is not None
    assert lucky.power(0.08, seeds, 64) >= 0.8 > lucky.power(0.08, seeds - 1, 64)


def test_if_runs_differ_no_number_of_examples_is_enough() -> None:
    losses = differences(np.random.default_rng(1), 3)
    lucky = compare(losses, np.full(64, 10.0), Luck(0.05**2, 2.0))
    assert lucky.examples_needed(0.02) is None and lucky.both_needed(0.02) is not None
    steady = compare(losses, np.full(64, 10.0), Luck(0.0, 2.0))
    assert steady.seeds_needed(0.001) is None


def test_many_equal_examples_are_the_paired_t_test() -> None:
    sample = np.random.default_rng(3).normal(0.2, 1.0, size=200)
    found = compare(sample[None, :] * 10, np.full(200, 10.0))
    expected = stats.ttest_1samp(sample, 0.0)
    assert found.difference == pytest.approx(sample.mean(), abs=1e-12)
    assert found.interval() == pytest.approx(expected.confidence_interval(), rel=0.05)
    assert found.p_differs() == pytest.approx(expected.pvalue, rel=0.3)


def test_the_p_value_is_the_level_at_which_the_interval_touches() -> None:
    found = compare(differences(np.random.default_rng(4), 3), np.full(64, 10.0), Luck(4e-4, 4))
    low, high = found.interval(1 - found.p_differs())
    assert min(abs(low), abs(high)) < 1e-6
    low, high = found.interval()
    assert found.p_below(high) == pytest.approx(0.025, rel=1e-3)
    assert found.p_below(low) == pytest.approx(0.975, rel=1e-3)


def reach(luck: Luck, level: float = 0.95) -> float:
    """Return how far an interval reaches: a standard error of 0.3 from 20 examples, two seeds."""
    sample = Sample(0.3, 0.0, 20, 20, 0.3, np.empty(0))
    return Estimate(0.0, sample, luck, seeds=2).interval(level)[1]


def test_of_a_well_known_variance_the_interval_is_that_of_satterthwaite() -> None:
    freedom = (0.09 + 0.04) ** 2 / (0.09**2 / 19 + 0.04**2 / 1e6)
    expected = stats.t.ppf(0.975, freedom) * math.sqrt(0.09 + 0.04)
    assert reach(Luck(0.08, 1e6)) == pytest.approx(expected, rel=1e-6)


def test_the_margins_of_a_poorly_known_variance_are_not_narrowed() -> None:
    of_sample = stats.t.ppf(0.975, 19) * 0.3
    of_two, of_one = (stats.t.ppf(0.975, freedom) * 0.2 for freedom in (2, 1))
    assert reach(Luck(0.08, 2)) == pytest.approx(math.hypot(of_sample, of_two))
    assert reach(Luck(0.08, 1)) == pytest.approx(of_sample + of_one)


@pytest.mark.parametrize("freedom", [1.5, 2.0, 3.0, 9.0, math.inf])
def test_a_higher_level_has_a_wider_interval(freedom: float) -> None:
    margins = [reach(Luck(0.08, freedom), level) for level in (0.5, 0.9, 0.95, 0.999, 0.999999)]
    assert margins == sorted(set(margins))


def test_equal_losses_are_equivalent_and_do_not_differ() -> None:
    found = compare(np.zeros((3, 20)), np.full(20, 5.0))
    assert found.interval() == (0.0, 0.0)
    assert (found.p_differs(), found.p_equivalent(0.01)) == (1.0, 0.0)
    assert found.power(0.01, 3, 20) == 1.0


def test_copies_of_examples_in_one_cluster_add_no_evidence() -> None:
    """Four copies of each example narrow the interval unless they are one cluster."""
    sums = differences(np.random.default_rng(5), 1, 32)
    once = compare(sums, np.full(32, 10.0)).interval()
    copied, tokens = np.repeat(sums, 4, axis=1), np.full(128, 10.0)
    together = compare(copied, tokens, clusters=np.repeat(np.arange(32), 4)).interval()
    assert together == pytest.approx(once)
    low, high = compare(copied, tokens).interval()
    assert high - low < 0.6 * (once[1] - once[0])


def test_the_order_of_examples_and_seeds_does_not_matter() -> None:
    values, tokens = differences(np.random.default_rng(1), 3), np.full(64, 10.0)
    order = np.random.default_rng(2).permutation(64)
    found, other = compare(values, tokens), compare(values[::-1, order], tokens[order])
    assert other.difference == pytest.approx(found.difference, abs=1e-12)
    assert other.interval() == pytest.approx(found.interval(), rel=0.2)  # the draws are others


def test_swapping_the_settings_negates_the_difference() -> None:
    values, tokens = differences(np.random.default_rng(1), 3), np.full(64, 10.0)
    found, other = compare(values, tokens), compare(-values, tokens)
    assert other.interval() == pytest.approx([-x for x in reversed(found.interval())])
    assert other.p_differs() == pytest.approx(found.p_differs())


def test_the_variance_between_seeds_is_that_of_a_randomized_block_design() -> None:
    """Compares with the residual mean square of a two-way analysis of variance, by hand."""
    losses = np.array([[1.0, 1.4, 0.9], [2.0, 2.5, 2.1], [1.5, 1.6, 1.7]])
    cells, seeds = losses.mean(axis=1), losses.mean(axis=0)
    left = [losses[c, s] - cells[c] - seeds[s] + losses.mean() for c in range(3) for s in range(3)]
    typical, freedom = pooled(losses)
    assert typical == pytest.approx(sum(x * x for x in left) / 4) and freedom == 4


def test_a_setting_that_is_like_the_others_has_their_variance() -> None:
    """Its p-value in the F test against the others is 0.49, above one in three seeds."""
    losses = np.array([[1.0, 1.4, 0.9], [2.0, 2.5, 2.1], [1.5, 1.6, 1.7]])
    others = losses[1:] - losses[1:].mean(axis=1, keepdims=True)
    others = others - others.mean(axis=0)
    apart = losses[0] - losses[0].mean() - (losses[1:] - losses[1:].mean(axis=1)[:, None]).mean(0)
    squares, rest = (apart**2).sum() * 2 / 3, (others**2).sum()
    assert stats.f.sf(squares / rest, 2, 2) > 1 / 3
    variances, freedoms = moderated(losses)
    assert freedoms[0] == 4 and variances[0] == pytest.approx(pooled(losses)[0])


def test_a_setting_far_from_the_others_has_its_own_variance_and_freedom() -> None:
    """A measured case: 1.607, 0.302 and 0.286 over three seeds give a t interval."""
    calm = np.array([[0.0, 0.0, 0.0], [0.01, -0.01, 0.0], [-0.01, 0.0, 0.01], [0.0, 0.01, -0.01]])
    wild = np.array([[1.607, 0.302, 0.286]])
    names = ["first", "a", "b", "c", "wild"]
    spread = SeedSpread.of(dict(zip(names, np.vstack([calm, wild]), strict=True)))
    luck = spread.luck(["first"], ["wild"], 3)
    expected = stats.ttest_1samp(wild[0], 0.0).confidence_interval()
    assert luck.freedom == pytest.approx(2.0, abs=0.01)
    margin = stats.t.ppf(0.975, luck.freedom) * math.sqrt(luck.variance / 3)
    assert 2 * margin == pytest.approx(expected.high - expected.low, rel=0.02)
    calm_luck = spread.luck(["first"], ["a"], 3)
    assert math.sqrt(calm_luck.variance / 2) == pytest.approx(pooled(calm)[0] ** 0.5, rel=0.05)


def test_identical_losses_have_no_variance() -> None:
    variances, freedoms = moderated(np.ones((4, 3)))
    assert variances.tolist() == [0.0] * 4 and (freedoms >= 2).all()


def test_an_effect_of_the_seed_on_all_settings_adds_no_variance() -> None:
    order = np.array([0.3, -0.2, 0.1])
    spread = SeedSpread.of({"a": 1.0 + order, "b": 2.0 + order})
    assert spread.luck(["a"], ["b"], 3).variance == pytest.approx(0.0, abs=1e-20)


def test_a_wild_setting_among_many_calm_ones_keeps_its_own_variance() -> None:
    generator = np.random.default_rng(8)
    losses = {str(cell): 2 + 0.005 * generator.normal(size=5) for cell in range(11)}
    losses["wild"] = 2 + 0.2 * generator.normal(size=5)
    spread = SeedSpread.of(losses)
    calm, wild = spread.luck(["0"], ["1"], 5), spread.luck(["0"], ["wild"], 5)
    assert math.sqrt(wild.variance) > 0.08 and math.sqrt(calm.variance) < 0.06


def test_an_average_of_several_settings_has_less_seed_variance() -> None:
    spread = SeedSpread(0.01, 10.0, 8)
    one, four = spread.luck(["a"], ["b"], 3), spread.luck(list("aceg"), list("bdfh"), 3)
    assert (one.variance, four.variance) == pytest.approx((0.02, 0.005))


def test_corrections_are_those_of_holm_and_of_benjamini_and_hochberg() -> None:
    raw = [0.01, 0.04, 0.03]
    assert adjusted(raw) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted(raw, "fdr_bh") == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted([]) == []


def test_a_single_example_gives_no_comparison() -> None:
    with pytest.raises(ValueError, match="two examples"):
        compare(np.ones((3, 1)), np.ones(1))
    with pytest.raises(ValueError, match="do not belong together"):
        compare(np.ones((1, 4)), np.ones(4), clusters=np.zeros(4))
