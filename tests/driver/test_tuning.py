"""Seeds and tuned values of a grid: the trials, the pruned candidates and the chosen values."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tests.stream_worker import STEPS, StreamWorkers, loss_of
from tests.studies import Values, first_evaluation, simulated_study
from tinyllama_lab.config import schema as config
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.findings import findings
from tinyllama_lab.report.page.origin import repeat
from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder
from tinyllama_lab.sweep import run as sweep_run
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.plan import make_plan
from tinyllama_lab.sweep.settings.questions import ExpandedGrid, Tune, expand
from tinyllama_lab.sweep.tuning import Contest, Tuning

ASKED = ("lora.r=4,16", "tune=train.lr", "train.lr=1e-3", "tune_values=[1e-5,1e-3,1e-2]")


def settings(asked: ExpandedGrid, *keys: str) -> list[tuple[Any, ...]]:
    """Return some settings of every composed cell."""
    found = []
    for cell in asked.cells:
        values = []
        for key in keys:
            place: Any = cell.raw
            for name in key.split("."):
                place = place[name]
            values.append(place)
        found.append(tuple(values))
    return found


def refused(*typed: str) -> str:
    with pytest.raises(ConfigError) as error:
        expand(grid.cells(*typed))
    return "\n".join(error.value.problems)


def test_a_question_gets_three_seeds_and_a_single_setting_one() -> None:
    asked = expand(grid.cells("lora.r=4,16", "seeds=3"))
    assert settings(asked, "lora.r", "seed") == list(product((4, 16), (0, 1, 2)))
    assert asked.cells[1].overrides[-1] == "seed=1"
    assert "seeds 0, 1, 2" in asked.notes[0]
    assert settings(expand(grid.cells("lora.r=4", "seeds=3")), "seed") == [(0,)]
    assert settings(expand(grid.cells("lora.r=4,4", "seeds=3")), "seed") == [(0,), (0,)]
    assert settings(expand(grid.cells("lora.r=4,8", "seeds=1")), "seed") == [(0,), (0,)]
    typed = expand(grid.cells("lora.r=4,8", "seed=7"))
    assert settings(typed, "seed") == [(7,), (7,)] and typed.notes == []


def test_the_default_is_three_seeds() -> None:
    assert grid.plain()["seeds"] == 3


def test_each_setting_and_seed_has_its_own_candidates_side_by_side() -> None:
    asked = expand(grid.cells(*ASKED, "seeds=2"))
    expected = list(product((4, 16), (0, 1), (1e-5, 1e-3, 1e-2)))
    assert settings(asked, "lora.r", "seed", "train.lr") == expected
    assert asked.tune == Tune({"train.lr": [1e-5, 1e-3, 1e-2]}, 2.5)


def test_without_values_there_is_a_ladder_around_what_is_set() -> None:
    asked = expand(grid.cells("tune=train.lr", "train.lr=2e-3"))
    assert settings(asked, "train.lr") == [(6.7e-4,), (2e-3,), (6e-3,)]
    both = expand(grid.cells("tune=[train.lr,train.batch_size]", "train.lr=1e-3"))
    rates, sizes = (3.3e-4, 1e-3, 3e-3), (3, 8, 24)
    assert settings(both, "train.lr", "train.batch_size") == list(product(rates, sizes))


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["seeds=3", "seed=0,1"], "seeds has no effect with seed="),
        (["tune=lora.r", "lora.r=4", "tune_values=[a,b]"], "lora.r must be an integer"),
        (["tune=train.lr", "tune_values=[0,1e-3]"], "train.lr must be more than 0"),
        (["tune_values=[1,2]"], "no effect without tune; type tune=train.lr"),
        (["tune=lr"], "did you mean 'train.lr'"),
        (["tune=train.lr", "train.lr=1e-3,1e-2"], "cannot be both swept and tuned"),
        (["tune=data.n"], "must name a setting of lora, quant, train, got data.n"),
        (["tune=model.path"], "must name a setting of lora, quant, train, got model.path"),
        (["tune=lora.variant"], "needs values to try; type tune_values="),
        (["tune=train.lr", "tune_values=[1e-3]"], "two values or more"),
        (["tune=[train.lr,lora.dropout]", "tune_values=[0.1,0.2]"], "belong to one setting"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_to_type(typed: list[str], told: str) -> None:
    swept = ["lora.r=4,16"] if not any(text.startswith("lora.r=") for text in typed) else []
    assert told in refused(*swept, *typed)


def test_typed_values_are_taken_as_they_are() -> None:
    asked = expand(grid.cells("tune=train.epochs", "train.epochs=1", "tune_values=[0.5,1,2]"))
    assert settings(asked, "train.epochs") == [(0.5,), (1,), (2,)]
    asked = expand(grid.cells("tune=lora.dropout", "tune_values=[0,0.05]"))
    assert settings(asked, "lora.dropout") == [(0,), (0.05,)]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("budget", [1.5, 2.0, 2.5, 3.0])
def test_halving_costs_no_more_than_its_budget(count: int, budget: float) -> None:
    """The cost is counted step by step: a candidate that is not pruned trains the next step."""
    tune = Tune({"train.lr": list(range(count))}, budget)
    steps, alive, cost = 100_000, count, 0
    ends = [round(share * steps) for share in tune.rungs]
    for before, after, kept in zip([0, *ends], [*ends, steps], tune.kept, strict=False):
        alive = kept
        cost += alive * (after - before)
    assert cost / steps <= budget + 1e-3 or not ends
    assert all(0 < share < 1 for share in tune.rungs)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> StreamWorkers:
    made = StreamWorkers()
    monkeypatch.setattr(schedule, "POLL_S", 0)
    monkeypatch.setattr(sweep_run, "workers", lambda name, stopped: made)
    monkeypatch.setattr(sweep_run, "_write_report", lambda plan, session: None)
    return made


def sweep(root: Path, *typed: str) -> list[Result | None]:
    made = grid.cells("study=s", f"sweeps_dir={root}", "data.eval_n=8", *typed)
    return sweep_run.run_grid(made, "local", root)


def by_settings(root: Path) -> dict[tuple[int, float, int], TrialFolder]:
    found = {}
    for trial in StudyFolder(root, "s").trials():
        own = trial.read_config()
        found[own["lora"]["r"], own["train"]["lr"], own["seed"]] = trial
    return found


def state_of(trial: TrialFolder) -> State:
    result = trial.read_result()[0]
    assert result is not None
    return result.state


def test_the_worse_candidates_are_ended_at_the_rung_and_the_rest_train_to_the_end(
    tmp_path: Path, workers: StreamWorkers, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three candidates of each rank ends after half of the steps, by the worker's loss."""
    results = sweep(tmp_path, *ASKED, "seeds=2")
    states = Counter(result.state for result in results if result)
    assert states == {State.DONE: 8, State.PRUNED: 4} and len(workers.packs) == 1
    trials = by_settings(tmp_path)
    for r, seed in product((4, 16), (0, 1)):
        at_half = {
            lr: loss_of(trials[r, lr, seed].read_config(), 0.5) for lr in (1e-5, 1e-3, 1e-2)
        }
        worst = max(at_half, key=lambda lr: at_half[lr])
        for lr in at_half:
            trial = trials[r, lr, seed]
            assert state_of(trial) is (State.PRUNED if lr == worst else State.DONE)
            steps = [e["step"] for e in read_events(trial.events_file) if e["kind"] == "metric"]
            assert (max(steps) < 0.7 * STEPS) == (lr == worst)
    assert "pruned (" not in capsys.readouterr().out  # part of the search: no line each


def test_the_same_command_has_nothing_left_and_a_new_rank_has_its_own_contests(
    tmp_path: Path, workers: StreamWorkers, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path, *ASKED, "seeds=2")
    capsys.readouterr()
    sweep(tmp_path, *ASKED, "seeds=2")
    told = capsys.readouterr().out
    assert "12 trials, 12 done, 0 to run" in told and "not run again" not in told
    assert len(workers.packs) == 1
    sweep(tmp_path, "lora.r=4,16,32", *ASKED[1:], "seeds=2")
    assert "18 trials, 12 done, 6 to run" in capsys.readouterr().out
    sweep(tmp_path, *ASKED, "seeds=2", "retry=all")  # whom the tuning ended has its answer
    assert set(workers.completions.values()) == {1}
    with pytest.raises(StudyError, match="must be tuned alike") as error:
        sweep(tmp_path, *ASKED[:3], "tune_values=[1e-3,1e-2]", "seeds=2")
    assert "train.lr=1e-05,0.001,0.01, judged after 50% of the steps" in str(error.value)
    assert "got train.lr=0.001,0.01, judged after 100% of the steps" in str(error.value)


def test_a_diverged_candidate_ends_and_is_not_waited_for(
    tmp_path: Path, workers: StreamWorkers
) -> None:
    """It may diverge at its end, in the worker, and before the rung at which the others wait."""
    workers.faults = lambda config, n: "diverged" if config["train"]["lr"] == 1e-2 else "done"
    results = sweep(tmp_path, *ASKED, "seeds=1")
    states = Counter(result.state for result in results if result)
    assert states == {State.DONE: 2, State.PRUNED: 2, State.DIVERGED: 2}
    contest = Contest([3, 2, 1], dict.fromkeys("abc", None))  # type: ignore[arg-type]
    contest.losses = {0: {"a": 1.0, "b": 2.0}}
    assert contest.judge() == {}
    del contest.running["c"]
    assert contest.judge() == {}  # two may go on, and two are left
    contest.losses[1] = {"a": 1.2, "b": math.inf}
    assert contest.judge() == {"b": (1, "a")} and list(contest.running) == ["a"]


def test_a_killed_worker_goes_on_with_its_contests(tmp_path: Path, workers: StreamWorkers) -> None:
    workers.faults = lambda config, n: "kill" if config["lora"]["r"] == 4 and n == 1 else "done"
    results = sweep(tmp_path, *ASKED, "seeds=2")
    assert Counter(r.state for r in results if r) == {State.DONE: 8, State.PRUNED: 4}
    assert set(workers.completions.values()) == {1}


def curve(values: Values) -> float:
    """The best learning rate of rank 4 is 1e-2, that of rank 16 is 1e-3; there they are equal."""
    best = {4: 1e-2, 16: 1e-3}[values["lora.r"]]
    return 2.0 + 0.3 * abs(math.log10(values["train.lr"] / best))


def tuned_study(root: Path) -> StudyFolder:
    """Write finished results for all candidates, as with a large budget."""
    rates = [1e-4, 1e-3, 1e-2]
    study = simulated_study(root, {"lora.r": [4, 16], "train.lr": rates}, effect=curve, steps=0)
    keys = [trial.key for trial in study.trials()]
    values = {"train.lr": [f"{rate:g}" for rate in rates]}
    record = {"values": values, "rungs": [], "keys": keys}
    write_atomic(study.tuned_file, json.dumps(record))
    return study


def test_levels_are_compared_at_their_own_best(tmp_path: Path) -> None:
    """With one shared learning rate they differ by 0.3, at their own best ones not at all.

    The candidates are far apart, so that rows and seeds agree on the best one, which is known.
    The right value: the loss at that one, averaged over seeds.
    """
    study = tuned_study(tmp_path)
    losses: dict[tuple[int, float, int], float] = {}
    for trial in study.trials():
        own = trial.read_config()
        file = first_evaluation(trial).per_example_file
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        mean = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
        losses[own["lora"]["r"], own["train"]["lr"], own["seed"]] = mean
    expected = sum(losses[16, 1e-3, seed] - losses[4, 1e-2, seed] for seed in (0, 1, 2)) / 3
    rows = read_study(study).trials
    found = make_comparison(rows)
    (effect,) = main_effects(found)
    assert effect.key == "lora.r" and effect.estimate.difference == pytest.approx(expected)
    assert abs(expected) < 0.03 and effect.seeds == 3
    assert (
        effect.rates
        == "each at the best of the learning rates that were tried (4: 0.01; 16: 0.001)"
    )
    assert not found.left_out and sum(row.is_beaten for row in rows) == 12
    cells = rank_cells(found)
    assert {cell.label for cell in cells} == {"r=4 lr=0.01", "r=16 lr=0.001"}
    assert "at the best of the learning rates" in findings(found, [effect], cells, 0.02)[0]
    assert any("in 3 of 6 runs the best lr was the highest" in note for note in found.tuning)


def test_at_one_learning_rate_the_verdict_says_so(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, {"lora.r": [4, 16]}, steps=0)
    (effect,) = main_effects(make_comparison(read_study(study).trials))
    assert effect.rates == "both at learning rate 0.003, which was not tuned"
    other = simulated_study(tmp_path, {"lora.dropout": [0.0, 0.1]}, name="d", steps=0)
    (effect,) = main_effects(make_comparison(read_study(other).trials))
    assert effect.rates == ""


def test_a_trial_beside_the_tuning_is_not_compared_and_says_why(tmp_path: Path) -> None:
    study = tuned_study(tmp_path)
    record = study.read_tuned()
    others = {t.key for t in study.trials() if t.read_config()["lora"]["r"] == 16}
    record["keys"] = [key for key in record["keys"] if key not in others]
    write_atomic(study.tuned_file, json.dumps(record))
    found = make_comparison(read_study(study).trials)
    assert {trial.settings["lora.r"] for trial in found.trials} == {4}
    assert sum("train.lr was not tuned for it" in text for text in found.left_out) == 9
    study.tuned_file.write_text("{")
    with pytest.raises(StudyError, match="delete it and run the study's command again"):
        read_study(study)


def test_the_command_that_repeats_a_study_tunes_again(
    tmp_path: Path, workers: StreamWorkers
) -> None:
    sweep(tmp_path, *ASKED, "seeds=2")
    study, trials = StudyFolder(tmp_path, "s"), by_settings(tmp_path)
    asked = expand(grid.cells(*ASKED, "seeds=2"))
    keys = settings(asked, "lora.r", "train.lr", "seed")
    for cell, (r, lr, seed) in zip(asked.cells, keys, strict=True):
        result = trials[r, lr, seed].read_result()[0]
        assert result is not None
        # which this worker does not write; one was trained before there was any tuning
        is_older = (r, lr, seed) == (4, 1e-3, 0)
        result.overrides = [
            text for text in cell.overrides if not (is_older and text.startswith("train.lr="))
        ]
        trials[r, lr, seed].commit(result)
    (command,) = repeat(study, read_study(study).trials).commands
    words = shlex.split(command)
    assert {"lora.r=4,16", "seed=0,1", "tune=train.lr"} <= set(words)
    assert "tune_values=[1e-05,0.001,0.01]" in words
    assert not any(word.startswith(("train.lr=", "seeds=")) for word in words)


@pytest.mark.usefixtures("workers")
def test_trials_beside_the_tuning_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path, *ASKED, "seeds=1")
    capsys.readouterr()
    monkeypatch.setattr(sweep_run, "run_plan", lambda plan, session, source: None)
    sweep(tmp_path, "lora.r=32,64", "seeds=1")
    assert (
        "s tunes train.lr; trials that are not tuned are not compared" in capsys.readouterr().out
    )


def test_candidates_of_one_contest_go_to_one_worker(tmp_path: Path) -> None:
    cells = expand(grid.cells(*ASKED, "seeds=3")).cells
    plan = make_plan(cells, [config.load(cell.raw) for cell in cells], StudyFolder(tmp_path, "s"))
    packs = plan.packs(4)
    assert len(packs) == 4 and sum(map(len, packs)) == 18
    at = [{(p.config["lora"]["r"], p.config["seed"]) for p in pack} for pack in packs]
    assert sum(map(len, at)) == 6  # each setting and seed in one pack alone


def test_with_the_inline_launcher_every_candidate_trains_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inline worker can be neither closed nor judged while it runs."""
    sources = []
    monkeypatch.setattr(
        sweep_run, "run_plan", lambda plan, session, source: sources.append(source)
    )
    cells = grid.cells("study=s", f"sweeps_dir={tmp_path}", *ASKED, "seeds=1")
    sweep_run.run_grid(cells, "inline", tmp_path)
    sweep_run.run_grid(cells, "local", tmp_path)
    assert sources[0] is None and sources[1] is not None


def test_strings_can_be_tuned_as_well(tmp_path: Path) -> None:
    """All seeds share one chosen value; for a seed that pruned it, the label names another."""

    def effect(values: Values) -> float:
        return 2.0 + 0.5 * (values["lora.targets"] != "mlp")

    def states(values: Values) -> State:
        is_first = (values["lora.r"], values["seed"]) == (4, 0)
        was_ended = is_first and values["lora.targets"] == "mlp"
        return State.PRUNED if was_ended else State.DONE

    modules = ["attention", "mlp"]
    keys = {"lora.r": [4, 16], "lora.targets": modules}
    study = simulated_study(tmp_path, keys, effect=effect, states=states, steps=0)
    record = {"values": {"lora.targets": modules}, "rungs": []}
    record["keys"] = [trial.key for trial in study.trials()]
    write_atomic(study.tuned_file, json.dumps(record))
    labels = {cell.label for cell in rank_cells(make_comparison(read_study(study).trials))}
    assert labels == {"r=4 targets=mlp", "r=16 targets=mlp"}


def test_rungs_of_an_earlier_search_prune_no_candidate(tmp_path: Path) -> None:
    """Its rungs are more, or scored on more rows."""
    cells = expand(grid.cells("study=s", f"sweeps_dir={tmp_path}", *ASKED, "seeds=1")).cells
    plan = make_plan(cells, [config.load(cell.raw) for cell in cells], StudyFolder(tmp_path, "s"))
    for number, planned in enumerate(plan.trials):
        rungs = ((0, 32), (3, 8)) if number % 2 else ()
        for rung, rows in rungs:
            EventLog(planned.trial.events_file).append(
                "rung", rung=rung, step=1, values={"rung/eval_loss": 9.0}, examples=[9.0] * rows
            )
    Tuning(plan, Tune({"train.lr": [1e-5, 1e-3, 1e-2]}, 2.5))
    assert not any(planned.trial.prune_reason() for planned in plan.trials)
