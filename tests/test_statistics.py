"""Intervals, tests and power against simulated losses whose truth is known."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tinyllama_lab.report.comparable import Comparable, Scored
from tinyllama_lab.report.recommend import candidates
from tinyllama_lab.report.statistics import Array, Estimate, Spread, adjusted, compare
from tinyllama_lab.report.table import Row
from tinyllama_lab.trial import Result, State, Trial

SIMULATIONS = 2000
EXAMPLES = 64
TRUTH = 0.03  # nats a token


def differences(
    generator: np.random.Generator,
    truth: float,
    seeds: int,
    of_seed: float = 0.01,
    of_example: float = 0.2,
) -> tuple[Array, Array]:
    """As trials differ: by seed, by example (heavy tails), and by both; and label tokens."""
    tokens = np.random.default_rng(EXAMPLES).integers(8, 90, EXAMPLES).astype(float)
    of_seed = of_seed if seeds > 1 else 0.0  # one seed says nothing of how seeds differ
    seed = of_seed * generator.normal(size=(seeds, 1))
    example = of_example * generator.standard_t(5, size=EXAMPLES)
    rest = 0.1 * generator.normal(size=(seeds, EXAMPLES))
    return (truth + seed + example + rest) * tokens, tokens


def simulated(truth: float, seeds: int, **spread: float) -> list[Estimate]:
    generator = np.random.default_rng(seeds)
    return [compare(*differences(generator, truth, seeds, **spread)) for _ in range(SIMULATIONS)]


@pytest.mark.parametrize(
    ("seeds", "of_seed"),
    [(1, 0.0), (2, 0.01), (3, 0.0), (3, 0.01), (3, 0.03), (3, 0.1), (5, 0.02), (5, 0.1)],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int, of_seed: float) -> None:
    estimates = simulated(TRUTH, seeds, of_seed=of_seed)
    covered = [low <= TRUTH <= high for low, high in (e.interval() for e in estimates)]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_an_effect_a_family_is_rarely_called_different(seeds: int) -> None:
    generator = np.random.default_rng(7)
    gc.freeze()  # every correction collects garbage, which is slow beside a loaded torch
    false = 0
    for _ in range(SIMULATIONS):
        family = [compare(*differences(generator, 0.0, seeds)) for _ in range(4)]
        false += min(adjusted([e.p_differs() for e in family])) < 0.05
    gc.unfreeze()
    assert false / SIMULATIONS <= 0.06


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_recommendation_rarely_takes_what_is_worse_by_the_margin(seeds: int) -> None:
    """Three cheaper settings, each worse than one by just the margin.

    Which is the best is seen in the data, as in a report; wrong is who says of another that it
    was shown to be within the margin of that one.
    """
    generator = np.random.default_rng(5)
    gc.freeze()
    wrong = 0
    for _ in range(SIMULATIONS):
        trials: list[Scored] = []
        for rank in range(4):
            truth = 2.0 + (0.0 if rank == 3 else 0.02)
            losses, tokens = differences(generator, truth, seeds, 0.007, 0.1)
            trials += [scored(rank, seed, losses[seed], tokens) for seed in range(seeds)]
        cells = candidates(Comparable(trials, ["lora.r"], []), "time", 0.02)
        taken = next(cell for cell in cells if cell.is_chosen)
        wrong += cells[0].label == "r=3" and taken.label != "r=3"
    gc.unfreeze()
    assert wrong / SIMULATIONS <= 0.05


def scored(rank: int, seed: int, losses: Array, tokens: Array) -> Scored:
    """A trial that is the cheaper the lower its rank."""
    trial = Trial(Path(f"r{rank}-{seed}"))
    metrics = {"perf/train_seconds": 10.0 * (1 + rank)}
    result = Result(trial.key, trial.name, State.DONE, metrics=metrics)
    row = Row(trial, result, {"lora.r": rank})
    return Scored(row, f"r={rank}", losses, tokens, "base", "e0", {"seed": seed})


def test_what_is_off_by_the_margin_is_rarely_called_equivalent() -> None:
    wrong = [e.p_equivalent(0.02) < 0.05 for e in simulated(-0.02, 3, of_example=0.03)]
    assert 0 < np.mean(wrong) <= 0.06


@pytest.mark.parametrize(("seeds", "size"), [(1, 0.06), (3, 0.06), (3, 0.08), (5, 0.05)])
def test_the_power_is_that_of_the_simulation(seeds: int, size: float) -> None:
    estimates = simulated(size, seeds)
    shown = np.mean([e.p_differs() < 0.05 for e in estimates])
    # the spread that the simulation has, not one that was estimated
    of_seed = 0.01**2 if seeds > 1 else 0.0
    spread = Spread(of_seed, 0.2**2 * 5 / 3 * 1.18, 0.1**2 * 1.18, seeds, EXAMPLES)
    predicted = Estimate(size, spread).power(size, seeds, EXAMPLES)
    assert predicted == pytest.approx(shown, rel=0.1)


def test_the_numbers_that_are_needed_have_the_power_and_no_fewer_do() -> None:
    generator = np.random.default_rng(1)
    estimate = compare(*differences(generator, 0.03, 1))
    examples = estimate.examples_needed(0.03)
    assert examples is not None
    assert estimate.power(0.03, 1, examples) >= 0.8 > estimate.power(0.03, 1, examples - 1)
    estimate = compare(*differences(generator, 0.03, 3, of_seed=0.05, of_example=0.02))
    seeds = estimate.seeds_needed(0.08)
    assert seeds is not None
    assert estimate.power(0.08, seeds, EXAMPLES) >= 0.8 > estimate.power(0.08, seeds - 1, EXAMPLES)


def test_no_number_of_seeds_replaces_examples() -> None:
    estimate = Estimate(0.0, Spread(seed=0.0, example=1.0, rest=0.0, seeds=3, examples=50))
    assert estimate.seeds_needed(0.02) is None
    assert Estimate(0.0, Spread(1.0, 0.0, 0.0, 1, 50)).seeds_needed(0.02) is None


def test_one_seed_and_equal_tokens_are_the_paired_t_test() -> None:
    generator = np.random.default_rng(3)
    sample = generator.normal(0.2, 1.0, size=200)
    found = compare(sample[None, :] * 10, np.full(200, 10.0))
    expected = stats.ttest_1samp(sample, 0.0)
    assert found.difference == pytest.approx(sample.mean(), abs=1e-12)
    assert found.freedom == pytest.approx(199)
    assert found.interval() == pytest.approx(expected.confidence_interval(), rel=0.05)
    assert found.p_differs() == pytest.approx(expected.pvalue, rel=0.25)


def test_equal_losses_are_equivalent_and_do_not_differ() -> None:
    found = compare(np.zeros((3, 20)), np.full(20, 5.0))
    assert found.interval() == (0.0, 0.0)
    assert (found.p_differs(), found.p_equivalent(0.01)) == (1.0, 0.0)
    assert found.power(0.01, 3, 20) == 1.0


def test_the_order_of_examples_and_seeds_does_not_matter() -> None:
    values, tokens = differences(np.random.default_rng(1), TRUTH, 3)
    order = np.random.default_rng(2).permutation(EXAMPLES)
    found, other = compare(values, tokens), compare(values[::-1, order], tokens[order])
    assert other.difference == pytest.approx(found.difference, abs=1e-12)
    assert other.error == pytest.approx(found.error, rel=0.1)  # the draws are others


def test_turning_the_question_round_turns_the_answer_round() -> None:
    values, tokens = differences(np.random.default_rng(1), TRUTH, 3)
    found, other = compare(values, tokens), compare(-values, tokens)
    assert other.interval() == pytest.approx([-x for x in reversed(found.interval())])
    assert other.p_differs() == pytest.approx(found.p_differs())


def test_corrections_are_those_of_holm_and_of_benjamini_and_hochberg() -> None:
    raw = [0.01, 0.04, 0.03]
    assert adjusted(raw) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted(raw, "fdr_bh") == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted([]) == []


def test_one_example_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="two examples"):
        compare(np.ones((3, 1)), np.ones(1))
    assert math.isinf(compare(np.ones((1, 2)), np.ones(2)).freedom)
