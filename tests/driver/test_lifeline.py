"""Workers, and whatever they have started, end with their driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.fault import lives
from tinyllama_lab.sweep.launchers import lifeline
from tinyllama_lab.sweep.launchers.lifeline import Lifeline

# starts a process of its own, which ignores the same signals, and prints both numbers
WORKER = """
import os, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
DRIVER = f"""
import subprocess, sys, time
from tinyllama_lab.sweep.launchers.lifeline import Lifeline
held = Lifeline()
held.open()
command = [sys.executable, "-c", {WORKER!r}, *sys.argv[1:]]
worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
held.hold(worker.pid)
print(worker.stdout.readline(), flush=True)
time.sleep(600)
"""
WITHIN_S = 5.0


def start(*arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a driver; return it with the worker and the process that the worker started."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", DRIVER, *arguments]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    return driver, [int(word) for word in driver.stdout.readline().split()]


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + WITHIN_S
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(lives, pids))


@pytest.mark.parametrize("kind", ["obeys", "deaf", "stopped"])
def test_a_worker_and_what_it_started_end_with_a_killed_driver(kind: str) -> None:
    driver, pids = start(kind)
    assert all(map(lives, pids))
    if kind == "stopped":
        os.killpg(pids[0], signal.SIGSTOP)
    driver.kill()
    assert gone(pids)


def test_a_worker_that_was_released_is_not_signalled() -> None:
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    held = Lifeline()
    held.open()
    held.hold(bystander.pid)
    held.release(bystander.pid)
    held.close()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_lifeline_that_somebody_killed_costs_no_sweep() -> None:
    held = Lifeline()
    held.open()
    assert held._process is not None
    held._process.kill()
    held._process.wait()
    held.hold(1 << 22)
    held.close()


def test_workers_get_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends on SIGTERM has the grace period for it; nobody waits for more."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(lifeline.os, "killpg", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(lifeline, "GRACE_S", 0.2)
    lifeline.watch(["7\n", "8\n", "-7\n"])
    assert sent[0] == (8, signal.SIGTERM) and sent[-1] == (8, signal.SIGKILL)
    assert {pid for pid, _ in sent} == {8}
