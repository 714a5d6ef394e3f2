"""Verdicts on generated answers: their intervals, p-values, and when there are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from tests.studies import first_evaluation, simulated_study, write_generations
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.statistics import compare
from tinyllama_lab.report.analysis.text_scores import (
    TextVerdict,
    mcnemar,
    shown_on_terminal,
    text_verdicts,
)
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.study.study import StudyFolder

Draw = Callable[[dict[str, Any]], dict[str, np.ndarray]]


def study_with(
    root: Path, keys: dict[str, list[Any]], draw: Draw, seeds: Sequence[int] = (0,)
) -> StudyFolder:
    """Return a study whose generations have the scores that `draw` returns for a configuration."""
    study = simulated_study(root, keys, seeds=seeds, steps=0, examples=64)
    for trial in study.trials():
        scores = draw(trial.read_config())
        names, rows = list(scores), zip(*scores.values(), strict=True)
        answers = [
            {"prompt": str(n), "reference": "r", "output": "o"}
            | {"scores": dict(zip(names, map(float, row), strict=True))}
            for n, row in enumerate(rows)
        ]
        write_generations(trial, answers)
        result, _ = trial.read_result()
        assert result is not None
        trial.commit(result)
    return study


def verdicts(study: StudyFolder) -> list[TextVerdict]:
    return text_verdicts(make_comparison(read_study(study).trials))


def shares(first: int, both: int, second: int, answers: int = 40) -> Draw:
    """Return scores: right with rank 2 alone, with both ranks, and with rank 8 alone."""

    def draw(config: dict[str, Any]) -> dict[str, np.ndarray]:
        right = np.zeros(answers)
        right[first : first + both] = 1
        if config["lora"]["r"] == 2:
            right[:first] = 1
        else:
            right[first + both : first + both + second] = 1
        return {"intent_accuracy": right}

    return draw


@pytest.mark.parametrize(("b", "c"), [(1, 9), (9, 1), (3, 4), (0, 12), (0, 0), (5, 5)])
def test_mcnemar_is_the_exact_test_of_statsmodels(b: int, c: int) -> None:
    first = np.array([1] * b + [0] * c + [1] * 5 + [0] * 7, dtype=float)
    second = np.array([0] * b + [1] * c + [1] * 5 + [0] * 7, dtype=float)
    expected = reference_mcnemar([[5, b], [c, 7]], exact=True).pvalue
    assert mcnemar(first, second) == pytest.approx(expected)


def test_a_share_has_mcnemars_p_and_the_points_between_the_two(tmp_path: Path) -> None:
    (found,) = verdicts(study_with(tmp_path, {"lora.r": [2, 8]}, shares(2, 6, 14)))
    assert (found.first, found.second) == (pytest.approx(20.0), pytest.approx(50.0))
    expected = 2 * binom.cdf(2, 16, 0.5)  # by hand: 2 of 16 that differ
    assert found.p == pytest.approx(expected) and found.verdict == "higher in this one run"
    low, high = found.interval_points
    # the textbook's error of a difference of paired shares is 9.4 points, with 39 degrees
    error = 100 * np.sqrt((16 - 12**2 / 40) / 40**2)
    assert low == pytest.approx(30 - 2.02 * error, abs=2) and high > 30 + 1.9 * error
    assert found.sentence.startswith("rank: 2 → 8: intent 20.0 % → 50.0 %, +30.0 points (95 % +")


def test_a_difference_that_chance_explains_is_not_called_shown(tmp_path: Path) -> None:
    (found,) = verdicts(study_with(tmp_path, {"lora.r": [2, 8]}, shares(4, 5, 7)))
    assert found.p == pytest.approx(reference_mcnemar([[5, 4], [7, 24]], exact=True).pvalue)
    assert found.sentence.endswith("): not shown")


def test_other_scores_are_judged_by_their_interval(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    base = generator.uniform(0.1, 0.5, 64)
    gain = generator.normal(0.1, 0.1, 64)

    def draw(config: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"rougeL": base + gain * (config["lora"]["r"] == 8)}

    (found,) = verdicts(study_with(tmp_path, {"lora.r": [2, 8]}, draw))
    assert found.second - found.first == pytest.approx(100 * gain.mean())
    low, high = found.interval_points
    reach = 2.0 * 100 * gain.std(ddof=1) / 8  # Student's, 63 degrees of freedom
    assert (high - low) / 2 == pytest.approx(reach, rel=0.1)
    assert found.p < 1e-4 and found.verdict == "higher in this one run"


def test_seeds_are_in_the_interval_and_allow_a_verdict(tmp_path: Path) -> None:
    def draw(config: dict[str, Any]) -> dict[str, np.ndarray]:
        luck = np.random.default_rng(config["seed"] + 100 * config["lora"]["r"]).normal(0, 0.04)
        return {"rougeL": np.full(40, 0.3 + luck) + np.linspace(-0.1, 0.1, 40)}

    (found,) = verdicts(study_with(tmp_path, {"lora.r": [2, 8]}, draw, seeds=(0, 1, 2)))
    low, high = found.interval_points
    assert found.seeds == 3 and low < 0 < high and high - low > 5  # equal but for their luck
    assert found.verdict == "not shown"


def test_holm_corrects_over_all_scores_of_answers(tmp_path: Path) -> None:
    right = shares(2, 6, 14)

    def draw(config: dict[str, Any]) -> dict[str, np.ndarray]:
        values = right(config)["intent_accuracy"]
        return {"intent_accuracy": values, "exact_match": np.zeros(40), "bleu": 30 * values}

    found = {each.score.label: each for each in verdicts(study_with(tmp_path, GRID, draw))}
    alone = 2 * binom.cdf(2, 16, 0.5)
    assert found["intent"].p == pytest.approx(alone * 2, rel=0.01)  # BLEU's is the smallest
    assert (
        found["exact match"].p == 1.0 and found["exact match"].verdict == "no completion differs"
    )
    assert found["BLEU"].second - found["BLEU"].first == pytest.approx(9.0)
    assert [each.score.label for each in shown_on_terminal(list(found.values()))] == ["intent"]


GRID: dict[str, list[Any]] = {"lora.r": [2, 8]}


def test_equal_answers_have_no_interval_and_no_line(tmp_path: Path) -> None:
    (found,) = verdicts(study_with(tmp_path, GRID, shares(0, 0, 0)))
    assert (found.interval, found.p, found.verdict) == ("", 1.0, "no completion differs")
    assert list(shown_on_terminal([found])) == []


@pytest.mark.parametrize("answers", [29, 0])
def test_fewer_than_thirty_answers_have_no_verdict(tmp_path: Path, answers: int) -> None:
    assert verdicts(study_with(tmp_path, GRID, shares(1, 2, 3, answers))) == []


def test_answers_without_scores_have_no_verdict(tmp_path: Path) -> None:
    study = study_with(tmp_path, GRID, shares(2, 6, 14))
    file = first_evaluation(study.trials()[0]).generations_file
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for damaged in ({"scores": 3}, {"scores": {"rougeL": "x"}}, {}):
        text = "".join(json.dumps({**r, "scores": {}} | damaged) + "\n" for r in records)
        file.write_text(text)
        assert text_verdicts(make_comparison(read_study(study).trials)) == []


@pytest.mark.parametrize("differ", [1, 2, 3, 6])
def test_few_answers_that_differ_have_a_finite_interval(differ: int) -> None:
    """About as wide as the exact interval of such a share (Clopper and Pearson)."""
    count = 64
    differences = np.zeros((1, count))
    differences[0, :differ] = 1.0
    low, high = compare(differences, np.ones(count)).interval()
    exact = binomtest(differ, count).proportion_ci(method="exact")
    assert -0.1 < low <= differ / count <= high < 0.25
    assert 0.7 < (high - low) / (exact.high - exact.low) < 1.2
