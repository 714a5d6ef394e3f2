"""A trial and its evaluations: identities, paths, results, and how results reach the disk."""

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
EVAL = "eval"  # the group that decides how an adapter is scored, and nothing about the adapter
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
    """Equal exactly when two trials train the same adapter; for bases, when scored alike.

    Paths, revisions and labels do not count: a model or data set is counted by its content or
    commit, which the driver wrote into `model.identity` and `data.identity`. How an adapter is
    scored does not count either: see `evaluation_key`. A base is nothing but its scores.
    """
    science = _unlabelled(config)
    if config["lora"] is not None:
        del science[EVAL]
    return digest(science)


def evaluation_key(settings: Mapping[str, Any]) -> str:
    """Equal exactly when two `eval` groups ask for the same scores."""
    return digest({k: v for k, v in settings.items() if NEUTRAL.get(f"{EVAL}.{k}", ...) != v})


def former_keys(config: Mapping[str, Any]) -> tuple[str, str]:
    """What earlier versions called a trial, the newer key first.

    In both, the settings of the evaluation counted; in the older one, labels and revisions too.
    """
    return digest(_unlabelled(config)), digest(_science(config))


def _unlabelled(config: Mapping[str, Any]) -> dict[str, Any]:
    science = _science(config)
    for group in (science["model"], science["data"]):
        if "revision" in group:  # as it was in the keys of those who named none
            group["revision"] = None
        if group.get("source") in _LABELLED and group["name"] not in SHIPPED:
            group["name"] = group["source"]
    return science


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
    """What a trial or an evaluation came to.

    `metrics` is flat; names and units are those of docs/architecture.md. Those of a trial contain
    its first evaluation.
    """

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
    # of a trial: the key of its first evaluation; None where that lies in `eval/` itself, as it
    # did in earlier versions
    evaluation: str | None = None

    def list_files(self, owner: Recorded, paths: Iterable[Path]) -> None:
        """Name what belongs to the result, so that a lost or cut file is noticed."""
        found = sorted(path for path in paths if path.is_file())
        self.files = {str(p.relative_to(owner.folder)): p.stat().st_size for p in found}


@dataclass(frozen=True)
class Recorded:
    """A folder with settings, files, and a result that is written last."""

    folder: Path

    @property
    def key(self) -> str:
        return self.folder.name.rpartition("-")[2]

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Create the folder with the configuration its key was computed from."""
        text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False)
        write_atomic(self.config_file, text)

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
            return (
                None,
                f"{self.result_file} belongs to another trial ({result.key})",
            )
        return result, None


@dataclass(frozen=True)
class Evaluation(Recorded):
    """What a trial's adapter, or a base, was scored with, and what came out."""

    @property
    def per_example_file(self) -> Path:
        return self.folder / "per_example.jsonl"

    @property
    def generations_file(self) -> Path:
        return self.folder / "generations.jsonl"

    @property
    def general_file(self) -> Path:
        return self.folder / "general.jsonl"

    @property
    def table_file(self) -> Path:
        return self.folder / "eval_results.csv"

    def read_settings(self) -> dict[str, Any] | None:
        """The `eval` group that it was scored with; None where that cannot be read."""
        try:
            loaded = _load_yaml(self.config_file)[EVAL]
        except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
            return None
        return _with_neutral({EVAL: loaded})[EVAL] if isinstance(loaded, dict) else None


@dataclass(frozen=True)
class Trial(Recorded):
    """One trial folder. Whoever needs a path of a trial asks here."""

    @property
    def name(self) -> str:
        return self.folder.name.rpartition("-")[0]

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
    def loss_curve_file(self) -> Path:
        return self.folder / "loss_curve.png"

    @property
    def log_file(self) -> Path:
        return self.folder / "worker.log"

    @property
    def prune_file(self) -> Path:
        return self.folder / "prune.txt"

    @property
    def is_done(self) -> bool:
        """Whether its adapter is trained and whole."""
        result, _ = self.read_result()
        return result is not None and result.state is State.DONE

    def evaluation(self, settings: Mapping[str, Any]) -> Evaluation:
        """The folder of an evaluation with the settings of an `eval` group."""
        return Evaluation(self.eval_dir / evaluation_key(settings))

    @property
    def first_evaluation(self) -> Evaluation:
        """The one that the trial's result contains."""
        result, _ = self.read_result()
        return self.evaluation_in(result) if result else Evaluation(self.eval_dir)

    def evaluation_in(self, result: Result) -> Evaluation:
        """The first evaluation of a result of this trial."""
        folder = self.eval_dir / result.evaluation if result.evaluation else self.eval_dir
        return Evaluation(folder)

    def later_evaluations(self, result: Result) -> list[Evaluation]:
        """The folders of the others, finished or not."""
        folders = self.eval_dir.iterdir() if self.eval_dir.is_dir() else ()
        others = (path for path in folders if path.is_dir() and path.name != result.evaluation)
        return [Evaluation(path) for path in sorted(others)]

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration, as plain dictionaries.

        Raises:
            StudyError: the file is not as `write_config` left it.
        """
        try:
            loaded = _load_yaml(self.config_file)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            loaded = None
        groups = loaded if isinstance(loaded, dict) else {}
        given = [name for name in SCIENCE[:-1] if isinstance(groups.get(name), dict)]
        if not {*given, "lora"}.issuperset(SCIENCE[:-1]):  # a base has no adapter
            raise StudyError(
                f"{self.config_file} must hold a trial's configuration, got a damaged file; "
                f"delete {self.folder} and run its command again"
            )
        return _with_neutral(groups)

    def prune(self, reason: str) -> None:
        """Ask the worker that trains it to end it."""
        write_atomic(self.prune_file, reason + "\n")

    def prune_reason(self) -> str | None:
        """Why it is to be ended, or None where it is not."""
        try:
            return self.prune_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None


def _load_yaml(path: Path) -> Any:
    return _Loader(path.read_text(encoding="utf-8")).get_single_data()


def _with_neutral(groups: dict[str, Any]) -> dict[str, Any]:
    """The groups of a file, with the settings that came after it was written."""
    for name, value in NEUTRAL.items():
        owner, last = _owner(groups, name)
        owner.setdefault(last, value)
    return groups
