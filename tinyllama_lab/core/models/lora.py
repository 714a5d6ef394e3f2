"""Attaches, saves, loads and detaches adapters through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tinyllama_lab.config.schema import LoraConfig
from tinyllama_lab.config.targets import TARGET_GROUPS
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.models.quiet import no_peft_deprecation
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.trial import ADAPTER_WEIGHTS

_NOTED_SHARE = 0.01  # of the weights; if as many have no adapter, a note says so


def target_modules(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Return the module names that `lora.targets` selects.

    Raises:
        ModelError: a name matches no linear module. PEFT accepts a list if only some names match,
            and would train fewer modules than requested.
    """
    # the head is a linear layer too, but `all_linear` must not adapt it, as in PEFT
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if targets == "all_linear":
        return sorted(linear)
    names = targets if isinstance(targets, list) else list(TARGET_GROUPS.get(targets, [targets]))
    missing = sorted(set(names) - linear)
    if missing:
        raise ModelError(
            f"lora.targets must name modules of the model, got {', '.join(missing)}; "
            f"this model has {', '.join(sorted(linear))}; set lora.targets=all_linear, or some "
            f"of them such as lora.targets=[{min(linear)}]"
        )
    return names


def attach(model: PreTrainedModel, lora: LoraConfig, seed: int) -> peft.PeftModel:
    """Attach a new adapter to the base; the seed decides its initial values."""
    # PEFT draws initial values from the global generator, and later its dropout masks
    torch.manual_seed(seed)
    alpha: Any = lora.scale_alpha  # PEFT's type says int, its code takes any number
    if alpha.is_integer():
        alpha = int(alpha)  # readers of adapter_config.json may accept only integers
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.targets),
        bias="none",
        **VARIANTS[lora.variant].peft,
    )
    revision = getattr(model.config, "_commit_hash", None)  # of the base, for AutoPeftModel
    with no_peft_deprecation():
        return peft.get_peft_model(model, config, revision=revision)


def attach_saved(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Attach the adapter of a folder to the base, for inference."""
    with no_peft_deprecation():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def count_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Return the number of values of an adapter, without creating it."""
    shapes = target_shapes(model, lora).values()
    has_magnitudes = VARIANTS[lora.variant].trains_magnitudes
    magnitudes = sum(outputs for outputs, _ in shapes) if has_magnitudes else 0
    return magnitudes + sum(lora.r * (outputs + inputs) for outputs, inputs in shapes)


def target_shapes(model: PreTrainedModel, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Return `(outputs, inputs)` of every module that an adapter adapts, by module name."""
    targets = set(target_modules(model, lora.targets))
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif name.rpartition(".")[2] in targets and isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes


def left_out(model: PreTrainedModel, lora: LoraConfig) -> str | None:
    """Return a note on weights that no adapter reaches, such as joint experts, or None.

    Adapters reach only linear layers, not experts stored as one three-dimensional parameter.
    Small shares, such as those of convolutions, get no note.
    """
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    unreached = [name for name, shape in shapes.items() if len(shape) > 2]
    total, unreached_size = sum(sizes.values()), sum(sizes[name] for name in unreached)
    if unreached_size < _NOTED_SHARE * total:
        return None
    adapted = target_shapes(model, lora)
    covered = sum(outputs * inputs for outputs, inputs in adapted.values())
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
    """Restore the base as it was before `attach`."""
    adapted.unload()


def trainable(adapted: peft.PeftModel) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name."""
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def sort_targets(config: Any) -> None:
    """Sort the module names, because the order of PEFT's set differs between processes."""
    config.target_modules = sorted(config.target_modules)


def save(adapted: peft.PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does; `PeftModel.from_pretrained` loads it."""
    sort_targets(adapted.peft_config["default"])
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card says nothing


def load(adapted: peft.PeftModel, folder: Path) -> None:
    """Load the values that `save` wrote into an adapter of the same shape."""
    peft.set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
