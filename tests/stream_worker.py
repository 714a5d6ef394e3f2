"""A worker that trains nothing: its losses are a known function of the settings."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fake_worker import CODES, Ended, FakeWorker
from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.pack import Exit, Pack, StreamSettings, Task
from tinyllama_lab.study.trial import Result, State

STEPS = 20
ROWS = 8
Faults = Mapping[str, Sequence[str]]  # by label of the settings: what its attempts end in


def loss_of(config: Mapping[str, Any], share: float) -> float:
    """Falls with training; best at r 16 and a learning rate of 1e-3."""
    lora, train = config["lora"], config["train"]
    off = abs(math.log10(train["lr"]) + 3) + 0.3 * abs(math.log2(lora["r"]) - 4)
    return 2.0 + 0.2 * off + (1 - share) * (1 + 0.1 * off) + lora["dropout"]


def act(
    pack: Pack,
    completions: Counter[str],
    faults: Callable[[Mapping[str, Any], int], str] = lambda config, attempt: "done",
) -> Iterator[None]:
    """What a worker writes, a step of all its trials at a time."""
    work, arrivals = pack.read(), pack.arrivals()
    assert work.stream is not None
    EventLog(pack.events_file).append("phase", name="training")
    entered, runners = list(work.tasks), list[Iterator[None]]()
    while True:
        runners += [
            _train(task, work.stream, completions, faults)
            for task in entered
            if task.trial.read_result()[0] is None
        ]
        runners = [runner for runner in runners if next(runner, _OVER) is None]
        yield
        entered = arrivals.poll()
        if not runners and not entered and arrivals.closed:
            return


_OVER: Any = object()


def _train(
    task: Task,
    stream: StreamSettings,
    completions: Counter[str],
    faults: Callable[[Mapping[str, Any], int], str],
) -> Iterator[None]:
    trial, config = task.trial, task.trial.read_config()
    log = EventLog(trial.events_file)
    before = read_events(trial.events_file)
    attempt = sum(e.get("state") == "running" for e in before) + 1
    reported = {e["rung"] for e in before if e["kind"] == "rung"}
    log.append("state", state="running", attempt=attempt)
    yield
    result = Result(trial.key, trial.name, State.DONE, attempts=attempt)
    fate = faults(config, attempt)
    for step in range(1, STEPS + 1):
        loss = loss_of(config, step / STEPS)
        log.append("metric", step=step, steps=STEPS, values={"train/loss": loss}, tokens=step)
        for rung, share in enumerate(stream.rungs):
            if step == round(share * STEPS) and rung not in reported:
                rows = [loss + 0.1 * math.sin(row) for row in range(ROWS)]
                log.append(
                    "rung", rung=rung, step=step, values={"rung/eval_loss": loss}, examples=rows
                )
        yield
        if reason := trial.prune_reason():
            result.state = State.PRUNED
            result.error = {"class": "pruned", "message": reason, "log_tail": ""}
            break
        if step == 2 and fate in CODES:
            raise Ended(CODES[fate])
    if result.state is State.DONE and fate not in ("done", *CODES):
        result.state = State.FAILED if fate == "no_base" else State(fate)
        result.error = {"class": fate, "message": f"{fate} on purpose", "log_tail": ""}
    if result.state is State.DONE:
        size = 0.1 * config["lora"]["r"]
        result.metrics = {"eval/loss": loss, "eval/perplexity": math.exp(loss)}
        result.metrics["eval/bits_per_byte"] = loss / 3
        result.metrics |= {"size/adapter_mib": size, "memory/train_peak_mib": 1000 + 10 * size}
        result.data = {"eval_fingerprint": "e"}
    trial.commit(result)
    trial.prune_file.unlink(missing_ok=True)
    completions[trial.key] += 1
    log.append("state", state=str(result.state))


@dataclass
class StreamWorkers:
    """Starts such workers; they take a step whenever the driver looks."""

    faults: Callable[[Mapping[str, Any], int], str] = lambda config, attempt: "done"
    completions: Counter[str] = field(default_factory=Counter)
    packs: list[Pack] = field(default_factory=list)
    started: list[FakeWorker] = field(default_factory=list)

    def start(self, pack: Pack) -> FakeWorker:
        """See `Workers`."""
        self.packs.append(pack)
        pack.log_file.write_text("a log\n")
        self.started.append(FakeWorker(act(pack, self.completions, self.faults)))
        return self.started[-1]

    def close(self) -> None:
        """Nothing was started ahead."""


class ProcessWorker:
    """The same steps in a process of their own, which ends with its driver."""

    def __init__(self, pack: Pack) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(pack.folder)], env=environment
        )

    def exit_code(self) -> int | None:
        """See `Worker`."""
        return self._process.poll()

    def stop(self, patience_s: float) -> None:
        """See `Worker`."""
        self._process.kill()
        self._process.wait()


class ProcessWorkers:
    """Starts such processes."""

    def start(self, pack: Pack) -> ProcessWorker:
        """See `Workers`."""
        return ProcessWorker(pack)

    def close(self) -> None:
        """Nothing was started ahead."""


def main() -> int:
    """The worker as a process; every result is noted, so that a test can count them."""
    pack = Pack(Path(sys.argv[1]))
    completions: Counter[str] = Counter()
    with pack.locked():
        for _ in act(pack, completions):
            noted = pack.folder.parent.parent / "completions.txt"
            with noted.open("a") as file:
                file.writelines(f"{key}\n" for key in completions.elements())
            completions.clear()
            time.sleep(0.1)
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
