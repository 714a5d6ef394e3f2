"""One trial from its configuration to its result, with either engine."""

from __future__ import annotations

import csv
import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packs import (
    QUIET,
    Lab,
    Wrapped,
    events,
    losses,
    quickly,
    result,
    states,
    take_off_adapters,
)
from tests.studies import first_evaluation
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.evaluation import losses as evaluate
from tinyllama_lab.core.training.attempt import Attempt, classify
from tinyllama_lab.data.cache import file_digest
from tinyllama_lab.errors import (
    BaseError,
    DataChangedError,
    DataDownloadError,
    DataError,
    DivergedError,
    StoppedError,
)
from tinyllama_lab.metrics import METRICS, Logged
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.machine import cpu_name
from tinyllama_lab.study.pack import Pace, Task
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep.plan import should_rerun
from tinyllama_lab.sweep.search.goals import logged_metrics

pytestmark = pytest.mark.usefixtures("dora_alone")

EVALUATION_FILES = (
    "config.yaml",
    "eval_results.csv",
    "generations.jsonl",
    "per_example.jsonl",
    "result.json",
)
SCORES = {
    *("loss", "perplexity", "bits_per_byte", "intent_accuracy", "intent_macro_f1"),
    *(name.removeprefix("eval/") for name, metric in METRICS.items() if metric.library_module),
}
SPEEDS = ("first_token_ms", "decode_tokens_per_s", "merged_decode_tokens_per_s")
COSTS = {
    "perf/train_tokens_per_s",
    "perf/train_seconds",
    "perf/train_tflop",
    *(f"perf/{name}{end}" for name in SPEEDS for end in ("", "_min", "_max")),
    *(f"perf/batch_{name}{end}" for name in SPEEDS[:2] for end in ("", "_min", "_max")),
    "perf/trial_seconds",
    "memory/train_peak_mib",
    "memory/alone_mib",
    "memory/predicted_mib",
    "memory/predicted_infer_mib",
    "memory/infer_peak_mib",
    "size/adapter_mib",
    "size/trainable_params",
}
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_finished_trial_has_every_metric_and_file(variant: str, lab: Lab) -> None:
    trial = lab.trial({"lora.variant": variant, "eval.generations": 3})
    (found,) = lab.run([trial])
    base = result(lab.base_trial(trial))
    assert (found.state, found.error, found.attempts) == (State.DONE, None, 1)
    assert found.overrides == ["x=1"]
    scores = {f"{part_}/{name}" for part_ in ("eval", "base") for name in SCORES}
    assert scores | COSTS | {"train/loss"} == found.metrics.keys()
    assert all(isinstance(value, float) for value in found.metrics.values())
    assert found.metrics["base/loss"] == base.metrics["eval/loss"]
    assert found.data["eval_fingerprint"] == base.data["eval_fingerprint"]
    assert found.data["train_rows"] == 8 and found.data["eval_rows"] == 4
    assert found.data["train_rows_seen"] == 8
    assert found.model["trainable_params"] == found.metrics["size/trainable_params"] > 0
    assert found.model["parameters"] == base.model["parameters"] == 90688
    assert {"versions", "git_commit", "hardware", "device", "threads"} <= found.environment.keys()
    assert {"micro_batch_tokens", "adapters_at_once"} <= found.environment.keys()
    assert found.environment["scored_together"] == 2  # with the base
    assert found.environment["profile"] == "tiny"
    assert found.environment["signatures"].keys() == {"bleu", "chrf", "rouge"}
    assert "eval/loss" in base.metrics and "train/loss" not in base.metrics
    assert set(found.files) == {
        *("config.yaml", "events.jsonl"),
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        *(f"eval/{found.evaluation}/{name}" for name in EVALUATION_FILES),
        "loss_curve.png",
    }


def test_a_result_holds_the_seconds_that_earlier_trials_foretold(lab: Lab) -> None:
    trial, elsewhere = (lab.trial({"seed": seed}) for seed in (5, 6))
    paces = {trial: Pace(cpu_name(), 50.0, 7.0), elsewhere: Pace("another CPU", 50.0, 7.0)}
    task_of = lab.task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lab, "task", lambda _, each: replace(task_of(each), pace=paces[each]))
        found, other = lab.run([trial, elsewhere])
    steps = [event["values"] for event in events(trial, "metric")]
    rows = lab.data.prepare(part(Science, trial.read_config()).data, 5, 4).train
    epochs = trial.read_config()["train"]["epochs"]
    tokens = epochs * sum(len(row.ids) for row in rows)
    assert steps and found.metrics["perf/predicted_seconds"] == tokens / 50 + 7
    assert other.state is State.DONE and "perf/predicted_seconds" not in other.metrics


def test_every_metric_that_a_worker_logs_is_in_the_registry(lab: Lab) -> None:
    trial = lab.trial({"eval.generations": 1, "eval.general": True, "train.keep": "best"})
    (found,) = lab.run([trial])
    ranges = re.compile("_(min|max)$")  # of repeated timings
    names = {ranges.sub("", name.replace("base/", "eval/")) for name in found.metrics}
    told = [*events(trial, "metric"), *events(trial, "heldout")]
    steps = {name for event in told for name in event["values"]}
    of_checks = {n for n, m in METRICS.items() if m.logged in (Logged.CHECKS, Logged.BEST)}
    # which a search does not take for goals
    assert names - of_checks == set(logged_metrics(trial.read_config(), cuda=False))
    assert of_checks <= names
    assert steps - names == {n for n, metric in METRICS.items() if metric.logged is Logged.STEPS}


def test_a_trial_leaves_its_files_and_no_checkpoint(lab: Lab) -> None:
    trial = lab.trial({"eval.generations": 3})
    (found,) = lab.run([trial])
    assert not trial.checkpoint_dir.exists()
    assert not [p for p in trial.folder.rglob("*") if ".tmp" in p.name]
    scored = first_evaluation(trial)
    rows = [json.loads(line) for line in scored.per_example_file.read_text().splitlines()]
    assert [row["example"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["tokens"] for row in rows) == found.data["eval_label_tokens"]
    assert len(scored.generations_file.read_text().splitlines()) == 3
    table = {row["metric"]: row for row in csv.DictReader(scored.table_file.open())}
    assert float(table["eval/loss"]["adapter"]) == found.metrics["eval/loss"]
    assert float(table["eval/loss"]["base"]) == found.metrics["base/loss"]
    picture = trial.loss_curve_file.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"


def test_states_and_steps_are_reported_while_a_trial_runs(lab: Lab) -> None:
    trial = lab.trial({"eval.latency_tokens": 0})
    lab.run([trial])
    assert states(trial) == ["running", "done"]
    phases = [event["name"] for event in events(trial, "phase")]
    assert phases == ["training", "scoring held-out rows", "generating completions"]
    timed = lab.trial({"eval.latency_tokens": 2, "eval.generations": 0})
    lab.run([timed])
    phases = [event["name"] for event in events(timed, "phase")]
    assert phases == ["training", "scoring held-out rows", "timing decoding"]
    assert events(trial, "metric")[0]["values"].keys() == {
        "train/loss",
        "train/grad_norm",
        "train/lr",
    }
    assert len(losses(trial)) == 2
    assert states(lab.base_trial(trial)) == ["running", "done"]


def test_rows_that_no_step_reached_are_not_counted_as_seen(lab: Lab) -> None:
    few = {**QUIET, "train.max_steps": 1, "train.batch_size": 3}
    (found,) = lab.run([lab.trial(few)])
    assert (found.data["train_rows"], found.data["train_rows_seen"]) == (8, 3)


def test_a_trial_does_not_change_the_next_one(lab: Lab) -> None:
    (alone,) = lab.run([lab.trial(QUIET)])
    lab.run([lab.trial({**QUIET, "lora.variant": "dora", "seed": 4})])
    (again,) = lab.run([lab.trial(QUIET, place="again")])
    for name in ("train/loss", "eval/loss"):
        assert alone.metrics[name] == again.metrics[name]


def test_optional_parts_of_an_evaluation_can_be_switched_off(lab: Lab) -> None:
    trial = lab.trial(QUIET)
    (found,) = lab.run([trial], lab.context(gradient_checkpointing=True))
    assert found.state == State.DONE and found.environment["gradient_checkpointing"] is True
    assert not {"eval/intent_accuracy", "perf/first_token_ms"} & found.metrics.keys()
    assert not first_evaluation(trial).generations_file.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.max_length": 8}, "data=travel has no usable row"),
        ({"lora.targets": ["q_porj"]}, "lora.targets must name modules of the model"),
    ],
)
def test_a_trial_that_cannot_run_fails_with_the_reason(
    changes: dict[str, Any], message: str, lab: Lab
) -> None:
    trial = lab.trial(changes)
    (found,) = lab.run([trial])
    assert found.state == State.FAILED and found.error is not None
    name = "data" if message.startswith("data") else "invalid"
    assert found.error["class"] == name and message in found.error["message"]
    assert "Error" in found.error["log_tail"] and "Traceback" in found.error["log_tail"]
    assert states(trial) == ["running", "failed"] and found.overrides == ["x=1"]
    assert "environment" in vars(found) and found.environment["profile"] == "tiny"


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


PLACES = [
    "evaluation.run.generate.generate",
    "training.attempt.plot_loss_curve",
    "training.pool.train_round",
]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("place", PLACES)
def test_any_exception_becomes_a_result_and_leaves_the_base_clean(
    place: str, variant: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in lab.base.model.state_dict().items()}
    monkeypatch.setattr(f"tinyllama_lab.core.{place}", fail_with(ZeroDivisionError("a\nb")))
    (found,) = lab.run([lab.trial({"lora.variant": variant})])
    assert found.state == State.FAILED and found.error is not None
    if place != PLACES[0]:  # that fails the base's score first
        assert (found.error["class"], found.error["message"]) == ("error", "a b")
    assert "ZeroDivisionError" in found.error["log_tail"]
    after_ = lab.base.model.state_dict()
    assert before.keys() == after_.keys()
    assert all(torch.equal(value, after_[name]) for name, value in before.items())


def test_a_full_disk_stops_the_worker_and_fails_no_trial(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tinyllama_lab.core.training.attempt.plot_loss_curve", fail_with(full))
    trial = lab.trial()
    with pytest.raises(OSError, match="No space left"):
        lab.run([trial])
    assert trial.read_result() == (None, None)


def test_a_lost_device_stops_the_worker_and_fails_no_trial(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr("tinyllama_lab.core.training.pool.train_round", fail_with(lost))
    trial = lab.trial()
    with pytest.raises(RuntimeError, match="device-side"):
        lab.run([trial])
    assert trial.read_result() == (None, None)


@pytest.mark.parametrize(
    ("error", "state", "name"),
    [
        (DivergedError("x"), State.DIVERGED, "diverged"),
        *((error, State.OOM, "oom") for error in OUT_OF_MEMORY),
        (BaseError("x"), State.FAILED, "no_base"),
        (DataDownloadError("x"), State.FAILED, "no_data"),
        (DataError("x"), State.FAILED, "data"),
        (ZeroDivisionError("x"), State.FAILED, "error"),
    ],
)
def test_every_error_has_a_state_and_a_class(error: Exception, state: State, name: str) -> None:
    found, record = classify(error)
    assert (found, record["class"]) == (state, name) and record["message"]


def test_a_trial_with_a_nan_loss_has_diverged(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run([lab.trial(QUIET, place="before")])  # the base has its score
    monkeypatch.setattr(evaluate, "example_losses", lambda *_: [float("nan")] * 4)
    trial = lab.trial(QUIET)
    (found,) = lab.run([trial])
    assert found.state == State.DIVERGED
    assert "NaN" not in trial.result_file.read_text()


@pytest.mark.parametrize(
    ("variant", "calls"),
    [*(("lora", calls) for calls in (1, 2, 4, 5, 6)), ("dora", 2), ("dora", 3), ("dora", 6)],
)
def test_a_trial_stopped_at_any_place_has_no_result_and_continues(
    variant: str, calls: int, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    changes = {"lora.variant": variant, "lora.dropout": 0.1, "eval.latency_tokens": 0}
    (whole,) = lab.run([lab.trial(changes, place="whole")])
    trial = lab.trial(changes)
    lab.stop([trial], calls)
    assert trial.read_result() == (None, None) and trial.checkpoint_dir.is_dir()
    (found,) = lab.run([trial])
    assert (found.state, found.attempts) == (State.DONE, 2)
    for name in ("train/loss", "eval/loss"):  # the measured speed decides the micro-batches
        assert found.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-6)
    assert states(trial) == ["running", "stopped", "running", "done"]


@pytest.mark.parametrize("scoring", [None, {"generations": 1}])
def test_a_worker_that_was_replaced_writes_neither_adapter_nor_result(
    scoring: dict[str, int] | None, lab: Lab
) -> None:
    """It may have been stopped for so long that another worker has begun its trial."""
    trial, attempt = lab.trial(QUIET), 2 if scoring else 1
    if scoring:
        lab.run([trial])
    result_folder = lab.task(trial, **scoring or {}).result_folder

    def replaced() -> bool:
        if states(trial).count("running") == attempt:  # this worker has just begun
            EventLog(trial.events_file).append("state", state="running", attempt=attempt + 1)
        return False

    with pytest.raises(StoppedError, match="another worker has taken over"):
        lab.run([trial], lab.context(replaced), **scoring or {})
    assert result_folder.read_result() == (None, None)
    assert trial.adapter_dir.exists() == bool(scoring)
    take_off_adapters(lab.base.model)


def test_a_trial_scored_on_other_rows_than_its_base_is_refused(lab: Lab) -> None:
    trial = lab.trial(QUIET)
    attempt = Attempt(lab.context(), Task(trial, lab.base_trial(trial), ()))
    attempt.begin()
    base = Result("key", "base", State.DONE, data={"eval_fingerprint": "another"})
    with pytest.raises(
        DataChangedError, match="scored on the same tokens.*the same command again"
    ):
        attempt.commit(base)


def test_a_trial_that_failed_on_changed_data_runs_again(lab: Lab, tmp_path: Path) -> None:
    """The message says that the same command runs the trial again."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"q {n}", "response": f"a {n}"}) + "\n" for n in range(40)]
    path.write_text("".join(lines))
    settings = {
        "data.source": "file",
        "data.path": str(path),
        "data.columns.split": None,
        "data.columns.intent": None,
    }
    identity = file_digest(path)[:16]
    trial = lab.trial({**QUIET, **settings, "data.identity": identity})
    path.write_text("".join(lines[1:]))
    (found,) = lab.run([trial])
    assert found.error is not None and found.error["class"] == "data_changed"
    assert "run the same command again" in found.error["message"]
    assert should_rerun(found, "auto") and not should_rerun(found, "none")
    path.write_text("".join(lines))
    trial.result_file.unlink()  # as the driver does before it hands a trial out again
    (found,) = lab.run([trial])
    assert found.state == State.DONE


def test_a_trial_that_fails_before_it_begins_has_a_result(lab: Lab) -> None:
    trial = lab.trial(QUIET)
    attempt = Attempt(lab.context(), Task(trial, lab.base_trial(trial), ("x=1",)))
    attempt.fail(BaseError("odd"))
    found = result(trial)
    assert found.error is not None and found.error["class"] == "no_base"
    assert states(trial) == ["running", "failed"] and found.environment["profile"] == "tiny"


def test_a_diverged_trial_leaves_no_checkpoint_and_an_oom_one_does(lab: Lab) -> None:
    class Tight(Wrapped):
        steps = 0

        def example_losses(self, items: Any) -> torch.Tensor:
            self.steps += torch.is_grad_enabled()
            if self.steps > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().example_losses(items)

    context = lab.context(checkpoint_every_s=1e-9)
    tight = lab.trial({**QUIET, "train.max_steps": 5})
    (found,) = lab.run([tight], context, wrap=Tight)
    assert found.state == State.OOM and found.error is not None
    assert found.error["class"] == "oom" and "out of memory" in found.error["message"]
    assert tight.checkpoint_dir.is_dir()  # another try could use what is there
    wild = lab.trial({**QUIET, "train.max_steps": 5, "train.max_loss": 0.1})
    (found,) = lab.run([wild], context)
    assert found.state == State.DIVERGED and found.error is not None
    assert found.error["class"] == "diverged" and "at step 1" in found.error["message"]
    assert not wild.checkpoint_dir.exists()
