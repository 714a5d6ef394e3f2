"""A merged model: the same logits, the same prompts, nothing in four bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.deploy.export import Wanted, deploy
from tinyllama_lab.deploy.merge import merge
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.trial import TrialFolder

STYLES = {
    "chat": {"data.style": "chat"},
    "system": {"data.style": "chat", "data.system": 'You "answer" travellers.\nAlways.'},
    "instruction": {"data.style": "instruction_response"},
    "query": {"data.style": "query_intent_response"},
}


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return result


@pytest.mark.parametrize("style", [*STYLES, "embedding"])
def test_a_merged_model_gives_the_logits_of_the_attached_adapter_and_renders_its_prompts(
    lab: Any, tmp_path: Path, style: str
) -> None:
    embedding = {"lora.modules_to_save": ["embed_tokens"]}
    trial = lab.trial({"train.lr": 0.05, **STYLES.get(style, embedding)})
    lab.run([trial])
    merge(trial, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    science = part(Science, trial.read_config())
    base = load_base(science.model, science.quant, "fp32", "cpu")
    attached = peft.PeftModel.from_pretrained(base.model, str(trial.adapter_dir)).eval()
    examples = DataCache(base.tokenizer).prepare(science.data).heldout
    for example in examples:
        found, expected = logits(merged, example.ids), logits(attached, example.ids)
        assert (found - expected).abs().max() <= 1e-4
        messages = [{"role": "user", "content": example.prompt}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = rendered if isinstance(rendered, list) else rendered["input_ids"]
        assert tuple(ids) == example.prompt_ids
    assert set(base.end_ids) == set(merged.generation_config.eos_token_id)


def test_the_adapter_of_a_four_bit_base_is_folded_into_dequantized_weights(
    lab: Any, tmp_path: Path
) -> None:
    trial = trained_on_nf4(tmp_path, lab)
    for into in ("dequantized", "original"):
        merge(trial, tmp_path / into, into)
    science = part(Science, trial.read_config())
    base = load_base(science.model, science.quant, "fp32", "cpu")
    attached = peft.PeftModel.from_pretrained(base.model, str(trial.adapter_dir)).eval()
    ids = tuple(range(5, 40))
    trained = logits(attached, ids)
    apart = {
        into: float((logits(loaded(tmp_path / into), ids) - trained).abs().max())
        for into in ("dequantized", "original")
    }
    assert apart["dequantized"] <= 1e-3  # bitsandbytes rounds inside its own matmul
    assert apart["original"] > 10 * apart["dequantized"]
    weights = loaded(tmp_path / "dequantized").state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_the_two_merged_forms_of_a_four_bit_base_are_both_measured(
    lab: Any, tmp_path: Path
) -> None:
    trial = trained_on_nf4(tmp_path, lab)
    of_trial = SimpleNamespace(row=SimpleNamespace(trial=trial))
    selection: Any = SimpleNamespace(trial=of_trial, study=None)
    rows, problems = deploy(selection, Wanted([], "f16", False), "cpu", lambda line: None)
    assert not problems
    assert [row.form for row in rows] == ["base", "adapter", "merged", "original"]
    dequantized, original = (abs(row.difference or 0) for row in rows[2:])
    assert dequantized < original
    assert Exports(trial.deploy_dir).original_dir.is_dir()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained_on_nf4(folder: Path, lab: Any) -> TrialFolder:
    """An adapter with random values, as if trained on an NF4 base."""
    from tests.llamas import make_b_random
    from tinyllama_lab.core.engines.peft import PeftEngine

    config = lab.configure({"quant.kind": "nf4"})
    trial = TrialFolder(folder / "trials" / "nf4-0123456789ab")
    trial.write_config(config)
    science = part(Science, config)
    base = load_base(science.model, science.quant, "fp32", "cpu")
    adapter = PeftEngine(base).add(science.lora, 0)
    make_b_random(adapter)
    adapter.save(trial.adapter_dir)
    return trial
