"""The worker: runs the missing trials of its pack, stops on request, and reports failures."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packs import after, result, weights
from tinyllama_lab.core import worker
from tinyllama_lab.core.worker import run_pack
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.pack import BaseSettings, Exit, Pack, Task, Work
from tinyllama_lab.study.trial import State, TrialFolder, trial_key

QUICK = {"eval.generations": 0, "eval.latency_tokens": 0, "train.max_steps": 2}
MakePack = Callable[..., tuple[Pack, list[TrialFolder]]]


@pytest.fixture
def make_pack(configure: Any, hardware: dict[str, Any], tmp_path: Path) -> MakePack:
    def make(*changes: dict[str, Any], **machine: Any) -> tuple[Pack, list[TrialFolder]]:
        found = []
        for each in changes:
            config = configure({**QUICK, **each})
            trial = TrialFolder(tmp_path / "trials" / f"tiny-{trial_key(config)}")
            trial.write_config(config)
            found.append(trial)
        pack = Pack(tmp_path / "packs" / "1")
        base = TrialFolder(tmp_path / "_base" / "tiny-base")
        settings = {**hardware, "threads": 1, **machine}
        tasks = [Task(trial, base, ("x=1",)) for trial in found]
        shared = BaseSettings.of(configure({**QUICK, **changes[0]}))
        pack.write(Work(tasks, shared, settings, "tiny"))
        return pack, found

    return make


def state(trial: TrialFolder) -> State | None:
    result, problem = trial.read_result()
    assert problem is None
    return result.state if result else None


def test_a_pack_gets_every_result_and_its_base_once(
    make_pack: MakePack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pack, (first, second) = make_pack({}, {"lora.r": 2})
    assert run_pack(pack.folder, lambda: False) == Exit.DONE
    assert (state(first), state(second)) == (State.DONE, State.DONE)
    base = pack.read().tasks[0].base
    base_result, _ = base.read_result()
    assert base_result is not None and base_result.state == State.DONE
    for trial in (first, second):
        result, _ = trial.read_result()
        assert result is not None and result.overrides == ["x=1"]
        assert result.metrics["base/loss"] == base_result.metrics["eval/loss"]
    phases = [event["name"] for event in read_events(pack.events_file)]
    assert phases == ["starting", "reading the data", "loading the base", "training"]
    assert "tiny: done" in first.log_file.read_text()
    written = [trial.result_file.stat().st_mtime_ns for trial in (first, second, base)]
    assert run_pack(pack.folder, lambda: False) == Exit.DONE  # nothing is left to do
    assert [t.result_file.stat().st_mtime_ns for t in (first, second, base)] == written
    assert pack.living_worker() is None


def test_a_trial_that_fails_does_not_stop_the_pack(make_pack: MakePack) -> None:
    pack, (first, second) = make_pack({"data.n": 10**6}, {})
    assert run_pack(pack.folder, lambda: False) == Exit.DONE
    assert (state(first), state(second)) == (State.FAILED, State.DONE)


def test_rows_to_score_that_cannot_be_had_fail_their_trial(make_pack: MakePack) -> None:
    pack, (trial,) = make_pack({"data.max_length": 8})
    assert run_pack(pack.folder, lambda: False) == Exit.DONE
    result, _ = trial.read_result()
    assert result is not None and result.error is not None
    assert result.error["class"] == "data"
    assert "unusable once they are tokens: 5012 too long" in result.error["message"]


@pytest.mark.parametrize("call", [0, 2, 3])
def test_a_stopped_pack_has_fewer_results_and_continues(call: int, make_pack: MakePack) -> None:
    pack, both = make_pack({}, {"seed": 1})
    assert run_pack(pack.folder, after(call)) == Exit.STOPPED
    assert [state(trial) for trial in both] == [None, None]
    assert run_pack(pack.folder, lambda: False) == Exit.DONE
    assert [state(trial) for trial in both] == [State.DONE, State.DONE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.source": "local", "model.path": "/nowhere"}, "got /nowhere"),
        ({"train.precision": "fp16"}, "train.precision=fp16 needs a CUDA GPU"),
    ],
)
def test_a_base_that_cannot_be_had_is_said_to_the_driver(
    changes: dict[str, Any], message: str, make_pack: MakePack
) -> None:
    pack, (trial,) = make_pack(changes)
    assert run_pack(pack.folder, lambda: False) == Exit.NO_BASE
    events = [event for event in read_events(pack.events_file) if event["kind"] == "error"]
    assert len(events) == 1 and message in events[0]["message"]
    assert events[0]["out_of_memory"] is False
    assert state(trial) is None


def test_a_base_that_does_not_fit_into_memory_is_said_to_be_that(
    make_pack: MakePack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("tinyllama_lab.core.models.loading.load_base", full)
    pack, (trial,) = make_pack({})
    assert run_pack(pack.folder, lambda: False) == Exit.NO_BASE
    (error,) = [event for event in read_events(pack.events_file) if event["kind"] == "error"]
    assert error["out_of_memory"] is True
    assert "Tried to allocate 20.00 GiB; set quant=nf4" in error["message"]
    assert state(trial) is None  # the driver writes its result, as it does for any lost base


def test_a_full_disk_has_its_own_exit(
    make_pack: MakePack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tinyllama_lab.core.training.attempt.plot_loss_curve", full)
    pack, (trial,) = make_pack({})
    assert run_pack(pack.folder, lambda: False) == Exit.NO_SPACE
    assert state(trial) is None


def test_a_trial_whose_configuration_is_damaged_fails_alone(make_pack: MakePack) -> None:
    pack, (first, broken, last) = make_pack({}, {"seed": 1}, {"seed": 2})
    broken.config_file.write_text("lora: [")
    assert run_pack(pack.folder, lambda: False) == Exit.DONE
    assert [state(t) for t in (first, broken, last)] == [State.DONE, State.FAILED, State.DONE]


def test_deterministic_algorithms_are_on_where_a_pack_asks_for_them(
    make_pack: MakePack, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def told(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise ZeroDivisionError

    monkeypatch.setattr("tinyllama_lab.core.training.pool.train_round", told)
    for deterministic in (True, False):
        pack, _ = make_pack({"train.deterministic": deterministic})
        assert run_pack(pack.folder, lambda: False) == Exit.DONE
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_dequantized_copy_of_a_4_bit_base_changes_no_bit(make_pack: MakePack) -> None:
    found = []
    for keep in (True, False):
        pack, (trial,) = make_pack({"quant.kind": "nf4", "seed": 3}, keep_dequantized=keep)
        trial.result_file.unlink(missing_ok=True)
        assert run_pack(pack.folder, lambda: False) == Exit.DONE
        found.append((weights(trial), result(trial).metrics["eval/loss"]))
        assert result(trial).environment["engine"] == "packed"
    assert found[0] == found[1]


def test_a_worker_that_is_stopped_while_it_starts_loads_no_model(make_pack: MakePack) -> None:
    pack, (trial,) = make_pack({"train.max_steps": 5000})
    assert run_pack(pack.folder, lambda: True) == Exit.STOPPED
    assert [event["name"] for event in read_events(pack.events_file)] == ["starting"]
    assert state(trial) is None


def test_a_signal_stops_the_process_with_its_work_saved(make_pack: MakePack) -> None:
    pack, (trial,) = make_pack({"train.max_steps": 5000})
    command = [sys.executable, "-m", "tinyllama_lab.core.worker", str(pack.folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while not any(event["kind"] == "metric" for event in read_events(trial.events_file)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        worker = pack.living_worker()
        assert worker is not None and worker.pid == process.pid
        os.kill(process.pid, signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == Exit.STOPPED
    assert state(trial) is None and list(trial.checkpoint_dir.glob("step-*"))
    assert pack.living_worker() is None


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_of_a_worker_do_not_spin_unless_the_user_says_so(
    tmp_path: Path, typed: dict[str, str], expected: dict[str, str]
) -> None:
    """Else one other program on the machine would slow training down many times over."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import os, sys, tinyllama_lab.core.worker as worker; worker.run_pack = lambda *a: 0; "
        "worker.main(); "
        f"print({{n: os.environ[n] for n in {names} if n in os.environ}}, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, env=plain | typed, capture_output=True, text=True)
    # the library reads them when it is loaded, so before torch is imported
    assert ended.stdout.strip() == f"{expected} False", ended.stderr


def test_a_worker_gives_signs_of_life_while_it_loads_computes_or_looks_for_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BEAT_EVERY_S", 0.01)
    monkeypatch.setattr(worker, "IDLE_S", 1e9)  # as if it never computed
    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)
    pack, flag = Pack(tmp_path), worker.StopFlag()
    threading.Thread(target=worker._beat, args=(pack, flag), daemon=True).start()

    def beats() -> bool:
        before, deadline = pack.last_beat(), time.monotonic() + 0.5
        while pack.last_beat() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        return pack.last_beat() != before

    assert beats() and beats()  # it may wait for a hub
    flag()
    assert beats() and beats()
    flag.asked = 9
    beats()
    assert not beats()  # it trains no more, and waits for nothing
    flag()
    assert beats()
