"""Attaches, saves, loads and detaches adapters through PEFT."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from tinyllama_lab.config.limited import limited
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.variants import INITIALISATIONS, VARIANTS
from tinyllama_lab.core.models import base_weights
from tinyllama_lab.core.models.quiet import no_peft_deprecation
from tinyllama_lab.core.models.saved import check_adapter_folder
from tinyllama_lab.core.models.targets import (
    check_matches,
    chosen_layers,
    linear_modules,
    of_module,
    sides,
    target_modules,
)
from tinyllama_lab.errors import ModelError, one_line
from tinyllama_lab.study.trial import ADAPTER_WEIGHTS

_NOTED_SHARE = 0.01  # of the weights; if as many have no adapter, a note says so


class LowRank(NamedTuple):
    """The shape of an adapter on one module: `A [rank, inputs]` and `B [outputs, rank]`."""

    outputs: int
    inputs: int
    rank: int

    @property
    def parameters(self) -> int:
        """Return the values of A and B."""
        return self.rank * (self.outputs + self.inputs)


def check(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuse settings that do not fit the model.

    Raises:
        ModelError: as in `peft_config`.
    """
    if not lora.is_full:
        peft_config(model, lora)


def peft_config(model: PreTrainedModel, lora: LoraConfig) -> peft.LoraConfig:
    """Return PEFT's settings of an adapter.

    Raises:
        ModelError: a name, layer or expression matches no linear layer of the model. PEFT accepts
            a list if only some names match, and would train fewer modules than requested.
    """
    linear = linear_modules(model)
    ranks = lora.rank_pattern or {}
    # the scale alpha / r is the same everywhere; that of rsLoRA follows each rank by itself
    alphas = {name: _short(lora.scale_alpha * rank / lora.r) for name, rank in ranks.items()}
    if VARIANTS[lora.variant].peft.get("use_rslora"):
        alphas = {}
    first: Any = INITIALISATIONS[lora.init].peft  # PEFT's types list words of its documentation
    bias: Any = lora.bias
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_short(lora.scale_alpha),
        lora_dropout=lora.dropout,
        target_modules=target_modules(linear, lora.targets),
        layers_to_transform=chosen_layers(model, lora.layers),
        rank_pattern=dict(ranks),
        alpha_pattern=alphas,
        bias=bias,
        modules_to_save=[*lora.modules_to_save] or None,  # a copy, because PEFT adds to it
        ensure_weight_tying=_keeps_tied(model, lora),
        init_lora_weights=first,
        **VARIANTS[lora.variant].peft,
    )
    check_matches(model, linear, lora, config)
    return config


def _keeps_tied(model: PreTrainedModel, lora: LoraConfig) -> bool:
    """Return whether one copy is trained for embedding and head, whose weight is one weight."""
    saved = base_weights.saved_modules(model, lora.modules_to_save)
    return bool(saved) and not {*saved}.isdisjoint(base_weights.tied_modules(model))


def _short(alpha: float) -> Any:
    """Return an alpha as an integer where it is one; readers of PEFT's files may expect that."""
    return int(alpha) if alpha.is_integer() else alpha


def attach(
    model: PreTrainedModel,
    lora: LoraConfig,
    seed: int,
    first_a: Mapping[str, torch.Tensor] | None = None,
) -> peft.PeftModel:
    """Attach a new adapter to the base; the seed decides its initial values.

    Those of A in `first_a`, by module name, replace drawn ones.

    Raises:
        ModelError: as in `peft_config`, or PEFT refuses a module; the base is as it was.
    """
    config = peft_config(model, lora)
    # PEFT draws initial values from the global generator, and later its dropout masks
    torch.manual_seed(seed)
    revision = getattr(model.config, "_commit_hash", None)  # of the base, for AutoPeftModel
    before = dict(model.named_modules())
    try:
        with no_peft_deprecation():
            adapted = peft.get_peft_model(model, config, revision=revision)
    except ValueError as error:
        # PEFT refuses some modules of some models, after it has replaced others
        _restore(model, before)
        raise ModelError(_refusal(model, lora, " ".join(str(error).split()))) from error
    for name, value in (first_a or {}).items():
        module: Any = adapted.get_base_model().get_submodule(name)
        module.lora_A["default"].weight.data.copy_(value)
    return adapted


def _restore(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    for name, module in before.items():  # parents come first
        if model.get_submodule(name) is not module:
            parent, _, short = name.rpartition(".")
            setattr(model.get_submodule(parent), short, module)
    model.requires_grad_(False)


def _refusal(model: PreTrainedModel, lora: LoraConfig, why: str) -> str:
    others = sorted({name.rpartition(".")[2] for name in linear_modules(model)})
    others = [name for name in others if f"'{name}'" not in why]
    return (
        f"lora.targets must name modules that PEFT can adapt in this model, got {lora.targets!r} "
        f"({why}); set lora.targets=[{','.join(others)}]"
    )


def first_values(
    model: PreTrainedModel,
    lora: LoraConfig,
    seed: int,
    first_a: Mapping[str, torch.Tensor] | None = None,
) -> tuple[peft.LoraConfig, dict[str, torch.Tensor]]:
    """Return PEFT's settings of an adapter, and its first values by the names of its file.

    `first_a` is as in `attach`. The values are float32 on the CPU. The base stays as it was.
    """
    if lora.shifts_base:
        return _first_values_apart(model, lora, seed)
    adapted = attach(model, lora, seed, first_a)
    try:
        values, config = _values(adapted), adapted.peft_config["default"]
    finally:
        detach(adapted)
    assert isinstance(config, peft.LoraConfig)
    return config, values


def _values(adapted: Any) -> dict[str, torch.Tensor]:
    # without the argument PEFT asks the hub whether the base's vocabulary was changed
    values = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # on the host, where they take nothing of a GPU's memory
    return {name: value.float().cpu() for name, value in values.items()}


def _first_values_apart(
    model: PreTrainedModel, lora: LoraConfig, seed: int
) -> tuple[peft.LoraConfig, dict[str, torch.Tensor]]:
    """Return the same where PEFT changes the weights: of a copy, one module at a time."""
    config, found = peft_config(model, lora), {}
    torch.manual_seed(seed)
    for name, shape in target_shapes(model, lora).items():
        holder = nn.Module()
        alone = replace(
            config,
            target_modules=["it"],
            layers_to_transform=None,
            r=shape.rank,
            lora_alpha=of_module(config.alpha_pattern, name, config.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )
        holder.it = copy.deepcopy(model.get_submodule(name))
        for key, value in _values(peft.inject_adapter_in_model(alone, holder)).items():
            found[f"base_model.model.{name}{key.removeprefix('it')}"] = value
    return config, found


def doubled(config: peft.LoraConfig) -> peft.LoraConfig:
    """Return the settings of an adapter that holds trained and first matrices.

    These are what PEFT writes when it converts PiSSA or OLoRA to LoRA: twice the ranks, at the
    same scale.
    """
    converted, more = copy.deepcopy(config), 2**0.5 if config.use_rslora else 2
    converted.init_lora_weights = True
    converted.r *= 2
    converted.lora_alpha = _short(float(config.lora_alpha * more))
    converted.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    converted.alpha_pattern = {
        key: _short(float(more * alpha)) for key, alpha in (config.alpha_pattern or {}).items()
    }
    return converted


def attach_saved(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Attach the adapter of a folder to the base, for inference.

    Raises:
        ModelError: the folder holds no adapter of this base, or anything that could run code.
    """
    check_adapter_folder(folder)
    with no_peft_deprecation(), _matching(folder):
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@contextmanager
def _matching(folder: Path) -> Iterator[None]:
    """Limit the time of a regular expression in the folder, and name weights that do not fit."""
    remedy = "train the adapter again, with module names in lora.targets"
    try:
        with limited(f"the expression for modules in {folder}", remedy, seconds=60.0):
            yield
    except (RuntimeError, ValueError, re.error) as error:
        reason = one_line(str(error))
        raise ModelError(
            f"{folder} must hold an adapter of this base, got {reason}; train it again"
        ) from error


def count_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Return the number of values that a trial trains, without creating its adapter."""
    by_name = target_shapes(model, lora)
    shapes = by_name.values()
    has_magnitudes = VARIANTS[lora.variant].trains_magnitudes
    magnitudes = sum(shape.outputs for shape in shapes) if has_magnitudes else 0
    of_base = {*base_weights.trained_parameters(model, lora, by_name).values()}  # tied ones once
    return (
        magnitudes
        + sum(shape.parameters for shape in shapes)
        + sum(parameter.numel() for parameter in of_base)
    )


def target_shapes(model: PreTrainedModel, lora: LoraConfig) -> dict[str, LowRank]:
    """Return the shape of an adapter on every module that it adapts, by module name.

    Raises:
        ModelError: as in `peft_config`.
    """
    shapes: dict[str, LowRank] = {}
    if lora.is_full:
        return shapes
    config = peft_config(model, lora)
    for name, module in linear_modules(model).items():
        if check_target_module_exists(config, name):
            rank = of_module(config.rank_pattern, name, lora.r)
            inputs, outputs = sides(module)
            shapes[name] = LowRank(outputs, inputs, rank)
    return shapes


def left_out(model: PreTrainedModel, lora: LoraConfig) -> str | None:
    """Return a note on weights that no adapter reaches, such as joint experts, or None.

    Adapters reach only linear layers, not experts stored as one three-dimensional parameter.
    Small shares, such as those of convolutions, get no note.
    """
    if lora.is_full:
        return None
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    unreached = [name for name, shape in shapes.items() if len(shape) > 2]
    total, unreached_size = sum(sizes.values()), sum(sizes[name] for name in unreached)
    if unreached_size < _NOTED_SHARE * total:
        return None
    adapted = target_shapes(model, lora)
    covered = sum(shape.outputs * shape.inputs for shape in adapted.values())
    modules = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
    weights = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in unreached}))
    return (
        f"adapters go on {modules}, which hold {covered / total:.1%} of the weights; {weights} "
        f"hold {unreached_size / total:.1%} and get none, because they are not linear layers"
    )


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape before quantization, which stores two 4-bit values in one element."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
    return torch.Size(shape)


def detach(adapted: peft.PeftModel) -> None:
    """Restore the base as it was before `attach`; trained biases are left to `BaseCopies`."""
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else PEFT would leave the trained copy in the base
    adapted.unload().requires_grad_(False)


def trainable(adapted: peft.PeftModel) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name."""
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def trains_faster(name: str, parameter: nn.Parameter) -> bool:
    """Return whether LoRA+ trains a parameter faster, as PEFT's optimizer does: B, magnitudes."""
    return "lora_B" in name or parameter.ndim == 1


def sort_targets(config: Any) -> None:
    """Sort the module names, because the order of PEFT's set differs between processes."""
    if not isinstance(config.target_modules, str):  # which is an expression
        config.target_modules = sorted(config.target_modules)


def save(adapted: peft.PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does; `PeftModel.from_pretrained` loads it."""
    sort_targets(adapted.peft_config["default"])
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing


def load(adapted: peft.PeftModel, folder: Path) -> None:
    """Load the values that `save` wrote into an adapter of the same shape."""
    peft.set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
