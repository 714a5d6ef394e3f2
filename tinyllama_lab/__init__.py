"""Sweeps of LoRA and QLoRA fine-tunes of small language models, run and compared."""

__version__ = "0.1.0"
