"""One attempt at a trial, from reading its configuration to writing its result."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.card import Facts, trial_card
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import STYLE, Example, Prepared
from tinyllama_lab.core.dataset.prompts import PromptFormat
from tinyllama_lab.core.engines.base import Adapter
from tinyllama_lab.core.evaluation.run import Subject, write_eval_table
from tinyllama_lab.core.out_of_memory import is_out_of_memory
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.prepare import prepare
from tinyllama_lab.core.training.step_schedule import first_epoch
from tinyllama_lab.errors import (
    BaseError,
    BaseMemoryError,
    DataChangedError,
    DataDownloadError,
    DataError,
    DivergedError,
    LabError,
    StoppedError,
)
from tinyllama_lab.metrics import HELDOUT_LOSS, MIB
from tinyllama_lab.study.evaluations import HELDOUT, facts_of_rows
from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.files import atomic_folder, share_equal, write_atomic
from tinyllama_lab.study.pack import Task
from tinyllama_lab.study.trial import EVAL, Result, State, TrialFolder

logger = logging.getLogger(__name__)


class Attempt:
    """A trial from the moment a worker starts it.

    If `is_trained`, the trial has its adapter already and is only scored again.
    """

    def __init__(self, context: WorkerContext, task: Task) -> None:
        """Read the trial's configuration.

        Raises:
            LabError: the trial's configuration is damaged.
        """
        self.trial, self.base = task.trial, task.base
        config = task.read_config()
        self.science: Science = part(Science, config)
        self.is_trained = task.trial.is_done
        self.evaluation = task.trial.evaluation(config[EVAL])
        self.log = EventLog(task.trial.events_file)
        self._context = context
        self._overrides = list(task.overrides)
        self._pace = task.pace
        self.seconds = 0.0  # with its share of the time spent on several trials together
        # the record of the trial, and that of the evaluation alone
        self.result = Result(task.trial.key, task.trial.name, State.DONE)
        self.eval_result = Result(self.evaluation.key, task.trial.name, State.DONE)
        self._prepared: Prepared | None = None
        self._files: list[Path] = []  # that the result rests on
        self._handler: logging.Handler | None = None
        self._losses: list[float] = []
        self._heldout: dict[int, float] = {}  # losses while it trained, by step

    def begin(self) -> None:
        """Log that the trial runs, and read its data.

        Raises:
            LabError: the data is not usable, or differs from what the adapter was trained on.
        """
        if self._prepared is not None:  # it was put back into the queue
            return
        self._handler = _log_to(self.trial)
        self._record_start()
        science = self.science
        self._prepared = prepare(self._context.data, science.data, science.eval, science.seed)
        self.result.data = dict(self._prepared.facts)
        if self.is_trained:
            self._check_same_rows()
            return
        for text in self._prepared.notes:
            self.log.append("note", text=text)
        self.log.append("phase", name="training")

    def _check_same_rows(self) -> None:
        """Refuse to score an adapter on other tokens than those of its training."""
        training_result, _ = self.trial.read_result()
        names = ["train_fingerprint"]
        if self.trial.read_config()[EVAL]["rows"] == self.science.eval.rows:
            names.append("eval_fingerprint")
        for name in names:
            recorded = training_result.data.get(name) if training_result else None
            if recorded not in (None, self.prepared.facts[name]):
                raise DataChangedError(
                    "a trial must be scored again on the tokens that it was trained with, got "
                    f"{name} {self.prepared.facts[name]}, which was {recorded}; the data, its "
                    "tokenizer or this project changed since: train it again in another study"
                )

    def _record_start(self) -> None:
        self.result.attempts = count_attempt(self.log, self.trial)
        self.result.overrides = self._overrides
        self.result.environment |= self._context.environment()

    @property
    def prepared(self) -> Prepared:
        """Return the data of a trial that has begun."""
        assert self._prepared is not None
        return self._prepared

    @property
    def has_begun(self) -> bool:
        """Return whether it was started, even if it was put back into the queue."""
        return self._handler is not None

    @property
    def longest_tokens(self) -> int:
        """Return the tokens of the longest training row; 0 if the rows cannot be read."""
        try:
            science, cache = self.science, self._context.data
            examples = cache.prepare(science.data, science.seed, science.eval.rows).train
        except Exception:  # `begin` reads them again and reports the error
            return 0
        return max(len(example.ids) for example in examples)

    @property
    def longest_example(self) -> Example:
        """Return the training example with the most tokens."""
        return max(self.prepared.train, key=lambda example: len(example.ids))

    @property
    def rows_to_read(self) -> list[Example]:
        """Return the rows of the first epoch in training order, if first values depend on them."""
        science, examples = self.science, self.prepared.train
        if not science.lora.reads_rows:
            return []
        return [examples[row] for row in first_epoch(len(examples), science.train, science.seed)]

    def subject(self, adapter: Adapter) -> Subject:
        """Return what the evaluation scores: the adapter, its data and its settings."""
        self.eval_result.environment = dict(self.result.environment)
        self.eval_result.data = facts_of_rows(self.result.data)
        evaluation, settings = self.evaluation, self.science.eval
        return Subject(self.trial, evaluation, settings, self.prepared, self.eval_result, adapter)

    def record_training(self, trainer: AdapterTrainer, facts: dict[str, Any]) -> None:
        """Record the results of training and save the adapter."""
        progress = trainer.progress
        self.result.environment |= facts
        self.result.model = {
            **self._context.model_facts(self.science.model),
            "trainable_params": trainer.adapter.trainable_params,
        }
        self._save_adapter(trainer.adapter)
        self.result.metrics |= {
            "train/loss": progress.losses[-1],
            "perf/train_tokens_per_s": progress.tokens_per_s,
            "perf/train_seconds": progress.seconds,
            "perf/train_tflop": trainer.tflop(self._context.base.parameters),
            "size/adapter_mib": self.trial.weights_file.stat().st_size / MIB,
            "size/trainable_params": float(trainer.adapter.trainable_params),
            **progress.memory,
            **trainer.heldout.metrics(is_scored=self.science.eval.rows == HELDOUT),
        }
        pace, hardware = self._pace, self.result.environment["hardware"]
        if pace is not None and pace.hardware == hardware:
            self.result.metrics["perf/predicted_seconds"] = pace.seconds(progress.tokens)
        self.result.data["train_rows_seen"] = trainer.rows_seen
        self.seconds += progress.seconds
        self._losses, self._heldout = progress.losses, trainer.heldout.curve

    def record_scoring(self, seconds: float, together: int) -> None:
        """Record its share of the seconds in which so many adapters and bases were scored."""
        # they share their batches, so the time of one cannot be measured
        self.seconds += seconds / together
        self.result.environment["scored_together"] = together

    def _save_adapter(self, adapter: Adapter) -> None:
        """Save the adapter's folder atomically: a killed worker leaves all of it or nothing.

        It holds the tokenizer too. Evaluations and exports of an earlier adapter are removed.
        """
        trial, context = self.trial, self._context
        self._check_current()
        # first, so that no kill leaves old scores with a new adapter
        for of_earlier in (trial.eval_dir, trial.deploy_dir):
            shutil.rmtree(of_earlier, ignore_errors=True)
        with atomic_folder(trial.adapter_dir) as temporary:
            adapter.save(temporary)
            # of a set of the hub, the rows decide the style, which the configuration lacks
            data = replace(self.science.data, style=self.result.data[STYLE])
            PromptFormat(context.base.tokenizer, data).save_tokenizer(temporary)
            if context.saved_adapter_dir is not None:
                share_equal(temporary, context.saved_adapter_dir)
        context.saved_adapter_dir = trial.adapter_dir

    def prune(self, trainer: AdapterTrainer, reason: str) -> None:
        """Write the result of a trial that the driver pruned in training."""
        progress, self.result.state = trainer.progress, State.PRUNED
        self.result.error = {"class": "pruned", "message": reason, "log_tail": ""}
        self.seconds += progress.seconds
        if progress.losses:
            self.result.metrics |= {
                "train/loss": progress.losses[-1],
                "perf/train_tokens_per_s": progress.tokens_per_s,
                "perf/train_seconds": progress.seconds,
            }
        self.result.data["trained_tokens"] = progress.tokens
        self.result.data["train_rows_seen"] = trainer.rows_seen
        self._end()

    def commit(self, base: Result) -> None:
        """Write the result of a scored trial.

        Raises:
            DataChangedError: base and trial were not scored on the same tokens.
        """
        # before anything is written: a trial is comparable with its base, or it fails
        ours, theirs = (result.data.get("eval_fingerprint") for result in (self.result, base))
        if ours != theirs:
            raise DataChangedError(
                "a trial and its base must be scored on the same tokens, got fingerprints "
                f"{ours} and {theirs}; the data changed while the sweep ran: run the same "
                "command again"
            )
        metrics = self.eval_result.metrics
        base_metrics = {k: v for k, v in base.metrics.items() if k.startswith("eval/")}
        metrics |= {k.replace("eval/", "base/", 1): v for k, v in base_metrics.items()}
        self.result.metrics |= metrics
        self.result.environment |= self.eval_result.environment
        write_eval_table(self.evaluation.table_file, self.result.metrics)
        if not self.is_trained:
            self._write_evaluation()
            self.result.evaluation = self.evaluation.key
            plot_loss_curve(self.trial, self._losses, metrics[HELDOUT_LOSS], self._heldout)
            trial, eval_files = self.trial, self.evaluation.folder.glob("[!.]*")
            card = trial_card(Facts.of(trial, self.result, self._context.base.end_ids))
            write_atomic(trial.card_file, card.text())
            # what only training can make; tokenizer and card can be written again, and edited
            adapter_files = (trial.adapter_config_file, trial.weights_file)
            self._files = [*adapter_files, *eval_files, trial.loss_curve_file]
        self._end()

    def _write_evaluation(self) -> None:
        """Write the evaluation's own record after all of its other files."""
        result, evaluation = self.eval_result, self.evaluation
        result.attempts, result.overrides = self.result.attempts, self.result.overrides
        result.model = self._context.model_facts(self.science.model)
        evaluation.write_config({EVAL: asdict(self.science.eval)})
        files = [f for f in evaluation.folder.glob("[!.]*") if f != evaluation.result_file]
        # last, because the result of an evaluation vouches for its other files
        evaluation.commit(result, files)

    def fail(self, error: Exception) -> None:
        """Write a result that says what went wrong."""
        if self._handler is None:  # it never began
            self._record_start()
        record = self.eval_result if self.is_trained else self.result
        record.state, record.error = classify(error)
        logger.error("%s failed", self.trial.folder.name, exc_info=error)
        self._end()

    def record_stop(self) -> None:
        """Log that the worker was asked to stop; without a result, the trial can continue."""
        self.log.append("state", state="stopped")
        self._close_log()

    def _end(self) -> None:
        """Commit the result, log the state, and remove what is no longer needed."""
        # The result comes first: a worker that is killed before it needs the checkpoint to
        # continue, and one that is killed after it leaves only files that nobody reads.
        result, trial = self.result, self.trial
        self._check_current()
        if self.is_trained:
            result = self.eval_result
            self._write_evaluation()
        else:
            result.metrics["perf/trial_seconds"] = self.seconds
            trial.commit(result, self._files)
        trial.prune_file.unlink(missing_ok=True)
        self.log.append("state", state=str(result.state))
        if result.state not in (State.OOM, State.FAILED):  # may be tried again
            shutil.rmtree(trial.checkpoint_dir, ignore_errors=True)
        logger.info("%s: %s %s", result.name, result.state, result.error or "")
        self._close_log()

    def _check_current(self) -> None:
        """Raise StoppedError if this worker was silent for long, and another has the trial now."""
        if attempts_at(self.trial) > self.result.attempts:
            raise StoppedError("another worker has taken over")

    def _close_log(self) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
            self._handler = None


def _log_to(trial: TrialFolder) -> logging.Handler:
    """Write the log, warnings included, to the trial's own file as well."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(trial.log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def count_attempt(log: EventLog, trial: TrialFolder) -> int:
    """Log that a trial is started; return how often that has happened."""
    attempts = attempts_at(trial) + 1
    log.append("state", state="running", attempt=attempts)
    return attempts


def attempts_at(trial: TrialFolder) -> int:
    """Return how often a trial was started."""
    events = read_events(trial.events_file, containing=b'"running"')
    return sum(event.get("state") == "running" for event in events)


def classify(error: Exception) -> tuple[State, dict[str, str]]:
    """Return the state that an error leads to, and the error's record for the result."""
    # special errors before LabError, which is the base class of most of them
    state, name = State.FAILED, "error"
    if isinstance(error, DivergedError):
        state, name = State.DIVERGED, "diverged"
    elif is_out_of_memory(error):
        state, name = State.OOM, "oom"
    elif isinstance(error, BaseError):
        state = State.OOM if isinstance(error, BaseMemoryError) else State.FAILED
        name = "no_base"
    elif isinstance(error, DataChangedError):
        name = "data_changed"
    elif isinstance(error, DataDownloadError):
        name = "no_data"
    elif isinstance(error, LabError):
        name = "data" if isinstance(error, DataError) else "invalid"
    tail = "".join(traceback.format_exception(error)).splitlines()[-40:]
    text = "; ".join(error.problems) if isinstance(error, LabError) else str(error)
    message = " ".join(text.split())[:500] or type(error).__name__
    return state, {"class": name, "message": message, "log_tail": "\n".join(tail)}


def plot_loss_curve(
    trial: TrialFolder,
    losses: Sequence[float],
    heldout_loss: float,
    heldout: Mapping[int, float],
) -> None:
    """Plot the training loss of every step, and the held-out loss at the end as a line.

    Args:
        trial: where the picture goes.
        losses: of training.
        heldout_loss: of the adapter that is kept.
        heldout: by step, as far as it was taken in training.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, marker="o" if len(losses) < 40 else None, markersize=3, label="train")
    axes.axhline(heldout_loss, color="C1", linestyle="--", label=f"held out: {heldout_loss:.3f}")
    axes.plot(list(heldout), list(heldout.values()), color="C1", marker="o", markersize=3)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per label token)", title=trial.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    trial.loss_curve_file.unlink(missing_ok=True)  # it may be a link to another file
    figure.savefig(trial.loss_curve_file, dpi=120)
