"""The spread between seeds that a study takes from other studies, on files of known losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.studies import first_evaluation, simulated_study
from tinyllama_lab.report.analysis import earlier
from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.luck import (
    PRIOR,
    PRIOR_FREEDOM,
    Seeded,
    SeedSpread,
    seed_spread,
)
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.study.study import StudyFolder

RANKS = {"lora.r": [4, 8, 16]}


def found(study: StudyFolder) -> Comparison:
    return make_comparison(read_study(study).trials)


def once(root: Path, **more: object) -> Comparison:
    """Return a study whose settings were run with one seed."""
    return found(simulated_study(root, {"lora.r": [4, 8]}, seeds=(7,), name="once", **more))  # type: ignore[arg-type]


def losses(study: StudyFolder) -> np.ndarray:
    """Return the losses `[settings, seeds]`, read from the results."""
    cells: dict[str, list[tuple[int, float]]] = {}
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        config = trial.read_config()
        name = str([config["lora"]["r"], config["data"]["n"]])
        cells.setdefault(name, []).append((config["seed"], result.metrics["eval/loss"]))
    return np.array([[loss for _, loss in sorted(each)] for each in cells.values()])


def block_variance(table: np.ndarray) -> tuple[float, int]:
    """Return the residual variance of a two-way table and its degrees of freedom."""
    apart = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float((apart**2).sum() / freedom), freedom


def test_the_spread_is_pooled_over_studies_and_named(tmp_path: Path) -> None:
    first = simulated_study(tmp_path, RANKS, seeds=(0, 1, 2), name="a", seed_noise=0.02)
    second = simulated_study(tmp_path, {"lora.r": [4, 8]}, seeds=(3, 4), name="b", seed_noise=0.05)
    parts = [block_variance(losses(study)) for study in (first, second)]
    spread = seed_spread(once(tmp_path))
    total = sum(freedom for _, freedom in parts)
    assert total == 5 and spread.freedom == total and spread.cells == 2
    assert spread.typical == pytest.approx(sum(v * f for v, f in parts) / total)
    assert spread.source == "measured in the studies a, b: 5 settings with 2 to 3 seeds each"
    (effect,) = main_effects(found(StudyFolder(tmp_path, "once")))
    assert "the studies a, b" in effect.estimate.luck.source
    assert effect.estimate.luck.freedom == 5


def test_few_runs_are_pooled_with_what_is_assumed(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [4, 8]}, name="few", seed_noise=0.1)
    variance, freedom = block_variance(losses(study))
    spread = seed_spread(once(tmp_path))
    assert freedom == 2 and spread.freedom == 6 and spread.measured == pytest.approx(2 / 6)
    assert spread.typical == pytest.approx((2 * variance + PRIOR_FREEDOM * PRIOR**2) / 6)
    assert spread.source == (
        "measured in the study few: 2 settings with 3 seeds each; so few that the assumed spread "
        "counts too"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"lora.variant": ["rslora"]},
        {"quant.kind": ["nf4"]},
        {"data.identity": ["2"]},
        {"model.identity": ["2"]},
    ],
    ids=str,
)
def test_studies_on_another_base_or_data_are_not_used(
    tmp_path: Path, other: dict[str, list]
) -> None:
    simulated_study(tmp_path, RANKS | other, name="other", seed_noise=0.1)
    assert seed_spread(once(tmp_path)).source == "assumed, not measured here"


def test_studies_on_other_heldout_rows_are_not_used(tmp_path: Path) -> None:
    simulated_study(tmp_path, RANKS, name="rows", facts={"eval_fingerprint": "e1"})
    assert seed_spread(once(tmp_path)).typical == PRIOR**2


def test_settings_with_about_as_many_rows_come_first(tmp_path: Path) -> None:
    near = simulated_study(tmp_path, RANKS | {"data.n": [400]}, name="near", seed_noise=0.01)
    simulated_study(tmp_path, RANKS | {"data.n": [5000]}, name="far", seed_noise=0.2)
    spread = seed_spread(once(tmp_path))  # of 500 rows
    assert spread.typical == pytest.approx(block_variance(losses(near))[0])
    assert "the study near" in spread.source
    for trial in near.trials():
        trial.result_file.unlink()
    assert "the study far" in seed_spread(found(StudyFolder(tmp_path, "once"))).source


def test_settings_with_about_such_a_learning_rate_come_first(tmp_path: Path) -> None:
    """The spread is larger at a higher rate; the study that asks trained at 0.003."""
    near = simulated_study(
        tmp_path, RANKS | {"train.lr": [2e-3]}, name="near", seed_noise=0.01, seeds=(0, 1, 2)
    )
    far = simulated_study(tmp_path, RANKS | {"train.lr": [1e-2]}, name="far", seed_noise=0.2)
    one = once(tmp_path)
    assert one.trials[0].settings["train.lr"] == 3e-3
    spread = seed_spread(one)
    assert spread.typical == pytest.approx(block_variance(losses(near))[0])
    assert spread.source == "measured in the study near: 3 settings with 3 seeds each"
    for trial in near.trials():
        trial.result_file.unlink()
    variance, freedom = block_variance(losses(far))
    spread = seed_spread(found(StudyFolder(tmp_path, "once")))
    pooled = (variance * freedom + PRIOR**2 * PRIOR_FREEDOM) / (freedom + PRIOR_FREEDOM)
    assert spread.typical == pytest.approx(pooled) and spread.freedom == freedom + PRIOR_FREEDOM
    assert spread.source.endswith(
        "of other learning rates or numbers of training rows, so the assumed spread counts too"
    )


@pytest.mark.parametrize("cells", [3, 6])
def test_a_setting_that_nearly_diverged_is_left_out(cells: int) -> None:
    generator = np.random.default_rng(2)
    block = 0.03 * generator.normal(size=(cells, 3))
    wild = 0.5 * np.array([[1.0, -1.0, 0.2]])
    names = [str(cell) for cell in range(cells)]
    rows = dict(zip(names, np.vstack([block[:-1], wild]), strict=True))
    spread = SeedSpread.of_others(Seeded({"a": rows}))
    variance, freedom = block_variance(block[:-1])
    known = freedom >= PRIOR_FREEDOM
    prior = 0.0 if known else PRIOR_FREEDOM
    pooled = (variance * freedom + prior * PRIOR**2) / (freedom + prior)
    assert spread.typical == pytest.approx(pooled)
    assert "1 setting of far larger spread left out" in spread.source


def test_a_large_spread_of_all_settings_stays(tmp_path: Path) -> None:
    block = 0.3 * np.random.default_rng(3).normal(size=(5, 4))
    rows = {str(cell): row for cell, row in enumerate(block)}
    spread = SeedSpread.of_others(Seeded({"a": rows}))
    assert spread.typical == pytest.approx(block_variance(block)[0])


def test_seeds_of_the_study_itself_come_first(tmp_path: Path) -> None:
    simulated_study(tmp_path, RANKS, name="other", seed_noise=0.1)
    own = found(simulated_study(tmp_path, RANKS, name="own"))
    assert seed_spread(own).source == "measured in this study"


def test_copies_are_no_new_evidence(tmp_path: Path) -> None:
    """The same study under another name, and its runs scored on more rows with more seeds."""
    for name, more in (("a", {}), ("b", {}), ("c", {"data.eval_n": [127]})):
        seeds = (0, 1, 2, 3) if name == "c" else (0, 1, 2)
        study = simulated_study(tmp_path, RANKS | more, seeds=seeds, name=name, seed_noise=0.05)
    spread = seed_spread(once(tmp_path))
    variance, freedom = block_variance(losses(study))
    assert spread.freedom == freedom == 6
    assert spread.typical == pytest.approx(variance)
    assert spread.source == "measured in the study c: 3 settings with 4 seeds each"


def test_a_damaged_study_is_skipped(tmp_path: Path) -> None:
    simulated_study(tmp_path, RANKS, name="good")
    for name in ("a", "b", "c"):
        for trial in simulated_study(tmp_path, RANKS, name=name).trials():
            losses_file = first_evaluation(trial).per_example_file
            files = {"a": trial.config_file, "b": trial.result_file, "c": losses_file}
            files[name].write_bytes(b"\x00{not: [what it was")
    simulated_study(tmp_path, RANKS, name="d").tuned_file.write_text("{")
    (tmp_path / "no study, a file").write_text("x")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "trials").write_text("a file")
    assert seed_spread(once(tmp_path)).source.startswith("measured in the study good:")


def test_studies_that_turn_out_useless_count_as_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six trials that may be read, a study with one seed takes four."""
    simulated_study(tmp_path, {"lora.r": [2, 4, 8, 16]}, seeds=(0,), name="a")
    simulated_study(tmp_path, {"lora.r": [4, 8]}, seeds=(0, 1), name="b")
    one = once(tmp_path)
    monkeypatch.setattr(earlier, "MOST_TRIALS", 6)
    assert seed_spread(one).source == "assumed, not measured here"
    seed_spread.cache_clear()
    monkeypatch.setattr(earlier, "MOST_TRIALS", 8)
    assert "the study b" in seed_spread(one).source


def test_fifty_studies_are_pooled(tmp_path: Path) -> None:
    for number in range(50):
        small = {"examples": 16, "steps": 0, "with_base": False, "prompts": ()}
        keys = {"lora.r": [4, 8], "lora.dropout": [number / 100]}  # no copies of each other
        simulated_study(tmp_path, keys, name=f"s{number}", **small)  # type: ignore[arg-type]
    one = once(tmp_path)
    spread = seed_spread(one)
    assert spread.freedom == 100 and "s0, s1, s10 and 47 more: 100 settings" in spread.source


@pytest.mark.parametrize("deviation", [0.01, 0.03, 0.06])
def test_the_interval_of_one_seed_contains_the_truth(deviation: float) -> None:
    """Other studies of the same spread: two with four settings and three seeds each."""
    generator, held, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        studies = {
            name: {
                str(cell): row
                for cell, row in enumerate(deviation * generator.normal(size=(4, 3)))
            }
            for name in "ab"
        }
        luck = SeedSpread.of_others(Seeded(studies)).luck(["x"], ["y"], 1)
        difference = deviation * (generator.normal() - generator.normal())
        held += abs(difference) <= stats.t.ppf(0.975, luck.freedom) * luck.variance**0.5
    assert 0.93 <= held / draws <= 0.97


def test_intervals_of_few_studies_contain_the_truth_if_the_assumption_holds() -> None:
    """The true spread is drawn from what is assumed; one study has two settings, three seeds."""
    generator, held, draws = np.random.default_rng(1), 0, 4000
    for _ in range(draws):
        variance = PRIOR**2 * PRIOR_FREEDOM / stats.chi2.rvs(PRIOR_FREEDOM, random_state=generator)
        block = np.sqrt(variance) * generator.normal(size=(2, 3))
        spread = SeedSpread.of_others(Seeded({"a": {"x": block[0], "y": block[1]}}))
        luck = spread.luck(["p"], ["q"], 1)
        difference = np.sqrt(2 * variance) * generator.normal()
        held += abs(difference) <= stats.t.ppf(0.975, luck.freedom) * luck.variance**0.5
    assert 0.935 <= held / draws <= 0.965
