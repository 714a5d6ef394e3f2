"""A worker that trains nothing: it writes what the real one writes, and fails as it is told.

`FakeWorkers` takes one step whenever the driver looks, so a test decides what happens between any
two writes. `python tests/fake_worker.py PACK_FOLDER` does the same in a process that really dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.pack import Exit, Pack, Task
from tinyllama_lab.study.trial import Result, State, TrialFolder, evaluation_key

STEPS = 3
# by key of a trial or base, what goes wrong in its first, second, ... attempt: a state, or one of
# `CODES`
Faults = Mapping[str, Sequence[str]]
CODES = {
    "kill": -signal.SIGKILL,
    "crash": 1,
    "no_base": int(Exit.NO_BASE),
    "no_memory": int(Exit.NO_BASE),  # for the base
    "no_space": int(Exit.NO_SPACE),
    "stopped": int(Exit.STOPPED),
    "silent": int(Exit.DONE),  # says that all is done, and it is not
}
HANG = "hang"  # gives no sign of life any more, as if SIGSTOP had been received


class Ended(Exception):
    """The worker ends here, with this status."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def act(pack: Pack, faults: Faults, completions: Counter[str]) -> Iterator[str | None]:
    """What a worker writes, from one pause to the next; counts the results of each key."""
    work = pack.read()
    log = EventLog(pack.events_file)
    log.append("phase", name="starting")
    yield
    for task in work.tasks:
        if task.base.read_result()[0] is None:
            yield from _run(task.base, faults.get(task.base.key, ()), log, completions)
        trial = task.trial
        if task.read_result() is None:
            log.append("phase", name=trial.name)
            run = _run if trial == task.result_folder else _score
            yield from run(task.trial, faults.get(trial.key, ()), log, completions, task)


def _score(
    trial: TrialFolder,
    faults: Sequence[str],
    pack_log: EventLog,
    completions: Counter[str],
    task: Task,
) -> Iterator[str | None]:
    """One that is trained already; its attempts at training are not counted."""
    log, place = EventLog(trial.events_file), task.result_folder
    before = [e for e in read_events(trial.events_file) if e.get("state") == "running"][1:]
    log.append("state", state="running", attempt=len(before) + 1)
    yield
    fault = faults[len(before)] if len(before) < len(faults) else "done"
    if fault in CODES:
        raise Ended(CODES[fault])
    result = Result(place.key, trial.name, State(fault), metrics={"eval/loss": 2.0})
    if result.state is not State.DONE:
        result.error = {"class": fault, "message": f"{fault} on purpose", "log_tail": ""}
    place.write_config({"eval": task.eval_settings})
    place.commit(result)
    completions[place.key] += 1
    yield
    log.append("state", state=str(result.state))
    yield


def _run(
    trial: TrialFolder,
    faults: Sequence[str],
    pack_log: EventLog,
    completions: Counter[str],
    task: Task | None = None,
) -> Iterator[str | None]:
    log = EventLog(trial.events_file)
    before = [e for e in read_events(trial.events_file) if e.get("state") == "running"]
    log.append("state", state="running", attempt=len(before) + 1)
    yield
    fault = faults[len(before)] if len(before) < len(faults) else "done"
    for step in range(1, STEPS + 1):
        log.append("metric", step=step, steps=STEPS, values={"train/loss": 3.0 / step})
        yield
        while fault == HANG and step == 2:
            yield HANG
        if fault in CODES and step == 2:
            no_memory = fault == "no_memory"
            pack_log.append("error", message=f"{fault} on purpose", out_of_memory=no_memory)
            raise Ended(CODES[fault])
    result = Result(trial.key, trial.name, State(fault), attempts=len(before) + 1)
    if result.state is State.DONE:
        trial.adapter_dir.mkdir(exist_ok=True)
        (trial.adapter_dir / "weights").write_bytes(b"w" * 8)
        result.metrics = {"eval/loss": int(trial.key[:4], 16) / 2**16, "eval/perplexity": 1.0}
        result.data = {"eval_fingerprint": "e"}
        settings = task.eval_settings if task else None
        result.evaluation = evaluation_key(settings) if settings else None
    else:
        result.error = {"class": fault, "message": f"{fault} on purpose", "log_tail": ""}
    trial.commit(result, [trial.adapter_dir / "weights"])
    completions[trial.key] += 1
    yield
    log.append("state", state=str(result.state))
    yield


@dataclass
class FakeWorker:
    """One run of `act`, a step and a heartbeat each time the driver asks for the exit status."""

    steps: Iterator[str | None]
    pack: Pack | None = None
    code: int | None = None
    stopped: bool = False

    def exit_code(self) -> int | None:
        """See `Worker`."""
        if self.code is None:
            try:
                if next(self.steps) != HANG and self.pack is not None:
                    self.pack.beat()
            except StopIteration:
                self.code = int(Exit.DONE)
            except Ended as end:
                self.code = end.code
        return self.code

    def stop(self, patience_s: float) -> None:
        """See `Worker`; the steps that are left are not taken."""
        self.stopped = True
        if self.code is None:
            self.code = int(Exit.STOPPED)


@dataclass
class FakeWorkers:
    """Starts workers that fail as `faults` says; remembers what they were given and did."""

    faults: Faults = field(default_factory=dict)
    completions: Counter[str] = field(default_factory=Counter)
    started: list[FakeWorker] = field(default_factory=list)
    packs: list[Pack] = field(default_factory=list)

    def start(self, pack: Pack) -> FakeWorker:
        """See `Workers`."""
        self.packs.append(pack)
        with pack.log_file.open("a") as log:
            log.write(f"the log of {pack.folder.name}\n")
        self.started.append(FakeWorker(act(pack, self.faults, self.completions), pack))
        return self.started[-1]

    def close(self) -> None:
        """Nothing was started ahead."""


class ProcessWorker:
    """The same steps in a process of their own."""

    def __init__(self, pack: Pack, faults: Faults) -> None:
        environment = {**os.environ, "FAKE_FAULTS": json.dumps(faults)}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        command = [sys.executable, __file__, str(pack.folder)]
        with pack.log_file.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stderr=log)

    def exit_code(self) -> int | None:
        """See `Worker`."""
        return self._process.poll()

    def stop(self, patience_s: float) -> None:
        """See `Worker`."""
        self._process.kill()
        self._process.wait()


@dataclass
class ProcessWorkers:
    """Starts such processes."""

    faults: Faults

    def start(self, pack: Pack) -> ProcessWorker:
        """See `Workers`."""
        return ProcessWorker(pack, self.faults)

    def close(self) -> None:
        """Nothing was started ahead."""


def main() -> int:
    """The worker as a process; a fault by signal is a real one."""
    pack = Pack(Path(sys.argv[1]))
    try:
        with pack.locked():
            for _ in act(pack, json.loads(os.environ["FAKE_FAULTS"]), Counter()):
                pack.beat()
                time.sleep(float(os.environ.get("FAKE_PAUSE_S", "0")))
    except Ended as end:
        print(f"ends with {end.code}", file=sys.stderr, flush=True)
        if end.code < 0:
            os.kill(os.getpid(), -end.code)
        return end.code
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
