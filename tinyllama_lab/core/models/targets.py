"""Which modules of a model an adapter adapts, and what cannot be adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tinyllama_lab.config.limited import limited
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.targets import (
    expression_of,
    group_names,
    layer_numbers,
    missing_names,
    state_space_problem,
)
from tinyllama_lab.config.variants import INITIALISATIONS
from tinyllama_lab.core.models import base_weights
from tinyllama_lab.errors import ModelError


def linear_modules(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the layers that an adapter may adapt, by name: all linear ones but the head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def target_modules(linear: Mapping[str, nn.Module], targets: str | list[str]) -> str | list[str]:
    """Return the module names that `lora.targets` selects, as PEFT takes them.

    Args:
        linear: as `linear_modules` returns it.
        targets: the setting.

    Raises:
        ModelError: a name matches no linear layer.
    """
    if isinstance(targets, str) and (expression := expression_of(targets)) is not None:
        return expression
    if targets == "all_linear":
        return sorted({name.rpartition(".")[2] for name in linear})
    names = group_names(targets, list(linear)) if isinstance(targets, str) else targets
    missing = missing_names(names, list(linear))
    if missing or not names:
        found = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"lora.targets must name modules of the model, got {', '.join(missing) or targets}; "
            f"this model has {', '.join(found)}; set lora.targets=all_linear, or some "
            f"of them such as lora.targets=[{found[0]}]"
        )
    return names


def chosen_layers(model: PreTrainedModel, layers: str | list[int]) -> list[int] | None:
    """Return the numbers of the layers that `lora.layers` selects; None for all."""
    if layers == "all":  # of a model that may not say how many it has
        return None
    count = int(model.config.num_hidden_layers)
    numbers = layer_numbers(layers, count)
    if not 0 <= min(numbers) <= max(numbers) < count:
        raise ModelError(
            f"lora.layers must name layers of the model, which has {count} from 0 to {count - 1}, "
            f"got {layers}; set lora.layers=all"
        )
    return numbers


def check_matches(
    model: PreTrainedModel,
    linear: Mapping[str, nn.Linear | Conv1D],
    lora: LoraConfig,
    config: peft.LoraConfig,
) -> None:
    """Refuse targets and patterns that match nothing, or what cannot be adapted.

    Raises:
        ModelError: with what does not match, and what does.
    """
    with limited("the expression in lora.targets", "set lora.targets=all_linear"):
        matched = [n for n, _ in model.named_modules() if check_target_module_exists(config, n)]
    if others := [name for name in matched if name not in linear]:
        raise ModelError(
            "lora.targets must match linear layers that lie before the head, got "
            f"{lora.targets!r}, which matches {others[0]}; set lora.targets=all_linear"
        )
    if not matched:
        whole, remedy = lora.modules_to_save, "lora.targets=all_linear"
        if whole:
            remedy = "lora.modules_to_save=[]"
        raise ModelError(
            f"lora.targets and lora.layers must match linear layers{' outside ' * bool(whole)}"
            f"{', '.join(whole)}, got {lora.targets!r} and {lora.layers!r}; this model has layers "
            f"such as {next(iter(linear))}; set {remedy}"
        )
    kind = getattr(model.config, "model_type", None)
    if problem := state_space_problem(kind, matched, linear, lora.targets):
        raise ModelError(problem)
    with limited("the expressions in lora.rank_pattern", "name modules, such as down_proj"):
        _check_patterns(matched, list(config.rank_pattern or ()))
    _check_first_values({name: linear[name] for name in matched}, lora, config)
    base_weights.check(model, lora, matched)


def _check_patterns(matched: Sequence[str], patterns: Sequence[str]) -> None:
    """Refuse ranks of modules that are not adapted, and two ranks of one module."""
    by_name = {
        name: [each for each in patterns if of_module({each: True}, name, False)]
        for name in matched
    }
    if unused := set(patterns) - {pattern for found in by_name.values() for pattern in found}:
        adapted = sorted({name.rpartition(".")[2] for name in matched})
        raise ModelError(
            f"lora.rank_pattern must name adapted modules, got {min(unused)!r}; adapted are "
            f"{', '.join(adapted)}; set 'lora.rank_pattern={{{adapted[0]}: 16}}'"
        )
    # the order of a pattern is not part of a trial's key
    if twice := next((name for name, found in by_name.items() if len(found) > 1), None):
        raise ModelError(
            "lora.rank_pattern must give a module one rank, got "
            f"{' and '.join(map(repr, by_name[twice]))}, which both match {twice}; leave one out"
        )


def _check_first_values(
    adapted: Mapping[str, nn.Linear | Conv1D], lora: LoraConfig, config: peft.LoraConfig
) -> None:
    """Refuse weights that have no first values of the kind that was asked for."""
    for name, layer in adapted.items():
        if INITIALISATIONS[lora.init].needs_nn_linear and isinstance(layer, Conv1D):
            raise ModelError(
                f"lora.init={lora.init} needs layers of the kind nn.Linear, got Conv1D in {name}; "
                "set lora.init=pissa"
            )
        rank, most = of_module(config.rank_pattern, name, lora.r), min(sides(layer))
        if lora.shifts_base and rank > most:  # PEFT would take fewer, and not load them again
            raise ModelError(
                f"lora.r must be at most the smaller side of every adapted weight when "
                f"lora.init={lora.init}, got {rank} and {name} with {most}; set lora.r={most}"
            )


def sides(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the number of inputs and of outputs."""
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        return inputs, outputs
    return layer.in_features, layer.out_features


def of_module(patterns: Mapping[str, Any] | None, module: str, other: Any) -> Any:
    """Return the value of the first of PEFT's patterns that matches a module, or `other`."""
    # PEFT returns the name itself where none matches
    return (patterns or {}).get(get_pattern_key(list(patterns or ()), module), other)
