"""One trial, or the base's own evaluation, from its configuration to its result."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.config import EvalConfig, HardwareConfig, Science, part
from tinyllama_lab.core import evaluate, generate, lora
from tinyllama_lab.core.data import DataCache, Example, Prepared
from tinyllama_lab.core.meter import MIB, PeakMemory, environment
from tinyllama_lab.core.metrics.intent import intent_accuracy
from tinyllama_lab.core.model import Base
from tinyllama_lab.core.plots import plot_loss_curve
from tinyllama_lab.core.train import Progress, Run, train
from tinyllama_lab.errors import DivergedError, LabError, StoppedError, is_disk_full
from tinyllama_lab.events import EventLog, read_events
from tinyllama_lab.trial import Result, State, Trial, sync, write_atomic

logger = logging.getLogger(__name__)


@dataclass
class Bench:
    """What all trials of a pack share: the base, its data, the machine."""

    base: Base
    data: DataCache
    hardware: HardwareConfig
    memory: PeakMemory
    profile: str
    stopped: Callable[[], bool]

    def environment(self) -> dict[str, Any]:
        """What a result records beside its configuration."""
        facts = environment(self.base.device, self.base.dtype, self.memory.basis)
        return {**facts, "profile": self.profile}

    @property
    def micro_batch_tokens(self) -> int:
        """What one forward pass takes: enough to keep the device busy, no more."""
        if self.hardware.micro_batch_tokens is not None:
            return self.hardware.micro_batch_tokens
        if self.base.device.type == "cpu":
            return 512
        total = torch.cuda.get_device_properties(self.base.device).total_memory
        return max(1024, 2048 * (total // (16 * 1024 * MIB)))


def run_trial(bench: Bench, trial: Trial, overrides: list[str], base_result: Result) -> Result:
    """Train, score and save one trial, and commit its result; a failure is a result as well.

    Raises:
        StoppedError: the worker was told to stop; the trial stays missing and can continue.
    """
    log = EventLog(trial.events_file)
    starts = [e for e in read_events(trial.events_file) if e.get("state") == "running"]
    attempts = len(starts) + 1
    log.append("state", state="running", attempt=attempts)
    result = Result(trial.key, trial.name, State.DONE, overrides=overrides, attempts=attempts)
    result.environment = bench.environment()
    begin = time.monotonic()
    try:
        science = part(Science, trial.read_config())
        _measure(bench, trial, science, log, result)
        for name, value in base_result.metrics.items():
            if name.startswith("eval/"):
                result.metrics[name.replace("eval/", "base/", 1)] = value
    except StoppedError:
        log.append("state", state="stopped")
        raise
    except Exception as error:
        if is_disk_full(error):
            raise  # nothing can be recorded on a full disk; the worker says so
        result.state, result.error = _classify(error)
        logger.exception("%s failed", trial.folder.name)
    finally:
        torch.use_deterministic_algorithms(False)
    result.metrics["perf/trial_seconds"] = time.monotonic() - begin
    trial.commit(result)
    log.append("state", state=str(result.state))
    shutil.rmtree(trial.checkpoint_dir, ignore_errors=True)
    return result


def run_base(bench: Bench, trial: Trial, science: Science) -> Result:
    """Score the base without any adapter; done once and shared by all studies."""
    result = Result(trial.key, trial.name, State.DONE)
    result.environment = bench.environment()
    log = EventLog(trial.events_file)
    log.append("state", state="running", attempt=1)
    # the held-out rows are those of every trial, however many rows that trains on
    prepared = bench.data.prepare(replace(science.data, n=1, balance_by=None))
    result.data = {k: v for k, v in prepared.facts.items() if k.startswith("eval_")}
    result.model = {**_model_facts(bench, science), "trainable_params": 0}
    _score(bench, trial, science.eval, prepared, log, result)
    _write_eval_table(trial, result.metrics)
    _list_files(trial, result)
    trial.commit(result)
    log.append("state", state="done")
    return result


def _measure(bench: Bench, trial: Trial, science: Science, log: EventLog, result: Result) -> None:
    prepared = bench.data.prepare(science.data)
    result.data = prepared.facts
    result.model = _model_facts(bench, science)
    torch.use_deterministic_algorithms(science.train.deterministic)
    adapted, progress = _train(bench, trial, science, prepared.train, log, result)
    try:
        trainable = sum(p.numel() for p in lora.trainable(adapted).values())
        result.model["trainable_params"] = trainable
        _save_adapter(adapted, trial)
        _score(bench, trial, science.eval, prepared, log, result)
    finally:
        lora.detach(adapted)
    weights = trial.adapter_dir / "adapter_model.safetensors"
    result.metrics |= {
        "train/loss": progress.losses[-1],
        "perf/train_tokens_per_s": progress.tokens_per_s,
        "perf/train_seconds": progress.seconds,
        "size/adapter_mib": weights.stat().st_size / MIB,
        "size/trainable_params": float(trainable),
    }
    plot_loss_curve(trial, progress.losses, result.metrics["eval/loss"])
    _write_eval_table(trial, result.metrics)
    _list_files(trial, result)


def _train(
    bench: Bench,
    trial: Trial,
    science: Science,
    examples: list[Example],
    log: EventLog,
    result: Result,
) -> tuple[Any, Progress]:
    """Train with ever smaller micro-batches while memory runs out; the effective batch stays."""
    tokens = bench.micro_batch_tokens
    longest = max(len(example.ids) for example in examples)
    while True:
        bench.memory.reset()
        adapted = lora.attach(bench.base.model, science.lora, science.seed)
        run = Run(trial, log, tokens, bench.hardware.checkpoint_every_s, bench.stopped)
        log.append("phase", name="training")
        try:
            _checkpoint_activations(bench)
            progress = train(bench.base, lora.trainable(adapted), examples, science, run)
            result.metrics |= bench.memory.read("train")
            result.environment["micro_batch_tokens"] = tokens
            return adapted, progress
        except BaseException as error:
            lora.detach(adapted)
            if not is_out_of_memory(error) or tokens <= longest:
                raise
        tokens = _halved(tokens, log)


def _losses(
    bench: Bench, examples: list[Example], tokens: int, log: EventLog
) -> list[evaluate.ExampleLoss]:
    """Held-out losses, with ever smaller micro-batches while memory runs out."""
    longest = max(len(example.ids) for example in examples)
    while True:
        try:
            return evaluate.example_losses(bench.base, examples, tokens, bench.stopped)
        except BaseException as error:
            if not is_out_of_memory(error) or tokens <= longest:
                raise
        tokens = _halved(tokens, log)


def _halved(tokens: int, log: EventLog) -> int:
    log.append("note", text=f"out of memory; trying {tokens // 2} tokens a micro-batch")
    return tokens // 2


def _checkpoint_activations(bench: Bench) -> None:
    model = bench.base.model
    if bench.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _score(
    bench: Bench,
    trial: Trial,
    settings: EvalConfig,
    prepared: Prepared,
    log: EventLog,
    result: Result,
) -> None:
    """Held-out loss, generations and latency of whatever adapter is attached."""
    bench.memory.reset()
    log.append("phase", name="scoring")
    losses = _losses(bench, prepared.heldout, 2 * bench.micro_batch_tokens, log)
    result.metrics |= evaluate.loss_metrics(losses)
    evaluate.write_per_example(trial, losses)
    _stop_here(bench)
    asked = prepared.heldout[: settings.generations]
    if asked:
        log.append("phase", name="generating")
        generations = generate.generate(bench.base, asked, settings.max_new_tokens)
        generate.write_generations(trial, generations)
        if all(g.intent for g in generations):
            answers, intents = [g.output for g in generations], [g.intent for g in generations]
            result.metrics["eval/intent_accuracy"] = intent_accuracy(answers, intents)
    _stop_here(bench)
    if settings.latency_tokens:
        result.metrics |= generate.measure_latency(
            bench.base, prepared.heldout[0], settings.latency_tokens
        )
    result.metrics |= bench.memory.read("infer")


def _stop_here(bench: Bench) -> None:
    if bench.stopped():
        raise StoppedError("asked to stop")


def _model_facts(bench: Bench, science: Science) -> dict[str, Any]:
    return {
        "name": science.model.name,
        "revision": science.model.identity,
        "parameters": bench.base.parameters,
    }


def _save_adapter(adapted: Any, trial: Trial) -> None:
    """The adapter's folder appears whole: a killed worker leaves none or all of it."""
    temporary = trial.folder / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    lora.save(adapted, temporary)
    shutil.rmtree(trial.adapter_dir, ignore_errors=True)
    temporary.rename(trial.adapter_dir)
    sync(trial.folder)


def _write_eval_table(trial: Trial, metrics: dict[str, float]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["metric", "value"])
    writer.writerows(sorted(metrics.items()))
    write_atomic(trial.eval_table_file, text.getvalue())


def _list_files(trial: Trial, result: Result) -> None:
    """Name what belongs to the result, so that a lost or cut file is noticed."""
    files = [*trial.adapter_dir.glob("*"), *trial.eval_dir.glob("*"), trial.loss_curve_file]
    result.files = {
        str(Path(file).relative_to(trial.folder)): file.stat().st_size
        for file in sorted(files)
        if file.is_file()
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python could not get memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _classify(error: Exception) -> tuple[State, dict[str, str]]:
    state, name = State.FAILED, "error"
    if isinstance(error, DivergedError):
        state, name = State.DIVERGED, "diverged"
    elif is_out_of_memory(error):
        state, name = State.OOM, "oom"
    elif isinstance(error, LabError):
        name = "invalid"
    tail = "".join(traceback.format_exception(error)).splitlines()[-20:]
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return state, {"class": name, "message": message, "log_tail": "\n".join(tail)}
