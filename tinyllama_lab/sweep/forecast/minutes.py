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
_OF_DATA_SHEET = {True: 0.33, False: 0.40}  # of a GPU's (an H100) and of a CPU's (assumed)


@dataclass(frozen=True)
class Speed:
    """How fast a base trains and is scored."""

    flops: float  # of the tokens of a trial, a second; 0 if tokens/s were measured
    tokens_per_s: float | None
    scoring_s: float | None  # of a unit of `evaluation_work`, if it was measured
    source: str

    def seconds(self, planned: Planned, facts: Mapping[str, Any]) -> float:
        """Return the seconds of a trial, without the start of its worker."""
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
        return float(facts["tflop"]) * 1e12 / self.flops


def speed_of(known: KnownCosts, card: CardConfig, reply: Mapping[str, Any]) -> Speed | None:
    """Return the speed on a card or on this machine, and what it rests on; None if unknown.

    Args:
        known: what earlier trials of the base cost here.
        card: the settings of `hardware.card`.
        reply: the answer of the forecast, with the measured rate of matmuls.
    """
    if card.name is not None:
        is_gpu = reply["machine"]["is_gpu"]
        share = _OF_DATA_SHEET[is_gpu]
        peak = float(card.tflops or 0.0)
        source = f"{share:.0%} of the {peak:g} TFLOP/s of the data sheet"
        return Speed(share * peak * 1e12, None, None, source)
    if known.tokens_per_s:
        source = f"{known.tokens_per_s:.0f} tokens/s, {known.speed_source}"
        return Speed(0.0, known.tokens_per_s, known.scoring_s, source)
    if reply["gflops"] is None:  # a GPU: this process has timed none of its matmuls
        return None
    share = _OF_MEASURED.get(reply["machine"]["dtype"], _OF_MEASURED["float32"])
    gflops = reply["gflops"]
    source = f"{share:.0%} of the {gflops:.0f} GFLOP/s that a matmul reaches here now"
    return Speed(share * gflops * 1e9, None, None, source)
