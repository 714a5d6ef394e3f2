"""The peers' settings: their defaults, what makes the work equal, and P3's strongest."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import peft
import torch

from benchmarks.job import Adapter, Job, Prepared
from tinyllama_lab.config.schema import QuantConfig
from tinyllama_lab.config.targets import TARGET_GROUPS
from tinyllama_lab.core.models.loading import quantization_config

MOST_ROWS = 8  # of P3 in a micro-batch on a CPU; a larger step accumulates


@dataclass(frozen=True)
class Variant:
    """Which trainer and attention P3 uses."""

    trainer: str
    attention: str

    @classmethod
    def parse(cls, text: str) -> Variant:
        """One of `P3_VARIANTS`."""
        trainer, attention = text.split("-")
        return cls(trainer, attention)


def lora_config(adapter: Adapter) -> peft.LoraConfig:
    """The same adapter as ours: alpha 2 r, no dropout."""
    group = adapter.targets
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=2 * adapter.r,
        lora_dropout=0.0,
        target_modules="all-linear" if group == "all_linear" else list(TARGET_GROUPS[group]),
        bias="none",
    )


def equal_work(job: Job, prepared: Prepared, adapter: Adapter, batch_size: int) -> dict[str, Any]:
    """What makes the arms do the same: batches, optimizer, schedule, precision, no reports."""
    return {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": adapter.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": adapter.seed,
        "bf16": prepared.dtype == "bfloat16",
        "fp16": prepared.dtype == "float16",
        "use_cpu": job.setup.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def strongest(job: Job, batch_size: int) -> dict[str, Any]:
    """What P3 sets on top of the equal work."""
    rows = rows_at_once(batch_size) if job.setup.device == "cpu" else batch_size
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch_size // rows,
        "gradient_checkpointing": False,
        # rows come grouped by length already; HF's own sampler does not group so few
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
    }
    if job.setup.device == "cuda" and _installed("liger_kernel"):
        settings["use_liger_kernel"] = True
    return settings


def rows_at_once(batch_size: int) -> int:
    """With 16 rows at once, whose logits are all there together, 24 GB of memory ran out.

    Pieces are equal and not so small that they would slow a step down, so 11 rows stay together.
    """
    evenly = [n for n in range(MOST_ROWS, MOST_ROWS // 2, -1) if batch_size % n == 0]
    return evenly[0] if evenly and batch_size > MOST_ROWS else batch_size


def padding_free(job: Job) -> bool:
    """Whether P3 flattens its batches: this needs FlashAttention, so a GPU."""
    return job.setup.device == "cuda" and _installed("flash_attn")


def load_options(job: Job, prepared: Prepared) -> dict[str, Any]:
    """How P3 loads its base, once."""
    dtype = getattr(torch, prepared.dtype)
    variant = Variant.parse(job.variant)
    attention = "flash_attention_2" if padding_free(job) else variant.attention
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if job.setup.quant != "none":
        quant = QuantConfig(kind=job.setup.quant, double=False)
        options["quantization_config"] = quantization_config(quant, dtype)
    if job.setup.quant != "none" or job.setup.device == "cuda":
        options["device_map"] = {"": job.setup.device}
    return options


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def shown(arguments: Any, lora: peft.LoraConfig, model: dict[str, Any]) -> dict[str, Any]:
    """Every setting of an arm, for the results; paths of this machine are left out."""
    trainer = {k: v for k, v in arguments.to_dict().items() if not k.endswith("_dir")}
    adapter = {k: v for k, v in lora.to_dict().items() if v is not None}
    return {"trainer": trainer, "adapter": adapter, "model": model}
