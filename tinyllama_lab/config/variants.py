"""The variants of LoRA that `lora.variant` may name; driver and worker read them here.

A new variant that PEFT knows needs one more entry, and its name in `conf/lora/default.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How a variant differs from plain LoRA."""

    peft: Mapping[str, Any] = field(default_factory=dict)  # arguments of `peft.LoraConfig`
    not_packed: str | None = None  # why its adapters train one at a time, through PEFT
    trains_magnitudes: bool = False  # one more trained number for every output of a module
    reads_weights: bool = False  # before the first matmul, which is what quantizes int8 on a CPU


VARIANTS = {
    "lora": Variant(),  # arXiv 2106.09685
    "rslora": Variant({"use_rslora": True}),  # arXiv 2312.03732
    "dora": Variant(  # arXiv 2402.09353
        {"use_dora": True},
        trains_magnitudes=True,
        reads_weights=True,
    ),
}
