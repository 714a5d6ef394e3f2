"""The values of `lora.variant` and `lora.init`; driver and worker read them here.

A new one that PEFT knows needs one more entry, and its name in `conf/lora/default.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How a variant differs from plain LoRA."""

    shown: str  # its name in a model card
    peft: Mapping[str, Any] = field(default_factory=dict)  # arguments of `peft.LoraConfig`
    not_packed: str | None = None  # why its adapters train one at a time, through PEFT
    trains_magnitudes: bool = False  # one more trained number for every output of a module
    reads_weights: bool = False  # before the first matmul, which is what quantizes int8 on a CPU
    is_full: bool = False  # there is no adapter: all weights of the base are trained


@dataclass(frozen=True)
class Initialisation:
    """How the first values of A and B are chosen."""

    peft: bool | str  # `init_lora_weights` of `peft.LoraConfig`
    # B @ A is not zero: PEFT takes it out of the base's weights, a pack keeps it as a frozen pair
    shifts_base: bool = False
    needs_even_rank: bool = False
    needs_nn_linear: bool = False  # PEFT has it for no other layer, such as GPT-2's Conv1D
    reads_rows: bool = False  # A comes from the base's activations on rows of the training


INITIALISATIONS = {
    "default": Initialisation(True),  # A uniform, B zero: arXiv 2106.09685
    "gaussian": Initialisation("gaussian"),
    "orthogonal": Initialisation("orthogonal", needs_even_rank=True),
    "pissa": Initialisation("pissa_niter_16", shifts_base=True),  # arXiv 2404.02948
    # arXiv 2406.01775
    "olora": Initialisation("olora", shifts_base=True, needs_nn_linear=True),
    # PEFT's "eva" would ask for rows when a saved adapter is loaded
    "eva": Initialisation(True, reads_rows=True),  # arXiv 2410.07170
}
FULL = "full"
VARIANTS = {
    "lora": Variant("LoRA"),  # arXiv 2106.09685
    "rslora": Variant("rsLoRA", {"use_rslora": True}),  # arXiv 2312.03732
    "dora": Variant(  # arXiv 2402.09353
        "DoRA",
        {"use_dora": True},
        trains_magnitudes=True,
        reads_weights=True,
    ),
    FULL: Variant("full", is_full=True),
}
