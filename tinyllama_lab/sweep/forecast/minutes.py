"""Seconds of trials: from earlier trials on this machine, else from the FLOPs of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.schema import CardConfig
from tinyllama_lab.sweep.ask.cost import KnownCosts
from tinyllama_lab.sweep.plan import PASSES_TO_TRAIN, Planned

# Shares of the rate of matmuls that training reaches, from benchmarks/README.md.
_OF_MEASURED = {"bfloat16": 0.27, "float32": 0.50}  # of the rate measured here, on a CPU
_RECOMPUTED = 1.5  # FLOPs with another forward pass beside one, and a backward pass as long
_OF_DATA_SHEET = {True: 0.33, False: 0.40}  # of a GPU's (an H100) and of a CPU's (assumed)
# A pack shares what a micro-batch and a decoded token take whatever their size. That is as long as
# so many more tokens or prompts take: SmolLM2 on two cores of a Xeon, docs/plan.md.
_FIXED_TOKENS = {"bfloat16": 500.0}  # none was seen in float32
_FIXED_PROMPTS = 32.0
_MOST_PROMPTS = 70.0  # for which a CPU's worker has room at a time
_NOTABLE = 1.05


@dataclass(frozen=True)
class Speed:
    """How fast a base trains and is scored in a pack."""

    flops: float  # of the tokens of a trial, a second; 0 if tokens/s were measured
    tokens_per_s: float | None
    scoring_s: float | None  # of a unit of `evaluation_work`, if it was measured
    source: str

    def seconds(self, planned: Planned, facts: Mapping[str, Any]) -> float:
        """Return a trial's share of the seconds of its pack, without the start of the worker."""
        training = 0.0 if planned.is_trained else self._training(facts)
        if self.scoring_s is not None:
            return training + self.scoring_s * planned.evaluation_work
        rows = max(1, int(planned.config["data"]["eval_n"]))
        a_row = float(facts["heldout_tokens"]) / rows
        tokens = a_row * planned.evaluation_work / PASSES_TO_TRAIN
        a_token = self._training(facts) / max(1, int(facts["tokens"]))
        return training + tokens * a_token

    def _training(self, facts: Mapping[str, Any]) -> float:
        if self.tokens_per_s:
            return float(facts["tokens"]) / self.tokens_per_s
        recomputing = _RECOMPUTED if facts["gradient_checkpointing"] else 1.0
        return recomputing * float(facts["tflop"]) * 1e12 / self.flops


def speed_of(
    known: KnownCosts, card: CardConfig, machine: Mapping[str, Any], facts: Mapping[str, Any]
) -> Speed | None:
    """Return the speed on a card or on this machine, and what it rests on; None if unknown.

    Args:
        known: what earlier trials of the base cost here.
        card: the settings of `hardware.card`.
        machine: as the forecast describes it.
        facts: of a trial, with its dtype and the measured rate of matmuls in it; and of its pack,
            the tokens of the largest micro-batch and the prompts that are completed together.
    """
    if card.name is not None:
        share, dtype = _OF_DATA_SHEET[machine["is_gpu"]], facts["dtype"]
        # a GPU without fast bf16 emulates it, at a rate that no data sheet tells
        is_fast = card.bf16 or dtype == machine["dtype"]
        peak = card.tflops_fp32 if dtype == "float32" else card.tflops if is_fast else None
        if not peak:
            return None
        source = f"{share:.0%} of the {peak:g} TFLOP/s of the data sheet in {dtype}"
        return Speed(share * peak * 1e12, None, None, source)
    if known.tokens_per_s:
        return _as_before(known, machine["is_gpu"], facts)
    gflops, of_measured = facts["gflops"], _OF_MEASURED.get(facts["dtype"])
    if gflops is None or of_measured is None:  # a GPU: this process has timed none of its matmuls
        return None
    source = f"{of_measured:.0%} of the {gflops:.0f} GFLOP/s that a matmul reaches here now"
    return Speed(of_measured * gflops * 1e9, None, None, source)


def _as_before(known: KnownCosts, is_gpu: bool, facts: Mapping[str, Any]) -> Speed:
    """Return the speed of earlier trials, corrected for a pack of another size than theirs."""
    assert known.tokens_per_s is not None
    fixed = 0.0 if is_gpu else _FIXED_TOKENS.get(facts["dtype"], 0.0)
    gain = _gain(known.micro_batch_tokens, facts["pack_micro_batch_tokens"], fixed)
    source = f"{known.tokens_per_s:.0f} tokens/s, {known.speed_source}"
    if gain > _NOTABLE:
        source += "; larger micro-batches are faster"
    scoring_s = known.scoring_s
    if scoring_s is not None and not is_gpu:
        scoring_s /= _gain(known.prompts, facts["pack_prompts"], _FIXED_PROMPTS, _MOST_PROMPTS)
    return Speed(0.0, known.tokens_per_s * gain, scoring_s, source)


def _gain(before: float | None, now: float, fixed: float, most: float = math.inf) -> float:
    """Return how many times as fast it is with `now` at a time as it was with `before`.

    What takes as long as `fixed` more is shared by all of them.
    """
    if not before or not now:
        return 1.0
    before, now = min(before, most), min(now, most)
    return (1 + fixed / before) / (1 + fixed / now)
