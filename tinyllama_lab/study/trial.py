"""A trial and its evaluations: their keys, paths and results."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study import integrity
from tinyllama_lab.study.files import make_way, read_file, read_yaml, write_atomic, yaml_text
from tinyllama_lab.study.integrity import FileRecord

SCIENCE = ("model", "data", "lora", "quant", "train", "eval", "seed")
EVAL = "eval"  # how an adapter is evaluated; it does not change the adapter
# Settings that later versions added, each at the value that keeps the behaviour from before. A
# key leaves out settings at these values, so that the keys of earlier trials stay the same.
NEUTRAL: dict[str, Any] = {
    "data.eval_path": None,  # if set, its content is part of `data.identity`
    **dict.fromkeys(("data.eval_split", "data.date", "lora.rank_pattern"), None),
    **{f"data.columns.{name}": None for name in ("text", "system", "tools", "group")},
    **{"data.rendering": 1, "data.subset": "nested"},
    **{"train.optimizer": "adamw", "train.keep": "last"},
    **dict.fromkeys(("train.loraplus_ratio", "train.eval_every", "train.patience"), None),
    **dict.fromkeys(("train.label_smoothing", "train.neftune_alpha"), 0.0),
    **dict.fromkeys(("data.learn", "lora.layers"), "all"),
    **{"lora.init": "default", "lora.bias": "none", "lora.modules_to_save": []},
    **{"eval.general": False, "eval.rows": "heldout"},
}
# option names of conf/, which are part of keys; any other name is a label of the user's
SHIPPED = ("tinyllama", "tinyllama_v01", "dolly", "alpaca", "bitext_travel", "indicvault")
_UNLABELLED = (None, "package", "random", "travel")  # of all other sources, the name is a label

# as PEFT names the files of an adapter, transformers those of a whole model, and the hub others
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL_WEIGHTS, MODEL_CONFIG = "model.safetensors", "config.json"
CARD, CHAT_TEMPLATE = "README.md", "chat_template.jinja"


class State(StrEnum):
    """How a trial ended. Without a valid result it is missing, whatever its folder contains."""

    DONE = "done"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    OOM = "oom"
    FAILED = "failed"


def canonical_json(value: Any) -> str:
    """Return the one JSON spelling of a value that hashes are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Return twelve hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def trial_key(config: Mapping[str, Any]) -> str:
    """Return the key: equal if and only if two trials train the same adapter.

    Paths, revisions and labels do not count. A model or data set counts by its content or commit,
    which the driver wrote into `model.identity` and `data.identity`. The settings of the
    evaluation count for a base alone, whose only result it is (see `evaluation_key`).
    """
    science = _unlabelled(config)
    if config["lora"] is not None:
        del science[EVAL]
    return digest(science)


def evaluation_key(settings: Mapping[str, Any]) -> str:
    """Return the key of an `eval` group: equal if and only if it gives the same metrics."""
    return digest({k: v for k, v in settings.items() if NEUTRAL.get(f"{EVAL}.{k}", ...) != v})


def former_keys(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the keys of a trial in earlier versions, the more recent one first.

    Both include the settings of the evaluation; the older one also labels and revisions.
    """
    return digest(_unlabelled(config)), digest(_science(config))


def _unlabelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a key covers, without labels and revisions."""
    science = _science(config)
    for group in (science["model"], science["data"]):
        if "revision" in group:  # null, not removed: the keys of trials without one stay the same
            group["revision"] = None
        if group.get("source") not in _UNLABELLED and group["name"] not in SHIPPED:
            group["name"] = group["source"]
    return science


def _science(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a key covers, without paths and neutral settings."""
    science = copy.deepcopy({group: config[group] for group in SCIENCE})
    for group in (science["model"], science["data"]):
        group.pop("path", None)
    science["data"].pop("eval_path", None)
    for name, value in NEUTRAL.items():
        owner, last = _owner(science, name)
        if last in owner and owner[last] == value:
            del owner[last]
    return science


def _owner(config: Any, name: str) -> tuple[dict[str, Any], str]:
    """Return the group that contains a dotted setting, empty if absent, and its name in it."""
    *groups, last = name.split(".")
    for group in groups:
        config = config.get(group) or {}
    return config, last


def cell_key(config: Mapping[str, Any]) -> str:
    """Return a key that is equal if and only if two trials differ in nothing but their seed."""
    return trial_key({**config, "seed": None})


def contest_key(config: Mapping[str, Any], tuned: Iterable[str]) -> str:
    """Return a key that is equal if and only if two trials differ only in the tuned settings."""
    plain = copy.deepcopy(dict(config))
    for key in tuned:
        owner, last = _owner(plain, key)
        owner[last] = None
    return trial_key(plain)


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a trial's configuration that the evaluation of its base depends on."""
    # which rows are trained on does not change the held-out rows, so all such trials share a base
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


@dataclass
class Result:
    """The outcome of a trial or an evaluation.

    `metrics` is flat, with the names and units of docs/architecture.md. A trial's metrics include
    those of its first evaluation.
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
    files: dict[str, FileRecord] = field(default_factory=dict)  # by relative path
    # key of a trial's first evaluation; None if that is in `eval/` itself, as in earlier versions
    evaluation: str | None = None


@dataclass(frozen=True)
class ResultFolder:
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

    @property
    def events_file(self) -> Path:
        return self.folder / "events.jsonl"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Create the folder with the configuration that its key was computed from."""
        write_atomic(self.config_file, yaml_text(dict(config)))

    def commit(self, result: Result, files: Iterable[Path] = ()) -> None:
        """Write the result, after all other files: it marks the trial or evaluation as ended.

        Args:
            result: what came out.
            files: what it rests on, beside the configuration and the events.
        """
        paths = [self.config_file, *files]
        result.files = integrity.record_files(self.folder, paths, [self.events_file])
        record = asdict(result)
        record["state"] = str(result.state)
        record["checksum"] = digest({k: v for k, v in record.items() if k != "checksum"})
        write_atomic(self.result_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def read_result(self) -> tuple[Result | None, str | None]:
        """Return the result, or None and why it is invalid (None if there is none)."""
        try:
            text = read_file(self.result_file).decode()
        except FileNotFoundError:
            return None, None
        except (OSError, UnicodeDecodeError) as error:
            return None, f"{self.result_file} cannot be read ({error})"
        try:
            record = json.loads(text)
            checksum = record.pop("checksum")
            if checksum != digest(record):  # edited by hand: its metrics cannot be trusted
                return None, f"{self.result_file} was changed after it was written"
            result = Result(**{**record, "state": State(record["state"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None, f"{self.result_file} is damaged"
        if why := integrity.problem(self.folder, result.files):
            return None, why
        if result.key != self.key:  # for example copied by hand from another trial
            return None, f"{self.result_file} belongs to another trial ({result.key})"
        return result, None


@dataclass(frozen=True)
class Evaluation(ResultFolder):
    """The folder of one evaluation: the settings it was made with, and its results."""

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
        """Return the `eval` group of this evaluation; None if it cannot be read."""
        try:
            loaded = read_yaml(self.config_file)[EVAL]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return _with_neutral({EVAL: loaded})[EVAL] if isinstance(loaded, dict) else None


@dataclass(frozen=True)
class TrialFolder(ResultFolder):
    """One trial folder. All paths inside it come from here."""

    @property
    def name(self) -> str:
        return self.folder.name.rpartition("-")[0]

    @property
    def checkpoint_dir(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    @property
    def template_file(self) -> Path:
        """The chat template that renders the prompts of training."""
        return self.adapter_dir / CHAT_TEMPLATE

    @property
    def weights_file(self) -> Path:
        whole = self.adapter_dir / MODEL_WEIGHTS
        return whole if whole.is_file() else self.adapter_dir / ADAPTER_WEIGHTS

    @property
    def adapter_config_file(self) -> Path:
        whole = self.adapter_dir / MODEL_CONFIG
        return whole if whole.is_file() else self.adapter_dir / ADAPTER_CONFIG

    @property
    def card_file(self) -> Path:
        """The adapter's README, which the Hugging Face hub shows as its card."""
        return self.adapter_dir / CARD

    @property
    def deploy_dir(self) -> Path:
        """What was exported for use outside of a sweep; see `Exports`."""
        return self.folder / "deploy"

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
    def lock_file(self) -> Path:
        """The lock of a base: workers of several studies share its evaluation."""
        return self.folder / "base.lock"

    @property
    def is_done(self) -> bool:
        """Whether the adapter is trained and its files are complete."""
        result, _ = self.read_result()
        return result is not None and result.state is State.DONE

    def evaluation(self, settings: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation with the settings of an `eval` group."""
        return Evaluation(self.eval_dir / evaluation_key(settings))

    def evaluation_in(self, result: Result) -> Evaluation:
        """Return the first evaluation, which a result of this trial names."""
        folder = self.eval_dir / result.evaluation if result.evaluation else self.eval_dir
        return Evaluation(folder)

    def later_evaluations(self, result: Result) -> list[Evaluation]:
        """Return the evaluations after the first one, finished or not."""
        folders = self.eval_dir.iterdir() if self.eval_dir.is_dir() else ()
        others = (path for path in folders if path.is_dir() and path.name != result.evaluation)
        return [Evaluation(path) for path in sorted(others)]

    def read_config(self) -> dict[str, Any]:
        """Return the resolved configuration as plain dictionaries.

        Raises:
            StudyError: the file is damaged.
        """
        try:
            loaded = read_yaml(self.config_file)
        except (OSError, ValueError):
            loaded = None
        groups = loaded if isinstance(loaded, dict) else {}
        present = {name for name in SCIENCE[:-1] if isinstance(groups.get(name), dict)}
        if "lora" in groups and groups["lora"] is None:  # a base has no adapter
            present.add("lora")
        if not {*present, *groups.keys() & {"seed"}}.issuperset(SCIENCE):
            raise StudyError(
                f"{self.config_file} must hold a trial's configuration, got a damaged file; "
                f"delete {self.folder} and run its command again"
            )
        return _with_neutral(groups)

    def clear(self) -> None:
        """Remove what stands in the way of a worker, and what a killed one left half written."""
        files = (self.config_file, self.events_file, self.log_file, self.prune_file)
        folders = (self.adapter_dir, self.eval_dir, self.checkpoint_dir)
        make_way(self.folder, (*files, self.result_file, self.loss_curve_file), folders)

    def prune(self, reason: str) -> None:
        """Ask the worker that trains the trial to prune it.

        A file instead of a signal, because one process trains several trials.
        """
        write_atomic(self.prune_file, reason + "\n")

    def prune_reason(self) -> str | None:
        """Return why the trial is to be pruned; None if it is not."""
        try:
            return read_file(self.prune_file).decode(errors="replace").strip()
        except OSError:
            return None


def _with_neutral(groups: dict[str, Any]) -> dict[str, Any]:
    """Return the groups of a file, with the settings that were added after it was written."""
    for name, value in NEUTRAL.items():
        owner, last = _owner(groups, name)
        owner.setdefault(last, copy.copy(value))
    return groups
