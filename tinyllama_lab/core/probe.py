"""What PyTorch can do on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from tinyllama_lab.core.engines.packed import fused_cpu
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.machine import cpu_has_fast_bf16

_SIZE = 64  # of the matrices that are multiplied
_MOST_WRONG = 0.5  # relative error of a quantized matmul; NF4 is off by about a tenth


def probe() -> dict[str, Any]:
    """Return devices, threads, precision, quantization and compiled loops."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "device": device.type,
        "gpus": _gpus(),
        "has_mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "has_openmp": torch.backends.openmp.is_available(),
        "has_fast_bf16": _has_fast_bf16(device),
        "bf16": _problem(lambda: _check(_plain(torch.bfloat16, device), device)),
        "nf4": _problem(lambda: _check(_quantized("nf4", device), device)),
        "int8": _problem(lambda: _check(_quantized("int8", device), device)),
        "loops": _why_no_loops(),
    }


def _gpus() -> list[dict[str, Any]]:
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_mib": gpu.total_memory // MIB} for gpu in gpus]


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_has_fast_bf16()


def _problem(check: Callable[[], None]) -> str:
    """Return why a check failed, or an empty string."""
    try:
        check()
    except Exception as error:  # a library may raise anything, and the reason is what is asked
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _weight() -> torch.Tensor:
    return torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)) / 8


def _plain(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    linear = torch.nn.Linear(_SIZE, _SIZE, bias=False)
    linear.weight.data = _weight()
    return linear.to(device, dtype)


def _quantized(kind: str, device: torch.device) -> torch.nn.Module:
    """Return a linear layer in 4 or 8 bits, as transformers makes it."""
    import bitsandbytes as bnb

    if kind == "int8":
        linear: Any = bnb.nn.Linear8bitLt(_SIZE, _SIZE, bias=False, has_fp16_weights=False)
        linear.weight = bnb.nn.Int8Params(_weight(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind, "compute_dtype": torch.float32}
        linear = bnb.nn.Linear4bit(_SIZE, _SIZE, bias=False, **options)
        linear.weight = bnb.nn.Params4bit(_weight(), requires_grad=False, quant_type=kind)
    module: torch.nn.Module = linear.to(device)
    return module


@torch.no_grad()
def _check(linear: torch.nn.Module, device: torch.device) -> None:
    """Multiply, and compare with float32.

    Raises:
        ArithmeticError: the result is another one.
    """
    x = torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(1))
    parameter = next(linear.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    found = linear(x.to(device, dtype)).float().cpu()
    expected = x @ _weight().T
    wrong = float((found - expected).norm() / expected.norm())
    if not wrong < _MOST_WRONG:  # true for NaN
        raise ArithmeticError(f"the result is off by {wrong:.0%}")


def _why_no_loops() -> str:
    """Return why the loops in C++ cannot be used on the CPU, or an empty string."""
    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    fused_cpu.logger.addHandler(handler)
    fused_cpu.logger.setLevel(logging.INFO)
    if fused_cpu.supports(torch.zeros(1)):
        return ""
    return reasons[-1].rpartition("slower: ")[2] if reasons else "unknown"
