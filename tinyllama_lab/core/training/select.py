"""Which engine carries which trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_packed
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.attempt import Attempt
from tinyllama_lab.errors import ModelError


def engines(
    base: Base, attempts: Sequence[Attempt], keep_dequantized: bool
) -> Iterator[tuple[Engine[Any], list[Attempt]]]:
    """Every engine that is needed, with its attempts; each result says which and why.

    Attempts that cannot be trained on this base fail here, before they are planned with others.
    """
    packed, single = sort_out(base, attempts)
    if packed:
        configs = [attempt.science.lora for attempt in packed]
        mixed = not packed[0].science.train.deterministic
        yield PackedEngine(base, configs, mixed, keep_dequantized), packed
    if single:
        yield PeftEngine(base), single


def sort_out(base: Base, attempts: Sequence[Attempt]) -> tuple[list[Attempt], list[Attempt]]:
    """Those that can be packed, and those that go through PEFT; others fail here."""
    reason = why_not_packed(base.model)
    packed: list[Attempt] = []
    single: list[Attempt] = []
    for attempt in attempts:
        try:
            lora.target_modules(base.model, attempt.science.lora.targets)
            _check_dora(base, attempt)
        except ModelError as error:
            attempt.fail(error)
            continue
        if note := lora.left_out(base.model, attempt.science.lora):
            attempt.log.append("note", text=note)
        why = reason
        if attempt.science.lora.variant == "dora":
            why = "DoRA is no plain sum of products"
        if why:
            attempt.log.append("note", text=f"trains one adapter at a time, not in a pack: {why}")
        attempt.result.environment["engine"] = "packed" if why is None else f"peft ({why})"
        (single if why else packed).append(attempt)
    return packed, single


def _check_dora(base: Base, attempt: Attempt) -> None:
    """DoRA reads the weights before the first product, which is what quantizes them on a CPU."""
    science = attempt.science
    if (science.lora.variant, science.quant.kind, base.device.type) == ("dora", "int8", "cpu"):
        raise ModelError(
            "lora.variant=dora needs a GPU on an int8 base, got the CPU; "
            "set lora.variant=lora, or quant=nf4"
        )
