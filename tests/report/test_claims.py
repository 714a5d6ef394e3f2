"""Published numbers beside what was measured, and what may not be compared."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.studies import simulated_study
from tinyllama_lab.report.__main__ import main
from tinyllama_lab.report.claims import CLAIMS, print_claims

DOLLY: dict[str, list[Any]] = {"model.name": ["tinyllama"], "data.name": ["dolly"]}


R3: dict[str, list[Any]] = {
    **DOLLY,
    "data.mask": ["all"],
    "data.style": ["instruction_response"],
    "lora.targets": ["attention_qv"],
    "train.epochs": [3],
}


def lines(root: Path) -> dict[str, str]:
    """Claim to the rest of its line."""
    text = io.StringIO()
    print_claims(root, Console(file=text, width=400))
    found = text.getvalue().splitlines()
    return {
        claim.text: next(line for line in found if claim.text in line and claim.project in line)
        for claim in CLAIMS
    }


def test_without_studies_nothing_is_measured(tmp_path: Path) -> None:
    found = lines(tmp_path)
    assert len(found) == len(CLAIMS)
    assert all("not measured here" in line for line in found.values())


def test_the_same_experiment_is_compared_with_its_interval(tmp_path: Path) -> None:
    keys = {**R3, "lora.r": [8, 16], "data.n": [1500, 3000]}
    simulated_study(tmp_path, keys, steps=0)
    found = lines(tmp_path)
    loss = found["loss 1.698 with r 8, n 1500"]
    assert " to " in loss and loss.rstrip().endswith("yes, but for the held-out rows")
    rows = found["3,000 rows give little over 1,500"]
    assert "better" in rows and rows.rstrip().endswith("yes")
    assert "not measured here" in found["2.25 M trainable"]


def test_a_loss_under_another_mask_is_no_measurement_of_the_claim(tmp_path: Path) -> None:
    keys = {**R3, "data.mask": ["response"], "lora.r": [8, 16], "data.n": [1500]}
    simulated_study(tmp_path, keys, steps=0)
    found = lines(tmp_path)
    assert "not measured here" in found["loss 1.698 with r 8, n 1500"]
    assert "no: data.mask=response, not all" in found["r 16 gives little over r 8"]


def test_another_model_is_shown_and_called_incomparable(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [8, 16]}, steps=0)
    found = lines(tmp_path)["r 16 gives little over r 8"]
    assert "no: model.name=" in found and "not tinyllama" in found


def test_sensitivity_to_the_learning_rate_is_a_difference_of_differences(tmp_path: Path) -> None:
    def effect(values: dict[str, Any]) -> float:
        steep = 0.2 if values["quant.kind"] == "nf4" else 0.05
        return 2.0 + steep * math.log10(values["train.lr"] / 1e-4)

    keys = {**DOLLY, "quant.kind": ["none", "nf4"], "train.lr": [1e-4, 1e-3]}
    simulated_study(tmp_path, keys, effect=effect, example_noise=0.01, seed_noise=0.001, steps=0)
    found = lines(tmp_path)["4-bit is more sensitive to the learning rate"]
    measured = float(found.split("nats")[0].split()[-1])
    assert measured == pytest.approx(0.15, abs=0.02)
    assert "none +0.0" in found and ("nf4 +0.2" in found or "nf4 +0.1" in found)


def test_a_damaged_study_does_not_keep_the_others_from_speaking(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [8, 16]}, name="good", steps=0)
    bad = simulated_study(tmp_path, {"lora.r": [8, 16]}, name="bad", seeds=(0,), steps=0)
    bad.trials()[0].config_file.write_text("a: [")
    assert "nats" in lines(tmp_path)["r 16 gives little over r 8"]


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["claims", f"sweeps_dir={tmp_path}"])
    assert "comparable?" in capsys.readouterr().out
