"""Kills and stops drivers and workers at random moments, and counts what became of the trials.

Drivers, launcher, locks and files are the real ones. The workers are processes that write what
real ones write and train nothing (`tests/fake_worker.py`), so hundreds of sweeps take minutes.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from tests import fake_worker, grid
from tests.faults.fault import Count, Draw, FaultClass, lives
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.lock import locked
from tinyllama_lab.sweep.execution.schedule import Scheduler
from tinyllama_lab.sweep.launchers import local
from tinyllama_lab.sweep.tracking.tracker import NullTracker

SWEEPS, KILLS = 400, 500
GRID = ("lora.r=2,4", "seed=0,1,2", "hardware.silence_s=1", "hardware.max_attempts=99")
TRIALS = 6
ORPHANS_END_WITHIN_S = 5.0
SWEEP_S = 1.2  # that one sweep takes; faults come within it
MOST_DRIVERS = 40  # in a row; then the sweep does not end
WHOM = ("driver", "worker", "both")
_statuses: dict[int, int] = {}  # of the drivers that have ended


def drive(root: Path) -> None:
    """Be a driver: run the sweep to its end."""
    schedule.POLL_S = 0.02
    local.PROGRAM = (str(Path(fake_worker.__file__)),)
    local.has_cuda = lambda: True  # type: ignore[assignment]  # no worker before its pack
    os.environ.update(FAKE_FAULTS="{}", FAKE_PAUSE_S="0.02")
    plan = grid.plan(root, *GRID)
    with locked(plan.study), Display(plan.todo, Console(file=io.StringIO())) as display:
        workers = local.LocalWorkers()
        try:
            Scheduler(plan, workers, NullTracker(), display, Interrupts()).run()
        finally:
            workers.close()


def start_driver(root: Path) -> int:
    """Fork a driver, and return its number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = (root / "driver.txt").open("a")
        drive(root)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def workers_of(root: Path) -> list[int]:
    """Return the numbers of the workers that run."""
    owners = [pack.living_worker() for pack in StudyFolder(root, "s").packs()]
    return [owner.pid for owner in owners if owner is not None]


def ended(pid: int, timeout_s: float) -> int | None:
    """Return the exit status of a child; None if it runs on."""
    deadline = time.monotonic() + timeout_s
    while pid not in _statuses:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _statuses[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(0.01)
    return _statuses[pid]


def hit(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def inject(root: Path, driver: int, dice: random.Random) -> tuple[str, float]:
    """Kill or stop somebody; return what, and how long workers outlived a killed driver."""
    whom, stops = dice.choice(WHOM), dice.random() < 0.3
    found = workers_of(root)
    if not found:  # the driver has just begun, or the worker has just ended
        whom = "driver"
    number = signal.SIGSTOP if stops else signal.SIGKILL
    targets = [driver] * (whom != "worker") + found * (whom != "driver")
    for pid in targets:
        hit(pid, number)
    what = f"{number.name} of {whom}"
    if whom == "worker":  # the driver notices by itself, and goes on
        return what, 0.0
    if stops and dice.random() < 0.5:  # a driver that is stopped for a while
        time.sleep(0.2)
        hit(driver, signal.SIGCONT)
        return what, 0.0
    hit(driver, signal.SIGKILL)
    ended(driver, 5)
    began = time.monotonic()
    # as another command would see it: a lock that is still held
    while any(map(lives, found)) and time.monotonic() - began < 2 * ORPHANS_END_WITHIN_S:
        time.sleep(0.02)
    return what, time.monotonic() - began


def one_sweep(root: Path, faults: int, seed: int) -> Count:
    """Run one sweep to its end in spite of some faults, and check its trials."""
    root.mkdir(parents=True)
    count, dice = Count(), random.Random(seed)
    longest_s, driver = 0.0, start_driver(root)
    for _ in range(faults):
        if ended(driver, dice.uniform(0, SWEEP_S)) is not None:  # too late: the next one is hit
            driver = start_driver(root)
            ended(driver, dice.uniform(0, SWEEP_S / 4))
        what, outlived_s = inject(root, driver, dice)
        longest_s = max(longest_s, outlived_s)
        count.add(what)
        if not lives(driver):
            driver = start_driver(root)
    status = None
    for _ in range(MOST_DRIVERS):
        status = ended(driver, 60)
        if status == 0 and len(grid.plan(root, *GRID).todo) == 0:
            break
        if status is None:
            hit(driver, signal.SIGKILL)
            ended(driver, 5)
        driver = start_driver(root)
    problems = _problems(root, status)
    if longest_s > ORPHANS_END_WITHIN_S:
        problems.append(f"a worker outlived its driver by {longest_s:.1f} s")
    count.wrong += [f"sweep {seed}: {problem}" for problem in problems]
    count.notes = [f"{longest_s:.2f}"]
    return count


def _problems(root: Path, status: int | None) -> list[str]:
    """Return what is wrong with a sweep that has ended."""
    problems = [] if status == 0 else [f"the last driver ended with {status}"]
    trials = StudyFolder(root, "s").trials()
    if len(trials) != TRIALS:
        problems.append(f"{len(trials)} trials")
    for trial in trials:
        result, why = trial.read_result()
        states = Counter(event.get("state") for event in read_events(trial.events_file))
        if result is None or result.state is not State.DONE:
            problems.append(f"{trial.name} is lost ({why or result})")
        elif result.metrics["eval/loss"] != int(trial.key[:4], 16) / 2**16:
            problems.append(f"{trial.name} differs")
        elif (trial.adapter_dir / "weights").read_bytes() != b"w" * 8:
            problems.append(f"{trial.name} has another adapter")
        if states["done"] > 1:
            problems.append(f"{trial.name} was completed {states['done']} times")
    if workers_of(root):
        problems.append("a worker is left")
    return problems


def kills(draw: Draw) -> Count:
    """Run sweeps side by side, some of which are hit twice."""
    total = Count()
    sweeps = draw.times(SWEEPS)
    seeds = [draw.dice.randrange(2**31) for _ in range(sweeps)]
    faults = [1 + (n < draw.times(KILLS) - sweeps) for n in range(sweeps)]
    roots = [draw.folder / f"sweep{n}" for n in range(sweeps)]
    grid.plan(draw.folder / "warm", *GRID)  # composed once, before the forks
    with ProcessPoolExecutor(2 * (os.cpu_count() or 1), get_context("fork")) as pool:
        for count in pool.map(one_sweep, roots, faults, seeds):
            total.injected += count.injected
            total.outcomes += count.outcomes
            total.wrong += count.wrong
            total.notes += count.notes
    longest_s = max(map(float, total.notes))
    total.notes = [f"{sweeps} sweeps, each of its {TRIALS} trials done once"]
    total.notes += [f"no worker outlived its driver by more than {longest_s:.1f} s"]
    return total


KILLED = FaultClass("kills", "SIGKILL and SIGSTOP of driver, worker and both (no training)", kills)
