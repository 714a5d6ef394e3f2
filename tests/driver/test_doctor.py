"""`doctor`: every check finds what it is for, on a machine where that is really so."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.config.schema import Config, TrackingConfig, load
from tinyllama_lab.data import hub
from tinyllama_lab.errors import LabError
from tinyllama_lab.sweep.check import composed
from tinyllama_lab.sweep.doctor import command, machine, places
from tinyllama_lab.sweep.doctor import fit as doctor_fit
from tinyllama_lab.sweep.doctor.deadline import Deadline, in_time
from tinyllama_lab.sweep.doctor.finding import Finding, Level, ok
from tinyllama_lab.sweep.doctor.fit import fit
from tinyllama_lab.sweep.forecast import process as forecast_process
from tinyllama_lab.sweep.forecast.process import Forecasting

ROOT = Path(__file__).parents[2]
ANSWER: dict[str, Any] = {
    "torch": "2.13.0",
    "device": "cpu",
    "gpus": [],
    "has_mps": False,
    "threads": 2,
    "has_openmp": True,
    "has_fast_bf16": False,
    "bf16": "",
    "nf4": "",
    "int8": "",
    "loops": "",
}
LONG_S = 600.0  # no machine is that busy
# the command, with time for a busy machine
UNHURRIED = f"""
import sys
from tinyllama_lab.sweep.doctor import command
command._SECONDS = {LONG_S}
sys.exit(command.doctor(sys.argv[1:]))
"""


def config(*overrides: str) -> Config:
    return load(composed([*grid.SMALL, *overrides]).raw)


def lines(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def is_root() -> bool:
    return os.geteuid() == 0


@pytest.mark.slow
def test_doctor_checks_a_command_and_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("a file in the way")
    arguments = [sys.executable, "-c", UNHURRIED, "model=tiny_random", "quant=nf4"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_x",
    }
    environment |= {"HF_HOME": str(tmp_path / "hf"), "CXX": "none"}
    ended = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stderr == ""
    found = {line.split()[1]: line.split()[0] for line in ended.stdout.splitlines()[:-1]}
    assert found.pop("database") == "problem"
    assert found.pop("compiler") == "warning"
    assert "problem" not in found.values()
    assert {"python", "packages", "files", "disk", "cache", "hub", "token", "model", "data"} < set(
        found
    )
    assert {"cpu", "memory", "gpu", "bf16", "nf4", "int8", "browser", "load"} < set(found)
    assert "CXX=none turns the loops in C++ off" in ended.stdout
    assert "hf_x" not in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]


@pytest.mark.parametrize(
    ("words", "level", "text"),
    [
        (
            ["lora.r=4,8"],
            Level.OK,
            r"2 trials in 1 pack fit, up to [\d,]+ MiB of [\d.]+ GiB, about ",
        ),
        (["hardware.threads=99999"], Level.PROBLEM, r"hardware\.threads must be at most"),
        (["data.n=99999999"], Level.PROBLEM, "data.n=99999999 needs 99999999 usable"),
        (["experiment=search_travel"], Level.OK, "unknown: a search proposes its trials"),
        (["hardware=t4"], Level.PROBLEM, "describes a machine to plan for, got T4"),
    ],
)
def test_the_plan_of_the_command_is_a_line(
    words: list[str], level: Level, text: str, tmp_path: Path
) -> None:
    with Forecasting() as process:
        (finding,) = fit([*grid.SMALL, *words], tmp_path, process)
    assert finding.level is level and re.search(text, finding.text)
    assert list(tmp_path.iterdir()) == []


class FixedForecasting(Forecasting):
    """Trials that fit: adapters of 100 MiB each, on a base of 2,000 MiB to download."""

    def __init__(self, download_mib: float = 2000.0) -> None:
        self.download_mib = download_mib

    def ask(self, packs: Any, *_: object) -> dict[str, Any]:
        pack = {"train_peak_mib": 900.0, "infer_peak_mib": 800.0, "weights_mib": 100.0}
        pack |= {"micro_batch_tokens": 640, "together": 1}
        facts = {"fits": True, "adapter_mib": 100.0, "is_guessed": False, "is_counted": True}
        facts |= {"dtype": "float32", "gflops": None, "packed": True}
        return {
            "packs": [pack for _ in packs],
            "trials": {each.trial.key: facts for members in packs for each in members},
            "machine": {"free_mib": 4096.0},
            "start_s": 1.0,
            "download_mib": {"o/m": self.download_mib} if self.download_mib else {},
        }


@pytest.mark.parametrize(
    ("free", "is_one_disk", "topics"),
    [
        ((802, 2000), False, ["plan"]),
        ((801, 2000), False, ["disk", "plan"]),  # 2 * (4 * 100 + 0.6) MiB of trials
        ((802, 1999), False, ["cache", "plan"]),
        ((10, 10), False, ["disk", "cache", "plan"]),
        ((2802, 2802), True, ["plan"]),
        ((2801, 2801), True, ["disk", "plan"]),
    ],
)
def test_trials_and_download_must_fit_onto_the_disk(
    free: tuple[int, int],
    is_one_disk: bool,
    topics: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(doctor_fit, "free_mib", lambda folder: free[folder == cache])
    monkeypatch.setattr(doctor_fit, "is_same_disk", lambda one, other: is_one_disk)
    words = [*grid.SMALL, "lora.r=4,8"]
    found = list(fit(words, tmp_path, FixedForecasting()))
    assert [finding.topic for finding in found] == topics
    assert found[-1].level is Level.OK
    assert {finding.level for finding in found[:-1]} <= {Level.PROBLEM}


def test_a_full_disk_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(doctor_fit, "free_mib", lambda folder: 90)
    monkeypatch.setattr(doctor_fit, "is_same_disk", lambda one, other: False)
    words = [*grid.SMALL, "lora.r=4,8"]
    found = lines(fit(words, tmp_path, FixedForecasting()))
    assert found["disk"].text == (
        "sweeps_dir=sweeps must have room for 802 MiB of trials, got 90 MiB free; free some, set "
        "sweeps_dir=/another/disk, or sweep less"
    )
    assert found["cache"].text == (
        f"{cache} must have room for 2,000 MiB of downloads, got 90 MiB free; free some, or set "
        "HF_HUB_CACHE=/another/disk"
    )
    monkeypatch.setattr(doctor_fit, "is_same_disk", lambda one, other: True)
    found = lines(fit(words, tmp_path, FixedForecasting()))
    assert found["disk"].text == (
        f"the disk of sweeps_dir=sweeps and {cache} must have room for 802 MiB of trials and "
        "2,000 MiB of downloads, got 90 MiB free; free some, set sweeps_dir=/another/disk, set "
        "HF_HUB_CACHE=/another/disk, or sweep less"
    )
    # nothing is downloaded, or the free space is unknown
    (disk, _) = fit(words, tmp_path, FixedForecasting(download_mib=0.0))
    assert "must have room for 802 MiB of trials, got" in disk.text
    monkeypatch.setattr(doctor_fit, "free_mib", lambda folder: None)
    assert list(lines(fit(words, tmp_path, FixedForecasting()))) == ["plan"]


def test_a_card_that_is_only_planned_for_is_no_missing_gpu() -> None:
    assert lines(machine.devices(ANSWER, config("hardware=t4")))["gpu"].level is Level.OK


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant=nf5"], "nf5"),
        (["data.m=3"], "data.m is not a setting"),
        (["--json"], "doctor takes only settings, got the option --json"),
    ],
)
def test_a_wrong_setting_is_refused_as_in_a_sweep(words: list[str], message: str) -> None:
    from tinyllama_lab.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        command.doctor(words)


def test_versions_are_compared_with_what_the_package_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "picky-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: picky\nVersion: 1.0\nRequires-Python: >=3.99\n"
        "Requires-Dist: numpy>=999\nRequires-Dist: no-such-package\nRequires-Dist: rich\n"
        'Requires-Dist: also-not-here; extra == "dev"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    python, numpy, missing = machine.packages("picky")
    assert {each.level for each in (python, numpy, missing)} == {Level.PROBLEM}
    assert "must be >=3.99, got 3." in python.text
    assert re.fullmatch(
        r'numpy must be >=999, got \S+; type: pip install "numpy>=999"', numpy.text
    )
    assert missing.text.startswith("no-such-package must be") and "got none" in missing.text
    (unknown,) = machine.packages("not-installed")
    assert unknown.level is Level.WARNING


def test_what_pytorch_cannot_do_is_a_problem_where_the_command_needs_it() -> None:
    broken = {**ANSWER, "nf4": "ImportError: no kernel", "bf16": "RuntimeError: no bf16"}
    plain = lines(machine.devices(broken, config()))
    assert plain["nf4"].level is Level.WARNING and plain["bf16"].level is Level.WARNING
    needed = lines(machine.devices(broken, config("quant=nf4", "train.precision=bf16")))
    assert needed["nf4"].level is Level.PROBLEM and "no kernel" in needed["nf4"].text
    assert "set quant=none" in needed["nf4"].text
    assert needed["bf16"].level is Level.PROBLEM
    assert lines(machine.devices(broken, config("quant=fp4")))["nf4"].level is Level.PROBLEM
    gpu = lines(machine.devices(ANSWER, config("hardware.device=cuda")))["gpu"]
    assert gpu.level is Level.PROBLEM and "set hardware.device=auto" in gpu.text
    cards = [{"name": "H100", "memory_mib": 81_000}]
    gpu = lines(machine.devices({**ANSWER, "gpus": cards, "device": "cuda"}, config()))["gpu"]
    assert (gpu.level, gpu.text) == (Level.OK, "H100 (81,000 MiB)")
    assert lines(machine.devices({**ANSWER, "has_openmp": False}, config()))["openmp"]
    (torch,) = machine.devices("ImportError: libtorch.so", config())
    assert torch.level is Level.PROBLEM and "libtorch.so" in torch.text


def test_a_machine_without_a_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with Forecasting(probes=True) as process:
        answer = process.probe()
    assert isinstance(answer, dict), answer
    compiler = lines(machine.devices(answer, config()))["compiler"]
    assert compiler.level is Level.WARNING
    assert "c++ is not a C++ compiler of this machine; install g++" in compiler.text
    assert answer["bf16"] == "" and answer["threads"] >= 1


def test_a_broken_pytorch_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: not found')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Forecasting(probes=True) as process:
        assert process.probe() == "ImportError: libtorch_cpu.so: not found"
        with pytest.raises(LabError, match=r"not be computed: .*libtorch_cpu\.so: not found"):
            process.ask([], {}, {})


def test_pytorch_is_tried_whatever_is_wrong_with_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('peft is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Forecasting(probes=True) as process:
        with pytest.raises(LabError, match="could not be computed: .*peft is broken"):
            process.ask([], {}, {})  # whose answer comes after that of the probe
        answer = process.probe()
    assert isinstance(answer, dict) and answer["bf16"] == "", answer


def test_busy_cores_are_a_warning() -> None:
    assert machine.load(4, 0.3).level is Level.OK
    busy = machine.load(4, 3.5)
    assert busy.level is Level.WARNING and "3.5 of 4 cores were busy" in busy.text


def test_a_machine_without_a_browser_says_how_to_see_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    assert machine.browser().level is Level.WARNING
    assert "http://127.0.0.1:5000, from elsewhere after ssh -L" in machine.browser().text
    program = tmp_path / "fox"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", [f"{program} %s"])
    assert machine.browser().level is Level.OK


# ---- folders and file systems ----------------------------------------------------------------


def test_a_good_file_system_is_ok_and_nothing_is_left(tmp_path: Path) -> None:
    found = list(places.file_system(tmp_path / "sweeps" / "not yet"))
    assert [finding.level for finding in found] == [Level.OK]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (disk,) = places.disk(tmp_path / "file" / "sweeps", "sweeps_dir=file/sweeps")
    assert disk.level is Level.PROBLEM
    assert disk.text.startswith("sweeps_dir=file/sweeps must be a folder that can be written to")
    if is_root():
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        (files,) = places.file_system(tmp_path)
        assert files.level is Level.PROBLEM and "cannot be written to" in files.text
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_without_its_guarantees_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(95, "Operation not supported")

    for module, name, level, text in (
        (fcntl, "flock", Level.PROBLEM, "a file cannot be locked (Operation not supported)"),
        (os, "fsync", Level.PROBLEM, "cannot be flushed and then replace another"),
        (os, "replace", Level.PROBLEM, "cannot be flushed and then replace another"),
        (os, "link", Level.WARNING, "no hard links"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            first, *_ = places.file_system(tmp_path)
        assert (first.level, text in first.text) == (level, True), first
    with monkeypatch.context() as patch:  # a lock that this process alone believes in
        patch.setattr(fcntl, "flock", lambda *arguments: None)
        (files,) = places.file_system(tmp_path)
    assert "a lock does not keep out a second process" in files.text


def test_little_space_is_a_warning_and_too_little_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, level in ((50, Level.PROBLEM), (500, Level.WARNING), (9000, Level.OK)):
        monkeypatch.setattr(places, "free_mib", lambda folder, free=free: free)
        (disk,) = places.disk(tmp_path, "sweeps_dir=x")
        assert disk.level is level
    monkeypatch.setattr(places, "free_mib", lambda folder: None)
    assert "unknown" in next(places.disk(tmp_path, "sweeps_dir=x")).text


# ---- services --------------------------------------------------------------------------------


def tracking(uri: str | None = None) -> TrackingConfig:
    return TrackingConfig(enabled=True, uri=uri, folder="mlruns")


def test_a_database_is_writable_locked_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "will be made" in places.database(tracking(), tmp_path).text
    file = tmp_path / "mlruns" / "mlflow.db"
    file.parent.mkdir()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE runs (id)")
    assert places.database(tracking(), tmp_path).level is Level.OK
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    locked = places.database(tracking(), tmp_path)
    other.close()
    assert locked.level is Level.PROBLEM and "database is locked; end the program" in locked.text
    file.write_text("no database at all, but long enough for a header of a database" * 9)
    damaged = places.database(tracking(), tmp_path)
    assert damaged.level is Level.PROBLEM and "file is not a database" in damaged.text


def test_a_server_that_does_not_answer_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    uri = f"http://me:secret@127.0.0.1:{server.server_port}"
    assert places.database(tracking(uri), tmp_path).level is Level.OK
    server.server_close()
    refused = places.database(tracking(uri), tmp_path)
    assert refused.level is Level.PROBLEM and "Connection refused" in refused.text
    assert "secret" not in refused.text


def hub_lines() -> dict[str, Finding]:
    return lines([*places.hub_files(), places.hub_access(places.hub_silence())])


def test_the_hub_is_reachable_or_the_cache_alone_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = hub_lines()
    assert [finding.level for finding in found.values()] == [Level.OK] * 3
    assert found["hub"].text == f"{address} answers" and found["token"].text == "there is one"
    found = hub_lines()
    assert found["hub"].level is Level.WARNING and "Connection refused" in found["hub"].text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hf").write_text("a file in the way")
    found = hub_lines()
    assert found["hub"].level is Level.OK and "only what is in the cache" in found["hub"].text
    assert found["cache"].level is Level.PROBLEM and "set HF_HOME=" in found["cache"].text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    token = hub_lines()["token"]
    assert token.level is Level.WARNING and "hf/token cannot be read (Not a dir" in token.text


def test_model_and_data_are_here_or_the_line_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = lines(places.model_and_data([config(), config("lora.r=3")], Deadline(LONG_S)))
    assert {finding.level for finding in here.values()} == {Level.OK}
    wanted = config("model=tinyllama", "data=file", f"data.path={tmp_path}/none.jsonl")
    gone = lines(places.model_and_data([wanted], Deadline(LONG_S)))
    assert {finding.level for finding in gone.values()} == {Level.PROBLEM}
    assert "HF_HUB_OFFLINE forbids connections" in gone["model"].text
    assert "none.jsonl" in gone["data"].text
    # known to the cache by its branch, but not downloaded
    commit = "0123456789" * 4
    repo = tmp_path / "hf" / "hub" / "models--o--m"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(places, "model_identity", lambda model: commit)
    known = [config("model=hub", "model.repo=o/m")]
    to_load = lines(places.model_and_data(known, Deadline(LONG_S)))["model"]
    assert (to_load.level, to_load.text) == (
        Level.OK,
        "hub: o/m is downloaded at the first use",
    )


# ---- the time of the command -----------------------------------------------------------------


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """An event on which a fake waits; at the end of the test it is set, and all threads end."""
    event, before = threading.Event(), set(threading.enumerate())
    yield event
    event.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG_S)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an empty cache that may ask a hub of four addresses."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # the client has noted the file of another test
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.chdir(tmp_path)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{n}", 443)) for n in range(4)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)


class Sockets:
    """Addresses that are silent for as long as they are waited for, but for those that answer."""

    def __init__(self, answering: tuple[str, ...] = ()) -> None:
        self.answering = answering
        self.waited: list[float] = []

    def create_connection(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.waited.append(timeout)
        if address[0] not in self.answering:
            raise TimeoutError("timed out")
        return socket.socket()


class SlowForecasting(Forecasting):
    """A forecast that does not come before the end of the test; PyTorch may answer."""

    def __init__(self, released: threading.Event, has_torch: bool = False) -> None:
        self.released, self.has_torch = released, has_torch

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""

    def probe(self) -> dict[str, Any]:
        if not self.has_torch:
            self.released.wait()
        return ANSWER

    def ask(self, *_: object) -> dict[str, Any]:
        self.released.wait()
        raise LabError("ended with the test")


def test_a_check_is_awaited_until_the_deadline(released: threading.Event) -> None:
    def refuse() -> list[Finding]:
        raise LabError("refused")

    deadline = Deadline(LONG_S)
    assert 0 < deadline.left() <= LONG_S
    assert list(in_time("files", deadline.start(lambda: [ok("files", "here")]), "")) == [
        ok("files", "here")
    ]
    with pytest.raises(LabError, match="refused"):
        deadline.start(refuse)()
    over = Deadline(0.0)
    assert over.left() == 0.0
    for blocked in (over.start(released.wait), deadline.start(released.wait, at_most_s=0.01)):
        (late,) = in_time("files", blocked, "set another folder")
        assert late == Finding(Level.WARNING, "files", "not checked in time; set another folder")


@pytest.mark.usefixtures("online")
def test_the_addresses_of_a_server_share_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = Sockets()
    monkeypatch.setattr(socket, "create_connection", sockets.create_connection)
    assert places.hub_silence() == "https://hub.example does not answer (timed out)"
    assert len(sockets.waited) == 4 and sum(sockets.waited) <= places._CONNECT_S
    sockets.waited.clear()
    server = places.database(tracking("http://mlflow.example:5000"), tmp_path)
    assert server.level is Level.PROBLEM and "must answer, got: timed out" in server.text
    assert len(sockets.waited) == 4 and sum(sockets.waited) <= places._CONNECT_S
    sockets.answering = ("192.0.2.3",)  # the last one
    assert places.hub_silence() == ""


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch, released: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    slow = SlowForecasting(released, has_torch=True)
    monkeypatch.setattr(command, "_SECONDS", LONG_S)
    monkeypatch.setattr(command, "Forecasting", lambda probes: slow)
    monkeypatch.setattr(socket, "create_connection", Sockets().create_connection)
    monkeypatch.setattr(hub, "_commit", lambda repo, *_: asked.append(repo))
    assert command.doctor(["model=tinyllama", "data=dolly"]) == 1
    found = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert found["hub"].startswith("warning") and "(timed out): only what is in" in found["hub"]
    for topic in ("model", "data", "plan"):
        assert found[topic].startswith("problem")
        assert "and https://hub.example does not answer (timed out); with a" in found[topic]
    assert asked == [] and not hub.is_offline()
    assert "PyTorch uses 2 threads" in found["cpu"]


@pytest.mark.usefixtures("online")
def test_what_is_late_is_a_warning_and_the_command_ends(
    monkeypatch: pytest.MonkeyPatch, released: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_SECONDS", 0.01)
    monkeypatch.setattr(command, "Forecasting", lambda probes: SlowForecasting(released))
    # neither the look-up of the name nor a request for a commit ends
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **options: released.wait() and [])
    monkeypatch.setattr(places, "model_identity", lambda model: released.wait() and "1")
    assert command.doctor([*grid.SMALL, "tracking=none"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    found = {line.split()[1]: line for line in printed}
    assert "https://hub.example does not answer in time" in found["hub"]
    assert {"python", "packages", "load", "browser", "llama.cpp"} < set(found)
    for topic in ("model", "torch", "plan"):
        assert re.match(rf"warning {topic} +not checked in time; \w+", found[topic])
    assert last.startswith("no problem; the warnings say")


def test_a_process_that_is_late_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    (tmp_path / "silent.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forecast_process, "_MODULE", "silent")
    with Forecasting() as process:
        late = Deadline(0.05).start(lambda: process.ask([], {}, {}))
        with pytest.raises(TimeoutError):
            late()
    assert process._process.returncode == -9
