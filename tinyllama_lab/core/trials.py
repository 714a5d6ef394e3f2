"""One trial from its configuration to its result."""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from typing import Any

import torch

from tinyllama_lab.config import Science, part
from tinyllama_lab.core import lora
from tinyllama_lab.core.bench import Bench, fit, is_out_of_memory
from tinyllama_lab.core.data import Example
from tinyllama_lab.core.meter import MIB
from tinyllama_lab.core.plots import plot_loss_curve
from tinyllama_lab.core.score import score, write_eval_table
from tinyllama_lab.core.train import Progress, Run, train
from tinyllama_lab.errors import (
    BaseError,
    DataError,
    DivergedError,
    LabError,
    StoppedError,
    is_disk_full,
)
from tinyllama_lab.events import Event, EventLog, read_events
from tinyllama_lab.trial import Result, State, Trial, sync

logger = logging.getLogger(__name__)


def run_trial(bench: Bench, trial: Trial, overrides: list[str], base_result: Result) -> Result:
    """Train, score and save one trial, and commit its result; a failure is a result as well.

    Raises:
        StoppedError: the worker was told to stop; the trial stays missing and can continue.
    """
    log, result, earlier_s = _begin(bench, trial, overrides)
    begin = time.monotonic()
    try:
        _measure(bench, trial, part(Science, trial.read_config()), base_result, result)
    except StoppedError:
        log.append("state", state="stopped")
        raise
    except Exception as error:
        if is_disk_full(error) or _has_lost_device(error):
            raise  # nothing can be recorded, or nothing would work from here on
        result.state, result.error = _classify(error)
        logger.exception("%s failed", trial.folder.name)
    finally:
        torch.use_deterministic_algorithms(False)
    result.metrics["perf/trial_seconds"] = earlier_s + time.monotonic() - begin
    _end(trial, log, result)
    return result


def fail_trial(bench: Bench, trial: Trial, overrides: list[str], error: BaseError) -> Result:
    """Commit that a trial cannot be run, because its base cannot be scored."""
    log, result, _ = _begin(bench, trial, overrides)
    result.state, result.error = _classify(error)
    _end(trial, log, result)
    return result


def _begin(bench: Bench, trial: Trial, overrides: list[str]) -> tuple[EventLog, Result, float]:
    """The trial's log and empty result, and the seconds that earlier attempts took."""
    log, before = EventLog(trial.events_file), read_events(trial.events_file)
    attempts = sum(event.get("state") == "running" for event in before) + 1
    log.append("state", state="running", attempt=attempts)
    result = Result(trial.key, trial.name, State.DONE, overrides=overrides, attempts=attempts)
    result.environment = bench.environment()
    return log, result, _seconds(before)


def _end(trial: Trial, log: EventLog, result: Result) -> None:
    trial.commit(result)
    log.append("state", state=str(result.state))
    if result.state in (State.DONE, State.DIVERGED):  # another try could use what is there
        shutil.rmtree(trial.checkpoint_dir, ignore_errors=True)


def _measure(
    bench: Bench, trial: Trial, science: Science, base_result: Result, result: Result
) -> None:
    prepared = bench.data.prepare(science.data)
    result.data = prepared.facts
    _check_same_heldout(base_result, result)
    torch.use_deterministic_algorithms(science.train.deterministic)
    adapted, progress = _train(bench, trial, science, prepared.train, result)
    try:
        trainable = sum(p.numel() for p in lora.trainable(adapted).values())
        _save_adapter(adapted, trial)
        score(bench, trial, science.eval, prepared, result)
    finally:
        lora.detach(adapted)
    result.model = {
        "name": science.model.name,
        "revision": science.model.identity,
        "parameters": bench.base.parameters,
        "trainable_params": trainable,
    }
    weights = trial.adapter_dir / "adapter_model.safetensors"
    result.metrics |= {
        "train/loss": progress.losses[-1],
        "perf/train_tokens_per_s": progress.tokens_per_s,
        "perf/train_seconds": progress.seconds,
        "size/adapter_mib": weights.stat().st_size / MIB,
        "size/trainable_params": float(trainable),
    }
    scores = {k: v for k, v in base_result.metrics.items() if k.startswith("eval/")}
    result.metrics |= {k.replace("eval/", "base/", 1): v for k, v in scores.items()}
    plot_loss_curve(trial, progress.losses, result.metrics["eval/loss"])
    write_eval_table(trial, result.metrics)
    files = [*trial.adapter_dir.glob("*"), *trial.eval_dir.glob("[!.]*"), trial.loss_curve_file]
    result.list_files(trial, files)


def _train(
    bench: Bench, trial: Trial, science: Science, examples: list[Example], result: Result
) -> tuple[Any, Progress]:
    """Train with ever smaller micro-batches while memory runs out; the effective batch stays."""
    log = EventLog(trial.events_file)
    if bench.hardware.gradient_checkpointing:
        bench.base.model.gradient_checkpointing_enable({"use_reentrant": False})

    def attempt(tokens: int) -> tuple[Any, Progress]:
        bench.memory.reset()
        adapted = lora.attach(bench.base.model, science.lora, science.seed)
        log.append("phase", name="training")
        run = Run(
            trial, log, tokens, bench.hardware.checkpoint_every_s, bench.memory, bench.stopped
        )
        try:
            return adapted, train(bench.base, lora.trainable(adapted), examples, science, run)
        except BaseException:
            lora.detach(adapted)
            raise

    longest = max(len(example.ids) for example in examples)
    wanted = bench.micro_batch_tokens
    (adapted, progress), tokens = fit(attempt, wanted, longest, log)
    if tokens != wanted:
        bench.fitting_tokens = tokens
    result.environment["micro_batch_tokens"] = tokens
    result.metrics |= progress.peak_mib
    return adapted, progress


def _check_same_heldout(base_result: Result, result: Result) -> None:
    ours, base = (each.data.get("eval_fingerprint") for each in (result, base_result))
    if ours != base:
        raise DataError(
            f"a trial and its base must be scored on the same tokens, got fingerprints {ours} and "
            f"{base}; the data changed while the sweep ran: run the same command again"
        )


def _save_adapter(adapted: Any, trial: Trial) -> None:
    """The adapter's folder appears whole: a killed worker leaves none or all of it."""
    temporary = trial.folder / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    lora.save(adapted, temporary)
    for file in temporary.iterdir():
        sync(file)
    shutil.rmtree(trial.adapter_dir, ignore_errors=True)
    temporary.rename(trial.adapter_dir)
    sync(trial.folder)


def _seconds(events: list[Event]) -> float:
    """How long attempts took: from each start to the last event before the next."""
    total, begin, last = 0.0, None, 0.0
    for event in events:
        if event.get("state") == "running":
            total += last - begin if begin is not None else 0.0
            begin = event["time"]
        last = event["time"]
    return total + (last - begin if begin is not None else 0.0)


def _has_lost_device(error: Exception) -> bool:
    """After such an error every later call of the process fails; only a new worker helps."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def _classify(error: Exception) -> tuple[State, dict[str, str]]:
    state, name = State.FAILED, "error"
    if isinstance(error, DivergedError):
        state, name = State.DIVERGED, "diverged"
    elif is_out_of_memory(error):
        state, name = State.OOM, "oom"
    elif isinstance(error, BaseError):
        name = "no_base"
    elif isinstance(error, LabError):
        name = "invalid"
    tail = "".join(traceback.format_exception(error)).splitlines()[-40:]
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return state, {"class": name, "message": message, "log_tail": "\n".join(tail)}
