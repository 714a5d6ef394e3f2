"""GGUF files, read back by transformers, by `gguf` and, where it is installed, by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.llamas import SHAPES, SIZES
from tests.made_tokenizers import MADE
from tinyllama_lab.core.models import tiny
from tinyllama_lab.deploy.gguf_export import FILE_TYPES, write_gguf
from tinyllama_lab.errors import ModelError

TEXTS = (
    "Book a flight to Zürich for 2 people in 2026.",
    "  two spaces\n\nand\tlines",
    "don't 12345",
)


def saved(folder: Path, tokenizer: Any, **changes: Any) -> Any:
    """A small Llama with a tokenizer, as transformers saves them."""
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **changes}
    rows = 8 * (len(tokenizer) // 8 + 2)  # some rows of the embedding have no token
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": rows})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = [int(tokenizer.eos_token_id)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.folder())


def llama_cpp() -> None:
    """Skip a test where the binding is not installed."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(2, 40)[None]).logits[0].double()
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_the_file_as_the_same_model(tmp_path: Path, shape: str) -> None:
    model = saved(tmp_path / "model", tiny_tokenizer(), **SHAPES[shape])
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    for name, expected in model.state_dict().items():
        rounded = expected if expected.dim() == 1 else expected.half().float()
        assert torch.equal(read[name].float(), rounded), name


def test_the_scaled_frequencies_of_llama3_are_those_of_transformers(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", tiny_tokenizer(), **SHAPES["llama3"])
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert 1 < factors.max() <= 8
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("q8_0", 1e-2), ("q4_0", 0.15)])
def test_weights_are_those_of_the_model_up_to_the_type(
    tmp_path: Path, kind: str, most: float
) -> None:
    model = saved(tmp_path / "model", tiny_tokenizer())
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", kind)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "blk.1.ffn_down": "model.layers.1.mlp.down_proj"}
    for ours, theirs in names.items():
        found = tensors[f"{ours}.weight"]
        values = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
        expected = state[f"{theirs}.weight"]
        assert (values - expected).norm() < most * expected.norm()
        stored = FILE_TYPES[kind]
        wanted = stored.embedding if ours == "token_embd" else stored.layers
        assert found.tensor_type is wanted


@pytest.mark.parametrize("name", MADE)
def test_transformers_reads_the_tokenizer_as_the_same(tmp_path: Path, name: str) -> None:
    tokenizer = MADE[name]()
    saved(tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    ("model", "before", "received"),
    [
        (Unigram([("<unk>", 0.0), ("a", -1.0)], 0), ByteLevel(), "BPE tokenizers, got Unigram"),
        (BPE({"<unk>": 0, "a": 1}, []), Whitespace(), r"got \('Whitespace',\)"),
    ],
    ids=["Unigram", "Whitespace"],
)
def test_a_tokenizer_that_llama_cpp_cannot_read_is_refused(
    model: Any, before: Any, received: str, tmp_path: Path
) -> None:
    raw = Tokenizer(model)
    raw.pre_tokenizer = before
    names = {"eos_token": "<unk>", "unk_token": "<unk>"}
    saved(tmp_path / "model", PreTrainedTokenizerFast(tokenizer_object=raw, **names))
    with pytest.raises(ModelError, match=f"{received}.*; use merge instead"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "positions in a part of each head",
        ),
    ],
    ids=["activation", "positions"],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    settings: dict[str, Any], received: str, tmp_path: Path
) -> None:
    saved(tmp_path / "model", tiny_tokenizer(), **settings)
    with pytest.raises(ModelError, match=f"plain Llama models, got {received}"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {k: v for k, v in SIZES.items() if k != "initializer_range"}
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="plain Llama models, got architecture qwen2"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["without merges", "Llama 3", "TinyLlama"])
def test_llama_cpp_reads_texts_and_computes_logits_as_transformers(
    tmp_path: Path, name: str
) -> None:
    llama_cpp()
    from tinyllama_lab.deploy.llama_cpp import GgufModel

    tokenizer = tiny_tokenizer() if name == "without merges" else MADE[name]()
    model = saved(tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
    with GgufModel(tmp_path / "m.gguf", 64) as read:
        for text in TEXTS:
            assert read.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        found = torch.from_numpy(read.logits([*range(2, 40)], 0)).double()
    expected = logits(model)
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("size", "wanted"), [(256, "Q4_K"), (64, "Q5_0")])
def test_q4_k_m_is_written_by_llama_cpp_and_falls_back_for_rows_that_are_no_blocks(
    tmp_path: Path, size: int, wanted: str
) -> None:
    llama_cpp()
    from tinyllama_lab.deploy.export import QUANTIZED
    from tinyllama_lab.deploy.llama_cpp import GgufModel, quantize_file

    model = saved(tmp_path / "model", tiny_tokenizer(), hidden_size=size)
    exact, small = tmp_path / "exact.gguf", tmp_path / "small.gguf"
    write_gguf(tmp_path / "model", exact, "f16")
    quantize_file(exact, small, QUANTIZED["q4_k_m"])
    tensors = {t.name: t for t in GGUFReader(small).tensors}
    found = tensors["blk.1.ffn_up.weight"]
    assert found.tensor_type.name == wanted
    values = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
    expected = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert (values - expected).norm() < 0.1 * expected.norm()
    with GgufModel(small, 64) as read:
        assert read.tokenize(TEXTS[0]) == tiny_tokenizer()(TEXTS[0])["input_ids"]


def test_a_damaged_file_is_refused_by_llama_cpp_in_one_sentence(tmp_path: Path) -> None:
    llama_cpp()
    from tinyllama_lab.deploy.llama_cpp import GgufModel, quantize_file

    (tmp_path / "m.gguf").write_bytes(b"GGUF but nothing else")
    with pytest.raises(ModelError, match="llama.cpp cannot read .*force=true"):
        GgufModel(tmp_path / "m.gguf", 64)
    with pytest.raises(ModelError, match="llama.cpp cannot quantize"):
        quantize_file(tmp_path / "m.gguf", tmp_path / "n.gguf", 15)
