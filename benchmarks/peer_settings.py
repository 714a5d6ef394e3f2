"""The settings of the peers: their defaults, what makes the work equal, and the fastest for P3."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import peft
import torch

from benchmarks.job import Adapter, Job, Prepared, Setup
from tinyllama_lab.config.schema import QuantConfig
from tinyllama_lab.config.targets import TARGET_GROUPS
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.models.loading import quantization_config

MOST_ROWS = 8  # in a micro-batch of P3 on a CPU; larger batches are accumulated


@dataclass(frozen=True)
class Variant:
    """The trainer and the attention of P3."""

    trainer: str
    attention: str

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Parse one of `P3_VARIANTS`, such as `hf-sdpa`."""
        trainer, attention = text.split("-")
        return cls(trainer, attention)


def lora_config(adapter: Adapter, setup: Setup) -> peft.LoraConfig:
    """Return the same adapter as in this project: alpha 2 r, no dropout."""
    group = adapter.targets
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=2 * adapter.r,
        lora_dropout=0.0,
        target_modules="all-linear" if group == "all_linear" else list(TARGET_GROUPS[group]),
        bias="none",
        **VARIANTS[setup.lora_variant].peft,
    )


def equal_work(job: Job, prepared: Prepared, adapter: Adapter, batch_size: int) -> dict[str, Any]:
    """Return the trainer arguments that make the work of all arms equal."""
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
    """Return the trainer arguments that make P3 as fast as it can be."""
    rows = rows_at_once(batch_size) if job.setup.device == "cpu" else batch_size
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch_size // rows,
        "gradient_checkpointing": False,
        # rows are grouped by length already; the sampler of transformers does not group so few
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
    }
    if job.setup.device == "cuda" and _installed("liger_kernel"):
        settings["use_liger_kernel"] = True
    return settings


def rows_at_once(batch_size: int) -> int:
    """Return the rows of a micro-batch of P3 on a CPU.

    P3 keeps the logits of all rows of a micro-batch, and with 16 rows it ran out of 24 GB of
    memory. The pieces of a batch must be equal, and large enough not to slow the step down. So 16
    rows become twice 8, and 11 rows stay together.
    """
    evenly = [n for n in range(MOST_ROWS, MOST_ROWS // 2, -1) if batch_size % n == 0]
    return evenly[0] if evenly and batch_size > MOST_ROWS else batch_size


def padding_free(job: Job) -> bool:
    """Return whether P3 flattens its batches, which needs FlashAttention and so a GPU."""
    return job.setup.device == "cuda" and _installed("flash_attn")


def load_options(job: Job, prepared: Prepared) -> dict[str, Any]:
    """Return the arguments with which P3 loads its base."""
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
    """Return every setting of an arm for the results, without paths of this machine."""
    trainer = {k: v for k, v in arguments.to_dict().items() if not k.endswith("_dir")}
    adapter = {k: v for k, v in lora.to_dict().items() if v is not None}
    return {"trainer": trainer, "adapter": adapter, "model": model}
