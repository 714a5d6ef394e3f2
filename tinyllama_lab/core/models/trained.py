"""Loads the adapter of a trial on its base, for use outside a sweep."""

from __future__ import annotations

import peft
from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config.schema import ModelConfig, Science, part, value_problem
from tinyllama_lab.core.models.loading import load_base, read_tokenizer
from tinyllama_lab.core.models.lora import attach_saved
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.study.trial import TrialFolder


def load_adapter(trial: TrialFolder, device: str) -> peft.PeftModel:
    """Load the base of a trial and attach the trial's adapter, for inference.

    Args:
        trial: a trial with an adapter.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.

    Raises:
        StudyError: the trial has no adapter.
        ConfigError: the device is not one of these.
        ModelError: the base or the device is not available.
    """
    if problem := value_problem("hardware.device", device):
        raise ConfigError([problem])
    if not trial.weights_file.is_file():
        raise StudyError(
            f"load_adapter needs a trial that has trained an adapter, and {trial.folder} holds "
            "none; take one whose state is done"
        )
    science: Science = part(Science, trial.read_config())
    if science.lora.is_full:
        raise StudyError(
            f"load_adapter needs a trial with an adapter, and {trial.folder.name} trained the "
            f'whole model; type AutoModelForCausalLM.from_pretrained("{trial.adapter_dir}")'
        )
    base = load_base(science.model, science.quant, science.train.precision, device)
    return attach_saved(base.model, trial.adapter_dir)


def load_tokenizer(trial: TrialFolder) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a trial's base, or of a base.

    Raises:
        ModelError: the tokenizer is not available.
    """
    return read_tokenizer(part(ModelConfig, trial.read_config()["model"]))[0]
