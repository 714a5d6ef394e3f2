"""The lock of a study: a second driver is refused, a dead one leaves no lock and no worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.pack import Pack
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.execution import lock

ROOT = Path(__file__).parents[2]
DRIVER = """
import sys, time
from pathlib import Path
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.execution import lock
with lock.locked(StudyFolder(Path(sys.argv[1]), "s")):
    print("held", flush=True)
    time.sleep(60)
"""
WORKER = """
import signal, sys, time
from pathlib import Path
from tinyllama_lab.study.pack import Pack
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with Pack(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that runs Python code until it prints `held`."""
    processes: list[subprocess.Popen[str]] = []

    def begin(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        out = processes[-1].stdout
        assert out and out.readline() == "held\n"
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path, "s")


def test_a_second_driver_is_refused_and_the_first_is_named(
    study: StudyFolder, start: Start
) -> None:
    driver = start(DRIVER, str(study.root))
    with pytest.raises(StudyError, match=rf"process {driver.pid} on .* runs s;.*study=<name>"):
        with lock.locked(study):
            pytest.fail("two drivers")
    with lock.locked(StudyFolder(study.root, "other")):
        pass


def test_a_killed_driver_frees_its_study(study: StudyFolder, start: Start) -> None:
    driver = start(DRIVER, str(study.root))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with lock.locked(study):
        assert str(os.getpid()) in study.driver_file.read_text()


def test_a_study_is_free_again_after_an_error(study: StudyFolder) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), lock.locked(study):
            raise KeyError


@pytest.mark.parametrize("owner", ["", "{", "[]", "3", "null", "{}"])
def test_the_refusal_does_not_need_the_name_of_the_holder(
    study: StudyFolder, start: Start, owner: str
) -> None:
    start(DRIVER, str(study.root))
    study.driver_file.write_text(owner)
    with pytest.raises(StudyError, match="another process"), lock.locked(study):
        pass


def packs(study: StudyFolder) -> list[Pack]:
    made = [Pack(study.packs_dir / name) for name in ("p1", "p2")]
    for pack in made:
        pack.folder.mkdir(parents=True)
    return made


def test_the_next_driver_ends_workers_that_were_left_behind(
    study: StudyFolder, start: Start
) -> None:
    workers = [start(WORKER, str(pack.folder), "") for pack in packs(study)]
    with lock.locked(study):
        codes = [worker.wait(timeout=1) for worker in workers]
    assert codes == [-signal.SIGTERM] * 2


def test_a_worker_that_ignores_sigterm_is_killed(
    study: StudyFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock._end_orphans, "__defaults__", (0.3,))
    worker = start(WORKER, str(packs(study)[0].folder), "deaf")
    with lock.locked(study):
        assert worker.wait(timeout=1) == -signal.SIGKILL


def test_a_pack_whose_worker_has_ended_does_no_harm(study: StudyFolder, start: Start) -> None:
    pack, _ = packs(study)
    # a number that now belongs to another process
    pack.lock_file.write_text(f"{os.getpid()} {socket.gethostname()}")
    with lock.locked(study):  # ends no process: this one is still here to see
        assert not pack.folder.exists()


def test_a_lock_that_stays_held_is_an_error(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock._end_orphans, "__defaults__", (0.2,))
    pack, _ = packs(study)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pack.locked():  # as by a child of a killed worker, which inherited the lock
        pack.lock_file.write_text(f"{gone.pid} {socket.gethostname()}")
        with pytest.raises(StudyError, match="p1"), lock.locked(study):
            pass


def test_a_worker_on_another_host_is_named_and_no_process_here_is_hit(
    study: StudyFolder, start: Start
) -> None:
    pack, _ = packs(study)
    innocent = start(WORKER, str(pack.folder), "")  # has the same number as the worker there
    pack.lock_file.write_text(f"{innocent.pid} elsewhere")
    with pytest.raises(StudyError, match=rf"process {innocent.pid} on elsewhere; end it there"):
        with lock.locked(study):
            pass
    assert innocent.poll() is None
