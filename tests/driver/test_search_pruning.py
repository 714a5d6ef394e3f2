"""Pruning: which trials end early, at which rung, and how many steps that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.searches import search, states, trials
from tests.stream_worker import STEPS, StreamWorkers, loss_of
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.study import StudyFolder

GRID = ("lora.r=choice(4,8,16,32)", "train.lr=choice(1e-5,3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2)")
THIRDS: dict[str, Any] = {"rungs": [0.1, 0.35], "reduction_factor": 3, "pruner": "halving"}


def spent(root: Path) -> float:
    """Return the trained steps, repeats included, as a share of training all to the end."""
    taken = [
        sum(e["kind"] == "metric" for e in read_events(trial.events_file))
        for trial in trials(root)
    ]
    return sum(taken) / (STEPS * len(taken))


def least(root: Path) -> float:
    """Return the loss of the best possible trial."""
    return min(loss_of(trial.read_config(), 1.0) for trial in trials(root))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, 0.30), ({"at_once": 8, **THIRDS}, 0.40)],
    ids=["default", "thirds"],
)
def test_halving_finds_the_best_of_a_grid_in_a_third_of_its_steps(
    tmp_path: Path, seed: int, settings: dict[str, Any], share: float
) -> None:
    grid = {"sampler": "grid", "n_trials": None, "pruner": "halving", "seed": seed}
    found = search(tmp_path, StreamWorkers(), *GRID, **{**grid, **settings})
    assert len(trials(tmp_path)) == 32 and set(states(tmp_path)) == {"done", "pruned"}
    assert found.best[0].values[0] == pytest.approx(least(tmp_path))
    assert spent(tmp_path) < share


@pytest.mark.parametrize("pruner", ["hyperband", "median", "wilcoxon"])
def test_every_pruner_prunes_bad_trials_and_keeps_the_best(tmp_path: Path, pruner: str) -> None:
    settings = {**THIRDS, "pruner": pruner}
    found = search(tmp_path, StreamWorkers(), *GRID, sampler="grid", n_trials=None, **settings)
    assert found.best[0].values[0] == pytest.approx(least(tmp_path))
    assert found.states["pruned"] > 0 and spent(tmp_path) < 0.9


def test_trials_that_reach_a_rung_together_are_ranked_together(tmp_path: Path) -> None:
    settings = {**THIRDS, "at_once": 32, "rungs": [0.5]}
    search(tmp_path, StreamWorkers(), *GRID, sampler="grid", n_trials=None, **settings)
    done = [t for t in trials(tmp_path) if (r := t.read_result()[0]) and str(r.state) == "done"]
    ranked = sorted(loss_of(t.read_config(), 0.5) for t in trials(tmp_path))
    kept = sorted(loss_of(t.read_config(), 0.5) for t in done)
    assert kept == ranked[: len(kept)] and len(kept) == 32 // 3


def test_the_result_says_why_a_trial_was_pruned(tmp_path: Path) -> None:
    search(tmp_path, StreamWorkers(), *GRID, sampler="grid", n_trials=None, **THIRDS)
    reasons = [
        (result.error or {})["message"]
        for trial in trials(tmp_path)
        if (result := trial.read_result()[0]) and str(result.state) == "pruned"
    ]
    assert reasons and all(r.startswith("halving: held-out loss ") for r in reasons)
    assert not any(trial.prune_file.exists() for trial in trials(tmp_path))


def test_without_a_pruner_no_trial_is_scored_at_rungs(tmp_path: Path) -> None:
    search(tmp_path, StreamWorkers(), *GRID, sampler="grid", n_trials=4)
    events = [e for trial in trials(tmp_path) for e in read_events(trial.events_file)]
    assert not any(event["kind"] == "rung" for event in events)


def test_a_resumed_search_remembers_earlier_rungs(tmp_path: Path) -> None:
    settings = {**THIRDS, "sampler": "grid", "at_once": 4}
    search(tmp_path / "cut", StreamWorkers(), *GRID, n_trials=20, **settings)
    cut = search(tmp_path / "cut", StreamWorkers(), *GRID, n_trials=None, **settings)
    assert cut.proposals == 32 and cut.best[0].values[0] == pytest.approx(least(tmp_path / "cut"))
    assert spent(tmp_path / "cut") < 0.45


class Stopped(StreamWorkers):
    """The driver is asked to stop right after the first trials have reached a rung."""

    def start(self, pack: Any) -> Any:
        worker = super().start(pack)
        ask, looks = worker.exit_code, iter(range(99))

        def exit_code() -> int | None:
            if next(looks) == 4:
                raise KeyboardInterrupt
            return ask()

        worker.exit_code = exit_code
        return worker


def test_a_rung_that_a_killed_driver_did_not_judge_is_judged_by_the_next(tmp_path: Path) -> None:
    settings = {**THIRDS, "sampler": "grid", "n_trials": 8, "rungs": [0.1]}
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Stopped(), *GRID, **settings)
    told = [e for t in trials(tmp_path) for e in read_events(t.events_file) if e["kind"] == "rung"]
    assert len(told) == 8 and not list(tmp_path.rglob("result.json"))
    found = search(tmp_path, StreamWorkers(), *GRID, **settings)
    assert found.states == {"pruned": 6, "done": 2} and spent(tmp_path) < 0.5


def test_a_pruned_trial_counts_and_is_not_trained_again(tmp_path: Path) -> None:
    search(tmp_path, StreamWorkers(), *GRID, sampler="grid", n_trials=None, **THIRDS)
    before = list(states(tmp_path))
    again = StreamWorkers()
    search(tmp_path, again, *GRID, sampler="grid", n_trials=None, **THIRDS)
    assert again.packs == [] and list(states(tmp_path)) == before
    assert StudyFolder(tmp_path, "s").search_file.is_file()
