"""The files of TinyLlama and Dolly as their repositories have them, but tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.made_tokenizers import MADE, ZEPHYR

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DOLLY = "databricks/databricks-dolly-15k"
_CATEGORIES = ("open_qa", "closed_qa", "summarization", "brainstorming")
# `config.json` of the real model; only the sizes differ
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
}
_GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 2048,
    "pad_token_id": 0,
    "transformers_version": "4.35.0",
}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
_TOKENIZER = {
    **_SPECIAL,
    "chat_template": ZEPHYR,
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 2048,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "use_default_system_prompt": False,
}


def tinyllama(folder: Path, shards: int = 1, seed: int = 0) -> dict[str, bytes]:
    """Return the files of TinyLlama-1.1B-Chat-v1.0, its weights in one file or in shards."""
    tokenizer = MADE["TinyLlama"]()
    config = {**_CONFIG, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    size = sum(2 * parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    weights = {path.name: path.read_bytes() for path in folder.glob("model*safetensors*")}
    files = {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": "---\nlicense: apache-2.0\n---\n",
        "config.json": json.dumps(config),
        "eval_results.json": "{}",
        "generation_config.json": json.dumps(_GENERATION),
        "special_tokens_map.json": json.dumps(_SPECIAL),
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "tokenizer.model": "the sentencepiece model, which tokenizer.json makes unnecessary",
        "tokenizer_config.json": json.dumps(_TOKENIZER),
    }
    return {**weights, **{name: text.encode() for name, text in files.items()}}


def dolly(rows: int) -> dict[str, bytes]:
    """Return the files of databricks-dolly-15k, with a handful of rows."""
    lines = [
        {
            "instruction": f"What is the price of ticket {number} to Kathmandu?",
            "context": f"A ticket of class {number} is {number} rupees." if number % 3 else "",
            "response": f"It is {number} rupees, say the people in Pokhara.",
            "category": _CATEGORIES[number % len(_CATEGORIES)],
        }
        for number in range(rows)
    ]
    card = "---\nlicense: cc-by-sa-3.0\nlanguage:\n- en\nsize_categories:\n- 10K<n<100K\n---\n"
    return {
        ".gitattributes": b"*.jsonl filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": card.encode(),
        "databricks-dolly-15k.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
    }
