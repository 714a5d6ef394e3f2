"""Runs packs: starts workers, follows their events, and decides which trials run again."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

from tinyllama_lab.config.axes import flatten, params
from tinyllama_lab.errors import StudyError
from tinyllama_lab.report.failures import failure
from tinyllama_lab.study.evaluations import read_whole
from tinyllama_lab.study.events import Event
from tinyllama_lab.study.pack import BaseSettings, Exit, Pace, StreamSettings, Task, Work
from tinyllama_lab.study.trial import EVAL, Result, State, TrialFolder, base_config
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.packing import Queue, Waiting
from tinyllama_lab.sweep.execution.running import Running
from tinyllama_lab.sweep.execution.slots import Slot, SlotPool
from tinyllama_lab.sweep.execution.source import TrialSource
from tinyllama_lab.sweep.launchers import Workers
from tinyllama_lab.sweep.plan import Plan, Planned, is_outdated
from tinyllama_lab.sweep.tracking.tracker import Tracker

if TYPE_CHECKING:  # its imports take half a second, which a command without work does not spend
    from tinyllama_lab.sweep.ask.cost import EarlierTrials

POLL_S = 0.2  # between two looks at the workers
SYNC_EVERY_S = 2.0  # between two batches of metrics of one worker
SILENCE_AT_FIRST = 5  # times `hardware.silence_s`, before the first sign of life
STOP_PATIENCE_S = 4.0  # for a worker to save its trials, before it is killed


class Scheduler:
    """Runs the trials of a plan, and those that a source adds to it."""

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        tracker: Tracker,
        display: Display,
        interrupts: Interrupts,
        slots: SlotPool | None = None,
        source: TrialSource | None = None,
    ) -> None:
        self._plan = plan
        self._workers = workers
        self._tracker = tracker
        self._display = display
        self._interrupts = interrupts
        self._slots = slots or SlotPool([Slot(None, plan.config.hardware.threads)])
        self._source = source
        self._queue = Queue()
        self._running: list[Running] = []
        self._earlier: EarlierTrials | None = None
        self._lost: Counter[str] = Counter()  # lost workers, by key of the running trial
        self._bases: set[TrialFolder] = set()  # whose configuration is written
        self._reached: list[tuple[Planned, Event]] = []  # rungs not yet judged
        self._reached_before = 0  # their number at the previous look

    def run(self) -> None:
        """Run the trials in `plan.todo` and put their results into `plan.results`.

        Raises:
            StudyError: the disk is full.
            KeyboardInterrupt: the driver was asked to stop; all workers have ended.
        """
        with self._interrupts.deferred():
            try:
                self._lease()
                packs = self._plan.packs(self._slots.count)
                self._queue.add(packs)
                while self._fill() or self._running:
                    for running in list(self._running):
                        self._follow(running)
                    self._compete()
                    self._interrupts.check()
                    time.sleep(POLL_S)
            except BaseException:
                self._stop()
                raise
            finally:
                self._slots.release()

    def _lease(self) -> None:
        """Wait for a slot: other commands may use all GPUs."""
        most = len(self._plan.todo) + (self._source.left if self._source else 0)
        # without trials no slot is needed
        if self._slots.lease(most) or not most:
            return
        self._display.say("every GPU is in use by another command; waiting for one")
        while not self._slots.lease(most):
            self._interrupts.check()
            time.sleep(POLL_S)

    def _fill(self) -> bool:
        """Give every free slot a pack, and return whether packs still wait."""
        more = False
        if self._source is not None:
            for planned in self._source.ask(self._room(self._source.stream)):
                self._display.add(planned)
                most = self._source.stream.max_concurrent
                if (joined := self._queue.assign(planned, self._running, most)) is not None:
                    joined.add(planned, self._task(planned, joined.slot))
            self._display.expect(self._source.left)
            more = not self._room(self._source.stream)  # room that `ask` left: no trials will come
        while self._queue and (slot := self._slots.take()) is not None:
            self._running.append(self._begin(self._queue.next(), slot))
        for running in self._running:
            if not more or self._queue.others_wait(running.group):
                running.close()
        return bool(self._queue)

    def _room(self, stream: StreamSettings) -> int:
        """Return how many more trials the source may add now."""
        under_way = sum(len(r.open) for r in self._running) + self._queue.trials
        return max(0, stream.max_concurrent * self._slots.count - under_way)

    def _task(self, planned: Planned, slot: Slot) -> Task:
        """Write the configurations of a trial and its base, and return the worker's task."""
        base = self._plan.base(planned)
        result, why = base.read_result()
        if planned.is_outdated:
            planned.trial.result_file.unlink(missing_ok=True)
            if result is not None and is_outdated(result):
                base.result_file.unlink(missing_ok=True)
                result = None
        if why:
            self._display.say(f"note: {why}; the base is scored again")
        # many trials share a base, whose configuration is written once
        if result is None and base not in self._bases:
            base.clear()
            base.write_config(base_config(planned.config))
            self._bases.add(base)
        trial = planned.trial
        # a finished trial keeps its configuration, with the settings of its first evaluation
        if not trial.is_done:
            trial.clear()
            trial.write_config(planned.config)
        if self._source is None or trial.result_file.exists():
            trial.prune_file.unlink(missing_ok=True)  # a search pruned it; now it is requested
        # an old result would say that the trial is done
        planned.result_folder.result_file.unlink(missing_ok=True)
        pace = self._pace(planned, slot)
        return Task(trial, base, planned.overrides, planned.config[EVAL], pace)

    def _pace(self, planned: Planned, slot: Slot) -> Pace | None:
        """Return how fast earlier trials of this machine make a trial; None if there are none."""
        if self._earlier is None:
            from tinyllama_lab.sweep.ask.cost import EarlierTrials

            self._earlier = EarlierTrials(self._plan)
        return self._earlier.pace(planned, slot.threads)

    def _begin(self, waiting: Waiting, slot: Slot) -> Running:
        pack = self._plan.study.new_pack()
        tasks = [self._task(planned, slot) for planned in waiting.trials]
        stream = self._source.stream if self._source else None
        shared = {"threads": slot.threads, "workers": self._slots.count}
        hardware = asdict(self._plan.config.hardware) | shared
        base = BaseSettings.of(waiting.trials[0].config)
        pack.write(Work(tasks, base, hardware, self._plan.profile, slot.gpu, stream))
        running = Running(pack, waiting.trials, slot, stream is not None)
        if not waiting.takes_more:
            running.close()
        # last, because the worker reads the pack, and an inline worker runs to its end here
        running.worker = self._workers.start(pack)
        return running

    def _follow(self, running: Running) -> None:
        """Read what one worker has written; after its end, queue its unfinished trials."""
        code = running.worker.exit_code()  # before reading: an ended worker writes no more
        self._look(running)
        if code is None and self._responds(running):
            return
        self._interrupts.check()  # a worker that stopped with the driver is not lost
        self._running.remove(running)
        self._slots.give_back(running.slot)
        self._queue.put_back(self._settle(running, code))

    def _responds(self, running: Running) -> bool:
        """Return whether a worker gives signs of life; it is ended if it does not."""
        silence, allowed_s = running.silence(), self._plan.config.hardware.silence_s
        if not silence.has_beaten:  # imports from a cold disk may take long
            allowed_s *= SILENCE_AT_FIRST
        limit_s = allowed_s + silence.longest_s
        if silence.seconds > limit_s / 2 and not silence.is_named:
            silence.is_named = True
            self._display.say(
                f"a worker has not responded for {silence.seconds:.0f} s: stopped, or waiting for "
                f"a disk? After {limit_s:.0f} s another one takes its trials"
            )
        if silence.seconds <= limit_s:
            return True
        running.worker.stop(patience_s=0)
        return False

    def _stop(self) -> None:
        """End all workers at the same time: a cluster waits only seconds after SIGTERM."""
        with ThreadPoolExecutor() as pool:
            workers = [running.worker for running in self._running]
            # `list` waits for all of them and raises their errors
            list(pool.map(lambda worker: worker.stop(STOP_PATIENCE_S), workers))
        for running in self._running:
            self._look(running)
            for planned in list(running.open):  # it may have ended after the last event was read
                self._collect(running, planned)

    def _look(self, running: Running) -> None:
        for name in running.phases():
            self._display.phase(name)
        for planned in list(running.open):
            fresh = running.news(planned)
            for event in fresh:
                if event.get("state") == "running":
                    self._track(planned)
                if event["kind"] == "rung":
                    self._reached.append((planned, event))
                self._display.progress(planned, event)
            # a worker writes a result before the event of its end, so only events are polled
            if fresh:
                self._collect(running, planned)
        self._sync(running)
        self._display.refresh()

    def _compete(self) -> None:
        """Pass the trials that reached a rung to the source, and prune those that it names.

        A worker writes the rungs of one step one after another. A look may therefore see some of
        them only, so they are judged together at the first look that finds no more.
        """
        if len(self._reached) > self._reached_before:
            self._reached_before = len(self._reached)
            return
        reached, self._reached, self._reached_before = self._reached, [], 0
        if self._source is not None and reached:
            for planned, reason in self._source.at_rungs(reached):
                if not planned.trial.result_file.exists():
                    planned.trial.prune(reason)

    def _sync(self, running: Running) -> None:
        """Sync metrics every `SYNC_EVERY_S`: a large batch costs as much as one metric."""
        if time.monotonic() - running.synced_at > SYNC_EVERY_S:
            running.synced_at = time.monotonic()
            for planned in running.open:
                self._tracker.sync(planned.trial)

    def _collect(self, running: Running, planned: Planned) -> None:
        result, _ = planned.read_result()
        if result is not None:
            running.open.remove(planned)
            self._record(planned, result)

    def _record(self, planned: Planned, result: Result) -> None:
        self._plan.results[planned.trial.key] = result
        if self._source is not None:
            self._source.ended(planned, result)
        self._tracker.finish(planned.trial, read_whole(planned.trial, result))
        self._display.finished(planned)
        is_quiet = self._source is not None and self._source.is_quiet
        if result.state is not State.DONE and not (is_quiet and result.state is State.PRUNED):
            settings = flatten(planned.config)
            self._display.say(failure(planned.label, planned.trial, result, settings))

    def _settle(self, running: Running, code: int | None) -> list[list[Planned]]:
        """Record the failures of an ended worker, and return the packs to run again."""
        for planned in list(running.open):
            self._collect(running, planned)
        if not running.open:
            return []
        if code == Exit.NO_SPACE:
            raise StudyError(
                f"a sweep needs free space for checkpoints and adapters, and the disk of "
                f"{self._plan.study.folder} is full; free some space and run the command again"
            )
        # every trial of the pack needs the base
        if code == Exit.NO_BASE:
            for planned in list(running.open):
                self._fail(running, planned, running.base_failure(planned))
            return []
        return self._after_loss(running, code)

    def _after_loss(self, running: Running, code: int | None) -> list[list[Planned]]:
        """Return the packs to run again after a worker was killed or has crashed.

        The loss counts as one attempt of the trial that was running. If several trials ran side
        by side, the cause is unknown: one of them, or too little memory for all. The pack then
        runs again in halves, down to a trial that runs alone.
        """
        cause = _cause(code)
        current = running.was_running()
        side_by_side = len(current) > 1 and code != Exit.STOPPED
        charged = current or list(running.open)
        # no trial is known to be the cause, so no attempt is counted
        if code == Exit.STOPPED or side_by_side:
            charged = []
        for planned in charged:  # none if the worker was asked to stop from outside
            self._lost[planned.trial.key] += 1
            if self._lost[planned.trial.key] >= self._plan.config.hardware.max_attempts:
                times = self._lost[planned.trial.key]
                often = "" if times == 1 else f", {times} times"
                text = f"its worker {cause}{often}; see worker.log next to this result"
                self._fail(running, planned, running.failure(planned, "killed", text))
        left = list(running.open)
        if not left:
            return []
        # the finished trials of the pack are not in `left`: their results stand
        half = (len(left) + 1) // 2 if side_by_side else len(left)
        packs = [pack for pack in (left[:half], left[half:]) if pack]
        halves = " in halves" if len(packs) > 1 else ""
        self._display.say(f"a worker {cause}; trying {len(left)} trial(s) again{halves}")
        return packs

    def _fail(self, running: Running, planned: Planned, result: Result) -> None:
        planned.result_folder.commit(result)
        running.open.remove(planned)
        self._track(planned)
        self._record(planned, result)

    def _track(self, planned: Planned) -> None:
        settings = params(planned.config, self._plan.swept)
        self._tracker.follow(planned.trial, planned.label, settings)


def _cause(code: int | None) -> str:
    """Return how a worker ended; `code` is its exit status, None if it was ended in silence."""
    if code is None:
        return "did not respond and was killed"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
