"""Forecasts every pack of a request, and the nearest setting for what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tinyllama_lab.config.schema import HardwareConfig, ModelConfig, QuantConfig, Science, part
from tinyllama_lab.core.engines.generate import inner_size
from tinyllama_lab.core.forecast.machine import Machine, gemm_gflops, machine_of
from tinyllama_lab.core.forecast.packs import Forecaster, Trial
from tinyllama_lab.core.forecast.rows import Rows, RowSource
from tinyllama_lab.core.models.loading import repo_to_download
from tinyllama_lab.core.models.outline import Outline, read_config, stored_weights
from tinyllama_lab.metrics import MIB

SHORTEST = 64  # tokens; a plan proposes no shorter rows
# settings that are made smaller for what does not fit, the cheapest first
_TRAINING = ("quant", "lora.r", "lora.targets", "data.max_length")
_SCORING = {"eval.latency_tokens": 0, "eval.generations": 0, "eval.max_new_tokens": 16}  # least


class _Answerer:
    """Keeps what the packs of a request share."""

    def __init__(self, hardware: HardwareConfig) -> None:
        self._hardware = hardware
        self._source = RowSource(self.config)
        self._configs: dict[str, Any] = {}
        self._forecasters: dict[str, Forecaster] = {}
        self._rates: dict[tuple[int, int, torch.dtype], float] = {}
        self._machine: Machine | None = None

    def rows(self, science: Science, estimate: Mapping[str, float]) -> Rows:
        """Return the rows of a trial."""
        return self._source.rows(science, estimate)

    @property
    def machine(self) -> Machine:
        """The machine; asked for once all rows are read, because a worker holds them too."""
        if self._machine is None:
            self._machine = machine_of(self._hardware)
        return self._machine

    def config(self, model: ModelConfig) -> Any:
        """Return the configuration of a base."""
        key = repr(model)
        if key not in self._configs:
            self._configs[key] = read_config(model)
        return self._configs[key]

    def forecaster(self, science: Science) -> Forecaster:
        """Return the forecaster of a base."""
        dtype = self.machine.dtype_of(science.train.precision)
        key = repr((science.model, science.quant, dtype))
        if key not in self._forecasters:
            config = self.config(science.model)
            outline = Outline.of(config, science.quant, dtype)
            stored = stored_weights(science.model, science.quant)
            self._forecasters[key] = Forecaster(outline, self._hardware, self.machine, stored)
        return self._forecasters[key]

    def fits(self, trial: Trial) -> bool:
        """Return whether a trial fits alone."""
        return self.forecaster(trial.science).fits(trial)

    def gflops(self, science: Science) -> float | None:
        """Return the measured rate of matmuls of a base's widths; None on a GPU and a card."""
        if self.machine.is_gpu or self._hardware.card.name is not None:
            return None
        config, dtype = self.config(science.model), self.forecaster(science).dtype
        inner = inner_size(config)
        key = (config.hidden_size, inner, dtype)
        if key not in self._rates:
            self._rates[key] = gemm_gflops(*key)
        return self._rates[key]


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the forecast of every pack and trial of a request.

    Args:
        request: `hardware`; and `packs`, lists of trials with `key`, `science` and `estimate`.

    Raises:
        LabError: a base or its rows cannot be used.
    """
    answerer = _Answerer(part(HardwareConfig, request["hardware"]))
    packs = [
        [(each["key"], _trial(answerer, each)) for each in trials] for trials in request["packs"]
    ]
    for pack in packs:
        answerer.config(pack[0][1].science.model)
    machine = answerer.machine
    replies, trials = [], dict[str, Any]()
    for pack in packs:
        members = [trial for _, trial in pack]
        forecaster = answerer.forecaster(members[0].science)
        forecast = forecaster.forecast(members)
        replies.append({**asdict(forecast), "weights_mib": forecaster.weights_mib})
        for (key, trial), fits in zip(pack, list(forecast.fits), strict=True):
            trials[key] = _facts(answerer, trial, fits)
            if len(pack) > 1:
                forecast = forecaster.alone(trial)
            trials[key] |= {k: v for k, v in asdict(forecast).items() if k != "fits"}
    return {
        "packs": replies,
        "trials": trials,
        "machine": {**asdict(machine), "dtype": _name(machine.dtype)},
        "download_mib": _download_mib(answerer, packs),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trial(answerer: _Answerer, each: Mapping[str, Any]) -> Trial:
    science: Science = part(Science, each["science"])
    return Trial(science, answerer.rows(science, each["estimate"]))


def _facts(answerer: _Answerer, trial: Trial, fits: bool) -> dict[str, Any]:
    """Return what is known about one trial."""
    science, rows = trial.science, trial.rows
    forecaster = answerer.forecaster(science)
    parameters, adapter_mib = forecaster.size(science.lora)
    return {
        "fits": fits,
        "trainable_params": parameters,
        "adapter_mib": adapter_mib,
        "packed": forecaster.is_packed(science.lora),
        "tokens": rows.tokens(science),
        "steps": rows.step_count(science),
        "longest": len(rows.longest.ids),
        "heldout_tokens": sum(len(example.ids) for example in rows.heldout),
        "is_counted": rows.is_counted,
        "is_guessed": rows.is_guessed and science.train.max_steps is None,
        "dtype": _name(forecaster.dtype),
        "gflops": answerer.gflops(science),
        "tflop": 4e-12 * forecaster.block_parameters * rows.tokens(science),
        "instead": None if fits else _instead(answerer, trial),
    }


def _instead(answerer: _Answerer, trial: Trial) -> list[str] | None:
    """Return the nearest settings with which a trial fits; None if there are none.

    The cheapest change that is enough alone comes first; if none is, they add up in this order.
    """
    forecaster = answerer.forecaster(trial.science)
    # where training fits, what changes no adapter comes first
    trains = forecaster.need(trial).training <= forecaster.room_mib
    names = (*_SCORING, *_TRAINING) if trains else (*_TRAINING, *_SCORING)
    for name in names:
        for change, changed in _changes(trial, name):
            if answerer.fits(changed):
                return [change]
    last, words = trial, dict[str, str]()
    for name in names:
        for change, changed in _changes(last, name):
            last, words[name] = changed, change
            if answerer.fits(changed):
                return list(words.values())
    return None


def _changes(trial: Trial, name: str) -> Iterator[tuple[str, Trial]]:
    """Yield what to type for the setting `name`, and the trial with it, the nearest first."""
    science, rows = trial.science, trial.rows
    group, _, field = name.partition(".")
    for value in _values(trial, name):
        if name == "quant":
            changed = replace(science, quant=QuantConfig(kind=value, double=False))
        else:
            of_group = replace(getattr(science, group), **{field: value})
            changed = replace(science, **{group: of_group})
        shorter = rows.cut(value) if name == "data.max_length" else rows
        yield f"{name}={value}", Trial(changed, shorter)


def _values(trial: Trial, name: str) -> Iterator[Any]:
    """Yield smaller values of a setting, the nearest first."""
    science = trial.science
    if science.lora.of_base is not None and name == "quant":
        return
    if science.lora.is_full and name.startswith("lora."):
        return
    if name == "quant" and science.quant.kind in ("none", "int8"):
        yield "nf4"
    elif name == "lora.targets" and science.lora.targets != "attention_qv":
        yield "attention_qv"
    elif name == "lora.r":
        yield from _halves(science.lora.r, 1)
    elif name == "data.max_length":
        yield from _halves(len(trial.rows.longest.ids), SHORTEST)
    elif name in _SCORING:
        yield from _halves(getattr(science.eval, name.removeprefix("eval.")), _SCORING[name])


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(least, value // 2)
        yield value


def _download_mib(
    answerer: _Answerer, packs: Sequence[Sequence[tuple[str, Trial]]]
) -> dict[str, float]:
    """Return MiB of weights to download, by repository."""
    sizes: dict[str, float] = {}
    for pack in packs:
        science = pack[0][1].science
        if repo := repo_to_download(science.model):
            stored = getattr(answerer.config(science.model), "dtype", None)
            itemsize = getattr(stored, "itemsize", 4)
            sizes[repo] = answerer.forecaster(science).parameters * itemsize / MIB
    return sizes
