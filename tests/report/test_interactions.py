"""Whether the effect of a setting depends on another, in studies whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.report.test_ranking import printed
from tests.studies import Values, simulated_study
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import DEPENDS, main_effects
from tinyllama_lab.report.analysis.interactions import interactions
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.claims import EVERY_PAIR, Claim, effect
from tinyllama_lab.report.page import page
from tinyllama_lab.study.study import StudyFolder

GRID = {"lora.r": [4, 8], "data.n": [32, 64]}
CALM = {"seed_noise": 0.003, "example_noise": 0.03}


def crossed(values: Values) -> float:
    """Return a study in which rank 8 is 0.05 better at 32 rows and 0.05 worse at 64."""
    sign = -1 if (values["lora.r"] == 8) == (values["data.n"] == 32) else 1
    return 2.0 + 0.025 * sign


def analysed(study: StudyFolder) -> Analysis:
    return Analysis(read_study(study))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    root = tmp_path_factory.mktemp("studies")
    return simulated_study(root, GRID, effect=crossed, steps=0, **CALM)


def test_the_difference_of_differences_equals_that_of_the_means(study: StudyFolder) -> None:
    found = make_comparison(read_study(study).trials)
    (test,) = interactions(found)
    means = {
        (t.row.swept["lora.r"], t.row.swept["data.n"], t.seed): t.losses.sum() / t.tokens.sum()
        for t in found.trials
    }
    by_hand = np.mean(
        [
            (means[8, 64, seed] - means[4, 64, seed]) - (means[8, 32, seed] - means[4, 32, seed])
            for seed in range(3)
        ]
    )
    assert 2 * test.half.difference == pytest.approx(by_hand, abs=1e-12)
    assert (
        test.is_shown
        and f"from n=32 to n=64 the difference changes by {by_hand:+.3f}" in test.sentence
    )


def test_opposite_effects_are_distinguished_and_never_called_equivalent(
    study: StudyFolder,
) -> None:
    (average,) = [
        e for e in main_effects(make_comparison(read_study(study).trials)) if e.key == "lora.r"
    ]
    assert average.verdict == "equivalent within margin"  # what the average alone would say
    rank = next(each for each in analysed(study).effects if each.key == "lora.r")
    assert rank.verdict == DEPENDS
    assert [(level.where, level.verdict) for level in rank.levels] == [
        ({"data.n": 32}, "better"),
        ({"data.n": 64}, "worse"),
    ]
    text = printed(study)
    assert "equivalent within" not in text
    assert "rank: 4 → 8: which is better depends on n: at n=32, 8 is better than 4 (0.0" in text
    assert "; at n=64, 8 is worse than 4 (0.0" in text


def test_a_claim_is_not_answered_by_an_average_of_opposites(study: StudyFolder) -> None:
    find = effect("lora.r", 4, 8)
    claim = Claim("R", "r 8 gives little", {}, "", find)
    assert DEPENDS in find([Analysis(read_study(study), EVERY_PAIR)], claim).value


def test_an_effect_that_is_the_same_everywhere_keeps_its_verdict(tmp_path: Path) -> None:
    grid = {"lora.r": [4, 8], "quant.kind": ["none", "nf4"]}

    def same(values: Values) -> float:
        return 2.0 - 0.05 * (values["lora.r"] == 8)

    analysis = analysed(simulated_study(tmp_path, grid, effect=same, steps=0, **CALM))
    assert not any(test.is_shown for test in analysis.interactions)
    rank = next(each for each in analysis.effects if each.key == "lora.r")
    assert rank.verdict == "better" and not rank.levels


def test_an_effect_of_another_size_and_one_sign_keeps_its_verdict(tmp_path: Path) -> None:
    def larger(values: Values) -> float:
        return 2.0 - (values["lora.r"] == 8) * (0.2 if values["data.n"] == 64 else 0.08)

    analysis = analysed(simulated_study(tmp_path, GRID, effect=larger, steps=0, **CALM))
    (test,) = analysis.interactions
    assert test.is_shown
    rank = next(each for each in analysis.effects if each.key == "lora.r")
    assert rank.verdict == "better"


def test_an_average_within_the_margin_is_not_equivalent_where_a_part_is_beyond_it(
    tmp_path: Path,
) -> None:
    def once(values: Values) -> float:  # 0.03 at 64 rows, and almost nothing at 32
        return 2.0 - (values["lora.r"] == 8) * (0.03 if values["data.n"] == 64 else 0.002)

    calm = {"seed_noise": 0.0005, "example_noise": 0.005}
    analysis = analysed(simulated_study(tmp_path, GRID, effect=once, steps=0, **calm))
    rank = next(each for each in analysis.effects if each.key == "lora.r")
    assert [level.verdict for level in rank.levels] == ["equivalent within margin", "better"]


def test_every_requested_pair_is_tested(tmp_path: Path) -> None:
    """The steps 2 to 8 and 8 to 32 do the same everywhere; what 2 to 32 does is -0.1 and +0.1."""

    def turned(values: Values) -> float:
        sign = 1 if values["lora.dropout"] else -1
        return 2.0 + 0.05 * sign * math.log(values["lora.r"] / 2, 4)

    grid = {"lora.r": [2, 8, 32], "lora.dropout": [0.0, 0.1]}
    study = simulated_study(tmp_path, grid, effect=turned, steps=0, **CALM)
    every = Analysis(read_study(study), EVERY_PAIR).effects
    ends = next(each for each in every if (each.first, each.second) == (2, 32))
    assert ends.verdict == DEPENDS
    assert [level.verdict for level in ends.levels] == ["better", "worse"]


def test_a_dependence_that_only_the_ends_show_is_found_whichever_key_comes_first(
    tmp_path: Path,
) -> None:
    """Each step of the rank changes what dropout does by 0.025, too little to be shown alone."""

    def turned(values: Values) -> float:
        return 2.0 + values["lora.dropout"] * 0.25 * (math.log2(values["lora.r"]) - 3)

    grid = {"lora.r": [2, 4, 8, 16, 32], "lora.dropout": [0.0, 0.1]}
    noise = {"seed_noise": 0.012, "example_noise": 0.02}
    study = simulated_study(tmp_path, grid, effect=turned, steps=0, **noise)
    analysis = analysed(study)
    shown = {(test.first, test.second) for test in analysis.interactions if test.is_shown}
    assert (2, 32) in shown and not shown & {(2, 4), (4, 8), (8, 16), (16, 32)}
    dropout = next(each for each in analysis.effects if each.key == "lora.dropout")
    assert dropout.verdict == DEPENDS


def test_every_two_keys_and_all_steps_of_both_are_tested_once(tmp_path: Path) -> None:
    grid = {"lora.r": [2, 4, 8], "data.n": [32, 64], "quant.kind": ["none", "nf4"]}
    found: Comparison = make_comparison(
        read_study(simulated_study(tmp_path, grid, (0,), steps=0)).trials
    )
    asked = [(t.key, t.first, t.second, t.other, t.low, t.high) for t in interactions(found)]
    ranks, rows, bases = 3, 1, 1  # 2 to 4, 4 to 8, 2 to 8
    assert len(asked) == len(set(asked)) == ranks * rows + ranks * bases + rows * bases
    assert main_effects(found) and interactions(make_comparison([])) == []


def test_the_page_says_on_what_a_verdict_depends_and_marks_equal_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")

    def crossed_or_alike(values: Values) -> float:  # ranks 8 and 16 are the same
        return crossed({**values, "lora.r": min(values["lora.r"], 8)})

    grid = {"lora.r": [4, 8, 16], "data.n": [32, 64]}
    study = simulated_study(tmp_path, grid, effect=crossed_or_alike, steps=0, **CALM)
    path = page.write_report(study, Analysis(read_study(study)))
    text = " ".join(path.read_text(encoding="utf-8").split())
    verdicts = text.partition('id="verdicts"')[2].partition('id="effects"')[0]
    assert "which is better depends on n" in verdicts and "rank: 4 → 8 at n=64" in verdicts
    assert "rank 4 → 8: from n=32 to n=64 the difference changes by" in verdicts
    best = {cell.label for cell in analysed(study).cells if cell.is_good_enough}
    assert best >= {"r=8 n=32", "r=16 n=32"}
    assert text.count('<tr class="rival">') == 3 * len(best) - 1  # one is the best itself
    assert 'data-chart="level-lora.r"' in text and 'data-chart="heat"' in text
