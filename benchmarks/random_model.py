"""Makes a small model with random weights, to measure the speed of an architecture.

python -m benchmarks.random_model qwen3 sweeps/qwen3   # --tiny: of 2 layers
python -m benchmarks.sweep --model sweeps/qwen3 --json out.json

Its sizes are those of SmolLM2-135M, so that architectures compare with each other. With `--tiny` a
step is mostly what does not depend on the sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinyllama_lab.core.models import tiny

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def make(architecture: str, folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write a model and a tokenizer into a folder.

    Args:
        architecture: a `model_type` of transformers, such as `qwen2`.
        folder: where they go.
        sizes: settings of its configuration.
    """
    # with random weights any tokenizer will do, and this one needs no download
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder(), local_files_only=True)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **ends))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="2 layers of width 64")
    asked = parser.parse_args()
    make(asked.architecture, asked.folder, SIZES | TINY if asked.tiny else SIZES)
