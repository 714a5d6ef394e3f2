"""Finished trials are scored again with other settings, and nothing is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tests.driver.test_schedule import run
from tests.fake_worker import FakeWorkers
from tests.packs import Lab, Wrapped, events, quickly, result, take_off_adapters, weights
from tests.studies import first_evaluation
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.study.evaluations import read_merged, read_requested, read_whole
from tinyllama_lab.study.integrity import MEMO
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Evaluation, State, TrialFolder, former_keys
from tinyllama_lab.sweep.evaluate_command import evaluate, read_arguments
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.plan import check_cells

QUICK = {"eval.generations": 1, "eval.latency_tokens": 0}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)
    monkeypatch.setattr(schedule, "POLL_S", 0)


# the measured size of a micro-batch decides the last bits of a loss
SIZE = {"micro_batch_tokens": 640}


@pytest.fixture(scope="module")
def trained(another_lab: Lab) -> Lab:
    """A folder whose study `s` has trials of rank 2 and 4, and one that only PEFT can train."""
    another_lab.hardware = another_lab.hardware | SIZE
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        another_lab.run(
            [
                trial_of(another_lab, {"lora.r": rank, "lora.variant": variant})
                for rank, variant in ((2, "lora"), (4, "lora"), (2, "dora"))
            ]
        )
    return another_lab


@pytest.fixture
def studied(trained: Lab, lab: Lab) -> Lab:
    """A copy of that folder, which a test may change."""
    shutil.copytree(trained.folder, lab.folder, dirs_exist_ok=True)
    lab.hardware = lab.hardware | SIZE
    return lab


def trial_of(lab: Lab, changes: dict[str, Any], study: str = "s") -> TrialFolder:
    config = lab.configure({**QUICK, **changes})
    trial = StudyFolder(lab.folder, study).trial(config, f"r{config['lora']['r']}")
    if not trial.config_file.exists():
        trial.write_config(config)
    return trial


def packed(lab: Lab) -> list[TrialFolder]:
    return [trial_of(lab, {"lora.r": rank}) for rank in (2, 4)]


def scored(trial: TrialFolder, **scoring: Any) -> Evaluation:
    """Return the folder of an evaluation, which must be complete."""
    evaluation = trial.evaluation(trial.read_config()["eval"] | scoring)
    found, problem = evaluation.read_result()
    assert found is not None and problem is None
    return evaluation


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(trial: TrialFolder) -> dict[str, bytes]:
    """Return the files of a trial, without those that are only appended to."""
    grow = (trial.events_file, trial.log_file, trial.folder / MEMO)
    files = [path for path in trial.folder.rglob("*") if path.is_file() and path not in grow]
    return {str(path.relative_to(trial.folder)): path.read_bytes() for path in files}


# ---- what a worker does ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_scores_are_those_of_a_trial_that_was_trained_with_these_settings(
    studied: Lab, variant: str
) -> None:
    """Scores are equal to the bit; adapter, result and first evaluation do not change."""
    trials = (
        packed(studied)
        if variant == "lora"
        else [trial_of(studied, {"lora.r": 2, "lora.variant": "dora"})]
    )
    changes = {"eval.generations": 3, "eval.general": True}
    fresh = [
        trial_of(
            studied,
            {"lora.r": t.read_config()["lora"]["r"], "lora.variant": variant} | changes,
            "other",
        )
        for t in trials
    ]
    studied.run(fresh)
    base = studied.base_trial(trials[0], generations=3, general=True)
    shutil.rmtree(base.folder)  # so that it is scored in the same batches
    before = [everything(trial) for trial in trials]
    steps = [events(trial, "metric") for trial in trials]
    studied.run(trials, generations=3, general=True)
    for trial, expected, files, known in zip(trials, fresh, before, steps, strict=True):
        evaluation = scored(trial, generations=3, general=True)
        theirs = first_evaluation(expected)
        for name in ("per_example.jsonl", "generations.jsonl", "general.jsonl"):
            assert (evaluation.folder / name).read_bytes() == (theirs.folder / name).read_bytes()
        first = lines(first_evaluation(trial).per_example_file)
        assert [row["loss"] for row in lines(evaluation.per_example_file)] == [
            row["loss"] for row in first
        ]
        own, other = result(trial), result(expected)
        again, _ = evaluation.read_result()
        assert again is not None and again.data["eval_fingerprint"] == own.data["eval_fingerprint"]
        measured = {k for k in other.metrics if k.startswith(("eval/", "base/"))}
        assert {k: again.metrics[k] for k in measured} == {k: other.metrics[k] for k in measured}
        assert not any(k.startswith(("train/", "perf/train")) for k in again.metrics)
        assert everything(trial).items() >= files.items() and events(trial, "metric") == known
    assert [e["name"] for e in events(trials[0], "phase")].count("training") == 1


def test_a_pack_trains_one_trial_and_only_scores_another(studied: Lab) -> None:
    old, new = trial_of(studied, {"lora.r": 2}), trial_of(studied, {"lora.r": 8})
    kept, steps = weights(old), len(events(old, "metric"))
    settings = old.read_config()["eval"] | {"generations": 2}
    config = new.read_config()
    new.write_config({**config, "eval": settings})
    studied.run([old, new], generations=2)
    assert result(new).state is State.DONE and len(events(new, "metric")) == steps
    assert first_evaluation(new) == new.evaluation(settings)
    assert (weights(old), len(events(old, "metric"))) == (kept, steps)
    assert len(lines(scored(old, generations=2).generations_file)) == 2


def test_a_stopped_scoring_continues_with_what_is_missing(studied: Lab) -> None:
    trials = packed(studied)
    before = [everything(trial) for trial in trials]
    studied.stop(trials, 4, scoring={"generations": 4})
    assert not any(
        trial.evaluation(trial.read_config()["eval"] | {"generations": 4}).result_file.exists()
        for trial in trials
    )
    assert [result(trial).state for trial in trials] == [State.DONE, State.DONE]
    studied.run(trials[:1], generations=4)
    once = scored(trials[0], generations=4).result_file.stat().st_mtime_ns
    studied.run(trials, generations=4)
    assert scored(trials[0], generations=4).result_file.stat().st_mtime_ns == once
    assert len(lines(scored(trials[1], generations=4).generations_file)) == 4
    assert all(everything(t).items() >= own.items() for t, own in zip(trials, before, strict=True))


class Mute(Wrapped):
    """An engine that cannot generate."""

    def generate(self, *arguments: Any, **named: Any) -> list[list[int]]:
        raise ValueError("no words")


def test_an_evaluation_that_fails_leaves_the_trial_as_it_is(studied: Lab) -> None:
    (trial, _) = packed(studied)
    before = everything(trial)
    studied.run([trial], wrap=Mute, generations=2)
    settings = trial.read_config()["eval"] | {"generations": 2}
    failed, _ = trial.evaluation(settings).read_result()
    assert failed is not None and failed.state is State.FAILED
    assert "no words" in (failed.error or {})["message"]
    assert result(trial).state is State.DONE and everything(trial).items() >= before.items()
    asked, _ = read_requested(trial, settings)
    assert asked is not None and asked.state is State.FAILED
    scores = read_merged(trial, trial.read_config()["eval"])["heldout"]
    assert scores.result == result(trial)


@pytest.mark.parametrize("name", ["train_fingerprint", "eval_fingerprint"])
def test_an_adapter_is_not_scored_on_other_tokens_than_before(studied: Lab, name: str) -> None:
    (trial, _) = packed(studied)
    found = result(trial)
    found.data[name] = "another"
    trial.commit(found)
    studied.run([trial], generations=2)
    settings = trial.read_config()["eval"] | {"generations": 2}
    failed, _ = trial.evaluation(settings).read_result()
    assert failed is not None and (failed.error or {})["class"] == "data_changed"
    assert f"{name} " in failed.error["message"] and "another" in failed.error["message"]  # type: ignore[index]


def test_a_new_adapter_forgets_what_the_old_one_scored(studied: Lab) -> None:
    (trial, _) = packed(studied)
    studied.run([trial], generations=2)
    trial.result_file.unlink()
    studied.run([trial])
    assert trial.later_evaluations(result(trial)) == []


# ---- what readers see --------------------------------------------------------------------------


def test_of_several_evaluations_the_one_with_most_answers_is_shown(studied: Lab) -> None:
    trials = packed(studied)
    studied.run(trials, generations=4)
    studied.run(trials, generations=0, general=True)
    study = StudyFolder(studied.folder, "s")
    bases, rows = [], []
    for row in read_study(study).trials:
        (bases if row.is_base else rows).append(row)
    row = next(row for row in rows if row.trial == trials[0])
    assert row.result is not None and list(row.swept) == ["lora.r", "lora.variant"]
    many = scored(trials[0], generations=4)
    general = scored(trials[0], generations=0, general=True)
    assert row.evaluations.generations_file == many.generations_file
    assert row.evaluations.general_file == general.general_file
    nats = lines(general.general_file)
    mean = sum(each["loss"] for each in nats) / sum(each["tokens"] for each in nats)
    assert row.result.metrics["eval/general_loss"] == pytest.approx(mean, rel=1e-9)
    of_many, _ = many.read_result()
    assert of_many is not None
    assert row.result.metrics["eval/chrf"] == of_many.metrics["eval/chrf"]
    assert row.result.metrics["train/loss"] == result(trials[0]).metrics["train/loss"]
    (base,) = bases
    assert len(lines(base.evaluations.generations_file)) == 4
    assert base.result is not None and "eval/general_loss" in base.result.metrics
    assert row.base is not None and row.base.general_file.is_file()


def test_scores_on_confirmation_rows_stand_apart_and_confirm_nothing(studied: Lab) -> None:
    (trial, other) = packed(studied)
    before = result(trial).metrics["eval/loss"]
    studied.run([trial], rows="confirmation")
    study = StudyFolder(studied.folder, "s")
    assert read_study(study).confirmation == []
    (row,) = read_study(study).rescored
    nats = lines(scored(trial, rows="confirmation").per_example_file)
    mean = sum(each["loss"] for each in nats) / sum(each["tokens"] for each in nats)
    assert row.trial == trial and row.result is not None and mean != before
    assert row.result.metrics["eval/loss"] == pytest.approx(mean, rel=1e-9)
    (held_out,) = (row for row in read_study(study).trials if row.trial == trial)
    assert held_out.result is not None and held_out.result.metrics["eval/loss"] == before
    whole = read_whole(trial, result(trial))
    assert (whole.metrics["eval/loss"], whole.metrics["confirmation/loss"]) == (
        before,
        row.result.metrics["eval/loss"],
    )
    assert read_whole(other, result(other)) == result(other)


# ---- earlier versions --------------------------------------------------------------------------


def aged(trial: TrialFolder) -> TrialFolder:
    """Write a trial like an earlier version: files in `eval/`, and `eval` settings in the key."""
    found, first = result(trial), first_evaluation(trial)
    for name in ("per_example.jsonl", "generations.jsonl", "eval_results.csv"):
        (first.folder / name).rename(trial.eval_dir / name)
    shutil.rmtree(first.folder)
    key, _ = former_keys(trial.read_config())
    old = TrialFolder(trial.folder.with_name(f"{trial.name}-{key}"))
    trial.folder.rename(old.folder)
    found.key, found.evaluation = key, None
    names = {name.replace(f"/{first.key}", "") for name in found.files}
    old.commit(found, [old.folder / name for name in names])
    return old


def test_a_study_of_an_earlier_version_goes_on_and_is_scored_again(studied: Lab) -> None:
    study = StudyFolder(studied.folder, "s")
    old = [aged(trial) for trial in packed(studied)]
    config = old[0].read_config()
    assert study.trial(config, "r2") == old[0] != study.trial({**config, "seed": 1}, "r2")
    assert read_requested(old[0], config["eval"])[0] == result(old[0])
    more = {**config["eval"], "generations": 2}
    assert study.trial({**config, "eval": more}, "r2") == old[0]
    assert read_requested(old[0], more) == (None, None)
    studied.run(old, generations=2)
    (row,) = (row for row in read_study(study).trials if row.trial == old[0])
    assert len(lines(row.evaluations.generations_file)) == 2
    assert row.evaluations.per_example_file == scored(old[0], generations=2).per_example_file
    assert lines(row.evaluations.per_example_file) == lines(old[0].eval_dir / "per_example.jsonl")
    old[0].result_file.unlink()
    assert study.trial({**config, "eval": more}, "r2").key != old[0].key  # not done: a new one


# ---- the driver --------------------------------------------------------------------------------


def test_the_same_trials_with_other_settings_are_only_scored(tmp_path: Path) -> None:
    run(grid.plan(tmp_path, "lora.r=2,4"), FakeWorkers())
    plan, workers = grid.plan(tmp_path, "lora.r=2,4,8", "eval.generations=3"), FakeWorkers()
    assert [planned.is_trained for planned in plan.todo] == [True, True, False]
    assert plan.todo[0].work == plan.todo[0].evaluation_work < plan.todo[2].work
    run(plan, workers)
    tasks = workers.packs[0].read().tasks
    assert [task.eval_settings["generations"] for task in tasks if task.eval_settings] == [3, 3, 3]
    assert all(r.state is State.DONE for r in plan.results.values()) and len(plan.results) == 3
    assert grid.plan(tmp_path, "lora.r=2,4,8", "eval.generations=3").todo == []
    assert len(grid.plan(tmp_path, "lora.r=2,4,8").todo) == 1  # r=8 was never scored like that


@pytest.mark.parametrize(("kills", "state"), [(2, State.DONE), (3, State.FAILED)])
def test_a_killed_scoring_is_repeated_and_costs_no_trial(
    tmp_path: Path, kills: int, state: State
) -> None:
    first = grid.plan(tmp_path)
    run(first, FakeWorkers())
    (trained,) = first.results.values()
    plan = grid.plan(tmp_path, "eval.generations=3")
    (planned,) = plan.todo
    run(plan, FakeWorkers({planned.trial.key: ["kill"] * kills}))
    assert plan.results[planned.trial.key].state is state
    assert planned.trial.read_result() == (trained, None)
    evaluation, _ = planned.trial.evaluation(planned.config["eval"]).read_result()
    assert evaluation is not None and evaluation.state is state
    assert len(grid.plan(tmp_path, "eval.generations=3").todo) == (state is State.FAILED)
    assert grid.plan(tmp_path, "eval.generations=3", "retry=none").todo == []


def test_settings_of_the_evaluation_cannot_be_swept() -> None:
    with pytest.raises(ConfigError) as caught:
        check_cells(grid.cells("eval.generations=2,4", "lora.r=2,4"))
    (problem,) = caught.value.problems
    assert problem.startswith("eval.generations cannot be swept, because it changes no adapter")
    assert problem.endswith("evaluate study=default eval.generations=...")


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def command(
    studied: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run `evaluate` on the study `s` in this process, and return what it prints."""
    monkeypatch.chdir(studied.folder)
    monkeypatch.setattr("tinyllama_lab.sweep.evaluate_command.model_identity", lambda model: "1")
    monkeypatch.setattr("tinyllama_lab.sweep.run._write_report", lambda plan, session: None)

    def run_command(*typed: str, code: int = 0) -> str:
        shared = ("study=s", "sweeps_dir=.", "tracking=none", "hydra/launcher=inline")
        assert evaluate([*shared, *typed], studied.folder) == code
        return " ".join(capsys.readouterr().out.split())

    yield run_command
    take_off_adapters(studied.base.model)


def test_the_command_scores_the_selected_trials_once(
    studied: Lab, command: Callable[..., str]
) -> None:
    said = command("eval.generations=2", "lora.variant=lora", "hardware.device=cpu")
    assert "scoring again with eval.generations=2" in said
    assert "2 trained trials, 0 scored with these settings, 2 to score" in said
    for trial in packed(studied):
        assert len(lines(scored(trial, generations=2).generations_file)) == 2
        assert scored(trial, generations=2).read_settings() == {
            **trial.read_config()["eval"],
            "generations": 2,
        }
    before = [everything(trial) for trial in packed(studied)]
    again = command("eval.generations=2", "lora.variant=lora")
    assert "2 scored with these settings, 0 to score" in again
    assert [everything(trial) for trial in packed(studied)] == before
    record = json.loads((studied.folder / "s" / "metrics.json").read_text())
    assert sorted(len(each["metrics"]) > 0 for each in record["trials"]) == [True] * 3


REFUSED = [
    (("eval.generatons=2",), "eval.generatons is not a setting; did you mean 'eval.generations'?"),
    (("eval.generations=-1",), "eval.generations must be at least 0, got -1"),
    (("eval.generations=1,2",), "eval.generations must have one value"),
    (("seeds=3", "eval.generations=2"), "evaluate takes study=<name>"),
    (("-m", "eval.generations=2"), "evaluate takes study=<name>"),
    (("lora.rank=2", "eval.generations=2"), "lora.rank is not a setting; did you mean 'lora.r'?"),
    ((), "got no setting of eval; type eval.generations=300"),
]


@pytest.mark.parametrize(("typed", "said"), REFUSED)
def test_other_arguments_of_the_command_are_refused(
    tmp_path: Path, typed: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(["study=s", *typed], tmp_path)
    assert any(said in problem for problem in caught.value.problems)


def test_trials_that_cannot_be_scored_are_refused(
    studied: Lab, command: Callable[..., str]
) -> None:
    with pytest.raises(StudyError, match="holds no trials; studies here: s"):
        command("study=t", "eval.generations=2")
    with pytest.raises(StudyError, match=r"no finished trial of s has lora.r=9; there are: r="):
        command("lora.r=9", "eval.generations=2")
    trial, _ = packed(studied)
    with pytest.raises(ConfigError, match="retry=outdated trains trials anew, and evaluate"):
        command("retry=outdated", "eval.generations=2")
    shutil.rmtree(trial.adapter_dir)
    with pytest.raises(StudyError, match=r"adapter.* is missing: this trial cannot be scored"):
        command("lora.r=2", "lora.variant=lora", "eval.generations=2")
    for each in StudyFolder(studied.folder, "s").trials():
        each.result_file.unlink()
    with pytest.raises(StudyError, match="only trials that are done can be scored again"):
        command("eval.generations=2")


def test_another_model_under_the_same_name_is_refused(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama_lab.sweep.evaluate_command.model_identity", lambda model: "2")
    with pytest.raises(ConfigError, match="must be scored on the model that it was trained on"):
        command("eval.generations=2")
