"""Ctrl-C and SIGTERM are recorded while workers are followed, and raise everywhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama_lab.sweep.execution.interrupts import ANSWER, Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once_where_nothing_is_deferred(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts().handled():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_waits_for_the_next_check(number: int) -> None:
    interrupts = Interrupts()
    with interrupts.handled(), interrupts.deferred():
        interrupts.check()
        os.kill(os.getpid(), number)
        assert interrupts.came
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_second_signal_does_not_wait() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.handled(), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_former_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts().handled():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_is_answered_when_it_comes(capfd: pytest.CaptureFixture[str]) -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.handled(), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == f"\n{ANSWER}\n"  # before anyone calls `check`
        interrupts.check()


@pytest.mark.parametrize(
    ("command", "library"),
    [
        (["tinyllama_lab", "-m", "lora.r=8,16"], "hydra"),
        (["tinyllama_lab.report", "study=s"], "rich"),
    ],
)
def test_ctrl_c_while_a_program_loads_is_one_line(
    tmp_path: Path, command: list[str], library: str
) -> None:
    (tmp_path / f"{library}.py").write_text(  # imported in place of the library
        "import os, signal\n"
        "exec('os.kill(os.getpid(), signal.SIGINT)')\n"  # as dataclasses execute strings
    )
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130 and ended.stdout == ""
    assert ended.stderr == "stopped; what is done is kept, and the same command continues\n"
