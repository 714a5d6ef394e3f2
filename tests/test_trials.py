"""One trial from its configuration to its result, and what becomes of one that fails."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama_lab.config import HardwareConfig, Science, part
from tinyllama_lab.core import evaluate, train, trials
from tinyllama_lab.core.bases import Bases, run_base
from tinyllama_lab.core.bench import Bench
from tinyllama_lab.core.data import DataCache
from tinyllama_lab.core.loss import Batch, label_losses
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.model import Base
from tinyllama_lab.core.trials import fail_trial, run_trial
from tinyllama_lab.errors import BaseError, StoppedError
from tinyllama_lab.events import read_events
from tinyllama_lab.trial import Result, State, Trial, trial_key

SCORES = {"loss", "perplexity", "intent_accuracy"}
COSTS = {
    "perf/train_tokens_per_s",
    "perf/train_seconds",
    "perf/decode_tokens_per_s",
    "perf/first_token_ms",
    "perf/trial_seconds",
    "memory/train_peak_mib",
    "memory/infer_peak_mib",
    "size/adapter_mib",
    "size/trainable_params",
}


@pytest.fixture(scope="module")
def data(tiny_base: Base) -> DataCache:
    return DataCache(tiny_base.tokenizer)


@pytest.fixture
def bench(tiny_base: Base, data: DataCache, hardware: dict[str, Any]) -> Callable[..., Bench]:
    def make(stopped: Callable[[], bool] = lambda: False, **changes: Any) -> Bench:
        machine = part(HardwareConfig, {**hardware, **changes})
        return Bench(tiny_base, data, machine, PeakMemory(tiny_base.device), "tiny", stopped)

    return make


@pytest.fixture
def make_trial(configure: Any, tmp_path: Path) -> Callable[..., Trial]:
    def make(changes: dict[str, Any] | None = None, place: str = "trials") -> Trial:
        config = configure(changes)
        trial = Trial(tmp_path / place / f"tiny-{trial_key(config)}")
        trial.write_config(config)
        return trial

    return make


@pytest.fixture(scope="module")
def base_result(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Result:
    """The base's own evaluation, done once as a worker does it."""
    base, configure, hardware, data = map(
        request.getfixturevalue, ("tiny_base", "configure", "hardware", "data")
    )
    machine = part(HardwareConfig, hardware)
    bench = Bench(base, data, machine, PeakMemory(base.device), "tiny", lambda: False)
    trial = Trial(tmp_path_factory.mktemp("base") / "base-1")
    run_base(bench, trial, part(Science, configure()))
    result, problem = trial.read_result()
    assert result is not None and problem is None and trial.per_example_file.is_file()
    return result


def events(trial: Trial, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(trial.events_file) if event["kind"] == kind]


def test_a_trial_ends_with_every_number_and_file(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    trial = make_trial()
    run_trial(bench(), trial, ["lora.r=4"], base_result)
    result, problem = trial.read_result()  # reads back whole: the checksum and all files fit
    assert result is not None and problem is None
    assert (result.state, result.error, result.attempts) == (State.DONE, None, 1)
    assert result.overrides == ["lora.r=4"]
    scores = {f"{part_}/{name}" for part_ in ("eval", "base") for name in SCORES}
    assert scores | COSTS | {"train/loss"} <= result.metrics.keys()
    assert all(isinstance(value, float) for value in result.metrics.values())
    assert result.metrics["base/loss"] == base_result.metrics["eval/loss"]
    assert result.data["eval_fingerprint"] == base_result.data["eval_fingerprint"]
    assert result.data["train_rows"] == 8 and result.data["eval_rows"] == 4
    assert result.model["trainable_params"] == result.metrics["size/trainable_params"] > 0
    assert result.model["parameters"] == base_result.model["parameters"] == 90688
    assert {"versions", "git_commit", "hardware", "device", "threads"} <= result.environment.keys()
    assert result.environment["profile"] == "tiny"
    assert "eval/loss" in base_result.metrics and "train/loss" not in base_result.metrics


def test_a_trial_leaves_its_files_and_no_checkpoint(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    trial = make_trial({"eval.generations": 3})
    result = run_trial(bench(), trial, [], base_result)
    assert set(result.files) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "eval/eval_results.csv",
        "eval/generations.jsonl",
        "eval/per_example.jsonl",
        "loss_curve.png",
    }
    assert not trial.checkpoint_dir.exists()
    assert not [p for p in trial.folder.rglob("*") if ".tmp" in p.name]
    rows = [json.loads(line) for line in trial.per_example_file.read_text().splitlines()]
    assert [row["example"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["tokens"] for row in rows) == result.data["eval_label_tokens"]
    assert len(trial.generations_file.read_text().splitlines()) == 3
    table = {row["metric"]: row for row in csv.DictReader(trial.eval_table_file.open())}
    assert float(table["eval/loss"]["adapter"]) == result.metrics["eval/loss"]
    assert float(table["eval/loss"]["base"]) == result.metrics["base/loss"]
    picture = trial.loss_curve_file.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"


def test_states_and_steps_are_told_while_it_runs(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    trial = make_trial()
    run_trial(bench(), trial, [], base_result)
    assert [event["state"] for event in events(trial, "state")] == ["running", "done"]
    phases = [event["name"] for event in events(trial, "phase")]
    assert phases == ["training", "scoring", "generating"]
    values = [event["values"] for event in events(trial, "metric")]
    assert len(values) == 2
    assert values[0].keys() == {"train/loss", "train/grad_norm", "train/lr"}


def test_one_trial_does_not_change_the_next(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    alone = run_trial(bench(), make_trial(), [], base_result)
    run_trial(bench(), make_trial({"lora.variant": "dora", "seed": 4}), [], base_result)
    after = run_trial(bench(), make_trial(place="again"), [], base_result)
    for name in ("train/loss", "eval/loss"):
        assert alone.metrics[name] == after.metrics[name]


def test_what_can_be_left_out_is_left_out(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    trial = make_trial({"eval.generations": 0, "eval.latency_tokens": 0})
    result = run_trial(bench(gradient_checkpointing=True), trial, [], base_result)
    assert result.state == State.DONE
    assert not {"eval/intent_accuracy", "perf/first_token_ms"} & result.metrics.keys()
    assert not trial.generations_file.exists()


def test_the_base_is_scored_whatever_a_trial_wants_to_train_on(
    bench: Any, make_trial: Any, configure: Any, base_result: Result
) -> None:
    science = part(Science, configure({"data.n": 10**6, "data.balance_by": "intent"}))
    result = run_base(bench(), make_trial(place="base"), science)
    assert result.data == base_result.data
    assert result.metrics["eval/loss"] == base_result.metrics["eval/loss"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data.max_length": 8}, "invalid", "data.n=8 needs 8 usable training rows"),
        ({"lora.targets": ["q_porj"]}, "invalid", "lora.targets must name modules of the model"),
        ({"data.columns": {}}, "invalid", "data.columns.prompt is missing"),
    ],
)
def test_what_cannot_be_run_fails_with_the_reason(
    changes: dict[str, Any], kind: str, message: str,
    bench: Any, make_trial: Any, base_result: Result,
) -> None:  # fmt: skip
    trial = make_trial(changes)
    run_trial(bench(), trial, [], base_result)
    result, _ = trial.read_result()
    assert result is not None and result.state == State.FAILED and result.error is not None
    assert result.error["class"] == kind and message in result.error["message"]
    assert "Error" in result.error["log_tail"] and "Traceback" in result.error["log_tail"]
    assert events(trial, "state")[-1]["state"] == "failed"


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize(
    "place", ["score.generate.generate", "trials.plot_loss_curve", "trials.train"]
)
def test_any_exception_is_a_result_and_the_base_is_clean(
    place: str, bench: Any, make_trial: Any, base_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in bench().base.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(f"tinyllama_lab.core.{place}", fail_with(ZeroDivisionError("a\nb")))
        result = run_trial(bench(), make_trial(), [], base_result)
    assert result.state == State.FAILED and result.error is not None
    assert (result.error["class"], result.error["message"]) == ("error", "a b")
    assert "ZeroDivisionError" in result.error["log_tail"]
    after = bench().base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_deterministic_algorithms_are_on_while_a_trial_runs_and_never_after(
    bench: Any, make_trial: Any, base_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def told(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise ZeroDivisionError

    monkeypatch.setattr(trials, "train", told)
    for deterministic in (True, False):
        trial = make_trial({"train.deterministic": deterministic})
        run_trial(bench(), trial, [], base_result)
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, False]
    monkeypatch.undo()
    trial = make_trial({"train.deterministic": True}, place="whole")
    assert run_trial(bench(), trial, [], base_result).state == State.DONE


def test_a_full_disk_is_the_workers_problem(
    bench: Any, make_trial: Any, base_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(trials, "plot_loss_curve", fail_with(full))
    trial = make_trial()
    with pytest.raises(OSError, match="No space left"):
        run_trial(bench(), trial, [], base_result)
    assert trial.read_result() == (None, None)


def small_memory(limit: int, error: BaseException) -> Callable[..., Any]:
    def losses(model: Any, batch: Batch) -> torch.Tensor:
        if batch.ids.numel() > limit:
            raise error
        return label_losses(model, batch)

    return losses


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_tried_again_in_smaller_pieces(
    error: BaseException, bench: Any, make_trial: Any, base_result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    roomy = run_trial(bench(micro_batch_tokens=1200), make_trial(), [], base_result)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "label_losses", small_memory(400, error))
    trial = make_trial(place="small")
    result = run_trial(bench(micro_batch_tokens=1200), trial, [], base_result)
    assert result.state == State.DONE
    assert result.environment["micro_batch_tokens"] == 300
    for name in ("train/loss", "eval/loss"):
        assert result.metrics[name] == pytest.approx(roomy.metrics[name], rel=1e-5)
    notes = [event["text"] for event in events(trial, "note")]
    assert "out of memory; trying again with 600 at a time" in notes
    assert [event["step"] for event in events(trial, "metric")] == [1, 2]


def test_out_of_memory_with_one_row_is_the_end(
    bench: Any, make_trial: Any, base_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "label_losses", small_memory(20, OUT_OF_MEMORY[0]))
    trial = make_trial()
    result = run_trial(bench(), trial, [], base_result)
    assert result.state == State.OOM and result.error is not None
    assert result.error["class"] == "oom" and "out of memory" in result.error["message"]
    assert not hasattr(bench().base.model, "peft_config")


def test_a_diverged_trial_says_where(bench: Any, make_trial: Any, base_result: Result) -> None:
    model = bench().base.model
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    try:
        result = run_trial(bench(), make_trial(), [], base_result)
    finally:
        hook.remove()
    assert result.state == State.DIVERGED and result.error is not None
    assert result.error["class"] == "diverged" and "at step 1" in result.error["message"]


def test_a_trial_whose_score_is_not_a_number_has_diverged(
    bench: Any, make_trial: Any, base_result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = [evaluate.ExampleLoss(0, float("nan"), 3)]
    monkeypatch.setattr(evaluate, "example_losses", lambda *_: spoiled)
    trial = make_trial()
    assert run_trial(bench(), trial, [], base_result).state == State.DIVERGED
    assert "NaN" not in trial.result_file.read_text()


@pytest.mark.parametrize("calls", [0, 2, 4, 5, 6])
def test_a_trial_stopped_at_any_place_has_no_result_and_continues(
    calls: int, bench: Any, make_trial: Any, base_result: Result
) -> None:
    whole = run_trial(bench(), make_trial(place="whole"), [], base_result)
    seen: list[int] = []
    trial = make_trial()
    with pytest.raises(StoppedError):
        stopped = lambda: len(seen) >= calls or bool(seen.append(1))  # noqa: E731
        run_trial(bench(stopped), trial, [], base_result)
    assert trial.read_result() == (None, None) and trial.checkpoint_dir.is_dir()
    result = run_trial(bench(), trial, [], base_result)
    assert (result.state, result.attempts) == (State.DONE, 2)
    for name in ("train/loss", "eval/loss"):
        assert result.metrics[name] == whole.metrics[name]
    states = [event["state"] for event in events(trial, "state")]
    assert states == ["running", "stopped", "running", "done"]


def test_a_base_that_cannot_be_scored_fails_its_trials_alone(
    bench: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, science = Bases(bench()), part(Science, make_trial().read_config())
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama_lab.core.bases.score", fail_with(ZeroDivisionError("odd")))
        for _ in range(2):  # the failure is remembered
            with pytest.raises(BaseError, match="the base could not be scored: odd"):
                bases.result_of(make_trial(place="base"), science)
    with pytest.raises(BaseError):
        bases.result_of(make_trial(place="base"), science)
    trial = make_trial()
    result = fail_trial(bench(), trial, [], BaseError("odd"))
    assert result.error is not None and result.error["class"] == "no_base"
    assert trial.read_result()[0] == result


def test_a_base_of_another_precision_is_scored_again(bench: Any, make_trial: Any) -> None:
    trial, science = make_trial(place="base"), part(Science, make_trial().read_config())
    first = Bases(bench()).result_of(trial, science)
    assert Bases(bench()).result_of(trial, science) == first
    first.environment["dtype"] = "bfloat16"
    trial.commit(first)
    assert Bases(bench()).result_of(trial, science).environment["dtype"] == "float32"


def test_a_trial_scored_on_other_rows_than_its_base_is_refused(
    bench: Any, make_trial: Any, base_result: Result
) -> None:
    other = replace(base_result, data={"eval_fingerprint": "another"})
    result = run_trial(bench(), make_trial(), [], other)
    assert result.error is not None and "scored on the same tokens" in result.error["message"]
