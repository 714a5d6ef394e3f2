"""The recommended setting, and how the terminal explains it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.report.test_contrasts import found, found_in, notes, study, truth
from tests.studies import Values, simulated_study
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.costs import noises
from tinyllama_lab.report.analysis.ranking import (
    RankedCell,
    front,
    rank_cells,
    rivals,
)
from tinyllama_lab.report.analysis.recommendation import advise
from tinyllama_lab.report.analysis.settings import DEFAULTS, Settings
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.findings import costs_in_words, print_findings
from tinyllama_lab.report.table import print_table, write_table
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State, TrialFolder

__all__ = ["found", "study"]  # fixtures


def said(cells: list[RankedCell], settings: Settings = DEFAULTS) -> str:
    told = advise(cells, settings)
    return " ".join([*told.sentences, *told.details])


def chosen(cells: list[RankedCell]) -> RankedCell:
    (one,) = [cell for cell in cells if cell.is_chosen]
    return one


def test_the_cheapest_that_cannot_be_told_apart_from_the_best_is_recommended(
    found: Comparison,
) -> None:
    by_memory = chosen(rank_cells(found, Settings(cost="memory")))
    assert by_memory.label == "r=8 n=512 quant=nf4"
    assert chosen(rank_cells(found, Settings(cost="time"))).label == "r=8 n=512 quant=none"


def test_a_wide_margin_admits_worse_settings_and_a_narrow_one_does_not(
    found: Comparison,
) -> None:
    """Ranks 8 and 32 are the same in truth, and so are none and nf4; rank 2 is 0.06 worse."""
    assert chosen(rank_cells(found, Settings(0.2, "size"))).label.startswith("r=2 n=512")
    strict = Settings(1e-6, "size")
    narrow = rank_cells(found, strict)
    good = [cell.label for cell in rivals(narrow)]
    assert chosen(narrow).is_best and 2 <= len(good) <= 4  # no other is as near as that
    assert all("n=512" in label and "r=2 " not in label for label in good)
    text = said(narrow, strict)
    assert "Take r=32 n=512 quant=nf4, or r=8 n=512" in text and "to save cost" in text
    assert "is cheaper, but its loss is more than 1e-06 nats per token higher" in text
    assert all(label in text for label in good)


def test_a_setting_that_is_shown_to_be_the_best_is_called_so(tmp_path: Path) -> None:
    study = simulated_study(
        tmp_path, {"lora.r": [2, 8]}, effect=lambda v: 2 / v["lora.r"], steps=0
    )
    cells = rank_cells(found_in(study))
    what, why, how_sure = advise(cells).sentences
    assert what == "Take r=8."
    assert "is the lowest of 2 settings; r=2 was shown to be worse" in why
    assert how_sure.startswith("How sure: provisional") and "on rows as hard as these" in how_sure
    losses, cost = advise(cells).details
    assert f"r=8 {cells[0].loss:.3f}; r=2 {cells[1].loss:.3f} (" in losses
    assert "Cost: r=8: 21.2 TFLOP of training, 9.4 MiB of adapter; r=2: 20.3 TFLOP" in cost


def test_the_sentence_has_its_numbers(found: Comparison) -> None:
    cells = rank_cells(found, Settings(cost="memory"))
    text, (best, taken) = said(cells, Settings(cost="memory")), (cells[0], chosen(cells))
    assert text.startswith("Take r=8 n=512 quant=nf4") and "MiB for one trial alone" in text
    assert best.is_best and taken.estimate is not None and taken is not best
    low, high = taken.estimate.interval(1 - 0.05 / 11)  # all comparisons with the best together
    within = "its held-out loss was shown to be within 0.02 nats per token of the lowest, that of"
    assert f"{within} {best.label}; it is the cheapest such setting" in text
    way = "lower or higher"  # three digits show no difference
    assert low < 0 < high < 0.02 and abs(taken.estimate.difference) < 0.0005
    assert (
        f"{best.label} {best.loss:.3f}; {taken.label} {taken.loss:.3f} (0.000 nats per token "
        f"{way}, 95 % interval for all 11 comparisons together: {-low:.3f} lower to {high:.3f} "
        "higher)"
    ) in text
    assert f"expect a loss of about {taken.expected:.3f} for {taken.label}" in text


def test_more_than_five_settings_that_are_as_good_are_counted(tmp_path: Path) -> None:
    ranks = {"lora.r": list(range(2, 12))}
    study = simulated_study(tmp_path, ranks, effect=lambda v: 2.0, steps=0)
    cells = rank_cells(found_in(study))
    good = rivals(cells)
    assert len(good) == 10
    (tied,) = [detail for detail in advise(cells).details if "apart" in detail]
    named = [f"r={r}" for r in range(2, 12) if re.search(rf"r={r}\b", tied)]
    assert "and 4 more" in tied and len(named) == 6  # five, and the best
    assert between_zero(advise(cells).details[0]) == ("lower", "higher")


def between_zero(text: str) -> tuple[str, str]:
    """Return the sides of zero on which the interval of the held-out losses ends."""
    found = re.search(r"95 % interval.*?: [\d.]+ (\w+) to [\d.]+ (\w+)", text)
    assert found, text
    return found.group(1), found.group(2)


def test_what_cannot_be_told_apart_has_an_interval_that_says_so(tmp_path: Path) -> None:
    """The plain 95 % interval excludes zero; the one for all settings together includes it."""
    ranks = {"lora.r": [2, 4, 8, 16, 32]}
    for seed in (0, 2, 4):
        study = simulated_study(
            tmp_path / str(seed),
            ranks,
            effect=lambda v, seed=seed: 2.0 - 0.004 * seed * (v["lora.r"] == 32),
            steps=0,
        )
        cells = rank_cells(found_in(study))
        told = advise(cells)
        take, why, _ = told.sentences
        if "cannot be told apart" in why:
            assert between_zero(told.details[0]) == ("lower", "higher")
            assert take.endswith("or r=32 if cost does not matter.") or "r=32" not in why


def test_no_setting_of_the_front_is_beaten(found: Comparison) -> None:
    cells = rank_cells(found)
    for cost in ("time", "memory", "size", "decode"):
        sign = -1 if cost == "decode" else 1

        def is_beaten(one: RankedCell, cost: str = cost, sign: int = sign) -> bool:
            return any(
                other.loss < one.loss and sign * other.costs[cost] <= sign * one.costs[cost]
                for other in cells
            )

        edge = {cell.label for cell in front(cells, cost)}
        assert edge and {cell.label for cell in cells if is_beaten(cell)}.isdisjoint(edge)
        assert edge <= {cell.label for cell in cells if not is_beaten(cell)}


def test_a_setting_whose_bad_runs_failed_is_not_recommended(tmp_path: Path) -> None:
    def lost(values: Values) -> State:
        wild = values["lora.r"] == 8 and values["seed"] > 0
        return State.DIVERGED if wild else State.DONE

    effect = lambda values: 1.9 if values["lora.r"] == 8 else 2.0  # noqa: E731
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, effect=effect, states=lost, steps=0)
    found = found_in(study)
    assert [cell.label for cell in rank_cells(found)] == ["r=2"]
    assert "1 setting lost a run that failed, and cannot be recommended" in notes(found)
    (effect,) = main_effects(found)
    assert effect.note == "2 of 3 runs with 8 ended without a score"


def test_more_seeds_of_one_setting_exclude_no_other(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [2, 4, 8]}, seeds=(0,), steps=0)
    study = simulated_study(tmp_path, {"lora.r": [8]}, seeds=(0, 1, 2), steps=0)
    found = found_in(study)
    cells = rank_cells(found)
    assert {cell.label for cell in cells} == {"r=2", "r=4", "r=8"}
    assert all(len(cell.trials) == 1 for cell in cells)
    assert "recommended on seed 0 alone: not every setting was run with the others" in notes(found)
    assert "lost" not in notes(found)


def test_a_setting_with_more_seeds_does_not_exclude_the_only_other_one(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [2]}, seeds=(0,), steps=0)
    study = simulated_study(tmp_path, {"lora.r": [8]}, seeds=(0, 1, 2), steps=0)
    assert {cell.label for cell in rank_cells(found_in(study))} == {"r=2", "r=8"}


def test_settings_on_other_seeds_are_left_out_and_counted(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [2, 4]}, seeds=(0, 1), steps=0)
    study = simulated_study(tmp_path, {"lora.r": [8]}, seeds=(2,), steps=0)
    found = found_in(study)
    assert {cell.label for cell in rank_cells(found)} == {"r=2", "r=4"}
    assert "not recommended, because run on other seeds: 1 of 3 settings" in notes(found)


def test_a_failed_run_on_another_model_excludes_no_setting(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [8, 64]}, seeds=(0,), steps=0)
    simulated_study(
        tmp_path,
        {"model.name": ["other"], "lora.r": [64]},
        seeds=(0,),
        states=lambda values: State.OOM,
        steps=0,
    )
    found = found_in(study)
    labels = {cell.label for cell in rank_cells(found)}
    assert labels == {"r=8 model=tiny_random", "r=64 model=tiny_random"}
    assert "lost a run" not in notes(found) and main_effects(found)[0].note == ""


def test_after_a_search_every_searched_setting_is_named_and_every_trial_counted(
    tmp_path: Path,
) -> None:
    study = simulated_study(
        tmp_path,
        {"lora.r": [4, 8], "train.lr": [1e-4, 1e-3]},
        seeds=(0,),
        states=lambda v: State.DONE if v["lora.r"] == 8 else State.PRUNED,
        steps=0,
    )
    found = found_in(study)
    assert {cell.label for cell in rank_cells(found)} == {"r=8 lr=0.0001", "r=8 lr=0.001"}
    assert "the best of 4 settings was chosen by these held-out rows" in notes(found)


def test_costs_within_noise_are_decided_by_size(tmp_path: Path) -> None:
    keys = {"lora.r": [8, 9]}  # 1 % apart in time
    study = simulated_study(tmp_path, keys, effect=lambda v: 2.0, example_noise=0.01, steps=0)
    assert chosen(rank_cells(found_in(study), Settings(0.5, "time"))).label == "r=8"


def test_trials_that_differ_in_nothing_swept_are_left_out(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [2, 8]}, seeds=(0,), steps=0)
    rows = read_study(study).trials
    twice = make_comparison([*rows, next(row for row in rows if not row.is_base)])
    assert len(twice.trials) == 1 and len(twice.left_out) == 2
    assert "differs in something else" in twice.left_out[0]


def test_a_single_setting_is_called_so(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [8]}, seeds=(0,), steps=0)
    assert said(rank_cells(found_in(study))).startswith("Only one setting")


def test_without_a_done_trial_there_is_no_recommendation(tmp_path: Path) -> None:
    study = simulated_study(
        tmp_path, {"lora.r": [2, 8]}, seeds=(0,), states=lambda v: State.FAILED, steps=0
    )
    assert said(rank_cells(found_in(study))).startswith("No recommendation")


# ---- on the terminal -----------------------------------------------------------------------


def printed(study: StudyFolder) -> str:
    text = io.StringIO()
    print_findings(study, Analysis(read_study(study)), Console(file=text, width=200))
    return text.getvalue()


def test_the_terminal_prints_a_verdict_for_every_question(study: StudyFolder) -> None:
    text = printed(study)
    assert text.startswith("Take ")
    assert "training rows: 128 → 512: 512 is better than 128, its loss 0.3" in text
    assert text.count("Loss in nats per token: how much each token (a piece of a word)") == 1
    assert "verdicts are corrected for 4 comparisons (Holm), the 95 % intervals are not" in text


def test_a_single_seed_is_mentioned(tmp_path: Path) -> None:
    assert "add seeds=3" in printed(
        simulated_study(tmp_path, {"lora.r": [2, 8]}, seeds=(0,), steps=0)
    )


def test_an_escape_in_a_value_does_not_reach_the_terminal(tmp_path: Path) -> None:
    keys = {"data.system": ["plain", "\x1b]0;title\x07 a\\|b <b>"]}
    study = simulated_study(tmp_path, keys, seeds=(0,), steps=0)
    assert "\x1b" not in printed(study)
    rows, text = read_study(study), io.StringIO()
    print_table(rows.trials, Console(file=text, width=200), study)
    write_table(study, rows)
    table = study.table_file.read_text()
    assert "\x1b" not in text.getvalue() + table and "&lt;b>" in table
    heads = next(line for line in table.splitlines() if line.startswith("|"))
    ends = re.compile(r"(?<!\\)(?:\\\\)*\|")  # not those that are text
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(ends.findall(line)) for line in lines} == {heads.count("|")}


def test_settings_are_checked() -> None:
    assert len(Settings(-1, cost="money", correction="none", pairs="some").problems()) == 4
    assert json.dumps(Settings().problems()) == "[]"


def test_trials_on_an_older_content_of_a_file_are_left_out(tmp_path: Path) -> None:
    """The same file has trials from before and after a change."""
    study = simulated_study(tmp_path, {"lora.r": [4, 8]}, (0,), truth, 32, steps=0)
    for trial in study.trials():
        config = trial.read_config()
        config["data"] |= {"path": "mine.jsonl", "identity": "old"}
        first, _ = trial.read_result()
        assert first is not None
        trial.write_config(config)
        trial.commit(first)
        newer = TrialFolder(trial.folder.with_name(f"new-{trial.name}-{trial.key[::-1]}"))
        shutil.copytree(trial.folder, newer.folder)
        config["data"]["identity"] = "new"
        newer.write_config(config)
        newer.commit(replace(first, key=newer.key))
        os.utime(trial.result_file, (1, 1))
    found = found_in(study)
    assert {trial.settings["data.identity"] for trial in found.trials} == {"new"}
    assert len(found.trials) == 2
    assert found.left_out == [f"r={r}: its data file was changed since" for r in (4, 8)]


# ---- costs ---------------------------------------------------------------------------------


def with_result(study: StudyFolder, **facts: Any) -> Comparison:
    """Return the study after changing the environment or the metrics of every result."""
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.environment |= facts
        trial.commit(result)
    return found_in(study)


def test_time_shared_in_a_pack_is_no_cost_of_a_setting(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"data.n": [128, 512]}, steps=0)
    (alone,) = main_effects(with_result(study, adapters_at_once=1))
    assert alone.costs["time"][1] == pytest.approx(4 * alone.costs["time"][0])
    (packed,) = main_effects(with_result(study, adapters_at_once=6))
    assert "time" not in packed.costs and "training compute x 4.00" in costs_in_words(packed)


def test_a_difference_within_measured_noise_decides_nothing(tmp_path: Path) -> None:
    """The seconds of equal trials differ by a half, so a third more is no difference."""
    study = simulated_study(tmp_path, {"lora.r": [4, 8]}, effect=lambda v: 2.0, steps=0)
    seconds = iter([10.0, 15.0, 12.0, 15.5, 19.0, 15.2])
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.metrics["perf/train_seconds"] = next(seconds)
        trial.commit(result)
    (effect,) = main_effects(found_in(study))
    assert effect.costs["time"][1] / effect.costs["time"][0] > 1.3
    assert "time" not in effect.moved


def test_noise_is_that_of_trials_of_one_setting(tmp_path: Path) -> None:
    """The expected noise is the pooled deviation of logarithms, computed by hand."""
    study = simulated_study(tmp_path, {"lora.r": [4, 8]}, seeds=(0, 1), steps=0)
    seconds = iter([10.0, 10.0 * math.e, 20.0, 20.0])
    for trial in study.trials():
        result, _ = trial.read_result()
        assert result is not None
        result.metrics["perf/train_seconds"] = next(seconds)
        trial.commit(result)
    noise = noises(found_in(study))["time"]
    assert noise.deviation == pytest.approx(math.sqrt(0.5 / 2)) and noise.freedom == 2
    assert noises(found_in(study))["compute"].ratio(1) == 1.05
