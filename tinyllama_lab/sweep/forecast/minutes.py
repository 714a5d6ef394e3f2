"""Seconds of trials: from earlier trials on this machine, else from the FLOPs of their tokens."""

from __future__ import annotations

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
# Whatever its size, a micro-batch also takes as long as so many tokens more; that was seen with
# SmolLM2 on two cores of a Xeon. In float32 it was not.
_FIXED_TOKENS = {"bfloat16": 500.0}
_NOTABLE = 0.05


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
            rows = int(planned.config["data"]["eval_n"])
            work = planned.evaluation_work_with(rows, facts["scored_together"])
            return training + self.scoring_s * work
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
        facts: of a trial, with its dtype, the measured rate of matmuls in it, and the tokens of
            the micro-batches of its pack.
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
    """Return the speed of earlier trials, corrected for micro-batches of another size."""
    assert known.tokens_per_s is not None
    before, now = known.micro_batch_tokens, facts["pack_micro_batch_tokens"]
    fixed = 0.0 if is_gpu else _FIXED_TOKENS.get(facts["dtype"], 0.0)
    gain = (1 + fixed / before) / (1 + fixed / now) if before and now else 1.0
    rate = known.tokens_per_s * gain
    source = f"{rate:.0f} tokens/s, {known.speed_source}"
    if abs(gain - 1) > _NOTABLE:
        source += f", in {'larger' if gain > 1 else 'smaller'} micro-batches"
    return Speed(0.0, rate, known.scoring_s, source)
