"""Writes a merged Llama as a GGUF file, which llama.cpp and Ollama run.

The names of metadata and tensors are those that llama.cpp reads for its architecture `llama`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TokenType,
    quantize,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tinyllama_lab.core.models.gguf_llama import IN_LAYER, OUTER
from tinyllama_lab.errors import ModelError

# names in transformers -> in llama.cpp
_OUTER = {theirs: ours for ours, theirs in OUTER.items()}
_IN_LAYER = {theirs: ours for ours, theirs in IN_LAYER.items()}
BLOCK = 32  # values that share a scale in Q8_0 and Q4_0; rows of a matrix are a multiple of it


@dataclass(frozen=True)
class FileType:
    """How the matrices of a file are stored: those of the layers, and the embedding."""

    layers: GGMLQuantizationType
    embedding: GGMLQuantizationType
    number: LlamaFileType


# The embedding, which is also the head of many small models, is in 8 bits where the rest is in 4:
# llama.cpp keeps it at six and more, and 4 bits there cost most of the quality.
FILE_TYPES = {
    "f16": FileType(GGMLQuantizationType.F16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": FileType(
        GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0
    ),
    "q4_0": FileType(
        GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q4_0
    ),
}
# Names in llama.cpp of the ways to split a text before byte-pair merges, by what tokenizer.json
# says: the kinds of its steps, and the patterns they split at.
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (f"{_SHORT}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}", "ByteLevel"): "llama-bpe",
    (f"{_SHORT}|{_LETTERS}|\\p{{N}}|{_REST}", "ByteLevel"): "qwen2",
}


def write_gguf(model: Path, file: Path, kind: str) -> None:
    """Write the model of a folder, as `merge` saves it, to a GGUF file.

    Args:
        model: the folder.
        file: the file to write.
        kind: one of `FILE_TYPES`.

    Raises:
        ModelError: llama.cpp cannot run this model, or its tokenizer.
    """
    config: Any = AutoConfig.from_pretrained(model, local_files_only=True)
    check_architecture(config)
    writer = GGUFWriter(file, "llama")
    _add_settings(writer, config, FILE_TYPES[kind])
    _add_tokenizer(writer, model)
    with _Weights(model, config) as weights:
        names = weights.names()
        for name in names:
            stored = _stored_as(name, weights.shape(name), FILE_TYPES[kind])
            data = quantize(np.zeros(weights.shape(name)[-1:], np.float32), stored)
            shape = (*weights.shape(name)[:-1], data.shape[-1])
            size = int(np.prod(shape)) * data.itemsize
            writer.add_tensor_info(name, shape, data.dtype, size, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:  # one at a time, so that the file never lies in memory as a whole
            stored = _stored_as(name, weights.shape(name), FILE_TYPES[kind])
            writer.write_tensor_data(quantize(weights.read(name), stored))
    writer.close()


def check_architecture(config: Any) -> None:
    """Refuse a model that is not a plain Llama.

    Raises:
        ModelError: it is not.
    """
    scaling = (config.rope_parameters or {}).get("rope_type", "default")
    problems = [
        f"architecture {config.model_type}" * (config.model_type != "llama"),
        "biases in its linear layers" * bool(getattr(config, "attention_bias", False)),
        "biases in its linear layers" * bool(getattr(config, "mlp_bias", False)),
        f"{scaling} scaling of positions" * (scaling not in ("default", "linear", "llama3")),
    ]
    if received := next(filter(None, problems), None):
        raise ModelError(
            f"GGUF files are written for plain Llama models, got {received}; "
            "use merge, whose folder llama.cpp's own converter may read"
        )


def _add_settings(writer: GGUFWriter, config: Any, kind: FileType) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_type("model")
    writer.add_file_type(kind.number)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokenizer(writer: GGUFWriter, model: Path) -> None:
    """Write tokens, merges, special tokens and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE":
        raise ModelError(
            "GGUF files are written for BPE tokenizers, got "
            f"{content['model']['type']}; use merge instead"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    size = AutoConfig.from_pretrained(model, local_files_only=True).vocab_size
    tokens, types = _tokens(content, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if content["model"].get("byte_fallback"):  # converted from SentencePiece
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
        writer.add_add_space_prefix(str(first[0]).startswith("\u2581"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content))
        writer.add_token_merges(merges)
    _add_special_tokens(writer, tokenizer, GenerationConfig.from_pretrained(model))
    # what a prompt begins with is part of the template, as it was in training
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return texts and types of all tokens; rows of the embedding without a token are unused."""
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    added = {each["id"]: each for each in content["added_tokens"]}
    texts |= {number: str(each["content"]) for number, each in added.items()}
    unknown = content["model"].get("unk_token")

    def kind(number: int) -> TokenType:
        if number not in texts:
            return TokenType.UNUSED
        if number in added and texts[number] != unknown:
            return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        if texts[number] == unknown:
            return TokenType.UNKNOWN
        is_byte = content["model"].get("byte_fallback") and texts[number].startswith("<0x")
        return TokenType.BYTE if is_byte else TokenType.NORMAL

    return [texts.get(n, f"[PAD{n}]") for n in range(size)], [kind(n) for n in range(size)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores with which llama.cpp merges pieces in the order of `merges`."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way a tokenizer splits a text before merging.

    Raises:
        ModelError: llama.cpp has no name for it.
    """
    step = content["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    key = tuple(
        each["pattern"].get("Regex") if each["type"] == "Split" else each["type"] for each in steps
    )
    if key not in SPLITS:
        raise ModelError(
            f"llama.cpp must know how a tokenizer splits a text, got {key}; use merge instead"
        )
    return SPLITS[key]


def _add_special_tokens(writer: GGUFWriter, tokenizer: Any, generation: Any) -> None:
    """Write the special tokens; the end of an answer is one of those that end a generation."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ends = generation.eos_token_id
    others = [n for n in (ends if isinstance(ends, list) else [ends]) if n is not None]
    if closing := [n for n in others if n != tokenizer.eos_token_id]:
        writer.add_eot_token_id(closing[0])


def _stored_as(name: str, shape: tuple[int, ...], kind: FileType) -> GGMLQuantizationType:
    """Return how a tensor is stored: norms in float32, and rows that are no blocks in float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = kind.embedding if name in ("token_embd.weight", "output.weight") else kind.layers
    return wanted if shape[-1] % BLOCK == 0 else GGMLQuantizationType.F16


class _Weights:
    """The weights of a folder under llama.cpp's names and in its order of rows."""

    def __init__(self, model: Path, config: Any) -> None:
        self._config = config
        self._files = [
            safe_open(path, framework="pt") for path in sorted(model.glob("model*.safetensors"))
        ]
        self._owners: dict[str, Any] = {
            _gguf_name(name): (file, name) for file in self._files for name in file.keys()
        }

    def __enter__(self) -> _Weights:
        for file in self._files:
            file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files:
            file.__exit__(*error)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        scales = ["rope_freqs.weight"] if _is_llama3(self._config) else []
        return [*scales, *self._owners]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if name not in self._owners:
            return tuple(_rope_factors(self._config).shape)
        file, own = self._owners[name]
        return tuple(file.get_slice(own).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32."""
        if name not in self._owners:
            return _rope_factors(self._config)
        file, own = self._owners[name]
        weight = file.get_tensor(own).to(torch.float32)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        for part, count in heads.items():
            if f".{part}." in name:
                # llama.cpp rotates neighbouring rows of a head, transformers those half apart
                pairs = weight.view(getattr(self._config, count), 2, -1, weight.shape[1])
                weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight.numpy()


def _gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor such as `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, last = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{last}"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_IN_LAYER[inner]}.{last}"


def _is_llama3(config: Any) -> bool:
    return (config.rope_parameters or {}).get("rope_type") == "llama3"


def _rope_factors(config: Any) -> np.ndarray:
    """Return what Llama 3 divides the frequencies of its rotary positions by, `[head_dim / 2]`.

    The formula is that of `rope_type=llama3` in transformers.
    """
    rope = config.rope_parameters
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    waves = 2 * np.pi / frequencies
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(waves > context / low, rope["factor"], between)
    return np.where(waves < context / high, 1.0, factors).astype(np.float32)
