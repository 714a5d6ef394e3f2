"""An adapter alone as a GGUF file, beside the file of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.deploy.test_gguf import llama_cpp, saved, tiny_tokenizer
from tests.llamas import LLAMA3
from tinyllama_lab.deploy.gguf_export import write_gguf
from tinyllama_lab.deploy.gguf_lora import write_lora
from tinyllama_lab.errors import ModelError

IDS = list(range(2, 40))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SCALES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
}


def adapted(folder: Path, model: Any, **settings: Any) -> Any:
    """The model with a random adapter, which is saved into the folder."""
    torch.manual_seed(1)
    options = {"task_type": "CAUSAL_LM", "target_modules": ALL, "init_lora_weights": False}
    made = peft.get_peft_model(model, peft.LoraConfig(**{**options, **settings})).eval()
    made.save_pretrained(str(folder))
    return made


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([IDS])).logits[0].double())


@pytest.mark.parametrize("scale", SCALES)
def test_base_and_adapter_in_llama_cpp_give_the_logits_of_peft(tmp_path: Path, scale: str) -> None:
    llama_cpp()
    from tinyllama_lab.deploy.llama_cpp import GgufModel

    shape: dict[str, Any] = {"rope_parameters": LLAMA3}
    bare = logits(saved(tmp_path / "base", tiny_tokenizer(), **shape))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = logits(adapted(tmp_path / "adapter", model, **SCALES[scale]))
    config = AutoConfig.from_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", tmp_path / "base.gguf", "f16")
    write_lora(tmp_path / "adapter", config, tmp_path / "adapter.gguf")
    with GgufModel(tmp_path / "base.gguf", 64, tmp_path / "adapter.gguf") as read:
        found = read.logits(IDS, 0)
    with GgufModel(tmp_path / "base.gguf", 64) as read:
        without = read.logits(IDS, 0)
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-2 * size
    assert np.abs(without - bare).max() < 1e-2 * size
    assert np.abs(expected - bare).max() > 0.1 * size  # the adapter says something


@pytest.mark.parametrize("scale", SCALES)
def test_the_products_and_the_scale_are_those_of_peft(tmp_path: Path, scale: str) -> None:
    made = adapted(tmp_path / "a", saved(tmp_path / "base", tiny_tokenizer()), **SCALES[scale])
    write_lora(tmp_path / "a", AutoConfig.from_pretrained(tmp_path / "base"), tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    matrices = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert len(matrices) == len(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    a, b = (matrices[f"blk.1.ffn_up.weight.lora_{part}"] for part in "ab")
    scaled = reader.fields["adapter.lora.alpha"].contents() / len(a)  # as llama.cpp computes it
    module = made.base_model.model.model.layers[1].mlp.up_proj
    expected = module.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(scaled * b @ a, expected, rtol=1e-4, atol=1e-6)
    # rows of a head: the halves of transformers become neighbours
    b = matrices["blk.0.attn_k.weight.lora_b"]
    module = made.base_model.model.model.layers[0].self_attn.k_proj
    theirs = module.lora_B["default"].weight.detach().numpy()
    order = [16 * head + 8 * part + n for head in (0, 1) for n in range(8) for part in (0, 1)]
    np.testing.assert_array_equal(b, theirs[order])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias=all"),
        ({"target_modules": ["q_proj", "lm_head"]}, "an adapter of lm_head"),
    ],
)
def test_an_adapter_that_is_more_than_products_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    model = saved(tmp_path / "base", tiny_tokenizer())
    adapted(tmp_path / "a", model, **{"r": 4, **settings})
    with pytest.raises(ModelError, match=f"got {named}; set types=f16"):
        write_lora(tmp_path / "a", model.config, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_the_file_says_that_it_is_an_adapter(tmp_path: Path) -> None:
    model = saved(tmp_path / "base", tiny_tokenizer())
    adapted(tmp_path / "a", model, r=4, lora_alpha=6)
    write_lora(tmp_path / "a", model.config, tmp_path / "a.gguf")
    fields = GGUFReader(tmp_path / "a.gguf").fields
    facts = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    assert {name: fields[name].contents() for name in facts} == facts
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 4
