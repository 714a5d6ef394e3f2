"""Forgetting: losses on unrelated passages, and what the report says about them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.packs import QUIET, Lab
from tests.studies import first_evaluation, simulated_study, write_losses
from tinyllama_lab.core.evaluation.losses import PASSAGES
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.caveats import caveats
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import evaluation_key

TEXTS = [json.loads(line)["text"] for line in PASSAGES.read_text().splitlines()]


def test_the_passages_are_short_and_of_several_kinds() -> None:
    kinds = Counter(json.loads(line)["kind"] for line in PASSAGES.read_text().splitlines())
    assert len(set(TEXTS)) == 24 and len(kinds) == 5
    assert all(30 <= len(text.split()) <= 80 for text in TEXTS)


@torch.no_grad()
def nats_of(base: Base, text: str) -> float:
    """Return the loss of a text without its first token, through transformers alone."""
    ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]])
    loss = base.model(input_ids=ids, labels=ids).loss
    return float(loss) * (ids.shape[1] - 1)


def test_base_and_adapter_are_scored_on_the_passages(lab: Lab, tiny_base: Base) -> None:
    plain, asked = lab.trial(QUIET), lab.trial({**QUIET, "eval.general": True})
    first, second = lab.run([plain, asked])
    expected = [nats_of(tiny_base, text) for text in TEXTS]
    base = lab.base_trial(asked)
    file = first_evaluation(base).general_file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    tokens = sum(len(text.encode()) - 1 for text in TEXTS)  # nothing predicts the first
    size = sum(len(text[1:].strip().encode()) for text in TEXTS)
    metrics = second.metrics
    assert metrics["base/general_loss"] == pytest.approx(sum(expected) / tokens, rel=1e-5)
    bits = sum(expected) / math.log(2) / size
    assert metrics["base/general_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert metrics["eval/general_loss"] != metrics["base/general_loss"]
    assert f"eval/{second.evaluation}/general.jsonl" in second.files
    assert not first_evaluation(plain).general_file.exists()
    assert not any("general" in name for name in first.metrics)
    assert second.metrics["eval/loss"] == pytest.approx(first.metrics["eval/loss"], rel=1e-5)


def test_general_text_changes_the_key_only_if_switched_on(configure: Any) -> None:
    before = configure()
    del before["eval"]["general"]
    key = evaluation_key(before["eval"])
    assert key == evaluation_key(configure()["eval"])
    assert key != evaluation_key(configure({"eval.general": True})["eval"])


# ---- the report ----------------------------------------------------------------------------


def study_that_forgot(root: Path, lost: float, seeds: Any = (0, 1, 2)) -> StudyFolder:
    """Passages of 50 tokens; adapters lost so many nats per token on average."""
    study = simulated_study(root, {"lora.r": [2, 8]}, seeds=seeds, steps=0)
    generator = np.random.default_rng(3)
    base_nats = generator.uniform(100, 200, 24)
    for row in read_study(study).trials:
        noise = 0.0 if row.is_base else 50 * (lost + generator.normal(0, 0.05, 24))
        write_losses(row.trial, base_nats + noise, [50] * 24)
        first_evaluation(row.trial).per_example_file.rename(
            first_evaluation(row.trial).general_file
        )
        if not row.is_base:
            write_losses(row.trial, generator.normal(80, 5, 64), [40] * 64)
    return study


def notes(study: StudyFolder) -> list[str]:
    found = make_comparison(read_study(study).trials)
    return caveats(found, [], rank_cells(found))


def test_the_report_says_what_was_lost_against_the_base(tmp_path: Path) -> None:
    study = study_that_forgot(tmp_path, 0.12, seeds=(0,))
    cells = rank_cells(make_comparison(read_study(study).trials))
    (chosen,) = next(cell for cell in cells if cell.is_chosen).trials
    base = chosen.row.base
    assert base is not None
    ours, theirs = (
        [json.loads(line)["loss"] for line in evaluations.general_file.read_text().splitlines()]
        for evaluations in (chosen.row.evaluations, base)
    )
    differences = (np.array(ours) - np.array(theirs)) / 50
    (said,) = [text for text in notes(study) if "unrelated text" in text]
    assert differences.mean() > 0
    label = next(cell.label for cell in cells if cell.is_chosen)
    start = f"in brackets): {label}: {differences.mean():.3f} nats per token higher ("
    low, high = (float(word) for word in said.split(start)[1].split()[0:3:2])
    expected = stats.t.interval(0.95, 23, differences.mean(), stats.sem(differences))
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert "not over other runs" in said


def test_several_seeds_are_in_its_interval(tmp_path: Path) -> None:
    (said,) = [t for t in notes(study_that_forgot(tmp_path, 0.12)) if "unrelated text" in t]
    assert "over other runs" not in said
    assert all(f"r={rank}: 0.1" in said for rank in (2, 8))


@pytest.mark.parametrize("damage", ["", "{", None])
def test_without_losses_of_base_and_adapter_nothing_is_reported(
    tmp_path: Path, damage: str | None
) -> None:
    study = study_that_forgot(tmp_path, 0.12)
    base = next(row for row in read_study(study).trials if row.is_base).evaluations.general_file
    base.unlink() if damage is None else base.write_text(damage)
    assert not [text for text in notes(study) if "unrelated" in text]
