"""A study: a named folder of trials, and the paths inside it."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.files import read_file, write_atomic, write_problem
from tinyllama_lab.study.pack import Pack
from tinyllama_lab.study.trial import TrialFolder, base_config, digest, former_keys, trial_key

# safe in every file system, shell and URL; no leading dot or dash, so no hidden file or option
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKSUM, _OWNER = "checksum", "owner"
# a listing is kept after it: before, a file system may give two changes the same time
SETTLED_NS = 10**9


def safe_name(name: str, setting: str) -> str:
    """Return `name` if it can be used as a file name.

    Raises:
        StudyError: it contains anything but letters, digits, `.`, `_` and `-`, or is too long.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise StudyError(
            f"{setting} must be 1 to 64 letters, digits, '.', '_' or '-', begin with a letter or "
            f"digit and not contain '..', got {name!r}; choose another, such as study=my_study"
        )
    return name


@dataclass(frozen=True)
class StudyFolder:
    """A named folder of trials below `root` (usually `sweeps/`)."""

    root: Path
    name: str

    def __post_init__(self) -> None:
        safe_name(self.name, "study")

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def trials_dir(self) -> Path:
        return self.folder / "trials"

    @property
    def packs_dir(self) -> Path:
        return self.folder / "packs"

    @property
    def lock_file(self) -> Path:
        return self.folder / "driver.lock"

    @property
    def driver_file(self) -> Path:
        return self.folder / "driver.json"

    @property
    def owner_file(self) -> Path:
        """A file whose random content identifies this folder; see `owner`."""
        return self.folder / "owner"

    @property
    def tracked_file(self) -> Path:
        """What was already sent to the tracking server."""
        return self.folder / "tracked.json"

    @property
    def table_file(self) -> Path:
        return self.folder / "experiment_table.md"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def optuna_file(self) -> Path:
        return self.folder / "optuna.log"

    @property
    def optuna_lock_file(self) -> Path:
        """The lock of Optuna's journal backend; it survives a killed process."""
        return self.folder / "optuna.log.lock"

    @property
    def search_file(self) -> Path:
        return self.folder / "search.json"

    @property
    def tuned_file(self) -> Path:
        """What is tuned in this study; see `read_tuned`."""
        return self.folder / "tuned.json"

    @property
    def report_dir(self) -> Path:
        return self.folder / "report"

    @property
    def report_file(self) -> Path:
        return self.report_dir / "index.html"

    @property
    def report_table_file(self) -> Path:
        return self.report_dir / "table.csv"

    @property
    def deploy_dir(self) -> Path:
        """The exports that several trials share; see `Exports`."""
        return self.folder / "deploy"

    @property
    def bases_dir(self) -> Path:
        """The evaluations of base models, which all studies below `root` share."""
        return self.root / "_base"

    def problems(self) -> Iterator[str]:
        """Yield each reason why the study's files cannot be written; nothing is created.

        Each message begins with the path.
        """
        folders = (self.root / ".hydra", self.bases_dir, self.folder, self.trials_dir)
        for folder in (*folders, self.packs_dir, self.report_dir):
            if os.path.lexists(folder) and (problem := write_problem(folder)):
                yield f"{folder} must be a folder that can be written to, but {problem}"
        inside = [self.trials_dir, self.packs_dir, self.report_dir]
        with suppress(OSError):  # there are none yet
            inside += self.trials_dir.iterdir()
        # sweeps_dir and the study itself may be links that the user made
        for folder in inside:
            if folder.is_symlink():
                yield f"{folder} must be a folder of the study, but it is a link to elsewhere"
        written = (self.lock_file, self.driver_file, self.owner_file, self.tracked_file)
        shown = (self.table_file, self.metrics_file, self.report_file)
        for file in (*written, *shown, self.optuna_file, self.search_file, self.tuned_file):
            if file.is_dir():
                yield f"{file} must be a file, but it is a folder"
        # a rename replaces a read-only file, but the lock is opened in place
        if self.lock_file.is_file() and not os.access(self.lock_file, os.W_OK):
            yield f"{self.lock_file} must be a file that can be written to, but is read-only"

    def owner(self) -> str:
        """Return a random name that is created once.

        It tells this study from others of the same name on one tracking server or Optuna storage.
        """
        try:
            return read_file(self.owner_file).decode(errors="replace")
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.owner_file, uuid.uuid4().hex)
            return self.owner()  # read back: another process may have written its name since

    def write_record(self, file: Path, record: Mapping[str, Any]) -> None:
        """Write a file of this study as JSON, with a checksum and the name of its owner."""
        sealed = {**record, _OWNER: self.owner()}
        sealed[_CHECKSUM] = digest(sealed)
        write_atomic(file, json.dumps(sealed, indent=1) + "\n")

    def read_record(self, file: Path) -> dict[str, Any]:
        """Return what `write_record` has written.

        Raises:
            FileNotFoundError: there is no such file.
            StudyError: it is damaged, or of another study; the message says what to delete.
        """
        if not os.path.lexists(file):
            raise FileNotFoundError(file)
        try:
            record: dict[str, Any] = json.loads(read_file(file))
            if _OWNER not in record and _CHECKSUM not in record:  # of an earlier version
                return record
            owner = read_file(self.owner_file).decode()
            if record.pop(_CHECKSUM) == digest(record) and record.pop(_OWNER) == owner:
                return record
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise StudyError(
            f"{file} must be as this study wrote it, got a damaged file; delete it and run the "
            "study's command again"
        )

    def read_tuned(self) -> dict[str, Any]:
        """Return what is tuned in this study: `values`, `rungs`, and the `keys` of candidates.

        Returns:
            An empty dictionary if nothing is tuned.

        Raises:
            StudyError: the file is damaged.
        """
        try:
            record = self.read_record(self.tuned_file)
            lists = {name: list(record[name]) for name in ("rungs", "keys")}
            return {"values": dict(record["values"]), **lists}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{self.tuned_file} must hold what was tuned, got a damaged file; delete it "
                "and run the study's command again"
            ) from error

    def trials(self) -> list[TrialFolder]:
        """Return every trial of the study, sorted by folder name."""
        if not self.trials_dir.is_dir():
            return []
        # a folder without a configuration was cut off when it was created, or is a user's own
        trials = map(TrialFolder, sorted(self.trials_dir.iterdir()))
        # with a result its configuration was lost, which whoever reads it says
        return [
            trial
            for trial in trials
            if trial.config_file.is_file() or os.path.lexists(trial.result_file)
        ]

    def packs(self) -> list[Pack]:
        """Return the packs of the study, also those that an earlier command left behind."""
        return [Pack(folder) for folder in sorted(self.packs_dir.glob("*"))]

    def new_pack(self) -> Pack:
        """Return a pack with a name that no other pack has; its folder is created by `write`."""
        return Pack(self.packs_dir / uuid.uuid4().hex[:8])

    def trial(self, config: Mapping[str, Any], name: str) -> TrialFolder:
        """Return the trial of a configuration: its existing folder under any name, else a new one.

        In earlier versions the settings of the evaluation were part of the key. A trial of such a
        version is matched if they are equal, and with any evaluation settings once it is done.
        """
        trial = _find(self.trials_dir, config, name)
        if trial.folder.exists() or not self.trials_dir.is_dir():
            return trial
        # a done trial of an earlier version has its adapter: only the evaluation may be missing
        others = _misnamed(self, self.trials_dir.stat().st_mtime_ns).get(trial.key, [])
        return next((other for other in others if other.is_done), trial)

    def base(self, config: Mapping[str, Any], name: str) -> TrialFolder:
        """Return the base evaluation that a trial with this configuration is compared with.

        It is in the same folder as the studies, which share it.
        """
        return _find(self.bases_dir, base_config(config), name)

    def relative_folder(self, trial: TrialFolder) -> str:
        """Return a trial's or base's folder as a path below `root`, which may be moved."""
        return os.path.relpath(trial.folder, self.root)

    def trial_at(self, relative_folder: str) -> TrialFolder:
        """Return the trial or base with this `relative_folder`."""
        return TrialFolder(self.root / relative_folder)

    def no_trials_error(self) -> StudyError:
        """Return the error for a study without trials; it names the studies below `root`."""
        names = ", ".join(study_names(self.root)) or "none yet"
        return StudyError(f"{self.folder} holds no trials; studies here: {names}")


def study_names(root: Path) -> list[str]:
    """Return the names of the studies below a sweeps folder, in alphabetical order."""
    # `_base` next to the studies has no such folder
    return sorted(path.parent.name for path in root.glob("*/trials"))


def _find(folder: Path, config: Mapping[str, Any], name: str) -> TrialFolder:
    """Return the trial in `folder` with the key of `config`, or with one of its former keys."""
    by_key = _names_by_key(folder)
    key = trial_key(config)
    if key in by_key:
        return TrialFolder(folder / by_key[key])
    former = (by_key[former_key] for former_key in former_keys(config) if former_key in by_key)
    return TrialFolder(folder / next(former, f"{name}-{key}"))


def _names_by_key(folder: Path) -> dict[str, str]:
    """Return the names of a folder's trials by their keys; the labels before them may differ."""
    try:
        changed_ns = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return {}
    is_settled = time.time_ns() - changed_ns > SETTLED_NS
    return (_listed if is_settled else _listed.__wrapped__)(folder, changed_ns)


@lru_cache(maxsize=8)
def _listed(folder: Path, _changed_ns: int) -> dict[str, str]:
    return {name.rpartition("-")[2]: name for name in os.listdir(folder)}


# a plan looks up every trial of a grid, and reading all configurations for each would be quadratic
@lru_cache(maxsize=8)
def _misnamed(study: StudyFolder, _changed_ns: int) -> dict[str, list[TrialFolder]]:
    """Return, by current key, the trials whose folder name ends in another (former) key.

    `_changed_ns` is the folder's modification time: it makes the cache forget an old listing.
    """
    misnamed: dict[str, list[TrialFolder]] = {}
    for trial in (each for each in study.trials() if each.config_file.is_file()):
        key = _key_of_content(trial.config_file, trial.config_file.stat().st_mtime_ns)
        if key != trial.key:
            misnamed.setdefault(key, []).append(trial)
    return misnamed


@cache
def _key_of_content(config_file: Path, _changed_ns: int) -> str:
    """Return the key of a trial's configuration; empty if the file is damaged."""
    try:
        return trial_key(TrialFolder(config_file.parent).read_config())
    except (StudyError, KeyError, TypeError, AttributeError):
        return ""
