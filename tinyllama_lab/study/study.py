"""A study: a named folder of trials, and every path it owns."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.files import write_problem
from tinyllama_lab.study.trial import Trial, base_config, former_keys, trial_key, write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def safe_name(name: str, what: str) -> str:
    """Return `name` where it may become a file name.

    Raises:
        StudyError: it holds anything but letters, digits, `.`, `_` and `-`, or is too long.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise StudyError(
            f"{what} must be 1 to 64 letters, digits, '.', '_' or '-', begin with a letter or "
            f"digit and not hold '..', got {name!r}; choose another, for example study=my_study"
        )
    return name


@dataclass(frozen=True)
class Study:
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
        return self.folder / "owner"

    @property
    def tracked_file(self) -> Path:
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
    def search_file(self) -> Path:
        return self.folder / "search.json"

    @property
    def tuned_file(self) -> Path:
        return self.folder / "tuned.json"

    @property
    def report_dir(self) -> Path:
        return self.folder / "report"

    @property
    def report_file(self) -> Path:
        return self.report_dir / "index.html"

    @property
    def bases_folder(self) -> Path:
        return self.root / "_base"

    def problems(self) -> Iterator[str]:
        """What stands in the way of a study that is to be written, or written further.

        Each begins with the place; nothing is made.
        """
        folders = (self.root / ".hydra", self.bases_folder, self.folder, self.trials_dir)
        for folder in (*folders, self.packs_dir, self.report_dir):
            if os.path.lexists(folder) and (problem := write_problem(folder)):
                yield f"{folder} must be a folder that can be written to, but {problem}"
        written = (self.lock_file, self.driver_file, self.owner_file, self.tracked_file)
        shown = (self.table_file, self.metrics_file, self.report_file)
        for file in (*written, *shown, self.optuna_file, self.search_file, self.tuned_file):
            if file.is_dir():
                yield f"{file} must be a file, but it is a folder"
        if self.lock_file.is_file() and not os.access(self.lock_file, os.W_OK):
            yield f"{self.lock_file} must be a file that can be written to, but is not"

    def owner(self) -> str:
        """A random name, made once: tells this folder from others whose study is called alike."""
        try:
            return self.owner_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.owner_file, uuid.uuid4().hex)
            return self.owner()

    def read_tuned(self) -> dict[str, Any]:
        """What is tuned in this study: `values`, `rungs`, and the `keys` of candidates.

        Raises:
            StudyError: the file is damaged.
        """
        try:
            found = json.loads(self.tuned_file.read_text(encoding="utf-8"))
            lists = {name: list(found[name]) for name in ("rungs", "keys")}
            return {"values": dict(found["values"]), **lists}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{self.tuned_file} must say what was tuned, got a damaged file; delete it and "
                "run the study's command again"
            ) from error

    def trials(self) -> list[Trial]:
        """Every trial folder of the study, by name."""
        if not self.trials_dir.is_dir():
            return []
        return [
            Trial(p) for p in sorted(self.trials_dir.iterdir()) if (p / "config.yaml").is_file()
        ]

    def trial(self, config: Mapping[str, Any], name: str) -> Trial:
        """A trial's folder: the one that is there, whatever it was called, else a new one.

        A trial of an earlier version, in whose key the settings of the evaluation counted, is
        found by the same settings, and once it is done by any.
        """
        trial = _find(self.trials_dir, config, name)
        if trial.folder.exists() or not self.trials_dir.is_dir():
            return trial
        others = _misnamed(self, self.trials_dir.stat().st_mtime_ns).get(trial.key, [])
        return next((other for other in others if other.is_done), trial)

    def base(self, config: Mapping[str, Any], name: str) -> Trial:
        """The evaluation of the base that a trial with this configuration is compared with.

        It lies beside the studies, and all of them share it.
        """
        return _find(self.bases_folder, base_config(config), name)


def _find(folder: Path, config: Mapping[str, Any], name: str) -> Trial:
    there = os.listdir(folder) if folder.is_dir() else []
    by_key = {found.rpartition("-")[2]: found for found in there}
    key = trial_key(config)
    if key in by_key:
        return Trial(folder / by_key[key])
    former = (by_key[each] for each in former_keys(config) if each in by_key)
    return Trial(folder / next(former, f"{name}-{key}"))


@lru_cache(maxsize=8)
def _misnamed(study: Study, _changed_ns: int) -> dict[str, list[Trial]]:
    """The trials that are called by another key than theirs, by their own."""
    found: dict[str, list[Trial]] = {}
    for trial in study.trials():
        key = _key_of_content(trial.config_file, trial.config_file.stat().st_mtime_ns)
        if key != trial.key:
            found.setdefault(key, []).append(trial)
    return found


@cache
def _key_of_content(config_file: Path, _changed_ns: int) -> str:
    """The key that a trial has by its configuration; empty where that is damaged."""
    try:
        return trial_key(Trial(config_file.parent).read_config())
    except (StudyError, KeyError, TypeError, AttributeError):
        return ""
