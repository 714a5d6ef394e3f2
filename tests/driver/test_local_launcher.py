"""A worker process starts before it has a pack, and nothing of that is lost or left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tinyllama_lab.study.pack import Exit, Pack
from tinyllama_lab.sweep.launchers import local


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "has_cuda", lambda: False)


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """Return a pack without work, so that its worker ends with an error."""
    return Pack(tmp_path)


def ended(worker: local.LocalWorker, timeout_s: float = 60) -> int:
    deadline = time.monotonic() + timeout_s
    while (code := worker.exit_code()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return code


def test_what_a_worker_prints_before_it_has_a_pack_is_in_the_log(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    launcher = local.LocalWorkers()
    first = waiting(launcher)
    worker = launcher.start(pack)
    assert worker._process is first
    assert ended(worker) == 1
    log = pack.log_file.read_text()
    assert re.search(r"import time: .*\| +torch$", log, re.MULTILINE)  # while it waited
    assert "No such file or directory" in log and "pack.json" in log  # after it
    assert log.count("| imported package") == 1


def test_what_it_printed_is_kept_if_it_ends_before_it_knows_the_log(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    launcher = local.LocalWorkers()
    process = waiting(launcher)
    assert launcher._ahead is not None
    while not os.fstat(launcher._ahead._output.fileno()).st_size:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot read the pack
    worker = launcher.start(pack)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(worker) == -signal.SIGKILL
    assert worker.exit_code() == -signal.SIGKILL
    assert pack.log_file.read_text().count("| imported package") == 1


def test_a_second_worker_is_another_process(pack: Pack) -> None:
    launcher = local.LocalWorkers()
    workers = [launcher.start(pack), launcher.start(pack)]
    assert workers[0]._process.pid != workers[1]._process.pid
    assert [ended(worker) for worker in workers] == [1, 1]


def test_a_process_that_died_while_it_waited_is_replaced(pack: Pack) -> None:
    launcher = local.LocalWorkers()
    first = waiting(launcher)
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    worker = launcher.start(pack)
    assert worker._process is not first
    assert ended(worker) == 1 and "pack.json" in pack.log_file.read_text()


def test_a_process_that_gets_no_pack_ends_with_its_launcher() -> None:
    launcher = local.LocalWorkers()
    process = waiting(launcher)
    launcher.close()
    assert process.returncode == -signal.SIGKILL
    launcher.close()


def test_it_ends_by_itself_when_the_driver_is_gone() -> None:
    launcher = local.LocalWorkers()
    process = waiting(launcher)
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does
    assert process.wait(60) == Exit.STOPPED


def test_without_room_for_another_process_a_sweep_goes_on(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError("Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(local.subprocess, "Popen", refused)
        launcher = local.LocalWorkers()
    assert ended(launcher.start(pack)) == 1


def test_on_a_machine_with_gpus_no_worker_starts_without_a_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "has_cuda", lambda: True)
    assert local.LocalWorkers()._ahead is None


def waiting(launcher: local.LocalWorkers) -> subprocess.Popen[bytes]:
    assert launcher._ahead is not None
    process = launcher._ahead.process
    assert process.poll() is None
    return process
