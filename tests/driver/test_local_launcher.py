"""A worker process starts before it has a pack, and nothing of that is lost or left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tinyllama_lab.study.pack import Pack
from tinyllama_lab.sweep.launchers import local


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
    assert launcher._ahead is not None
    first = launcher._ahead.pid
    worker = launcher.start(pack)
    assert worker._process.pid == first
    assert ended(worker) == 1
    log = pack.log_file.read_text()
    assert re.search(r"import time: .*\| +torch$", log, re.MULTILINE)  # while it waited
    assert "No such file or directory" in log and "pack.json" in log  # after it


def test_a_second_worker_is_a_process_of_its_own(pack: Pack) -> None:
    launcher = local.LocalWorkers()
    workers = [launcher.start(pack), launcher.start(pack)]
    assert workers[0]._process.pid != workers[1]._process.pid
    assert [ended(worker) for worker in workers] == [1, 1]


def test_a_process_that_died_while_it_waited_is_replaced(pack: Pack) -> None:
    launcher = local.LocalWorkers()
    assert launcher._ahead is not None
    first = launcher._ahead.pid
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    worker = launcher.start(pack)
    assert worker._process.pid != first
    assert ended(worker) == 1 and "pack.json" in pack.log_file.read_text()


def test_a_process_that_gets_no_pack_ends_with_its_launcher() -> None:
    launcher = local.LocalWorkers()
    process = launcher._ahead
    assert process is not None and process.poll() is None
    del launcher
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_on_a_machine_with_gpus_no_worker_starts_without_a_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "has_cuda", lambda: True)
    assert local.LocalWorkers()._ahead is None
