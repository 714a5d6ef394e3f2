"""What earlier trials of this machine tell about the next ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyllama_lab.config.schema import Config
from tinyllama_lab.study.machine import cpu_name
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.ask.cost import known_costs
from tinyllama_lab.sweep.check import grid_cells
from tinyllama_lab.sweep.forecast import forecast as forecasts
from tinyllama_lab.sweep.plan import check_cells, make_plan

pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.mark.parametrize("targets", ["all_linear", "attention_qv", "[q_proj,v_proj]"])
def test_fewer_targets_are_expected_to_train_faster(targets: str, small: Sequence[str]) -> None:
    typed = ["model=tiny_random", *small, "hardware.device=cpu"]
    before, after = (
        check_cells(grid_cells([*typed, f"lora.targets={name}"]))[0]
        for name in ("all_linear", targets)
    )
    studies = earlier_trials((before, {"perf/train_tokens_per_s": 100.0}))
    # of a step with all 7 modules, 23 % is that of their adapters
    expected = 100 if targets == "all_linear" else 100 / (0.77 + 0.23 * 2 / 7)
    known = known_costs(studies, after, None)
    assert known.tokens_per_s == pytest.approx(expected) and known.micro_batch_tokens == 700


def earlier_trials(*trials: tuple[Config, dict[str, float]], parts: int = 1) -> Any:
    """Studies with one trial for each configuration, with these metrics."""
    made = [
        SimpleNamespace(
            settings=dict(_flattened(asdict(config))),
            environment={
                "hardware": cpu_name(),
                "largest_micro_batch": 700 + 100 * number,
                "micro_batch_tokens": 1280,
                "scored_together": 2,
            },
            metric=metrics.get,
            row=SimpleNamespace(
                result=None,
                evaluations=SimpleNamespace(parts=[None] * parts),
                trial=SimpleNamespace(read_config=lambda: {"eval": {**SCORED_FIRST}}),
            ),
        )
        for number, (config, metrics) in enumerate(trials)
    ]
    return {"earlier": SimpleNamespace(trials=made)}


SCORED_FIRST = {"generations": 0, "max_new_tokens": 8, "latency_tokens": 0, "latency_batch": 1}
SCORED_FIRST |= {"general": False, "harness": []}


# two adapters complete 32 prompts together
@pytest.mark.parametrize(("parts", "unit_s"), [(1, 10 / (4 + 16 * 8 / 8)), (2, 10 / 4)])
def test_seconds_of_scoring_belong_to_the_first_evaluation(
    parts: int, unit_s: float, small: Sequence[str]
) -> None:
    typed = ["model=tiny_random", *small, "hardware.device=cpu", "data.eval_n=4"]
    typed += ["eval.generations=16", "eval.max_new_tokens=8", "eval.latency_tokens=0"]
    (config,) = check_cells(grid_cells(typed))
    seconds = {"perf/trial_seconds": 40.0, "perf/train_seconds": 30.0}
    known = known_costs(earlier_trials((config, seconds), parts=parts), config, None)
    assert known.scoring_s == pytest.approx(unit_s)
    assert known.scored_together == 2
    general = replace(config, eval=replace(config.eval, general=True))
    assert known_costs(earlier_trials((general, seconds)), config, None).scoring_s is None


@pytest.mark.parametrize("layers", ["all,first_1", "first_1,all"])
def test_every_trial_of_a_plan_gets_the_speed_of_its_own_layers(
    layers: str, small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = grid_cells(
        ["model=tiny_random", *small, f"lora.layers={layers}", "hardware.device=cpu"]
    )
    plan = make_plan(cells, check_cells(cells), StudyFolder(tmp_path, "planned"))
    speeds = {"all": 100.0, "first_1": 400.0}
    typed = ["model=tiny_random", *small, "hardware.device=cpu"]
    made = [check_cells(grid_cells([*typed, f"lora.layers={name}"]))[0] for name in speeds]
    studies = earlier_trials(
        *(
            (config, {"perf/train_tokens_per_s": speeds[str(config.lora.layers)]})
            for config in made
        )
    )
    monkeypatch.setattr(forecasts, "studies_below", lambda root: studies)
    earlier = forecasts._Earlier(plan)
    for planned in plan.todo:
        known, _ = earlier.costs(planned)
        assert known.tokens_per_s == speeds[planned.config["lora"]["layers"]]


def _flattened(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, values in config.items():
        if isinstance(values, dict):
            yield from ((f"{group}.{name}", value) for name, value in values.items())
