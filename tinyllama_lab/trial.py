"""A trial: its identity, every path it owns, its result, and how results reach the disk."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from tinyllama_lab.errors import StudyError

# both are the safe ones; libyaml's are ten times faster
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SCIENCE = ("model", "data", "lora", "quant", "train", "eval", "seed")
# Settings that came later, at the value that asks what was asked before there were any: a key
# leaves them out, so that trials of then keep theirs.
NEUTRAL: dict[str, Any] = {
    "data.eval_path": None,
    "data.eval_split": None,
    "data.rendering": 1,
    "data.date": None,
    "data.learn": "all",
    "data.subset": "nested",
    "data.columns.text": None,
    "data.columns.system": None,
    "data.columns.tools": None,
    "data.columns.group": None,
    "eval.general": False,
    "eval.rows": "heldout",
}
# names of options, which are parts of keys; any other name is a label
SHIPPED = ("tinyllama", "tinyllama_v01", "dolly", "alpaca", "bitext_travel", "indicvault")
_LABELLED = ("local", "file", "hub")  # sources that may have one


class State(StrEnum):
    """How a trial ended; a trial without a result is missing, whatever its folder holds."""

    DONE = "done"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    OOM = "oom"
    FAILED = "failed"


def canonical_json(value: Any) -> str:
    """The one spelling of a value that hashes are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def trial_key(config: Mapping[str, Any]) -> str:
    """Equal exactly when two trials ask the same question, with the same settings.

    Paths, revisions and labels do not count: a model or data set is counted by its content or
    commit, which the driver wrote into `model.identity` and `data.identity`.
    """
    science = _science(config)
    for group in (science["model"], science["data"]):
        if "revision" in group:  # as it was in the keys of those who named none
            group["revision"] = None
        if group.get("source") in _LABELLED and group["name"] not in SHIPPED:
            group["name"] = group["source"]
    return digest(science)


def former_key(config: Mapping[str, Any]) -> str:
    """The key of when labels and revisions still counted: folders of then are called by it."""
    return digest(_science(config))


def _science(config: Mapping[str, Any]) -> dict[str, Any]:
    science = copy.deepcopy({group: config[group] for group in SCIENCE})
    for group in (science["model"], science["data"]):
        group.pop("path", None)
    science["data"].pop("eval_path", None)
    for name, value in NEUTRAL.items():
        owner, last = _owner(science, name)
        if last in owner and owner[last] == value:
            del owner[last]
    return science


def _owner(config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The group that holds a dotted setting, and the setting's name in it."""
    *groups, last = name.split(".")
    owner: Any = config
    for group in groups:
        owner = owner.get(group, {})
    return owner, last


def cell_key(config: Mapping[str, Any]) -> str:
    """Equal exactly when two trials differ in nothing but their seed."""
    return trial_key({**config, "seed": None})


def contest_key(config: Mapping[str, Any], tuned: Iterable[str]) -> str:
    """Equal exactly when two trials differ in nothing but what is tuned."""
    plain = copy.deepcopy(dict(config))
    for key in tuned:
        owner, last = _owner(plain, key)
        owner[last] = None
    return trial_key(plain)


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a trial's configuration that the base model's own evaluation depends on."""
    data = {k: v for k, v in config["data"].items() if k not in ("n", "balance_by", "subset")}
    precision = {"precision": config["train"]["precision"]}
    return {
        "model": dict(config["model"]),
        "data": data,
        "lora": None,
        "quant": dict(config["quant"]),
        "train": precision,
        "eval": dict(config["eval"]),
        "seed": None,
    }


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new text, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Result:
    """What a trial came to. `metrics` is flat; names and units are those of the README."""

    key: str
    name: str
    state: State
    error: dict[str, str] | None = None  # class, message, log_tail
    overrides: list[str] = field(default_factory=list)
    attempts: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)  # what must lie beside it -> bytes

    def list_files(self, trial: Trial, paths: Iterable[Path]) -> None:
        """Name what belongs to the result, so that a lost or cut file is noticed."""
        found = sorted(path for path in paths if path.is_file())
        self.files = {str(p.relative_to(trial.folder)): p.stat().st_size for p in found}


@dataclass(frozen=True)
class Trial:
    """One trial folder. Whoever needs a path of a trial asks here."""

    folder: Path

    @property
    def key(self) -> str:
        return self.folder.name.rpartition("-")[2]

    @property
    def name(self) -> str:
        return self.folder.name.rpartition("-")[0]

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def events_file(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def checkpoint_dir(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    @property
    def eval_dir(self) -> Path:
        return self.folder / "eval"

    @property
    def per_example_file(self) -> Path:
        return self.eval_dir / "per_example.jsonl"

    @property
    def generations_file(self) -> Path:
        return self.eval_dir / "generations.jsonl"

    @property
    def general_file(self) -> Path:
        return self.eval_dir / "general.jsonl"

    @property
    def eval_table_file(self) -> Path:
        return self.eval_dir / "eval_results.csv"

    @property
    def loss_curve_file(self) -> Path:
        return self.folder / "loss_curve.png"

    @property
    def log_file(self) -> Path:
        return self.folder / "worker.log"

    @property
    def prune_file(self) -> Path:
        return self.folder / "prune.txt"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Create the folder with the configuration its key was computed from."""
        text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False)
        write_atomic(self.config_file, text)

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration, as plain dictionaries.

        Raises:
            StudyError: the file is not as `write_config` left it.
        """
        try:
            loaded = _Loader(self.config_file.read_text(encoding="utf-8")).get_single_data()
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            loaded = None
        groups = loaded if isinstance(loaded, dict) else {}
        given = [name for name in SCIENCE[:-1] if isinstance(groups.get(name), dict)]
        if not {*given, "lora"}.issuperset(SCIENCE[:-1]):  # a base has no adapter
            raise StudyError(
                f"{self.config_file} must hold a trial's configuration, got a damaged file; "
                f"delete {self.folder} and run its command again"
            )
        for name, value in NEUTRAL.items():  # a trial that was made before there were these
            owner, last = _owner(groups, name)
            owner.setdefault(last, value)
        return groups

    def prune(self, reason: str) -> None:
        """Ask the worker that trains it to end it."""
        write_atomic(self.prune_file, reason + "\n")

    def prune_reason(self) -> str | None:
        """Why it is to be ended, or None where it is not."""
        try:
            return self.prune_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def commit(self, result: Result) -> None:
        """Write the result, last of all files: from here on the trial has ended."""
        record = asdict(result)
        record["state"] = str(result.state)
        record["checksum"] = digest({k: v for k, v in record.items() if k != "checksum"})
        write_atomic(self.result_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def read_result(self) -> tuple[Result | None, str | None]:
        """The result, or None and why what is there does not count (None where nothing is)."""
        try:
            text = self.result_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None, None
        except (OSError, UnicodeDecodeError) as error:
            return None, f"{self.result_file} cannot be read ({error})"
        try:
            record = json.loads(text)
            checksum = record.pop("checksum")
            if checksum != digest(record):
                return None, f"{self.result_file} was changed after it was written"
            result = Result(**{**record, "state": State(record["state"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None, f"{self.result_file} is damaged"
        for name, size in result.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None, f"{path} is missing or not the {size} bytes that the result names"
        if result.key != self.key:
            return None, f"{self.result_file} belongs to another trial ({result.key})"
        return result, None
