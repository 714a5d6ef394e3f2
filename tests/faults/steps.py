"""Ends a process, or lets the disk fail, at each durable step of a sweep in turn.

The driver is the real one, in a process that is forked after its imports. Its workers write what
real ones write, in the same process, so that every step of both halves is counted.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests import grid
from tests.fake_worker import FakeWorkers
from tests.faults.fault import Count, Draw, FaultClass
from tinyllama_lab import report, sweep
from tinyllama_lab.errors import user_errors
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State
from tinyllama_lab.sweep import run as sweep_run
from tinyllama_lab.sweep.execution import schedule

SETTINGS = ("data=file", "data.path=../rows.jsonl", "hardware.device=cpu", "lora.r=2,4", "study=s")
STEPS = ("mkdir", "replace", "unlink", "rmdir", "fsync", "rename")  # of `os`, beside opening
CRASHED = 137
# what the disk does from a step on, or at that step alone
FAILURES = {
    "no space": (errno.ENOSPC, True),
    "I/O error": (errno.EIO, False),
    "read-only": (errno.EROFS, True),
    "no handles": (errno.EMFILE, True),
    "file too large": (errno.EFBIG, True),
}


@dataclass
class Counter:
    """Counts durable steps, and does something at one of them."""

    number: int  # the step; 0 for none
    act: Callable[[str], None]
    lasts: bool = False
    seen: int = 0

    def step(self, name: str) -> None:
        self.seen += 1
        if self.number and (self.seen == self.number or (self.lasts and self.seen > self.number)):
            self.act(name)

    def install(self, root: Path) -> None:
        """Watch what is written below a folder from now on."""
        self._below = f"{root}/"
        for name in STEPS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        opened = self._opened(io.open)
        builtins.open = io.open = opened  # type: ignore[assignment]

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Any, *others: Any, **named: Any) -> Any:
            if isinstance(first, int) or str(first).startswith(self._below):
                self.step(name)
            return call(first, *others, **named)

        return counted

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
            writes = set(mode) & set("wax+") and not isinstance(file, int)
            if writes and os.path.abspath(file).startswith(self._below):
                self.step("open")
            return call(file, mode, *others, **named)

        return counted


def command(root: Path, counter: Counter) -> int:
    """Run the sweep in a process of its own; return its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        os.chdir(root)
        for number in (1, 2):
            os.dup2(os.open(root / f"out{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        schedule.POLL_S = 0
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sweep_run.workers = lambda name, stopped: FakeWorkers()  # type: ignore[assignment]
        sweep_run._write_report = lambda plan, session: None
        counter.install(root / "sweeps")
        try:
            with user_errors():
                results = sweep_run.run_grid(grid.cells(*SETTINGS), "local", root)
            status = 0 if sweep_run.all_ended_well(results) else 1
        except SystemExit as end:
            status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        (root / "seen").write_text(str(counter.seen))
        os._exit(status)


def problems(root: Path) -> list[str]:
    """Return what is wrong with a sweep that has ended."""
    trials = StudyFolder(root / "sweeps", "s").trials()
    found = [] if len(trials) == 2 else [f"{len(trials)} trials"]
    for trial in trials:
        result, why = trial.read_result()
        if result is None or result.state is not State.DONE:
            found.append(f"{trial.name} is lost ({why or result})")
        elif result.metrics["eval/loss"] != int(trial.key[:4], 16) / 2**16:
            found.append(f"{trial.name} differs")
    left = [path.name for path in (root / "sweeps").rglob(".*.tmp")]
    return [*found, *(f"{name} is left" for name in left if "verified" not in name)]


def crash(root: Path, number: int) -> list[str]:
    """End the process at a step, then run the command again."""
    root.mkdir(parents=True)

    def end(_: str) -> None:
        os._exit(CRASHED)

    status = command(root, Counter(number, end))
    if status != CRASHED:
        return [f"step {number} was not reached ({status})"]
    if (status := command(root, Counter(0, end))) != 0:
        return [f"after a crash at step {number} it ends with {status}: {_said(root)}"]
    return [f"after a crash at step {number}: {problem}" for problem in problems(root)]


def fail(root: Path, number: int, kind: str) -> list[str]:
    """Let the disk fail from a step on, then run the command again on a sound one."""
    root.mkdir(parents=True)
    code, lasts = FAILURES[kind]
    where: list[str] = []

    def raise_it(name: str) -> None:
        raise OSError(code, os.strerror(code), str(root / "sweeps" / "s" / "somewhere"))

    status = command(root, Counter(number, raise_it, lasts))
    said = (root / "out2").read_text(errors="replace")
    if "Traceback" in said or status not in (0, 1, 2):
        where.append(f"{kind} at step {number} ends with {status}: {said[-1500:]}")
    if (status := command(root, Counter(0, raise_it))) != 0:
        where.append(f"after {kind} at step {number} it ends with {status}: {_said(root)}")
    return where + [f"after {kind} at step {number}: {problem}" for problem in problems(root)]


def _said(root: Path) -> str:
    return (root / "out2").read_text(errors="replace")[-600:]


def steps_of_a_sweep(folder: Path) -> int:
    """Return how many durable steps the sweep has."""
    folder.mkdir(parents=True)
    rows = [{"prompt": f"Question {n}?", "response": f"It is {n**3}."} for n in range(60)]
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid.cells(*SETTINGS)  # composed once, before the forks
    status = command(folder, Counter(0, lambda _: None))
    assert status == 0, _said(folder)
    return int((folder / "seen").read_text())


def crashes(draw: Draw) -> Count:
    """Crash at every step."""
    return _injected(draw, [(number, "") for number in _numbers(draw)], "crash")


def failures(draw: Draw) -> Count:
    """Let the disk fail at every step, in turn with each of its failures."""
    kinds = list(FAILURES)
    numbers = _numbers(draw)
    return _injected(draw, [(n, kind) for kind in kinds for n in numbers], "failure of the disk")


def _import_all() -> None:
    """Import what a command imports late, so that every fork has it."""
    for package in (sweep, report):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def _numbers(draw: Draw) -> list[int]:
    _import_all()
    last = steps_of_a_sweep(draw.folder / "count")
    return sorted(draw.dice.sample(range(1, last + 1), min(last, draw.times(last))))


def _injected(draw: Draw, faults: list[tuple[int, str]], what: str) -> Count:
    count = Count()
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        runs = [
            pool.submit(fail, draw.folder / f"{kind.partition('/')[0]}-{n}", n, kind)
            if kind
            else pool.submit(crash, draw.folder / f"crash-{n}", n)
            for n, kind in faults
        ]
        for run, (_, kind) in zip(runs, faults, strict=True):
            count.add(kind or what)
            count.wrong += run.result()
    count.notes.append("completed by the same command")
    return count


CRASHED_AT = FaultClass("crashes", "the process ends at each durable step", crashes)
FAILED_AT = FaultClass("disk", "no space, I/O error, read-only, no handles at each step", failures)
