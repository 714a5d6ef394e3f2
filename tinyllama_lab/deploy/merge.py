"""Folds an adapter into the weights of its base, and saves a model of its own.

The result needs neither PEFT nor this project: transformers loads it as any other model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.models.base_weights import load_whole, savable
from tinyllama_lab.core.models.loading import TRUSTED_FILES, Base, load_base, model_folder
from tinyllama_lab.core.models.lora import attach_saved
from tinyllama_lab.core.models.quiet import no_progress_bar
from tinyllama_lab.deploy.trained import prompt_format
from tinyllama_lab.study.trial import TrialFolder


def merge(trial: TrialFolder, target: Path, into: str = "dequantized") -> None:
    """Write the base of a trial with the adapter in its weights into the folder `target`.

    The sum is computed in float32, and never stored in 4 or 8 bits. Weights are saved in the
    dtype that the base is stored in. The chat template renders the prompts of training.

    Args:
        trial: a trial with an adapter.
        target: an empty folder.
        into: weights that a quantized base gets. `dequantized` are those that the adapter was
            trained on, `original` those before quantization. The same without quantization.

    Raises:
        ModelError: the base is not available.
    """
    science: Science = part(Science, trial.read_config())
    base = _base(science, into)
    if science.lora.is_full:  # there is nothing to fold
        load_whole(base.model, trial.adapter_dir)
        _save(base.model, base, trial, target)
        return
    model: Any = attach_saved(base.model, trial.adapter_dir)
    _save(model.merge_and_unload(safe_merge=True), base, trial, target)


def save_base(trial: TrialFolder, target: Path) -> None:
    """Write the base of a trial without its adapter into a folder, otherwise as `merge` does.

    Raises:
        ModelError: the base is not available.
    """
    base = _base(part(Science, trial.read_config()), "dequantized")
    _save(base.model, base, trial, target)


def _save(model: Any, base: Base, trial: TrialFolder, target: Path) -> None:
    science: Science = part(Science, trial.read_config())
    folder = model_folder(science.model)
    config = AutoConfig.from_pretrained(folder, **TRUSTED_FILES)
    model.generation_config = _generation(folder, base)
    with no_progress_bar():
        model.to(config.dtype or torch.float32).save_pretrained(target)
    prompt_format(trial, base.tokenizer).save_tokenizer(target)


def _base(science: Science, into: str) -> Base:
    """Return the base in float32, without quantized weights."""
    is_quantized = science.quant.kind != "none"
    quant = science.quant
    if into == "original":
        quant = replace(quant, kind="none", double=False)
    # a GPU only where its kernels are needed: in float32 a model takes twice its usual memory
    device = "auto" if is_quantized and into == "dequantized" else "cpu"
    base = load_base(science.model, quant, "fp32", device)
    if quant.kind != "none":
        model: Any = base.model
        base.model = model.dequantize(torch.float32).to("cpu")
    return base


def _generation(folder: Path, base: Base) -> GenerationConfig:
    """Return the base's own settings of generation, which end where answers end in training."""
    try:
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # it has none
        settings = GenerationConfig()
    settings.eos_token_id = sorted(set(base.end_ids))
    settings.pad_token_id = int(base.tokenizer.pad_token_id)
    return savable(settings)
