"""How the frozen base is stored: bitsandbytes' int8, nf4 and fp4."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from tinyllama_lab.config.schema import QuantConfig


def quantization_config(quant: QuantConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings that `from_pretrained` takes; products are computed in `compute_dtype`.

    The method of nf4, fp4 and double quantization is that of QLoRA (arXiv 2305.14314), int8
    that of LLM.int8() (arXiv 2208.07339).
    """
    if quant.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=compute_dtype,
    )
