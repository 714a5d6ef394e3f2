"""Unpacking a GGUF file gives the folder that transformers would save, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinyllama_lab.core.models.gguf_llama import unpack
from tinyllama_lab.core.models.quiet import no_progress_bar

WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, FEED_FORWARD = 64, 2, 4, 2, 96
TOKENS = ["<|end|>", "<|start|>", *bytes_to_unicode().values(), "th", "the"]


@pytest.fixture(params=["tied", "untied"])
def gguf_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a Llama of random weights in Q4_1, Q8_0 and F32, with a byte-level tokenizer."""
    file = tmp_path / "source" / "model.gguf"
    file.parent.mkdir()
    writer: Any = GGUFWriter(file, "llama")
    writer.add_name("A tiny Llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    _add_weights(writer, request.param == "tied")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_weights(writer: Any, tied: bool) -> None:
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: str = "Q4_1") -> None:
        weight = random.standard_normal(shape, np.float32)
        stored = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)

    add("token_embd.weight", len(TOKENS), WIDTH, kind="Q8_0")
    add("output_norm.weight", WIDTH, kind="F32")
    if not tied:
        add("output.weight", len(TOKENS), WIDTH, kind="Q8_0")
    key_value_width = WIDTH // HEADS * KEY_VALUE_HEADS
    for block in (f"blk.{number}" for number in range(LAYERS)):
        add(f"{block}.attn_norm.weight", WIDTH, kind="F32")
        add(f"{block}.attn_q.weight", WIDTH, WIDTH)
        add(f"{block}.attn_k.weight", key_value_width, WIDTH)
        add(f"{block}.attn_v.weight", key_value_width, WIDTH)
        add(f"{block}.attn_output.weight", WIDTH, WIDTH)
        add(f"{block}.ffn_norm.weight", WIDTH, kind="F32")
        add(f"{block}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        add(f"{block}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, FEED_FORWARD)


def test_the_folder_is_the_one_that_transformers_saves(gguf_file: Path, tmp_path: Path) -> None:
    source: dict[str, Any] = {"gguf_file": gguf_file.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype="float32", **source)
    settings = loaded.config.to_dict()
    # transformers refuses to save what came from a GGUF file: move the weights into a plain model
    settings.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    expected, target = tmp_path / "expected", tmp_path / "target"
    with no_progress_bar():
        plain.save_pretrained(expected)
    AutoTokenizer.from_pretrained(gguf_file.parent, **source).save_pretrained(expected)

    target.mkdir()
    unpack(gguf_file, target)
    assert {file.name for file in target.iterdir()} == {file.name for file in expected.iterdir()}
    for file in expected.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_tokenizer_knows_its_merges_and_its_special_tokens(
    gguf_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    unpack(gguf_file, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("the<|end|>") == ["the", "<|end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
