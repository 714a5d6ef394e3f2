"""The prompts that a trial was trained on."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import STYLE, DataCache
from tinyllama_lab.core.dataset.prompts import PromptFormat
from tinyllama_lab.study.trial import TrialFolder


def prompt_format(trial: TrialFolder, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the format of a trial's prompts.

    The worker is the first to read a set of the hub, so the configuration does not say whether it
    is ready-made text; the result does. For results of earlier versions the set is read again.

    Raises:
        DataError: the set must be read, and cannot be.
    """
    science: Science = part(Science, trial.read_config())
    data = science.data
    result, _ = trial.read_result()
    style = result.data.get(STYLE) if result else None
    if style is None and not data.has_text:
        style = DataCache(tokenizer).examine(data).data.style
    return PromptFormat(tokenizer, replace(data, style=style or data.style))
