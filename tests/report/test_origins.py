"""Trials on other data, another model or other code are left out or noted."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.studies import ENVIRONMENT, Values, simulated_study, write_base, write_config
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.trial_rows import TrialRow, read_study
from tinyllama_lab.report.caveats import caveats
from tinyllama_lab.report.findings import finding
from tinyllama_lab.report.page.origin import environments
from tinyllama_lab.report.table import print_table
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder

Amend = Callable[[Values, dict[str, Any], Any], None]  # swept values, configuration, result


def amended(study: StudyFolder, change: Amend) -> list[TrialRow]:
    """The rows of a study after each trial's configuration and result were changed.

    Trials keep the times of their results.
    """
    for trial in study.trials():
        config, (result, _) = trial.read_config(), trial.read_result()
        assert result is not None
        ended = trial.result_file.stat().st_mtime
        change({"r": config["lora"]["r"], "n": config["data"]["n"]}, config, result)
        write_config(trial, config)
        trial.commit(result)
        os.utime(trial.result_file, (ended, ended))
    return read_study(study).trials


def age(trial: TrialFolder) -> None:
    os.utime(trial.result_file, (1, 1))


def said(rows: list[TrialRow]) -> tuple[list[str], str]:
    """Return the verdicts and the notes."""
    found = make_comparison(rows)
    effects = main_effects(found)
    answers = [finding(effect, Settings.margin) for effect in effects]
    return answers, " | ".join(caveats(found, effects, rank_cells(found)))


def table(rows: list[TrialRow]) -> str:
    text = io.StringIO()
    print_table(rows, Console(file=text, width=200), StudyFolder(Path("sweeps"), "s"))
    return text.getvalue()


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return simulated_study(tmp_path, {"lora.r": [4, 16], "data.n": [250, 500]}, (0, 1), steps=0)


# ---- data and models that were changed ---------------------------------------------------------


def test_other_training_rows_under_the_same_settings_are_not_compared(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        if values == {"r": 4, "n": 250}:
            result.data["train_fingerprint"] = "other"

    for trial in study.trials():
        config = trial.read_config()
        if (config["lora"]["r"], config["data"]["n"]) == (4, 250):
            age(trial)
    rows = amended(study, change)
    found = make_comparison(rows)
    assert len(found.trials) == 6
    reason = (
        "it was trained on other rows (other) than the newest trial with the same data settings"
    )
    assert found.left_out == [f"r=4 n=250 seed={seed}: {reason}" for seed in (0, 1)]
    assert reason in said(rows)[1]


@pytest.mark.parametrize("subset", ["nested", "seed"])
def test_rows_that_each_seed_draws_are_compared(study: StudyFolder, subset: str) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        config["data"]["subset"] = subset
        if subset == "seed":
            result.data["train_fingerprint"] += str(config["seed"])

    rows = amended(study, change)
    assert len(make_comparison(rows).trials) == 8
    assert ("data.subset=seed draws others for each seed" in said(rows)[1]) == (subset == "nested")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"source": "file", "path": "mine.jsonl"}, "its data file was changed since"),
        ({"source": "hub", "repo": "owner/name"}, "its data set was changed since"),
        ({"source": "travel"}, "its data set was changed since"),
    ],
)
def test_more_rows_of_a_set_that_was_changed_are_not_compared_with_fewer_of_the_old_one(
    study: StudyFolder, place: dict[str, str], reason: str
) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        config["data"] |= {**place, "identity": "old" if values["n"] == 250 else "new"}

    for trial in study.trials():
        if trial.read_config()["data"]["n"] == 250:
            age(trial)
    rows = amended(study, change)
    found = make_comparison(rows)
    assert {trial.settings["data.n"] for trial in found.trials} == {500} and found.keys == [
        "lora.r"
    ]
    assert all(text.endswith(reason) for text in found.left_out) and len(found.left_out) == 4
    text = table(rows)
    assert f"† not compared with the others. 4 trials: {reason}" in text
    assert text.count("done †") == 4
    head = next(line for line in text.splitlines() if "state" in line)
    assert head.split()[:2] == ["r", "seed"]  # no column of what is the same for all compared
    assert not any(row.is_best for row in rows if row.outdated)


def test_two_files_that_are_swept_are_compared(study: StudyFolder) -> None:
    """The files have different paths, and neither was changed."""

    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        name = "a" if values["n"] == 250 else "b"
        config["data"] |= {"source": "file", "path": f"{name}.jsonl", "identity": name, "n": "all"}

    found = make_comparison(amended(study, change))
    assert len(found.trials) == 8 and found.keys == ["lora.r", "data.path"]


def test_a_changed_model_is_noted(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        identity = "old" if values["r"] == 4 else "new"
        config["model"] |= {"source": "local", "path": "model", "identity": identity}
        result.model["revision"] = identity

    for trial in study.trials():
        if trial.read_config()["lora"]["r"] == 4:
            age(trial)
    rows = amended(study, change)
    assert {trial.settings["lora.r"] for trial in make_comparison(rows).trials} == {16}
    assert "4 trials: its model was changed since" in table(rows)
    assert any(row.is_best for row in rows)


def test_a_base_has_one_row_whatever_else_was_asked_of_it(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        config["eval"]["generations"] = 8 if values["r"] == 4 else 0

    amended(study, change)
    for trial in study.trials():
        write_base(study, trial.read_config(), [30.0, 40.0], [10, 10])
    rows = read_study(study).trials
    assert len({row.base.trial for row in rows if row.base}) == 2
    assert sum(row.is_base for row in rows) == 1


# ---- code, libraries, machines -----------------------------------------------------------------


def test_a_version_that_differs_with_a_level_is_noted_in_the_verdict(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        torch = "2.12.0" if values["r"] == 4 else "2.13.0"
        versions = {**ENVIRONMENT["versions"], "torch": torch}  # type: ignore[dict-item]
        result.environment = {**ENVIRONMENT, "versions": versions}

    answers, notes = said(amended(study, change))
    (rank,) = [text for text in answers if text.startswith("rank")]
    (rows,) = [text for text in answers if text.startswith("training rows")]
    assert "4 ran with torch 2.12.0, 16 with torch 2.13.0" in rank and "torch" not in rows
    assert "a part of the difference may come from that: run both with the same" in notes


def test_changes_that_were_not_committed_are_other_code(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        is_dirty = values["r"] == 16 and config["seed"] == 1
        diff = "abcdef123456" if is_dirty else None
        result.environment = {**ENVIRONMENT, "git_dirty": is_dirty, "git_diff": diff}

    answers, notes = said(amended(study, change))
    assert not any("commit" in text for text in answers)
    assert (
        "rank: 4 → 16: some pairs did not run with the same code (commit 01234567 and commit "
        "01234567 with changes abcdef123456)"
    ) in notes


def test_seeds_that_ran_on_other_machines_are_noted(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        hardware = "a GPU" if config["seed"] else "a processor"
        result.environment = {**ENVIRONMENT, "hardware": hardware}

    answers, notes = said(amended(study, change))
    assert not any("GPU" in text for text in answers)
    wanted = "the trials did not all run with the same machine: "
    assert re.search(wanted + r"a \w+ \(4 trials\) and a \w+ \(4 trials\)", notes)


def test_facts_that_an_older_result_lacks_are_no_difference(study: StudyFolder) -> None:
    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        result.environment = {} if values["r"] == 4 else dict(ENVIRONMENT)

    answers, notes = said(amended(study, change))
    assert not any("ran with" in text for text in answers) and "the same code" not in notes


# ---- weights of the base -----------------------------------------------------------------------


def test_a_quantization_question_says_what_the_weights_are(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"quant.kind": ["none", "nf4"]}, (0, 1), steps=0)

    def change(values: Values, config: dict[str, Any], result: Any) -> None:
        is_nf4 = config["quant"]["kind"] == "nf4"
        result.model["weights"] = f"{'nf4 of ' * is_nf4}Q4_1, dequantized"

    rows = amended(study, change)
    (text,) = said(rows)[0]
    assert "weights of the base: Q4_1, dequantized → nf4 of Q4_1, dequantized" in text
    assert "weights of the base: Q4_1, dequantized; nf4 of Q4_1, dequantized" in table(rows)
    assert "Q4_1, dequantized (2 trials)" in dict(environments(rows))["model.weights"]
