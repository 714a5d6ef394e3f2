"""How many values a trial trains, and how large the file with them is, without making it."""

from __future__ import annotations

import json

from transformers import PreTrainedModel

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.models import lora as adapters
from tinyllama_lab.core.models.base_weights import trained_parameters
from tinyllama_lab.metrics import MIB


def adapter_size(model: PreTrainedModel, lora: LoraConfig) -> tuple[int, float]:
    """Return the number of trained values, and MiB of the file that PEFT writes.

    Raises:
        ModelError: the settings do not fit the model.
    """
    count = adapters.count_parameters(model, lora)
    stored = count * (2 if lora.shifts_base else 1)
    shapes = adapters.target_shapes(model, lora)
    entries = {
        f"{name}.lora_{part}.weight": [shape.rank, shape.outputs]
        for name, shape in shapes.items()
        for part in "AB"
    }
    of_base = trained_parameters(model, lora, shapes)
    entries |= {name: [*parameter.shape] for name, parameter in of_base.items()}
    # PEFT writes a tied weight under both of its names
    stored += sum(p.numel() for p in of_base.values()) - sum(
        p.numel() for p in {*of_base.values()}
    )
    header = {
        f"base_model.model.{name}": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [stored, stored],
        }
        for name, shape in entries.items()
    }
    return count, (4 * stored + len(json.dumps(header, separators=(",", ":")))) / MIB
