"""A pack folder: its work list survives moving the study, and its worker is known by a lock."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Configure
from tinyllama_lab.config.axes import flatten
from tinyllama_lab.study.pack import (
    BaseSettings,
    Exit,
    Holder,
    Pace,
    Pack,
    StreamSettings,
    Task,
    Work,
)
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder

ROOT = Path(__file__).parents[2]
KEYS = ("0" * 12, "1" * 12)


def written(root: Path, stream: StreamSettings | None = None) -> tuple[Pack, Work]:
    study = StudyFolder(root / "sweeps", "s")
    shared = BaseSettings({"name": "tiny"}, {"kind": "nf4"}, "bf16", True)
    base = TrialFolder(study.bases_dir / f"base-{'b' * 12}")
    tasks = [
        Task(
            TrialFolder(study.trials_dir / f"r{n}-{key}"),
            base,
            (f"lora.r={n}", "data.system='a, ä'"),
            pace=Pace("a CPU", 120.5, 3.25) if n else None,
        )
        for n, key in enumerate(KEYS)
    ]
    machine = {"device": "cpu", "threads": None}
    work = Work(tasks, shared, machine, "profile", stream=stream)
    pack = Pack(study.packs_dir / "p1")
    pack.write(work)
    return pack, work


def test_trials_share_a_base_if_no_setting_of_the_base_differs(configure: Configure) -> None:
    config = configure()
    base = BaseSettings.of(config)
    for key in flatten(config):
        other = BaseSettings.of(configure({key: "another value"}))
        assert (other != base) == BaseSettings.has_setting(key), key
    shared = [key for key in flatten(config) if BaseSettings.has_setting(key)]
    assert {key for key in shared if not key.startswith(("model.", "quant."))} == {
        "train.precision",
        "train.deterministic",
    }


@pytest.mark.parametrize("stream", [None, StreamSettings(3, (0.25, 0.5), 4)])
def test_a_pack_comes_back_as_it_was_written(
    stream: StreamSettings | None, tmp_path: Path
) -> None:
    pack, work = written(tmp_path, stream)
    assert pack.read() == work


def test_a_fixed_pack_is_a_stream_that_is_closed_already(tmp_path: Path) -> None:
    fixed = written(tmp_path / "fixed")[0].arrivals()
    assert (fixed.poll(), fixed.closed) == ([], True)
    pack, work = written(tmp_path / "stream", StreamSettings(3))
    arrivals = pack.arrivals()
    assert (arrivals.poll(), arrivals.closed) == ([], False)
    pack.add(work.tasks[1])
    pack.close()
    assert (arrivals.poll(), arrivals.closed) == ([work.tasks[1]], True)


def test_a_study_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    pack, work = written(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Pack(tmp_path / "there" / pack.folder.relative_to(tmp_path / "here")).read()
    assert {t.trial.folder.parent for t in moved.tasks} == {tmp_path / "there/sweeps/s/trials"}
    base = TrialFolder(tmp_path / "there/sweeps/_base" / work.tasks[0].base.folder.name)
    assert {task.base for task in moved.tasks} == {base}
    assert str(tmp_path) not in (tmp_path / "there/sweeps/s/packs/p1/pack.json").read_text()


def test_exit_codes_differ_from_those_of_python_and_signals() -> None:
    assert len(set(Exit)) == 4 and Exit.DONE == 0
    assert not {1, 2, *range(126, 256)} & set(Exit)


def test_a_pack_that_was_never_locked_has_no_living_worker(tmp_path: Path) -> None:
    assert written(tmp_path)[0].living_worker() is None


HOLD = """
import sys, time
from pathlib import Path
from tinyllama_lab.study.pack import Pack
with Pack(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Pack, subprocess.Popen[str]]]:
    pack, _ = written(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(pack.folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield pack, process
    process.kill()
    process.communicate()


def test_a_living_worker_is_known_by_its_process_until_it_is_killed(
    holder: tuple[Pack, subprocess.Popen[str]],
) -> None:
    pack, process = holder
    assert pack.living_worker() == Holder(process.pid, socket.gethostname())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pack.living_worker() is None


def test_a_second_worker_waits_for_the_first(holder: tuple[Pack, subprocess.Popen[str]]) -> None:
    pack, process = holder
    begin = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    with pack.locked():
        assert time.monotonic() - begin >= 0.25
        assert pack.lock_file.read_text() == f"{os.getpid()} {socket.gethostname()}"
    killer.wait()
    assert pack.living_worker() is None
