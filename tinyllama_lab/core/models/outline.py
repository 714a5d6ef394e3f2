"""A base without its weights: its sizes on the meta device, and some layers to trace.

Everything follows from `config.json`. Nothing is loaded, and of a model of the hub that file alone
is fetched.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from tinyllama_lab.config.schema import ModelConfig, QuantConfig
from tinyllama_lab.core.models import smollm2, tiny
from tinyllama_lab.core.models.loading import TRUSTED_FILES, is_packaged, load_weights, stored_as
from tinyllama_lab.data import hub
from tinyllama_lab.data.snapshots import check_task
from tinyllama_lab.errors import ModelError, one_line, shown
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.files import user_path

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_IF_USED = ("intermediate_size",)  # by the architecture
_NULLABLE = (*_IF_USED, "num_key_value_heads", "head_dim")  # null is what follows from others
_BLOCK = 64  # weights that share a float32 scale in 4 bits
_SCALES = 256  # scales that share a float32 scale themselves, with `quant.double`


@dataclass(frozen=True)
class Outline:
    """The sizes of a base as it would be loaded."""

    model: PreTrainedModel  # on the meta device
    quant: QuantConfig
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, quant: QuantConfig, dtype: torch.dtype) -> Outline:
        """Return the outline of the model that `read_config` describes.

        Raises:
            ModelError: the configuration contradicts itself.
        """
        try:
            with torch.device("meta"):
                model = _from_config(config, dtype)
        except Exception as error:  # whatever the code of an architecture raises
            raise _unknown(Path(config.name_or_path) / "config.json", error) from error
        # as on a model that was loaded so
        vars(model)["is_quantized"] = quant.kind != "none"
        vars(model)["is_loaded_in_8bit"] = quant.kind == "int8"
        return cls(model, quant, dtype)

    @property
    def weights_mib(self) -> float:
        """MiB of the weights as they are stored in memory."""
        quantized = self._quantized()
        names = {f"{name}.weight" for name in quantized}
        others = sum(p.numel() for name, p in self.model.named_parameters() if name not in names)
        stored = sum(self._stored_bytes(module) for module in quantized.values())
        return (others * self.dtype.itemsize + stored) / MIB

    def dense_mib(self, largest: bool = False) -> float:
        """Return MiB of the quantized weights once they are dequantized, or of the largest."""
        sizes = [m.in_features * m.out_features for m in self._quantized().values()]
        return (max if largest else sum)(sizes or [0]) * self.dtype.itemsize / MIB

    def _quantized(self) -> dict[str, nn.Linear]:
        """Return the linear layers that are quantized: all but the head."""
        if self.quant.kind == "none":
            return {}
        head = self.model.get_output_embeddings()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }

    def _stored_bytes(self, module: nn.Linear) -> float:
        count = module.in_features * module.out_features
        if self.quant.kind == "int8":
            return count + 4 * module.out_features  # a scale for every output
        scales = count / _BLOCK
        return count / 2 + (scales * (1 + 4 / _SCALES) if self.quant.double else 4 * scales)

    def some_layers(self, count: int, vocabulary: int | None = None) -> PreTrainedModel:
        """Return a model of `count` layers of the real widths, on the CPU, with arbitrary weights.

        Args:
            count: layers.
            vocabulary: rows of the embedding; None for the real number.
        """
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers = count
        if hasattr(config, "layer_types") and config.layer_types:
            config.layer_types = config.layer_types[:count]
        if vocabulary is not None:
            config.vocab_size, config.pad_token_id = vocabulary, None  # it must be a row
        if self.quant.kind != "int8":
            # memory that nobody wrote to: tracing asks for sizes and never for values
            with no_init_weights():
                return _from_config(config, self.dtype).requires_grad_(False)
        # int8 layers keep what others do not, and only loading makes them
        with tempfile.TemporaryDirectory(prefix="tinyllama-lab-") as folder:
            _from_config(config, self.dtype).save_pretrained(folder)
            model = load_weights(Path(folder), self.quant, self.dtype, torch.device("cpu"))
        return model.requires_grad_(False)


def _from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    make: Any = AutoModelForCausalLM.from_config
    made: PreTrainedModel = make(config, dtype=dtype, trust_remote_code=False)
    return made.eval()


def read_config(model: ModelConfig) -> Any:
    """Return the configuration of a base.

    Raises:
        ModelError: it is not available, or lacks a field; the message names the field.
    """
    if is_packaged(model):
        return smollm2.config()
    folder = _config_folder(model)
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"a plan needs the config.json of the model, and {file} cannot be read "
            f"({one_line(str(error))}); choose another model"
        ) from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise _missing(file, "model_type")
    check_task(folder)
    written = {**raw, **(raw.get("text_config") or {})}
    _check_sizes(file, written)
    names = _names(written)
    _check_fields(file, written, _FIELDS, names)  # before the architecture checks what it assumes
    try:
        config = AutoConfig.from_pretrained(folder, **TRUSTED_FILES).get_text_config()
    except Exception as error:  # the checks of an architecture raise errors of many classes
        raise _unknown(file, error) from error
    # transformers fills in the sizes of another model without a word
    used = [name for name in _IF_USED if isinstance(getattr(config, name, None), int)]
    _check_fields(file, written, (*_FIELDS, *used), getattr(config, "attribute_map", {}))
    return config


def _names(written: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the names that an architecture has for fields, where they differ."""
    kind = str(written["model_type"])
    # not `get`, which does not find what this mapping imports on demand
    known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None
    names: Mapping[str, str] = getattr(known, "attribute_map", {})
    return names


def _check_fields(
    file: Path, written: dict[str, Any], needed: Sequence[str], names: Mapping[str, str]
) -> None:
    """Refuse a configuration without a size; `names` are those of an architecture.

    Raises:
        ModelError: with the field and the file.
    """
    for name in needed:
        if names.get(name, name) not in written and name not in written:
            raise _missing(file, names.get(name, name))


def _check_sizes(file: Path, written: dict[str, Any]) -> None:
    """Refuse a size that is no size, under its name in this architecture.

    Raises:
        ModelError: with the field, its value and the file.
    """
    aliases = _names(written)
    for name in (*_FIELDS, *_NULLABLE):
        for field in {name, aliases.get(name, name)} & written.keys():
            value = written[field]
            is_size = type(value) is int and value > 0  # `True` is an int as well
            if not is_size and not (value is None and name in _NULLABLE):
                raise ModelError(
                    f"the field {field} of config.json must be a positive integer, got "
                    f"{shown(json.dumps(value))} in {file}; correct it, or choose another model"
                )
    heads, shared = written.get("num_attention_heads"), written.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise ModelError(
            f"num_attention_heads of config.json must be a multiple of num_key_value_heads, got "
            f"{heads} and {shared} in {file}; correct them, or choose another model"
        )


def _unknown(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} must describe a model that transformers knows, got an error "
        f"({one_line(str(error))}); correct it, or choose another model"
    )


def _missing(file: Path, field: str) -> ModelError:
    return ModelError(
        f"config.json must hold the field {field}, which sizes are computed from, got none in "
        f"{file}; add it, or choose another model"
    )


def _config_folder(model: ModelConfig) -> Path:
    if model.source == "random":
        return tiny.folder()
    if model.source == "local":
        return user_path(str(model.path))
    return hub.config_folder(str(model.repo), str(model.identity))


def stored_weights(model: ModelConfig, quant: QuantConfig) -> str:
    """Return what `Base.weights` will say."""
    if is_packaged(model):
        return stored_as(model, quant, Path())
    return stored_as(model, quant, _config_folder(model))
