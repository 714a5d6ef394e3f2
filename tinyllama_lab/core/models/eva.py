"""EVA (arXiv 2410.07170): A begins as the leading directions of the inputs of each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import peft
import torch
from peft import get_eva_state_dict
from transformers import PreTrainedModel

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.models.lora import peft_config, target_shapes
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.trial import digest

_LABELS = 512  # supervised tokens to read, or 4 for every rank; the directions change little after
_TOKENS = 8192  # the most in the batch, with padding: one forward pass takes all of them
_PASSES = 64  # without convergence; 3 to 5 are usual
_KEPT = 4  # results: a sweep goes through its seeds before it comes to the next learning rate

Directions = dict[str, torch.Tensor]  # `[rank, inputs]` by module name, float32 on the host


class InputDirections:
    """The first values of A on one base, computed once for all trials that share them.

    Call it while no adapter is attached: PEFT then reads the inputs of the bare modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._kept: dict[str, Directions] = {}

    def of(self, config: LoraConfig, rows: Sequence[Example]) -> Directions:
        """Return the directions on the first of `rows`; none if `lora.init` does not need them.

        Without rows there are none either: saved values will replace the first ones.

        Raises:
            ModelError: the rows do not decide as many directions as the rank.
        """
        if not config.reads_rows or not rows:
            return {}
        batch_rows = _first(rows, config.r)
        tokens = [(row.ids, row.loss_mask) for row in batch_rows]
        key = digest([config.r, config.targets, config.layers, tokens])
        if key not in self._kept:
            found = self._compute(config, batch_rows)
            if len(self._kept) == _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = found
        return self._kept[key]

    def _compute(self, config: LoraConfig, rows: Sequence[Example]) -> Directions:
        _check(self._model, config, rows)
        # `rho=1` leaves every module the rank it was planned with; PEFT's 2 moves ranks around
        settings = replace(
            peft_config(self._model, config),
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=1.0),
        )
        try:
            found = get_eva_state_dict(
                self._model,
                [_batch(rows)],  # PEFT repeats it until the directions stay the same
                settings,
                forward_fn=_Forward(config.r),
                show_progress_bar=False,
            )
        finally:
            _remove_hooks(self._model)
        return {name: value.float().cpu() for name, value in found.items()}


class _Forward:
    """A forward pass without the head, which no adapter reads; PEFT sets no limit to passes."""

    def __init__(self, rank: int) -> None:
        self._rank, self._passes = rank, 0

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        self._passes += 1
        if self._passes > _PASSES:  # such as more directions than distinct tokens
            raise ModelError(
                f"lora.init=eva needs rows that decide lora.r directions, got lora.r={self._rank} "
                f"and other directions in each of {_PASSES} passes; set lora.r="
                f"{max(1, self._rank // 2)}, or lora.init=default"
            )
        # right padding needs no mask in a causal model
        model.base_model(input_ids=batch["input_ids"], use_cache=False)


def _remove_hooks(model: PreTrainedModel) -> None:
    """Remove what PEFT leaves after an error; it would read the inputs of all later passes."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if type(hook).__module__ == get_eva_state_dict.__module__:
                del module._forward_hooks[key]


def _first(rows: Sequence[Example], rank: int) -> list[Example]:
    """Return as many of the first rows as the directions need and a forward pass may take."""
    chosen: list[Example] = []
    labels = longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if chosen and longest * (len(chosen) + 1) > _TOKENS:
            break
        chosen.append(row)
        labels += sum(row.loss_mask)
        if labels >= max(_LABELS, 4 * rank):
            break
    return chosen


def _check(model: PreTrainedModel, config: LoraConfig, rows: Sequence[Example]) -> None:
    """Refuse ranks that the inputs of a module, or the tokens, do not have."""
    fewest = min(shape.inputs for shape in target_shapes(model, config).values())
    if config.r > fewest:
        raise ModelError(
            "lora.r must be at most the inputs of every adapted module when lora.init=eva, got "
            f"{config.r} and a module with {fewest}; set lora.r={fewest}"
        )
    labels = sum(sum(row.loss_mask) for row in rows)
    if labels <= config.r:  # their mean is taken out, which leaves one direction fewer
        remedy = f"set lora.r={labels - 1}" if labels > 1 else "set lora.init=default"
        raise ModelError(
            f"lora.init=eva needs more supervised tokens than lora.r={config.r}, got {labels} in "
            f"the first {len(rows)} rows of the training; {remedy}, or train on more rows"
        )


def _batch(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return rows padded on the right; PEFT reads the inputs at labels alone."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)  # any token serves as padding
    labels = torch.full((len(rows), longest), peft.EvaConfig().label_mask_value)
    for number, row in enumerate(rows):
        tokens, mask = torch.tensor(row.ids), torch.tensor(row.loss_mask)
        ids[number, : len(tokens)] = tokens
        labels[number, : len(tokens)][mask] = tokens[mask]
    return {"input_ids": ids, "labels": labels}
