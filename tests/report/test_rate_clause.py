"""What a verdict says about the learning rates of the trials that it compares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.studies import Values, simulated_study
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.analysis.tuned import untuned_sentence


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.epochs", [1, 2]),
        ("train.max_steps", [9, 18]),
        ("lora.r", [2, 4]),
        ("lora.init", ["default", "eva"]),
        ("lora.rank_pattern", [{"q_proj": 2}, {"q_proj": 4}]),
        ("train.loraplus_ratio", [None, 16.0]),
        ("train.optimizer", ["adamw", "lion"]),
    ],
)
def test_settings_compared_at_one_learning_rate_are_called_untuned(
    tmp_path: Path, key: str, values: list[Any]
) -> None:
    study = simulated_study(tmp_path, {key: values}, steps=0)
    found = make_comparison(read_study(study).trials)
    (effect,) = main_effects(found)
    assert effect.rates == "both at learning rate 0.003, which was not tuned"
    sentence = untuned_sentence([trial.row for trial in found.trials])
    assert sentence.startswith("All ran at learning rate 0.003, which was not tuned")


def test_a_verdict_over_a_grid_of_learning_rates_is_called_an_average(tmp_path: Path) -> None:
    """Losses of 2.3, 2.15 and 2.0 by hand: 0.3 less for ten times the rate, and no noise."""

    def falls(values: Values) -> float:
        return 2.0 - 0.3 * math.log10(values["train.lr"] / 1e-2)

    keys = {"train.lr": [1e-3, 10**-2.5, 1e-2], "lora.r": [2, 8], "lora.dropout": [0.0, 0.1]}
    calm = {"effect": falls, "seed_noise": 0.0, "example_noise": 0.0, "steps": 0}
    study = simulated_study(tmp_path, keys, **calm)
    found = make_comparison(read_study(study).trials)
    hardness = min(trial.loss for trial in found.trials) - 2.0  # of the examples, for all alike
    means = ", ".join(f"{2.0 + more + hardness:.3f}" for more in (0.3, 0.15, 0.0))
    for effect in main_effects(found):
        if effect.key == "train.lr":
            assert effect.rates == ""
            continue
        assert effect.rates.startswith("averaged over the learning rates 0.001, 0.0031")
        assert effect.rates.endswith(f" (mean losses {means}), not each at its own best")
