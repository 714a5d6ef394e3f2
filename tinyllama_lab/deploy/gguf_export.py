"""Writes a merged Llama as a GGUF file, which llama.cpp and Ollama run.

The names of metadata and tensors are those that llama.cpp reads for its architecture `llama`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    quantize,
)
from safetensors import safe_open
from transformers import AutoConfig

from tinyllama_lab.core.models.gguf_llama import IN_LAYER, OUTER
from tinyllama_lab.core.models.loading import TRUSTED_FILES
from tinyllama_lab.deploy.gguf_tokenizer import add_tokenizer
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


def write_gguf(model: Path, file: Path, kind: str) -> None:
    """Write the model of a folder, as `merge` saves it, to a GGUF file.

    Args:
        model: the folder.
        file: the file to write.
        kind: one of `FILE_TYPES`.

    Raises:
        ModelError: llama.cpp cannot run this model, or its tokenizer.
    """
    config: Any = AutoConfig.from_pretrained(model, **TRUSTED_FILES)
    check_architecture(config)
    writer = GGUFWriter(file, "llama")
    _add_settings(writer, config, FILE_TYPES[kind])
    add_tokenizer(writer, model)
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


def weights_by_type(file: Path) -> str:
    """Return which shares of a file's weights are stored in which type: `57 % q5_0, 43 % q8_0`."""
    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    shares = ((100 * count / counts.total(), name) for name, count in counts.most_common())
    return ", ".join(f"{share:.0f} % {name}" for share, name in shares if share >= 0.5)


def check_architecture(config: Any) -> None:
    """Refuse a model that is not a plain Llama.

    Raises:
        ModelError: it is not.
    """
    rope = config.rope_parameters or {}
    scaling = rope.get("rope_type", "default")
    problems = [
        f"architecture {config.model_type}" * (config.model_type != "llama"),
        "biases in its linear layers" * bool(getattr(config, "attention_bias", False)),
        "biases in its linear layers" * bool(getattr(config, "mlp_bias", False)),
        f"hidden_act={config.hidden_act}" * (config.hidden_act != "silu"),
        "positions in a part of each head" * (rope.get("partial_rotary_factor", 1.0) != 1),
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
            gguf_name(name): (file, name) for file in self._files for name in file.keys()
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
        return in_row_order(name, file.get_tensor(own).to(torch.float32), self._config).numpy()


def in_row_order(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a weight with its rows (outputs) in llama.cpp's order; `name` is llama.cpp's.

    llama.cpp rotates neighbouring rows of a head, transformers those half a head apart.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if f".{part}." in name), None)
    if count is None:
        return weight
    return weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
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
