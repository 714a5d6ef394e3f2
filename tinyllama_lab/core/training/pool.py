"""Runs a pack: adapters that train together, trials that wait, and adapters to be scored."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.core.context import WorkerContext, raise_if_fatal
from tinyllama_lab.core.engines.base import Adapter, Engine
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.evaluation.load import losses_load
from tinyllama_lab.core.evaluation.losses import heldout_losses
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.attempt import Attempt
from tinyllama_lab.core.training.best_step import mib_with_best
from tinyllama_lab.core.training.finish import finish
from tinyllama_lab.core.training.loop import Round, StepError, train_round
from tinyllama_lab.core.training.memory import Planner
from tinyllama_lab.core.training.micro_batch import MicroBatchSize
from tinyllama_lab.core.training.rungs import Rungs, await_pruning, score_due
from tinyllama_lab.errors import StoppedError

SAVING_SHARE = 0.03  # of the time that goes by between two checkpoints
SLOW_SAVING_INTERVAL_S = 600.0  # slow saving lengthens the interval to at most this

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """A trial whose adapter is being trained."""

    attempt: Attempt
    trainer: AdapterTrainer
    adapter_mib: float  # what its adapter takes in training
    rungs: Rungs
    together: int = 1  # the most adapters that it has taken a step with, itself included


class Pool:
    """Runs attempts until each has a result; a failed attempt does not end the others."""

    def __init__(self, context: WorkerContext, engine: Engine[Any], bases: Bases) -> None:
        self._context = context
        self._engine = engine
        self._bases = bases
        self._waiting: deque[Attempt] = deque()
        self._max_others: dict[Attempt, int] = {}  # most other adapters it may be added to
        self._training: list[Member] = []
        self._trained: list[tuple[Attempt, Adapter]] = []
        context.memory.reset()
        # after the reset and before any adapter, because it measures the memory of the bare base
        self._planner = Planner(context, engine)
        self._size = MicroBatchSize(context)
        # the engine's limit; None until the planner sets one
        self._max_concurrent = engine.max_concurrent
        self._step_s = 0.0  # what the last step took

    def run(
        self, attempts: Sequence[Attempt], arriving: Callable[[], Sequence[Attempt]] = tuple
    ) -> None:
        """Train, score and commit all attempts, and those that arrive in the meantime.

        Raises:
            StoppedError: the worker was asked to stop; unfinished trials have a checkpoint.
        """
        self._waiting.extend(attempts)
        self._planner.begin()
        self._size.begin()
        try:
            while self._waiting or self._training or self._trained:
                self._fill()
                if self._training:
                    self._round()
                # scoring is shared, so it waits for more adapters unless they keep trials waiting
                if self._trained and (not self._training or self._is_crowded()):
                    self._finish()
                self._waiting.extend(arriving())
        except StoppedError:
            self._stop()
            raise

    def _finish(self) -> None:
        """Score and commit the trained adapters; afterwards nothing holds one any more."""
        beside_mib = sum(member.adapter_mib for member in self._training)
        trained = dict(self._trained)
        finish(self._context, self._engine, self._bases, trained, self._planner, beside_mib)
        self._trained.clear()

    def _stop(self) -> None:
        """Save every adapter in training and log that the trials were stopped."""
        for member in self._training:
            # trained adapters have a checkpoint of their last step: only scoring is repeated
            member.trainer.save(self._engine.random_state())
        waiting = [attempt for attempt in self._waiting if attempt.has_begun]
        training = [member.attempt for member in self._training]
        trained = [attempt for attempt, _ in self._trained]
        for attempt in [*waiting, *training, *trained]:
            attempt.record_stop()

    def _is_crowded(self) -> bool:
        """Return whether trained adapters occupy slots that other trials need."""
        if self._context.stream is not None:  # the driver may send a trial at any time
            return True
        return bool(self._waiting) and not self._has_room()

    @property
    def _adapters_on_base(self) -> int:
        return len(self._training) + len(self._trained)

    def _has_room(self) -> bool:
        return self._max_concurrent is None or self._adapters_on_base < self._max_concurrent

    def _next(self) -> Attempt | None:
        """Remove and return the first attempt in the queue that may fit, or None."""
        count = self._adapters_on_base
        for attempt in self._waiting:
            if count <= self._max_others.get(attempt, count):
                self._waiting.remove(attempt)
                return attempt
        return None

    def _wait(self, attempt: Attempt) -> None:
        """Put an attempt that did not fit back into the queue; smaller ones may fit before it."""
        # one adapter fewer may not be enough: try again when at most half of them are left
        count = self._adapters_on_base
        self._max_others[attempt] = count // 2
        others = f"{count} other adapter{'s' * (count > 1)}"
        text = f"out of memory with {others}; it waits until some have left"
        attempt.log.append("note", text=text)
        self._waiting.append(attempt)

    def _fill(self) -> None:
        """Start waiting attempts while there is room."""
        while self._waiting and self._has_room():
            self._context.check_stop()
            if (attempt := self._next()) is None:
                return
            with self._failing_alone(attempt):
                # no trial becomes done without the scores of its base: check before it trains
                self._bases.check(attempt.base)
                attempt.begin()
                try:
                    if attempt.is_trained:
                        self._trained.append((attempt, self._load(attempt)))
                    else:
                        self._training.append(self._start(attempt))
                except Exception as error:
                    if not self._planner.may_fit_later(error, self._adapters_on_base):
                        raise
                    self._wait(attempt)
            self._context.memory.trim()  # PEFT needs extra memory while it creates an adapter

    def _load(self, attempt: Attempt) -> Adapter:
        """Load the saved adapter of a trial that is scored again."""
        if self._max_concurrent is None:
            candidates = [attempt, *self._waiting]
            sizes = [self._engine.adapter_mib(each.science.lora) for each in candidates]
            self._max_concurrent = self._planner.plan_scoring(sizes)
        adapter = self._engine.add(attempt.science.lora, attempt.science.seed)
        try:
            adapter.load(attempt.trial.adapter_dir)
        except BaseException:
            self._engine.remove(adapter)
            raise
        return adapter

    def _start(self, attempt: Attempt) -> Member:
        science = attempt.science
        candidates = [attempt, *self._waiting][: self._engine.max_concurrent]
        # before an adapter is attached, because PEFT renames the base's modules
        sizes = [self._training_mib(each) for each in candidates]
        # assume that later trials of the stream are as large as the largest
        if self._context.stream is not None and self._engine.max_concurrent is None:
            sizes += [max(sizes)] * (self._context.stream.max_concurrent - len(sizes))
        adapter = self._engine.add(science.lora, science.seed, attempt.rows_to_read)
        try:
            # once, with the first adapter: the memory of others in its pack is computed from sizes
            if not self._planner.is_ready or self._engine.max_concurrent == 1:
                self._planner.measure(adapter, attempt.longest_example)
                longest = max(each.longest_tokens for each in candidates)
                fixed = science.train.deterministic
                self._max_concurrent = self._planner.plan_training(sizes, longest, fixed)
            data, dtype = attempt.prepared.train, self._context.base.dtype
            trainer = AdapterTrainer(attempt.trial, science, adapter, data, dtype)
            # PEFT's dropout then draws the masks that it would have drawn without the interruption
            self._engine.set_random_state(trainer.resume())
        except BaseException:
            self._engine.remove(adapter)
            raise
        rungs = Rungs.of(attempt.trial, self._context.stream, trainer.steps)
        return Member(attempt, trainer, sizes[0], rungs)

    def _training_mib(self, attempt: Attempt) -> float:
        """Return what the adapter of an attempt takes in training."""
        science, device = attempt.science, self._context.base.device
        return mib_with_best(self._engine.adapter_mib(science.lora), science.train, device)

    def _round(self) -> None:
        """Take one step with every adapter in training."""
        self._check_heldout(self._training)  # those that were stopped between a step and its check
        members = [member for member in self._training if not member.trainer.is_done]
        failed: dict[int, Exception] = {}
        if members:  # empty if all were resumed after their last step
            random_state = self._engine.random_state()
            trainers = [member.trainer for member in members]
            try:
                outcome = self._train(trainers)
            except StoppedError:
                # the step is repeated after a restart, and must draw the same dropout masks
                self._engine.set_random_state(random_state)
                raise
            except StepError as error:
                self._retry_smaller(members, error.reason, random_state)
                return
            except Exception as error:  # some may have taken the step: it cannot be repeated
                for member in members:
                    self._fail(member.attempt, error, member)
                return
            failed = outcome.failed
            self._learn(outcome, members)
        self._check_heldout([m for m in members if id(m.trainer) not in failed])
        every_s = self._checkpoint_every_s
        # a copy of the list, because members leave it in the loop
        for member in list(self._training):
            with self._failing_alone(member.attempt, member):
                self._end_step(member, failed.get(id(member.trainer)), every_s)
        if self._context.stream is not None:
            self._prune_at_rungs()

    def _train(self, trainers: Sequence[AdapterTrainer]) -> Round:
        """Take one step with every trainer, in micro-batches of the best size."""
        round_tokens = sum(len(each.ids) for trainer in trainers for each in trainer.batch)
        tokens = self._size.next(round_tokens, self._planner.micro_batch_sizes)
        return train_round(self._engine, trainers, tokens, self._context.before_batch)

    def _learn(self, outcome: Round, members: Sequence[Member]) -> None:
        """Note what a round says about speed and memory."""
        self._step_s = outcome.seconds
        sizes = [member.adapter_mib for member in self._training]
        self._planner.predict(sizes, outcome.micro_batches)
        measured = self._size.note(outcome.tokens, outcome.seconds)
        for member in members:
            member.together = max(member.together, len(members))
            if measured:
                member.attempt.log.append("note", text=measured)

    def _prune_at_rungs(self) -> None:
        """Score the trials at a rung; end those that the driver pruned."""
        due = [member for member in self._training if self._is_at_rung(member)]
        self._score_together(due, self._score_rungs, self._is_at_rung)
        await_pruning([m.attempt.trial for m in due], self._step_s)
        for member in list(self._training):
            if reason := member.attempt.trial.prune_reason():
                member.attempt.prune(member.trainer, reason)
                self._leave(member)

    @staticmethod
    def _is_at_rung(member: Member) -> bool:
        return member.rungs.due(member.trainer) is not None

    def _score_rungs(self, members: Sequence[Member]) -> None:
        entries = [(m.rungs, m.trainer, m.attempt.prepared.heldout) for m in members]
        score_due(self._context, self._engine, entries)

    def _check_heldout(self, members: Sequence[Member]) -> None:
        """Take the held-out losses that are due."""
        self._score_together(members, self._score_heldout, lambda m: m.trainer.is_check_due)

    def _score_heldout(self, members: Sequence[Member]) -> None:
        """Take held-out losses; they are never of rows that are kept for confirmation."""
        begin = time.monotonic()
        sciences = [member.attempt.science for member in members]
        rows = [self._context.data.prepare(s.data, s.seed).heldout for s in sciences]
        work = [(m.trainer.adapter, of_one) for m, of_one in zip(members, rows, strict=True)]
        load = losses_load(self._engine, work, 2 * self._context.micro_batch_tokens)
        self._planner.predict_checks([m.adapter_mib for m in self._training], load)
        first = members[0].attempt.trial
        all_losses = heldout_losses(self._context, self._engine, work, first)
        for member, losses in zip(members, all_losses, strict=True):
            member.trainer.check(losses)
            member.attempt.seconds += (time.monotonic() - begin) / len(members)

    def _score_together(
        self,
        members: Sequence[Member],
        score: Callable[[Sequence[Member]], None],
        is_due: Callable[[Member], bool],
    ) -> None:
        """Score the adapters in training that are due together, or one by one where that fails."""
        due = [member for member in members if is_due(member)]
        try:
            if due:
                score(due)
        except StoppedError:
            raise
        except Exception as error:
            if len(due) == 1:
                self._fail(due[0].attempt, error, due[0])
                return
            raise_if_fatal(error)
            for member in due:
                # those before the one that failed may have been scored already
                self._score_together([member], score, is_due)

    @property
    def _checkpoint_every_s(self) -> float:
        """Return the configured seconds, or more where saving would take too much of the time."""
        saving_s = sum(member.trainer.saving_s for member in self._training)
        configured_s = self._context.hardware.checkpoint_every_s
        return max(configured_s, min(saving_s / SAVING_SHARE, SLOW_SAVING_INTERVAL_S))

    def _end_step(self, member: Member, error: Exception | None, every_s: float) -> None:
        """After a step, save a checkpoint if one is due; a finished adapter waits for scoring."""
        trainer = member.trainer
        if error is not None:
            raise error
        if trainer.is_done:
            trainer.heldout.restore_best(trainer.adapter)
        if trainer.is_done or trainer.is_due(every_s):
            # stored with the progress, because the peaks of the process are lost with it
            trainer.progress.note_memory(self._context.memory.read("train"))
            trainer.progress.note_memory(self._planner.predicted())
            trainer.progress.note_memory(self._planner.predicted_alone(member.adapter_mib))
            trainer.save(self._engine.random_state())
        if trainer.is_done:
            facts = {"adapters_at_once": member.together, **self._planner.facts()}
            member.attempt.record_training(trainer, facts)
            # the adapter stays on the base until `finish` has scored it
            self._training.remove(member)
            self._trained.append((member.attempt, trainer.adapter))

    def _retry_smaller(
        self, members: list[Member], error: Exception, random_state: dict[str, Any]
    ) -> None:
        """Retry a failed step with smaller micro-batches, then fewer adapters; else fail it."""
        raise_if_fatal(error)
        # the failed step has drawn dropout masks: its repetition must draw the same ones
        self._engine.set_random_state(random_state)
        if (remedy := self._planner.remedy(error)) is not None:
            for member in members:
                member.attempt.log.append("note", text=remedy)
            return
        if len(members) == 1:
            self._fail(members[0].attempt, error, members[0])
            # an error of one trial must not limit the others: only a limit by memory remains
            self._max_concurrent = self._planner.max_concurrent
            return
        # halving ends at one adapter, which then fails alone if the error is its own
        self._max_concurrent = self._planner.halve(len(members), error)
        logger.warning("a step of %d adapters failed", len(members), exc_info=error)
        for member in members[self._max_concurrent :]:
            # with the state before the failed step, from which it continues when there is room
            member.trainer.save(random_state)
            count = self._max_concurrent
            text = f"a step of {len(members)} adapters failed; trying {count} together"
            member.attempt.log.append("note", text=text)
            self._leave(member)
            self._waiting.append(member.attempt)

    def _leave(self, member: Member) -> None:
        self._training.remove(member)
        self._engine.remove(member.trainer.adapter)

    @contextlib.contextmanager
    def _failing_alone(self, attempt: Attempt, member: Member | None = None) -> Iterator[None]:
        """Fail this attempt, and no other, if the block raises an error."""
        try:
            yield
        except StoppedError:
            raise
        except Exception as error:
            self._fail(attempt, error, member)

    def _fail(self, attempt: Attempt, error: Exception, member: Member | None) -> None:
        raise_if_fatal(error)
        if member is not None and member in self._training:
            attempt.seconds += member.trainer.progress.seconds
            self._leave(member)
        attempt.fail(error)
