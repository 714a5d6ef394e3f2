"""Weights of the base that a trial trains beside its adapter, and how the base gets them back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.targets import missing_names
from tinyllama_lab.core.models.quiet import no_progress_bar
from tinyllama_lab.errors import ModelError

_BIAS = ".bias"


class BaseCopies:
    """Copies to be trained, which stand in for parameters of a model.

    The parameters themselves are never written to, so the model can have them back bit by bit.
    One that several modules share, as a tied head does, has one copy, which they share too.
    """

    def __init__(self, model: nn.Module, originals: Iterable[nn.Parameter]) -> None:
        """Freeze the originals and put copies in their place."""
        copies = {}
        for original in originals:
            copies[id(original)] = nn.Parameter(original.detach().clone())
            original.requires_grad_(False)
        self._places = [
            (module, name, parameter, copies[id(parameter)])
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in copies
        ]
        self._put_copies()

    def remove(self) -> None:
        """Put the originals back; the copies are lost with the last reference to them."""
        for module, name, original, _ in self._places:
            setattr(module, name, original)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Run the block with the originals in place."""
        self.remove()
        try:
            yield
        finally:
            self._put_copies()

    def _put_copies(self) -> None:
        for module, name, _, trained in self._places:
            setattr(module, name, trained)


def train_whole(model: PreTrainedModel) -> BaseCopies:
    """Put copies of all weights into a model."""
    return BaseCopies(model, list(model.parameters()))


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """Write the folder that `AutoModelForCausalLM.from_pretrained` loads."""
    own = model.generation_config
    model.generation_config = savable(own) if own is not None else None
    try:
        with no_progress_bar():
            model.save_pretrained(folder, max_shard_size="1TB")  # in one file
    finally:
        model.generation_config = own


def savable(settings: GenerationConfig) -> GenerationConfig:
    """Return settings of generation that transformers saves.

    It refuses temperatures beside `do_sample=False`, with which some bases are published.
    """
    settings = copy.deepcopy(settings)
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
    return settings


@torch.no_grad()
def load_whole(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights that `save_whole` wrote into those of a model.

    Raises:
        KeyError: a weight is missing.
    """
    with no_progress_bar():
        saved = type(model).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    values = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def trained_parameters(
    model: PreTrainedModel, lora: LoraConfig, adapted: Collection[str]
) -> dict[str, nn.Parameter]:
    """Return the weights of the base that are trained, by the names in an adapter's file.

    Args:
        model: the base, with no adapter on it.
        lora: `bias` and `modules_to_save` say which.
        adapted: names of the modules with an A and a B.
    """
    if lora.is_full:
        return dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for module in saved_modules(model, lora.modules_to_save):
        of_module = model.get_submodule(module).named_parameters()
        found |= {f"{module}.{name}": parameter for name, parameter in of_module}
    for name, parameter in model.named_parameters() if lora.bias != "none" else ():
        module = name.removesuffix(_BIAS)
        if name.endswith(_BIAS) and module in adapted:
            found[f"{module}.base_layer{_BIAS}"] = parameter
        elif name.endswith(_BIAS) and lora.bias == "all":
            found[name] = parameter
    return found


def biases(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return all biases of a model."""
    return [p for name, p in model.named_parameters() if name.endswith(_BIAS)]


def saved_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the whole names of the modules that `lora.modules_to_save` selects.

    Of an embedding and a head that share their weight, one comes with the other.
    """
    found = [name for name, _ in model.named_modules() if _ends_whole(name, names)]
    tied = tied_modules(model) if found else []
    return list(dict.fromkeys([*found, *tied])) if {*tied} & {*found} else found


def tied_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the embedding and the head if they share their weight, else none."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return []
    return [name for name, module in model.named_modules() if module in (embedding, head)]


def check(model: PreTrainedModel, lora: LoraConfig, adapted: Collection[str]) -> None:
    """Refuse settings that select nothing in the model, or more than they name.

    Raises:
        ModelError: they do.
    """
    names, modules = lora.modules_to_save, [name for name, _ in model.named_modules() if name]
    if missing := missing_names(names, modules):
        free = _free_names(model, adapted)
        raise ModelError(
            f"lora.modules_to_save must name modules of the model, got {missing[0]}; this model "
            f"has {', '.join(free)}; set lora.modules_to_save=[{free[0] if free else ''}]"
        )
    # PEFT compares the ends of names: `norm` would be `input_layernorm` too
    more = [m for m in modules if m.endswith(tuple(names)) and not _ends_whole(m, names)]
    if more:
        name = next(name for name in names if more[0].endswith(name))
        whole = next(module for module in modules if _ends_whole(module, [name]))
        raise ModelError(
            f"lora.modules_to_save must name whole modules, got {name}, which {more[0]} ends with "
            f"too; set lora.modules_to_save=[{whole}]"
        )
    if lora.bias != "none" and not _has_biases(model, lora, adapted):
        raise ModelError(
            f"lora.bias={lora.bias} needs a model whose layers have biases, and this one has "
            "none there; set lora.bias=none"
        )


def _has_biases(model: PreTrainedModel, lora: LoraConfig, adapted: Collection[str]) -> bool:
    return bool(trained_parameters(model, replace(lora, modules_to_save=[]), adapted))


def _ends_whole(module: str, names: Sequence[str]) -> bool:
    """Return whether a module's name is one of these, or ends with one after a dot."""
    return any(f".{module}".endswith(f".{name}") for name in names)


def _free_names(model: PreTrainedModel, adapted: Collection[str]) -> list[str]:
    """Return the last parts of the names of modules that have weights and are not adapted."""
    free = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name not in adapted and any(True for _ in module.parameters(recurse=False))
    ]
    return sorted(set(free))
