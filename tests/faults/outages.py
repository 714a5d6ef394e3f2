"""Outages of MLflow while a sweep runs: are points lost or doubled, and what do they cost?

The tracker, the command `track`, the servers and their databases are real. The studies are made
by hand: their events are written again while the sweep "runs", at the pace of a real driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tests import studies
from tests.faults.fault import Count, Draw, FaultClass
from tests.faults.mlflow_server import Server, SlowProxy, lock
from tinyllama_lab.config.schema import TrackingConfig
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder
from tinyllama_lab.sweep.track_command import track
from tinyllama_lab.sweep.tracking.tracker import open_in_background

NAME = "s"
TRIALS, STEPS = 3, 400
TICK_S, TICKS = 0.2, 20  # of a trial: as often as a driver looks at its workers
MOST_HELD = 0.01  # of the time of a sweep
LONGEST_CALL_S = 0.25
SLOW_S, STOPPED_S, LOCKED_S = 2.0, 12.0, 25.0
MANY = 100_000  # points
COMMANDS = 3  # after which everything must be there
SUMMARY = {"best/eval/loss": 1.5}


@dataclass
class Site:
    """Where one run takes place."""

    folder: Path
    study: StudyFolder
    server: Server
    uri: str
    database: Path
    said: list[logging.LogRecord] = field(default_factory=list)
    held_s: float = 0.0  # how long calls of the tracker held the loop of the driver
    longest_s: float = 0.0
    seconds: float = 0.0  # of the sweep
    cpu_s: float = 0.0  # of the driver meanwhile
    note: str = ""

    @property
    def tracking(self) -> TrackingConfig:
        return TrackingConfig(enabled=True, uri=self.uri, folder="mlruns")

    def in_process(self) -> None:
        """Use a SQLite file without a server."""
        self.uri, self.database = f"sqlite:///{self.folder}/mlflow.db", self.folder / "mlflow.db"
        (self.folder / "server.db").rename(self.database)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Measure how long a call holds the loop that follows workers."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.held_s, self.longest_s = self.held_s + took, max(self.longest_s, took)

    def track(self, *more: str) -> int:
        """Run the command `track`."""
        arguments = [f"study={NAME}", f"sweeps_dir={self.study.root}", f"tracking.uri={self.uri}"]
        with (self.folder / "track.txt").open("a") as out, contextlib.redirect_stdout(out):
            return track([*arguments, *more], self.folder)


# A fault is a generator. Its parts run before the sweep, after one third of it, after two
# thirds, and after its end.
Fault = Callable[[Site], Iterator[None]]


def down_from_the_start(site: Site) -> Iterator[None]:
    yield
    yield
    yield
    assert site.track() == 1
    site.server.start()


def killed_and_back(site: Site) -> Iterator[None]:
    site.server.start()
    yield
    site.server.kill()
    yield
    site.server.start()
    yield


def killed_for_good(site: Site) -> Iterator[None]:
    site.server.start()
    yield
    yield
    site.server.kill()
    yield
    site.server.start()


def stopped(site: Site) -> Iterator[None]:
    """Answers come after they were given up."""
    site.server.start()
    yield
    site.server.signal(signal.SIGSTOP)
    threading.Timer(STOPPED_S, site.server.signal, [signal.SIGCONT]).start()
    yield
    yield


def slow(site: Site) -> Iterator[None]:
    site.server.start()
    site.uri = SlowProxy(site.server, SLOW_S).uri
    yield
    yield
    yield


def locked(site: Site) -> Iterator[None]:
    site.in_process()
    yield
    other = lock(site.database, LOCKED_S)
    yield
    yield
    other.communicate()


def full_disk(site: Site) -> Iterator[None]:
    site.server.start()
    yield
    site.server.limit_files(site.database.stat().st_size)
    yield
    yield
    site.server.limit_files(-1)


def experiment_deleted(site: Site) -> Iterator[None]:
    from mlflow import MlflowClient

    site.server.start()
    client = MlflowClient(tracking_uri=site.uri)
    yield
    (experiment,) = client.search_experiments(filter_string=f"name = '{NAME}'")
    client.delete_experiment(experiment.experiment_id)
    yield
    yield


def a_folder(site: Site) -> Iterator[None]:
    site.in_process()
    yield
    away = site.database.with_suffix(".away")
    site.database.rename(away)
    site.database.mkdir()
    yield
    yield
    site.database.rmdir()
    away.rename(site.database)


def many_points(site: Site) -> Iterator[None]:
    """An empty server is killed in the middle of a whole study, and sent it again."""
    yield
    yield
    yield
    site.server.start()
    killer = threading.Thread(target=_kill_in_the_middle, args=(site,), daemon=True)
    killer.start()
    status = site.track()
    killer.join()
    site.note = f", killed after {stored_points(site.database).total():,}"
    assert status == 1, "it was killed too late"
    site.server.start()


def _kill_in_the_middle(site: Site) -> None:
    while stored_points(site.database).total() < MANY // 3:
        time.sleep(0.2)
    site.server.kill()


FAULTS: dict[str, Fault] = {
    "down from the start": down_from_the_start,
    "killed, and back": killed_and_back,
    "killed, back after the end": killed_for_good,
    f"stopped for {STOPPED_S:.0f} s": stopped,
    f"slow, {SLOW_S:.0f} s a request": slow,
    f"database locked for {LOCKED_S:.0f} s": locked,
    "full disk": full_disk,
    "experiment deleted": experiment_deleted,
    "database replaced by a folder": a_folder,
    f"{MANY:,} points, killed in the middle": many_points,
}


# ---- the sweep --------------------------------------------------------------------------------


def sweep(site: Site, fault: Iterator[None]) -> None:
    """Be a driver whose workers write their events, and inject the fault meanwhile."""
    trials = site.study.trials()
    events = {trial.key: trial.events_file.read_bytes().splitlines(True) for trial in trials}
    for trial in trials:
        trial.events_file.unlink()
    next(fault)
    began, worked, tick = time.monotonic(), time.process_time(), 0
    with site.timed():
        tracker = open_in_background(site.study, site.tracking, site.folder)
    for trial in trials:
        with site.timed():
            tracker.follow(trial, trial.name, {"lora.r": trial.name})
        for number in range(TICKS):
            tick += 1
            if tick in (TICKS * len(trials) // 3, 2 * TICKS * len(trials) // 3):
                next(fault)
            _write_part(trial, events[trial.key], number)
            with site.timed():
                if number % 5 == 4:
                    tracker.sync(trial)
            time.sleep(TICK_S)
        result, _ = trial.read_result()
        assert result is not None
        with site.timed():
            tracker.finish(trial, result)
    site.seconds, site.cpu_s = time.monotonic() - began, time.process_time() - worked
    tracker.close(SUMMARY, stopped=False)
    next(fault, None)


def _write_part(trial: TrialFolder, lines: list[bytes], number: int) -> None:
    first, last = (len(lines) * n // TICKS for n in (number, number + 1))
    with trial.events_file.open("ab") as file:
        file.writelines(lines[first:last])


# ---- what must be there -----------------------------------------------------------------------


def expected_points(study: StudyFolder) -> Counter[tuple[str, str, int]]:
    """Return key, metric and step of every point that the folders hold."""
    points: Counter[tuple[str, str, int]] = Counter()
    for trial in study.trials():
        for line in trial.events_file.read_text().splitlines():
            event = json.loads(line)
            points.update((trial.key, name, event["step"]) for name in event["values"])
        metrics = json.loads(trial.result_file.read_text())["metrics"]
        points.update((trial.key, n, 0) for n in metrics if not n.startswith("train/"))
    return points


def stored_points(database: Path) -> Counter[tuple[str, str, int]]:
    """Count the points of the trials in a database, straight from its tables."""
    query = """
        select t.value, m.key, m.step from metrics m
        join runs r on r.run_uuid = m.run_uuid and r.lifecycle_stage = 'active'
        join tags t on t.run_uuid = m.run_uuid and t.key = 'key'
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as source:
        return Counter(source.execute(query).fetchall())


def problems(site: Site, is_swept: bool) -> list[str]:
    """Return what is wrong after the outage."""
    expected, stored = expected_points(site.study), stored_points(site.database)
    found = []
    if lost := (expected - stored).total():
        found.append(f"{lost} of {expected.total()} points lost")
    if doubled := (stored - expected).total():
        found.append(f"{doubled} points doubled")
    runs = "select name, status from runs where lifecycle_stage = 'active'"
    twice = """
        select m.key from metrics m join tags t on t.run_uuid = m.run_uuid
        where t.key = 'kind' and t.value = 'sweep' group by m.key, m.value having count(*) > 1
    """
    with contextlib.closing(sqlite3.connect(f"file:{site.database}?mode=ro", uri=True)) as source:
        statuses = source.execute(runs).fetchall()
        found += [f"{name} of the summary doubled" for (name,) in source.execute(twice)]
    if len(statuses) != len(site.study.trials()) + 1:
        found.append(f"{len(statuses)} runs: {statuses}")
    found += [f"{name} is {status}" for name, status in statuses if status != "FINISHED"]
    if is_swept and site.held_s > MOST_HELD * site.seconds:
        found.append(f"the loop was held for {site.held_s:.2f} of {site.seconds:.0f} s")
    if site.longest_s > LONGEST_CALL_S:
        found.append(f"the loop was held for {site.longest_s:.2f} s by one call")
    if any(record.exc_info for record in site.said):
        found.append("a traceback was logged")
    if "/slow" not in str(site.folder):
        if not any("could not write" in record.getMessage() for record in site.said):
            found.append("the tracker did not meet the fault")
    return found


class _Collector(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def one_run(root: Path, name: str) -> tuple[str, list[str]]:
    """Inject one fault; return numbers for people, and what is wrong."""
    folder = root / FAULTS[name].__name__
    folder.mkdir()
    os.chdir(folder)
    (folder / "server.db").write_bytes((root / "empty.db").read_bytes())
    is_swept = FAULTS[name] is not many_points
    trials = TRIALS if is_swept else 10
    steps = STEPS if is_swept else MANY // 2 // trials
    ranks = list(range(1, 1 + trials))
    study = studies.simulated_study(
        folder / "sweeps", {"lora.r": ranks}, (0,), examples=8, steps=steps, with_base=False
    )
    server = Server(folder)
    site = Site(folder, study, server, server.uri, server.database)
    logging.getLogger().addHandler(_Collector(site.said))
    began = time.monotonic()
    try:
        fault = FAULTS[name](site)
        sweep(site, fault) if is_swept else list(fault)
        sent_again = 0
        while (status := site.track()) != 0 and sent_again < COMMANDS:
            sent_again += 1
        found = problems(site, is_swept)
        found += [] if status == 0 else [f"track ends with {status}"]
    except Exception as error:
        found = [f"{type(error).__name__}: {error}"]
    finally:
        server.kill()
    took = time.monotonic() - began
    held = f", loop held {1000 * site.held_s:.1f} ms of {site.seconds:.0f} s" if is_swept else ""
    held += f", driver's CPU {100 * site.cpu_s / site.seconds:.0f} %" if is_swept else ""
    numbers = f"{name}: {expected_points(study).total():,} points{site.note}{held}, {took:.0f} s"
    return numbers, [f"{name}: {problem}" for problem in found]


def _prepare(root: Path) -> None:
    """Create an empty database once, and import what every run needs before the forks."""
    import mlflow.store.tracking.rest_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    import tinyllama_lab.report.page.page  # noqa: F401

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    command = (
        "import sys; from mlflow import MlflowClient;"
        "MlflowClient(tracking_uri=sys.argv[1]).search_experiments(max_results=1)"
    )
    made = subprocess.run(
        [sys.executable, "-c", command, f"sqlite:///{root}/empty.db"],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]


def outages(draw: Draw) -> Count:
    """Inject the outages side by side: most of their time is waiting."""
    count, names = Count(), list(FAULTS)
    longest = [name for name in names if FAULTS[name] in (many_points, slow)]
    quick = [name for name in names if name not in longest]
    if draw.share < 1:
        chosen = draw.dice.sample(quick, min(len(quick), draw.times(len(names))))
    else:
        chosen = [*longest, *quick]
    _prepare(draw.folder)
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        runs = [pool.submit(one_run, draw.folder, name) for name in chosen]
        for run in runs:
            numbers, wrong = run.result()
            count.add("nothing lost or doubled") if not wrong else count.fail("; ".join(wrong))
            count.notes.append(numbers)
    return count


OUTAGES = FaultClass(
    "outages", "MLflow down, killed, slow, locked, full, deleted; 100,000 points", outages
)
