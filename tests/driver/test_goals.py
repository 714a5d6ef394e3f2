"""Objectives and constraints: directions, valid texts, and the metrics that trials log."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import load
from tinyllama_lab.sweep.search.goals import Goals, logged_metrics, parse_goals

LOGGED = ("eval/loss", "eval/bleu", "memory/train_peak_mib", "perf/decode_tokens_per_s")


def goals(*objectives: str, ways: Any = (), bounds: Any = ()) -> Goals:
    found, problems = parse_goals(objectives, ways, bounds, LOGGED)
    assert problems == []
    return found


@pytest.mark.parametrize(
    ("metric", "way"),
    [
        ("eval/loss", "minimize"),
        ("memory/train_peak_mib", "minimize"),
        ("perf/first_token_ms", "minimize"),
        ("perf/train_seconds", "minimize"),
        ("eval/rougeL", "maximize"),
        ("eval/intent_accuracy", "maximize"),
        ("perf/batch_decode_tokens_per_s", "maximize"),
    ],
)
def test_a_metric_has_a_direction(metric: str, way: str) -> None:
    found, problems = parse_goals([metric], (), (), [metric])
    assert (found.directions, problems) == ((way,), [])


def test_directions_can_be_typed() -> None:
    assert goals("eval/loss", "eval/bleu").directions == ("minimize", "maximize")
    assert goals("eval/loss", ways=["maximize"]).directions == ("maximize",)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_trial_without_a_number_has_no_value(value: float | None) -> None:
    metrics = {"eval/bleu": 3.0} | ({} if value is None else {"eval/loss": value})
    assert goals("eval/loss", "eval/bleu").values(metrics) is None
    assert goals("eval/bleu").values(metrics) == [3.0]


def test_a_constraint_says_by_how_much_it_is_broken() -> None:
    found = goals(
        "eval/loss", bounds=["memory/train_peak_mib <= 7000", "perf/decode_tokens_per_s>=1e1"]
    )
    metrics = {"memory/train_peak_mib": 7100.0, "perf/decode_tokens_per_s": 12.0}
    assert list(found.excesses(metrics).values()) == [100.0, -2.0]
    assert list(found.excesses({}).values()) == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("objectives", "ways", "bounds", "said"),
    [
        (["eval/los"], [], [], "got 'eval/los'; did you mean 'eval/loss'?"),
        ([], [], [], "must name one metric or several, got none"),
        (["eval/loss", "eval/loss"], [], [], "must name one metric or several"),
        (["eval/loss"], ["minimize", "maximize"], [], "one for each of 1 objectives"),
        (["eval/loss"], ["down"], [], "must be minimize or maximize, got 'down'"),
        (["eval/loss"], [], ["memory/train_peak_mib < 7"], "must be like"),
        (["eval/loss"], [], ["memory/train_peak_mib <= lots"], "must be like"),
        (["eval/loss"], [], ["memory/peak <= 7"], "must name a metric that the trials log"),
        (
            ["eval/loss"],
            [],
            ["memory/train_peak_mib <= 7", "memory/train_peak_mib >= 8"],
            "contradict each other, got memory/train_peak_mib at least 8 and at most 7",
        ),
    ],
)
def test_a_mistake_is_one_clear_sentence(
    objectives: list[str], ways: list[str], bounds: list[str], said: str
) -> None:
    (found,) = parse_goals(objectives, ways, bounds, LOGGED)[1]
    assert said in found


def test_what_trials_log_follows_from_their_settings() -> None:
    def logged(*overrides: str, cuda: bool = False) -> set[str]:
        config = load(grid.plain("model=tiny_random", "data=travel", *overrides))
        return set(logged_metrics(resolved(config), cuda))

    everything = logged(cuda=True)
    assert {"eval/bleu", "eval/intent_accuracy", "perf/first_token_ms"} <= everything
    assert "memory/train_reserved_mib" in everything - logged()
    assert not any("bleu" in name for name in logged("eval.generations=0"))
    assert not any("decode" in name for name in logged("eval.latency_tokens=0"))
    assert "perf/merged_decode_tokens_per_s" in logged() - logged("quant=nf4")
