"""The optimizers of `train.optimizer`, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinyllama_lab.config.schema import TrainConfig
from tinyllama_lab.core.engines.base import Adapter
from tinyllama_lab.core.models.lora import trains_faster

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    # fused: one pass over weights, gradient and moments
    return torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)


def _sgd(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=train.weight_decay, fused=True)


def _adafactor(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # as transformers' Trainer sets it: `train.lr` is the rate, and weights do not scale it
    fixed = {"scale_parameter": False, "relative_step": False}
    return Adafactor(groups, lr=train.lr, weight_decay=train.weight_decay, **fixed)


def _adamw_8bit(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, weight_decay=train.weight_decay)


def _lion(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion32bit

    return Lion32bit(groups, weight_decay=train.weight_decay)


def _fill_bitsandbytes(optimizer: Any) -> None:
    for number, group in enumerate(optimizer.param_groups):
        for place, matrix in enumerate(group["params"]):
            optimizer.init_state(group, matrix, number, place)


def _fill_adafactor(optimizer: torch.optim.Optimizer) -> None:
    for matrix in (each for group in optimizer.param_groups for each in group["params"]):
        shapes = {"exp_avg_sq": matrix.shape}
        if matrix.ndim > 1:
            columns = matrix.shape[:-2] + matrix.shape[-1:]
            shapes = {"exp_avg_sq_row": matrix.shape[:-1], "exp_avg_sq_col": columns}
        zeros = {name: matrix.new_zeros(shape) for name, shape in shapes.items()}
        optimizer.state[matrix] = {"step": 0, "RMS": 0, **zeros}


@dataclass(frozen=True)
class _Kind:
    """An optimizer.

    Attributes:
        make: creates it.
        moments: its state, if that has the shape of the parameters. Such an optimizer updates a
            whole adapter at once; any other one is given each matrix.
        fill: allocates any other state.
    """

    make: Callable[[Groups, TrainConfig], torch.optim.Optimizer]
    moments: tuple[str, ...] = ()
    fill: Callable[[Any], None] | None = None


# by `train.optimizer`; `OPTIMIZERS` of the schema lists the same names
_KINDS = {
    "adamw": _Kind(_adamw, ("exp_avg", "exp_avg_sq")),
    "adamw_8bit": _Kind(_adamw_8bit, fill=_fill_bitsandbytes),
    "adafactor": _Kind(_adafactor, fill=_fill_adafactor),
    "lion": _Kind(_lion, fill=_fill_bitsandbytes),
    "sgd": _Kind(_sgd, ("momentum_buffer",)),
}
_STEP = "optimizer_step"  # in a checkpoint, AdamW's count of steps, which all parameters share
_STATE = "optimizer."


class AdapterOptimizer:
    """The optimizer of one adapter.

    Attributes:
        torch: the optimizer itself; each of its groups has the `ratio` of its learning rate to
            `train.lr`.
    """

    def __init__(self, adapter: Adapter, train: TrainConfig) -> None:
        kind = _KINDS[train.optimizer]
        self._adapter, self._moments = adapter, kind.moments
        self._matrices = {} if kind.moments else adapter.matrices()
        if kind.moments:
            fast = {id(parameter) for parameter in adapter.fast_parameters}
            parameters = [(p, id(p) in fast) for p in adapter.parameters]
        else:
            parameters = [(p, trains_faster(name, p)) for name, p in self._matrices.items()]
        self._undecayed = {id(parameter) for parameter in adapter.undecayed_parameters}
        self.torch = kind.make(self._groups(parameters, train), train)
        # allocated here: running out of memory inside an update could not be undone
        if kind.fill is not None:
            kind.fill(self.torch)
        for parameter in adapter.parameters if kind.moments else ():
            zeros = {name: torch.zeros_like(parameter.detach()) for name in kind.moments}
            self._set(parameter, zeros, 0.0)

    def _groups(self, parameters: list[tuple[nn.Parameter, bool]], train: TrainConfig) -> Groups:
        """Return parameters by weight decay, and by the ratio of their rate to `train.lr`.

        Args:
            parameters: each with whether LoRA+ trains it faster.
            train: the settings.
        """
        faster = 1.0 if train.loraplus_ratio is None else train.loraplus_ratio
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter, is_fast in parameters:
            decays = id(parameter) not in self._undecayed
            groups.setdefault((faster if is_fast else 1.0, decays), []).append(parameter)
        return [
            {
                "params": members,
                "lr": train.lr * ratio,
                "ratio": ratio,
                "weight_decay": train.weight_decay if decays else 0.0,
            }
            for (ratio, decays), members in groups.items()
        ]

    def _set(self, parameter: nn.Parameter, moments: dict[str, torch.Tensor], step: float) -> None:
        state: dict[str, Any] = dict(moments)
        if isinstance(self.torch, torch.optim.AdamW):
            state["step"] = torch.tensor(step, dtype=torch.float32, device=parameter.device)
        self.torch.state[parameter] = state

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of its state, by the names of matrices where they have the shape."""
        if not self._moments:
            state = self._state().items()
            # copies, because matrices of 8 bits share tables, which safetensors refuses
            return {k: v.clone() for k, v in state if isinstance(v, torch.Tensor)}
        states = [self.torch.state[parameter] for parameter in self._adapter.parameters]
        tensors = {_STEP: states[0]["step"]} if "step" in states[0] else {}
        for moment in self._moments:
            values = self._adapter.named([state[moment] for state in states])
            tensors |= {f"{moment}.{name}": value for name, value in values.items()}
        return tensors

    def numbers(self) -> dict[str, float]:
        """Return the rest of its state."""
        return {k: v for k, v in self._state().items() if not isinstance(v, torch.Tensor)}

    def _state(self) -> dict[str, Any]:
        return {
            f"{_STATE}{name}.{key}": value
            for name, matrix in self._matrices.items()
            for key, value in self.torch.state[matrix].items()
            if value is not None
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: Mapping[str, float]) -> None:
        """Set the state that `tensors` and `numbers` returned."""
        stored = {**tensors, **numbers}
        for name, matrix in self._matrices.items():
            prefix = f"{_STATE}{name}."
            self.torch.state[matrix] = {
                key.removeprefix(prefix): self._moved(value, matrix)
                for key, value in stored.items()
                if key.startswith(prefix)
            }
        parameters = self._adapter.parameters
        moments = [values_of(self._adapter, tensors, moment) for moment in self._moments]
        for parameter, *values in zip(parameters, *moments, strict=True) if moments else ():
            step = float(tensors.get(_STEP, 0.0))
            self._set(parameter, dict(zip(self._moments, values, strict=True)), step)

    @staticmethod
    def _moved(value: Any, matrix: nn.Parameter) -> Any:
        return value.to(matrix.device) if isinstance(value, torch.Tensor) else value


def values_of(
    adapter: Adapter, tensors: Mapping[str, torch.Tensor], kind: str
) -> list[torch.Tensor]:
    """Return what a checkpoint holds of a kind, such as a moment, as tensors like `parameters`."""
    device, prefix = adapter.parameters[0].device, f"{kind}."
    return adapter.values(
        {
            name.removeprefix(prefix): value.to(device)
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
    )
