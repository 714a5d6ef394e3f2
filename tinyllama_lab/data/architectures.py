"""Which architectures the installed transformers knows, told without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tinyllama_lab.errors import ModelError, shown

_FILES = ("auto_mappings.py", "configuration_auto.py")  # one or both list the architectures


def check_known(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose architecture transformers does not know; no code of it is run.

    Args:
        folder: of the model.
        config: its `config.json`.

    Raises:
        ModelError: transformers does not know it.
    """
    kind, words = config.get("model_type"), _words()
    if not isinstance(kind, str) or not words or kind in words:
        return
    received = f"model_type {shown(kind)!r} in {folder}/config.json"
    if config.get("auto_map"):
        raise ModelError(
            f"the model must be one that transformers itself knows, got {received}, which brings "
            "code of its own (auto_map); such code is never run: choose another model"
        )
    version = importlib.metadata.version("transformers")
    raise ModelError(
        f"the model must be one that transformers knows, got {received}, which version {version} "
        "does not know; choose another model, or run pip install --upgrade transformers"
    )


@cache
def _words() -> frozenset[str]:
    """Return all strings in the lists of transformers; empty if it keeps them elsewhere."""
    found = importlib.util.find_spec("transformers")  # which imports nothing
    if found is None or found.origin is None:
        return frozenset()
    folder = Path(found.origin).parent / "models" / "auto"
    texts = [path.read_text("utf-8") for name in _FILES if (path := folder / name).is_file()]
    words = frozenset(re.findall(r"\"([^\"\n]+)\"", "\n".join(texts)))
    return words if "llama" in words else frozenset()
