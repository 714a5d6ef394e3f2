"""Kills and stops the real driver and its real workers, and compares every bit of the adapters.

Grids whose adapters train in one pack, and searches; with MLflow's database and without it.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.damage import ROOT, TINY, sweep
from tests.faults.fault import Count, Draw, FaultClass, lives
from tests.faults.kills import ORPHANS_END_WITHIN_S, WHOM, hit
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State

SWEEPS, KILLS_EACH = 30, 2
EXACT = (
    *("train.deterministic=true", "hardware.threads=1", "hardware.micro_batch_tokens=256"),
    *("hardware.max_attempts=99", "hardware.silence_s=10", "hardware.checkpoint_every_s=0.01"),
    *("train.max_steps=6", "study=s"),
)
KINDS = {
    "grid": (*TINY, *EXACT, "lora.r=2,4,8", "seed=0,1"),
    "grid without MLflow": (*TINY, *EXACT, "lora.r=2,4,8", "seed=0,1", "tracking=none"),
    "search": (
        *(*TINY, *EXACT, "tracking=none", "lora.r=choice(2,4,8)", "seed=choice(0,1,2)"),
        *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler=random"),
    ),
}
MOST_COMMANDS = 6  # after the last kill


def adapters(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every trial's weights, by key."""
    trials = StudyFolder(folder / "sweeps", "s").trials()
    done = [t for t in trials if (r := t.read_result()[0]) and r.state is State.DONE]
    return {t.key: hashlib.sha256(t.weights_file.read_bytes()).hexdigest() for t in done}


def start(folder: Path, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tinyllama_lab", "-m", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = (folder / "driver.txt").open("ab")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def children(pid: int) -> list[int]:
    """Return the processes that a driver has started, also while they import libraries."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in listed.read_text().split()]
    except OSError:
        return []


def workers(driver: int) -> list[int]:
    """Return the workers among a driver's processes."""
    found = []
    for pid in children(driver):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"tinyllama_lab.core.worker" in words:
            found.append(pid)
    return found


def one_sweep(
    folder: Path, settings: tuple[str, ...], seed: int, takes_s: float
) -> tuple[Count, dict[str, str], float]:
    """Run a sweep in spite of kills; return its adapters and how long workers outlived drivers."""
    folder.mkdir(parents=True)
    count, dice, longest_s = Count(), random.Random(seed), 0.0
    for _ in range(KILLS_EACH):
        driver = start(folder, settings)
        time.sleep(dice.uniform(0.05, takes_s))
        whom, number = dice.choice(WHOM), dice.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
        found = workers(driver.pid)
        whom = whom if found else "driver"
        for pid in found * (whom != "driver"):
            hit(pid, number)
        if whom == "worker":  # the driver goes on by itself
            count.add(f"{number.name} of worker")
            continue_s = takes_s + 60 * (number is signal.SIGSTOP)
            try:
                driver.wait(continue_s)
            except subprocess.TimeoutExpired:
                found = workers(driver.pid)
        else:
            stops = whom == "both" and number is signal.SIGSTOP
            count.add(f"SIGKILL of {'driver, its worker stopped' if stops else whom}")
        driver.kill()
        driver.wait()
        began = time.monotonic()
        while any(map(lives, found)) and time.monotonic() - began < 20:
            time.sleep(0.02)
        longest_s = max(longest_s, time.monotonic() - began)
    for _ in range(MOST_COMMANDS):
        if (ran := sweep(folder, *settings)).returncode == 0:
            return count, adapters(folder), longest_s
    count.wrong.append(f"sweep {seed} does not end: {ran.stdout[-300:]}{ran.stderr[-500:]}")
    return count, adapters(folder), longest_s


def mlflow_problems(folder: Path) -> list[str]:
    """Return what is wrong with the runs: unfinished ones, points that are doubled or lost."""
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return []
    with sqlite3.connect(database) as rows:
        states = Counter(state for (state,) in rows.execute("select status from runs"))
        points = Counter(
            rows.execute("select run_uuid, step from metrics where key = 'train/loss'").fetchall()
        )
    found = [f"{states['RUNNING']} runs are left RUNNING"] if states["RUNNING"] else []
    if doubled := [point for point, times in points.items() if times > 1]:
        found.append(f"{len(doubled)} points are doubled")
    if lost := {run for run, _ in points if sum(r == run for r, _ in points) < 6}:
        found.append(f"points of {len(lost)} runs are lost")
    return found


def real_kills(draw: Draw) -> Count:
    """Run each kind undisturbed once, and then many times with kills."""
    total, longest_s = Count(), 0.0
    sweeps = draw.times(SWEEPS)
    expected, takes_s = {}, {}
    for kind, settings in KINDS.items():
        (folder := draw.folder / "whole" / kind).mkdir(parents=True)
        began = time.monotonic()
        ran = sweep(folder, *settings)
        assert ran.returncode == 0, ran.stderr[-2000:]
        expected[kind], takes_s[kind] = adapters(folder), time.monotonic() - began
    kinds = [list(KINDS)[n % len(KINDS)] for n in range(sweeps)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [
            pool.submit(
                *(one_sweep, draw.folder / f"kill{n}", KINDS[kind]),
                *(draw.dice.randrange(2**31), takes_s[kind]),
            )
            for n, kind in enumerate(kinds)
        ]
        for number, (kind, run) in enumerate(zip(kinds, runs, strict=True)):
            count, found, outlived_s = run.result()
            longest_s = max(longest_s, outlived_s)
            total.injected += count.injected
            total.outcomes += count.outcomes
            total.wrong += count.wrong
            if found != expected[kind]:
                total.wrong.append(f"{kind} {number}: other adapters")
            for problem in mlflow_problems(draw.folder / f"kill{number}"):
                total.wrong.append(f"{kind} {number}: {problem}")
    if longest_s > ORPHANS_END_WITHIN_S:
        total.wrong.append(f"a worker outlived its driver by {longest_s:.1f} s")
    total.notes += [f"{sweeps} sweeps, all adapters equal bit by bit"]
    total.notes += [f"no worker outlived its driver by more than {longest_s:.1f} s"]
    return total


REAL = FaultClass(
    "real-kills",
    "the same with real training in packs, searches and MLflow included",
    real_kills,
    is_slow=True,
)
