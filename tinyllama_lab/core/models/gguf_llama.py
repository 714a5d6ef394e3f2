"""Unpacks a Llama model from a GGUF file into a folder as transformers saves it.

transformers can load such files too. It parses the file four times and initializes two models at
random, which takes five times as long; a test compares the folders.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

# names in llama.cpp -> in transformers, outside of the layers and in a layer
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def unpack(file: Path, target: Path) -> None:
    """Write float32 weights, configuration and tokenizer of `file` into the folder `target`."""
    reader = _Reader(file)
    config = _config(reader)
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    weights = {_name(t.name): _weight(t, config) for t in reader.tensors}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    # not AutoTokenizer, which parses the file once more to find this class
    PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(
        target
    )


def read_config(file: Path) -> LlamaConfig:
    """Return the configuration in `file`; neither weights nor tokenizer are read."""
    return _config(_Reader(file))


class _Reader(GGUFReader):
    """Reads a GGUF file without its arrays: the strings of a tokenizer would take two seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], Any, Any]:
        if raw_type != GGUFValueType.ARRAY:
            size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
            return size, parts, indices, types
        data: Any = self.data
        item_type, count = struct.unpack_from("<IQ", data, orig_offs)
        end = orig_offs + struct.calcsize("<IQ")
        if item_type == GGUFValueType.STRING:
            for _ in range(count):  # every string begins with its length
                end += 8 + struct.unpack_from("<Q", data, end)[0]
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(item_type)]).itemsize
        return end - orig_offs, [], [], [GGUFValueType.ARRAY]


def _config(reader: GGUFReader) -> LlamaConfig:
    """Return the configuration that the fields of the file describe."""

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    make: Any = LlamaConfig  # its signature lacks two settings that transformers stores
    config: LlamaConfig = make(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=value("llama.rope.dimension_count"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        unk_token_id=value("tokenizer.ggml.unknown_token_id"),
        _model_name_or_path=value("general.name"),
    )
    return config


def _name(name: str) -> str:
    """Return the name in transformers of a tensor such as `blk.3.attn_q.weight`."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{OUTER[parts[0]]}.{parts[1]}"
    return f"model.layers.{parts[1]}.{IN_LAYER[parts[2]]}.{parts[3]}"


def _weight(tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """Return a tensor as float32, with the rows of `q_proj` and `k_proj` in transformers' order.

    llama.cpp rotates neighbouring rows of a head, transformers those half a head apart.
    """
    # writable, as PyTorch wants it: what is not quantized is copied out of the mapped file
    weight = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), None, "W"))
    rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = next((n for part, n in rotated.items() if f".{part}." in tensor.name), None)
    if heads is None:
        return weight
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
