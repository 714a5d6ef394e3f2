"""Checks of folders, file systems, the database, the hub, and of the model and data there."""

from __future__ import annotations

import fcntl
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tinyllama_lab.config.schema import ALL, Config, DataConfig, ModelConfig, TrackingConfig
from tinyllama_lab.data import hub, hub_requests
from tinyllama_lab.data.snapshots import Kind
from tinyllama_lab.errors import LabError, without_password
from tinyllama_lab.study.files import free_mib, publish, write_problem
from tinyllama_lab.sweep.doctor.deadline import PATIENT, Deadline, in_time
from tinyllama_lab.sweep.doctor.finding import Finding, ok, problem, warning
from tinyllama_lab.sweep.run import NEEDED_FREE_MIB
from tinyllama_lab.sweep.settings.identify import data_identity, model_identity
from tinyllama_lab.sweep.tracking.record import sqlite_file, tracking_uri

_LITTLE_MIB = 2048  # of free disk space
_CONNECT_S = 3.0  # for all addresses of a name together
_NETWORK = "check the network, or set HF_HUB_OFFLINE=1 to use only what is in the cache"
_LARGE = f"its files are large or their disk is slow; take a command that waits: {PATIENT}"
_TRY_LOCK = (
    "import fcntl, sys\n"
    "try: fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "except OSError: sys.exit(7)\n"
)
_IS_LOCKED = 7  # exit status of the script


def disk(folder: Path, setting: str) -> Iterator[Finding]:
    """Check that a folder can be written to, and its free space.

    Args:
        folder: it may not exist yet.
        setting: what names the folder, for messages.
    """
    if text := write_problem(folder):
        yield problem("disk", f"{setting} must be a folder that can be written to, but {text}")
        return
    free = free_mib(folder)
    if free is None:
        yield warning("disk", f"the free space at {setting} is unknown")
    elif free < NEEDED_FREE_MIB:
        yield problem(
            "disk", f"{setting} needs {NEEDED_FREE_MIB} MiB, got {free}; free some, or move it"
        )
    elif free < _LITTLE_MIB:
        yield warning("disk", f"{free:,} MiB free at {setting}: enough for small sweeps alone")
    else:
        yield ok("disk", f"{free:,} MiB free at {setting}")


def file_system(folder: Path) -> Iterator[Finding]:
    """Try what a sweep needs of a file system, in a temporary folder.

    Args:
        folder: of the studies; if it does not exist yet, its nearest parent is used.
    """
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    remedy = "set sweeps_dir to a local disk"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as name:
            here = Path(name)
            failures = [text for check in _NEEDED if (text := check(here))]
            notes = [text for check in _WANTED if (text := check(here))]
    except OSError as error:
        yield problem("files", f"{parent} cannot be written to ({error.strerror}); {remedy}")
        return
    yield from (problem("files", f"{text} at {parent}; {remedy}") for text in failures)
    yield from (warning("files", f"{text} at {parent}") for text in notes)
    if not failures:
        yield ok("files", "files are replaced at once, flushed to disk, and locked")


def _replaces(folder: Path) -> str:
    old, new = folder.joinpath("old"), folder.joinpath("new")
    old.write_text("old")
    new.write_text("new")
    try:
        publish(new, old)  # the way in which every file of a study is replaced, flushed first
    except OSError as error:
        return f"a file cannot be flushed and then replace another ({error.strerror})"
    return "" if old.read_text() == "new" and not new.exists() else "a renamed file is not there"


def _locks(folder: Path) -> str:
    path = folder.joinpath("lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"a file cannot be locked ({error.strerror})"
        tried = subprocess.run([sys.executable, "-S", "-c", _TRY_LOCK, str(path)])
    return "" if tried.returncode == _IS_LOCKED else "a lock does not keep out a second process"


def _links(folder: Path) -> str:
    source = folder.joinpath("source")
    source.write_text("x")
    try:
        folder.joinpath("link").hardlink_to(source)
    except OSError:
        return "no hard links, so every adapter takes a copy of its tokenizer"
    return ""


def _tells_case(folder: Path) -> str:
    folder.joinpath("Case").write_text("x")
    is_same = folder.joinpath("case").exists()
    return "names do not differ by case, so give studies names that differ otherwise" * is_same


_NEEDED = (_replaces, _locks)
_WANTED = (_links, _tells_case)


def database(tracking: TrackingConfig, workdir: Path) -> Finding:
    """Check that runs can be recorded in MLflow's store."""
    if not tracking.enabled:
        return ok("database", "tracking=none: no runs are recorded in MLflow")
    uri = tracking_uri(tracking, workdir)
    file, other = sqlite_file(uri), "or set tracking=none"
    if file is None:
        return _server(uri)
    file = workdir / file
    if text := write_problem(file.parent):
        return problem("database", f"{file} must be writable, but {text}; correct it, {other}")
    if not file.exists():
        return ok("database", f"{file} will be made")
    try:
        connection = sqlite3.connect(file, timeout=1)
        try:
            connection.execute("BEGIN IMMEDIATE")  # takes the lock of a writer
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return problem(
            "database",
            f"{file} must be a SQLite database that can be written to, got: {error}; end the "
            f"program that uses it, set tracking.folder=/another/folder, {other}",
        )
    return ok("database", f"{file} can be written to")


def _server(uri: str) -> Finding:
    url = urlsplit(uri)
    shown = without_password(uri)
    if url.scheme not in ("http", "https"):
        return ok("database", f"{shown} (not asked)")
    if reason := _unreachable(uri):
        return problem(
            "database",
            f"the MLflow server {shown} must answer, got: {reason}; start it, correct "
            "tracking.uri or MLFLOW_TRACKING_URI, or set tracking=none",
        )
    return ok("database", f"the MLflow server {shown} answers")


def _unreachable(address: str) -> str:
    """Return why a server takes no connection; empty if it does."""
    try:
        url = urlsplit(address)
        _connect(url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _connect(host: str, port: int) -> None:
    """Connect to the first address of a name that answers.

    Raises:
        OSError: none does.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys((str(address[0]), port) for *_, address in found))
    for number, address in enumerate(addresses, 1):
        try:
            # each has its share, so that one that is silent leaves time for the others
            socket.create_connection(address, _CONNECT_S / len(addresses)).close()
            return
        except OSError:
            if number == len(addresses):
                raise


def hub_silence() -> str:
    """Return that the hub, or the proxy to it, takes no connection, and why.

    Empty if it does, or must not be asked.
    """
    endpoint, proxy = hub_requests.endpoint(), hub_requests.proxy()
    if hub.is_offline():
        return ""
    reason = _unreachable(proxy.address if proxy else endpoint)
    return f"{endpoint} does not answer ({reason})" if reason else ""


def hub_access(silence: str) -> Finding:
    """Say whether the hub answers.

    Args:
        silence: of `hub_silence`.
    """
    if silence:
        return warning(
            "hub",
            f"{silence}: only what is in the cache can be used; check the network, HTTPS_PROXY "
            "and HF_ENDPOINT",
        )
    if hub.is_offline():
        return ok("hub", "HF_HUB_OFFLINE: only what is in the cache is used")
    return ok("hub", f"{hub_requests.endpoint()} answers")


def hub_files() -> Iterator[Finding]:
    """Check the cache of the hub, and whether there is a token."""
    cache = hub.cache_folder()
    if text := write_problem(cache):
        yield problem(
            "cache", f"{cache} must be writable, but {text}; set HF_HOME=/another/folder"
        )
    else:
        free = free_mib(cache)
        text = f"{cache}, {'unknown' if free is None else f'{free:,}'} MiB free"
        is_short = free is not None and free < _LITTLE_MIB
        yield (
            warning("cache", f"{text}; set HF_HOME=/a/larger/disk")
            if is_short
            else ok("cache", text)
        )
    yield _token()


def _token() -> Finding:
    from huggingface_hub import get_token

    try:
        is_there = bool(get_token())
    except OSError as error:  # such as a file where HF_HOME should be
        text = f"{error.filename} cannot be read ({error.strerror})"
        return warning("token", f"{text}; correct HF_HOME, or set HF_TOKEN")
    return ok(
        "token", "there is one" if is_there else "none, which public repositories do not need"
    )


def model_and_data(configs: Sequence[Config], deadline: Deadline) -> Iterator[Finding]:
    """Say of every model and data set of a command whether it is here."""
    checks: dict[str, tuple[str, str | None, Callable[[], list[Finding]]]] = {}
    for config in configs:
        model, data = config.model, replace(config.data, n=ALL)  # `n` takes a part of the same
        # all begin now: what the hub keeps waiting must not take the time of what is here
        if (key := repr(model)) not in checks:
            checks[key] = "model", model.repo, deadline.start(partial(_model, model))
        if (key := repr(data)) not in checks:
            checks[key] = "data", data.repo, deadline.start(partial(_data, data))
    for topic, repo, findings in checks.values():
        yield from in_time(topic, findings, _NETWORK if repo else _LARGE)


def _model(model: ModelConfig) -> list[Finding]:
    try:
        identity = model_identity(model)
    except LabError as error:
        return [problem("model", str(error))]
    repo = model.repo if hub.is_commit(identity) else None
    return [_found("model", model.name, repo, identity)]


def _data(data: DataConfig) -> list[Finding]:
    try:
        identity = data_identity(data)
    except LabError as error:
        return [problem("data", str(error))]
    return [_found("data", data.name, data.repo, identity)]


def _found(topic: str, name: str, repo: str | None, identity: str) -> Finding:
    kind: Kind = "model" if topic == "model" else "dataset"
    if repo and hub.cached_snapshot(repo, identity, kind) is None:
        return ok(topic, f"{name}: {repo} is downloaded at the first use")
    return ok(topic, f"{name} is here" + (f", as {repo}" if repo else ""))
