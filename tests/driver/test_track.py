"""The mirror in MLflow: what a run shows, while its trial runs and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tracked import (
    PARAMS,
    STEPS,
    TRACKING,
    add_steps,
    client,
    config_of,
    count_rows,
    make_trial,
    mirror,
    result_of,
    runs_of,
)
from tinyllama_lab.study.evaluations import read_whole
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Evaluation, Result, State, TrialFolder, base_config, cell_key
from tinyllama_lab.sweep.tracking.record import points_of
from tinyllama_lab.sweep.tracking.tracker import (
    is_mirrored,
    open_tracker,
    tracking_uri,
    view_hint,
)

pytestmark = pytest.mark.usefixtures("own_server_only")


def test_metrics_are_synced_with_their_steps_while_the_trial_runs(
    study: StudyFolder, workdir: Path
) -> None:
    trial = make_trial(study)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r=8", PARAMS)
    tracker.sync(trial)
    add_steps(trial, STEPS + 1, STEPS + 3)
    tracker.sync(trial)
    tracker.sync(trial)
    run = runs_of(workdir, study)["r=8"]
    history = client(workdir).get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 3.0 / s) for s in range(1, STEPS + 4)]
    assert run.info.status == "RUNNING"
    assert run.data.tags["state"] == "running"


def test_a_replay_adds_no_rows(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    results = mirror(study, workdir, trial)
    rows = count_rows(workdir, study)
    assert rows == 2 * STEPS + 2 + 1  # events, final metrics, summary
    study.tracked_file.write_text("{ damaged")
    assert not is_mirrored(study, TRACKING, workdir, results)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "seed 0", PARAMS)
    tracker.finish(trial, results[trial.key])
    assert count_rows(workdir, study) == rows
    assert set(runs_of(workdir, study)) == {"seed 0", f"sweep/{study.name}"}


def test_sweep_is_the_parent_of_trials_and_base(study: StudyFolder, workdir: Path) -> None:
    trials = [make_trial(study, seed) for seed in (0, 1)]
    mirror(study, workdir, *trials)
    base = base_trial(study)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(base, "base", {})
    tracker.finish(base, result_of(base))
    tracker.close({"best/eval/loss": 1.25}, stopped=True)
    runs = runs_of(workdir, study)
    parent = runs.pop(f"sweep/{study.name}")
    assert parent.info.status == "KILLED"
    assert parent.data.metrics == {"best/eval/loss": 1.25}
    assert {r.data.tags["mlflow.parentRunId"] for r in runs.values()} == {parent.info.run_id}
    assert {n: r.data.tags["kind"] for n, r in runs.items()} == {
        "seed 0": "trial",
        "seed 1": "trial",
        "base": "base",
    }
    cells = {runs[f"seed {seed}"].data.tags["cell"] for seed in (0, 1)}
    assert cells == {cell_key(config_of())}
    assert "cell" not in runs["base"].data.tags


def base_trial(study: StudyFolder) -> TrialFolder:
    base = study.base(config_of(), "base")
    base.write_config(base_config(config_of()))
    return base


def test_a_finished_run_shows_the_result(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    mirror(study, workdir, trial)
    run = runs_of(workdir, study)["seed 0"]
    expected = {
        "key": trial.key,
        "study": study.name,
        "state": "done",
        "attempt": "1",
        "data.fingerprint": "f" * 64,
        "eval.fingerprint": "e" * 12,
        "hardware": "2 x EPYC",
    }
    assert expected.items() <= run.data.tags.items()
    assert "error" not in run.data.tags
    assert run.data.params["lora.targets"] == '["q_proj","v_proj"]'
    assert run.data.params["train.lr"] == "0.0002"
    assert run.data.metrics["eval/loss"] == 1.5
    assert run.data.metrics["train/loss"] == 0.25  # the last step's: it has a curve
    inputs = {(i.tags[0].value, i.dataset.digest) for i in run.inputs.dataset_inputs}
    assert inputs == {("training", "f" * 36), ("evaluation", "e" * 12)}
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time


def test_artifacts_are_there(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    study.table_file.write_text("| r |")
    mirror(study, workdir, trial)
    runs = runs_of(workdir, study)
    run = runs["seed 0"]
    folder = workdir / "mlruns" / "artifacts" / run.info.run_id / "artifacts"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        "config.yaml",
        "eval/eval_results.csv",
        "eval/generations.jsonl",
        "generations.json",
        "loss_curve.png",
        "result.json",
    }
    parent = runs[f"sweep/{study.name}"].info.run_id
    shown = {file.path for file in client(workdir).list_artifacts(parent)}
    assert shown == {"experiment_table.md", "generations.json"}


def test_generations_load_as_tables(
    study: StudyFolder, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(study, workdir, make_trial(study, 0), make_trial(study, 1))
    study.tracked_file.unlink()
    mirror(study, workdir, *study.trials())  # sent twice, shown once
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(TRACKING, workdir))
    runs = runs_of(workdir, study)
    experiment = runs["seed 0"].info.experiment_id

    def table(name: str) -> list[dict[str, Any]]:
        shown = client(workdir).load_table(
            experiment, "generations.json", [runs[name].info.run_id]
        )
        return list(shown.to_dict(orient="records"))

    assert table("seed 1")[0] == {"prompt": "to Rome", "reference": "x", "output": "to Rome-1"}
    merged = [(row["prompt"], row["trial"]) for row in table(f"sweep/{study.name}")]
    assert [prompt for prompt, _ in merged] == ["to Rome", "to Rome", "=1+1", "=1+1"]
    assert {trial for _, trial in merged} == {"seed 0", "seed 1"}


def test_a_parameter_that_changed_keeps_its_first_value(
    study: StudyFolder, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trial = make_trial(study)
    for r in (8, 16):
        tracker = open_tracker(study, TRACKING, workdir)
        tracker.follow(trial, "r", {"lora.r": r, f"only.{r}": 1})
    params = runs_of(workdir, study)["r"].data.params
    assert params == {"lora.r": "8", "only.8": "1", "only.16": "1"}
    assert not caplog.records


def test_the_next_driver_ends_what_a_killed_one_left(study: StudyFolder, workdir: Path) -> None:
    trial = make_trial(study)
    open_tracker(study, TRACKING, workdir).follow(trial, "r", PARAMS)
    tracker = open_tracker(study, TRACKING, workdir)
    left = runs_of(workdir, study)
    assert left["r"].info.status == "KILLED"
    assert left[f"sweep/{study.name}"].info.status == "RUNNING"
    tracker.follow(trial, "r", PARAMS)
    again = runs_of(workdir, study)["r"].info
    assert (again.status, again.run_id) == ("RUNNING", left["r"].info.run_id)
    tracker.close({}, stopped=True)
    assert runs_of(workdir, study)["r"].info.status == "KILLED"


def test_a_study_of_the_same_name_on_the_same_server_is_left_alone(
    study: StudyFolder, workdir: Path
) -> None:
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(make_trial(study), "mine", PARAMS)
    other = StudyFolder(workdir / "elsewhere", study.name)
    theirs = open_tracker(other, TRACKING, workdir)
    theirs.follow(make_trial(other), "theirs", PARAMS)
    theirs.close({}, stopped=True)
    experiment = client(workdir).get_experiment_by_name(study.name)
    runs = client(workdir).search_runs([experiment.experiment_id])
    status = sorted((run.info.run_name, run.info.status) for run in runs)
    parent = f"sweep/{study.name}"
    assert status == [
        ("mine", "RUNNING"),
        (parent, "KILLED"),
        (parent, "RUNNING"),
        ("theirs", "KILLED"),
    ]
    tracker.close({}, stopped=True)


def test_an_error_is_shown_until_a_later_attempt_succeeds(
    study: StudyFolder, workdir: Path
) -> None:
    trial = make_trial(study)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    error = {"class": "MemoryError", "message": "m" * 9000, "log_tail": ""}
    tracker.finish(trial, result_of(trial, State.OOM, error=error))
    run = runs_of(workdir, study)["r"]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"].startswith("MemoryError: mmm")
    assert len(run.data.tags["error"]) == 5000
    tracker.follow(trial, "r", PARAMS)
    tracker.finish(trial, result_of(trial, attempts=2))
    run = runs_of(workdir, study)["r"]
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert run.data.tags["attempt"] == "2"


def test_the_loss_at_a_rung_is_shown_beside_that_of_its_step(
    study: StudyFolder, workdir: Path
) -> None:
    trial = make_trial(study, steps=3)
    rung = {"rung": 0, "values": {"rung/eval_loss": 2.5}, "examples": [2.0, 3.0]}
    EventLog(trial.events_file).append("rung", step=3, **rung)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    metrics = runs_of(workdir, study)["r"].data.metrics
    assert metrics["rung/eval_loss"] == 2.5 and metrics["train/loss"] == 1.0


def test_a_held_out_loss_that_is_taken_again_counts_once(study: StudyFolder) -> None:
    events: list[dict[str, Any]] = [
        {"kind": kind, "step": step, "time": float(time), "values": {name: float(time)}}
        for time, (kind, step, name) in enumerate(
            [
                *(("metric", 9, "train/loss"), ("metric", 10, "train/loss")),
                ("heldout", 10, "heldout/loss"),  # then its worker is killed, and resumes at 8
                *(("metric", 9, "train/loss"), ("metric", 10, "train/loss")),
                *(("heldout", 10, "heldout/loss"), ("metric", 11, "train/loss")),
            ]
        )
    ]
    found = [(name, step, value) for name, value, _, step in points_of(events, 0)]
    assert found == [
        *(("train/loss", 9, 0.0), ("train/loss", 10, 1.0)),
        *(("heldout/loss", 10, 2.0), ("train/loss", 11, 6.0)),
    ]
    # of a later call, which has sent step 10 before
    assert [name for name, *_ in points_of(events[2:3], 10)] == ["heldout/loss"]


def test_values_that_are_not_finite_do_not_stop_the_others(
    study: StudyFolder, workdir: Path
) -> None:
    trial = make_trial(study, steps=1)
    values = {"a": float("nan"), "b": float("inf"), "c": 1.0, "d": None, "<img>": 1.0}
    EventLog(trial.events_file).append("metric", step=2, values=values)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "r", PARAMS)
    tracker.sync(trial)
    metrics = runs_of(workdir, study)["r"].data.metrics
    assert metrics["a"] != metrics["a"]
    assert metrics["b"] > 1e308
    assert metrics["c"] == 1.0
    assert {"d", "<img>"}.isdisjoint(metrics)


def test_a_ctrl_c_while_a_run_is_made_leaves_one_run(
    study: StudyFolder, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    trial = make_trial(study)
    tracker = open_tracker(study, TRACKING, workdir)
    create = MlflowClient.create_run

    def interrupted(*arguments: Any, **named: Any) -> None:
        create(*arguments, **named)  # carried out, and its answer never came
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "create_run", interrupted)
        tracker.follow(trial, "r8", PARAMS)
    tracker.sync(trial)
    tracker.close({}, stopped=True)
    assert set(runs_of(workdir, study)) == {f"sweep/{study.name}", "r8"}


def test_the_link_opens_the_trials_by_held_out_loss(study: StudyFolder, workdir: Path) -> None:
    assert view_hint(study, TRACKING, workdir).endswith(
        "runs?workflowType=machine_learning&searchFilter=tags.kind+%3D+%27trial%27"
        "&orderByKey=metrics.%60eval%2Floss%60&orderByAsc=true"
    )
    tracker = open_tracker(study, TRACKING, workdir)
    for seed, rate in ((0, "1e-4"), (1, "1e-3")):
        trial = make_trial(study, seed, steps=1)
        tracker.follow(trial, f"seed {seed}", {"lora.r": 8, "train.lr": rate})
        tracker.finish(trial, result_of(trial))
    tracker.close({}, stopped=False)
    hint = view_hint(study, TRACKING, workdir)
    assert hint.endswith("runs?workflowType=machine_learning&viewStateShareKey=tinyllama_lab")
    experiment = client(workdir).get_experiment_by_name(study.name)
    state = json.loads(experiment.tags["mlflow.sharedViewState.tinyllama_lab"])
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`eval/loss`", True)
    assert state["selectedColumns"][:2] == ["params.`train.lr`", "metrics.`eval/loss`"]
    shown = client(workdir).search_runs([experiment.experiment_id], state["searchFilter"])
    assert {run.info.run_name for run in shown} == {"seed 0", "seed 1"}


def test_runs_say_in_words_what_they_came_to(study: StudyFolder, workdir: Path) -> None:
    trial, bad = make_trial(study), make_trial(study, 1)
    tracker = open_tracker(study, TRACKING, workdir)
    for each in (trial, bad):
        tracker.follow(each, each.key, PARAMS)
    done = result_of(trial, overrides=["lora.r=8", "data.path=my file.csv"])
    done.metrics["base/loss"] = 3.25
    done.data |= {"train_rows": 64, "train_tokens": 5321, "eval_rows": 32}
    done.model = {"name": "smollm2", "weights": "Q4_1, dequantized"}
    tracker.finish(trial, done)
    error = {"class": "oom", "message": "out of memory", "log_tail": ""}
    tracker.finish(bad, result_of(bad, State.OOM, error=error))
    tracker.close({"best/eval/loss": 1.5}, stopped=False)
    runs = runs_of(workdir, study)
    text = runs[trial.key].data.tags["mlflow.note.content"]
    assert text.splitlines()[::2] == [
        "Held-out loss 1.5000 nats per token; the base has 3.2500.",
        "Trained on 64 rows (5,321 tokens), scored on 32 held-out rows.",
        "Base: smollm2, weights: Q4_1, dequantized.",
        "    python -m tinyllama_lab lora.r=8 'data.path=my file.csv'",
    ]
    assert runs[bad.key].data.tags["mlflow.note.content"].startswith("oom: out of memory")
    parent = runs[f"sweep/{study.name}"].data.tags["mlflow.note.content"]
    assert "2 runs. The lowest held-out loss is 1.5000 nats per token." in parent


def test_the_held_out_curve_ends_with_the_loss_after_the_last_step(
    study: StudyFolder, workdir: Path
) -> None:
    trial = make_trial(study)
    log = EventLog(trial.events_file)
    log.append("rung", rung=0, step=4, values={"rung/eval_loss": 2.5}, examples=[2.0, 3.0])
    lines = [{"loss": 10.0, "tokens": 5}, {"loss": 6.0, "tokens": 5}, {"loss": 90.0, "tokens": 5}]
    file = Evaluation(trial.eval_dir).per_example_file
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    mirror(study, workdir, trial)
    run = runs_of(workdir, study)["seed 0"]
    curve = client(workdir).get_metric_history(run.info.run_id, "rung/eval_loss")
    points = sorted((point.step, point.value) for point in curve)
    assert points == [(4, 2.5), (STEPS, pytest.approx(16 / 10))]  # on the rows of the rung


def test_later_evaluations_join_the_run_of_their_trial(study: StudyFolder, workdir: Path) -> None:
    """Scores on confirmation rows have another name: `eval/loss` is that of the held-out rows."""
    trial = make_trial(study)
    results = mirror(study, workdir, trial)
    for rows, loss in (("heldout", 1.25), ("confirmation", 1.75)):
        settings = {"generations": 30, "rows": rows}
        evaluation = trial.evaluation(settings)
        evaluation.write_config({"eval": settings})
        metrics = {"eval/loss": loss, "eval/bleu": 3.0}
        evaluation.commit(Result(evaluation.key, trial.name, State.DONE, metrics=metrics))
    EventLog(trial.events_file).append("state", state="done")
    whole = {trial.key: read_whole(trial, results[trial.key])}
    assert not is_mirrored(study, TRACKING, workdir, whole)
    tracker = open_tracker(study, TRACKING, workdir)
    tracker.follow(trial, "seed 0", PARAMS)
    tracker.finish(trial, whole[trial.key])
    tracker.close({}, stopped=False)
    runs = runs_of(workdir, study)
    assert set(runs) == {"seed 0", f"sweep/{study.name}"}
    shown = runs["seed 0"].data.metrics
    assert (shown["eval/loss"], shown["eval/bleu"]) == (1.25, 3.0)
    assert (shown["confirmation/loss"], shown["memory/train_peak_mib"]) == (1.75, 100)
    assert is_mirrored(study, TRACKING, workdir, whole)
