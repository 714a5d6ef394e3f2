"""What the files of a model say about it: names and sizes of its weights, and its settings.

Nothing is loaded: the headers of safetensors hold names and sizes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.config.axes import shown_name
from tinyllama_lab.config.limited import can_limit
from tinyllama_lab.config.schema import ModelConfig
from tinyllama_lab.data import hub
from tinyllama_lab.data.snapshots import read_settings, weight_files
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.files import user_path

Weights = Mapping[str, Sequence[int]]  # shapes by name

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
HEAD = "lm_head"  # in no file where it is tied to the embedding
# architectures whose files name the modules as transformers does; tests compare the two
PLAIN = (
    *("gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2"),
    *("phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
)
_INNER = ("model.", "transformer.", "gpt_neox.")  # files without the head lack it
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^lm_head$|^shared$")  # layers that take no adapter
# layers, hidden size, that of the MLP, and that of keys, of the models that come without a file
_LLAMAS = {"random": (2, 64, 128, 32), "package": (30, 576, 1536, 192)}


@dataclass(frozen=True)
class StoredModel:
    """The weights of a model, as its files name them."""

    name: str
    kind: str  # its architecture; empty if the files do not say it
    weights: Weights

    @cached_property
    def linear(self) -> list[str]:
        """The names of the linear layers that may take an adapter."""
        # only their weights are matrices, beside embeddings
        matrices = (n for n, s in self.weights.items() if n.endswith(".weight") and len(s) == 2)
        names = (name.removesuffix(".weight") for name in matrices)
        return sorted(name for name in names if not _EMBEDDING.search(leaf(name)))

    @cached_property
    def modules(self) -> list[str]:
        """The names of all modules that hold weights, themselves or further down."""
        names = {HEAD}
        for name in self.weights:
            parts = name.split(".")[:-1]
            names |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return sorted(names)

    @cached_property
    def is_plain(self) -> bool:
        """Whether its names are certainly those of the modules, and its matrices linear layers."""
        is_whole = bool(self.linear) and all(name.startswith(_INNER) for name in self.linear)
        return self.kind in PLAIN and is_whole

    @property
    def can_match(self) -> bool:
        """Whether expressions can be matched with its names here."""
        return self.is_plain and can_limit()


def stored_model(model: ModelConfig) -> StoredModel | None:
    """Return what is known of a model's weights; None if only the worker knows them.

    Raises:
        ModelError: a file is damaged.
    """
    name = shown_name(vars(model))
    if model.source in _LLAMAS:
        return StoredModel(name, "llama", _llama(*_LLAMAS[model.source]))
    folder = folder_of(model)
    weights: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder) if folder else ():
        state = file.stat()
        weights |= _header(file, state.st_mtime_ns, state.st_size)
    return StoredModel(name, model_type(folder), weights) if folder and weights else None


def folder_of(model: ModelConfig) -> Path | None:
    """Return the folder of a model on this machine; None if it is not downloaded yet."""
    if model.source == "local":
        return user_path(str(model.path))
    if model.source == "hub":
        return hub.cached_snapshot(str(model.repo), model.revision, "model")
    return None


def model_type(folder: Path) -> str:
    """Return the architecture that `config.json` names; empty if it names none."""
    kind = read_settings(folder / "config.json").get("model_type")
    return kind if isinstance(kind, str) else ""


def leaf(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]


def _llama(layers: int, hidden: int, inner: int, keys: int) -> Weights:
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
    shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    blocks = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(layers)
        for name, shape in {**shapes, **norms}.items()
    }
    # nothing depends on the size of the vocabulary
    return {"model.embed_tokens.weight": (0, hidden), "model.norm.weight": (hidden,), **blocks}


@lru_cache(maxsize=64)
def _header(path: Path, _changed_ns: int, _bytes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file by name; other arguments name its version.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # limited: a damaged length must not fill the memory
            header: Any = json.loads(file.read(min(length, 100_000_000)))
        entries = [(n, entry) for n, entry in header.items() if isinstance(entry, dict)]
        return {n: tuple(map(int, e.get("shape", ()))) for n, e in entries if n != "__metadata__"}
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{path} must be a safetensors file; it cannot be read ({error})"
        ) from error
