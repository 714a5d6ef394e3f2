"""Compiles and calls the loops of `fused_cpu.cpp` and `lora_cpu.cpp`, if there is a C++ compiler.

Between two matmuls, PyTorch passes over memory once for every operation; a fused loop does so
once. The matmuls of adapters are too small for PyTorch's calls. Compiling takes about three
seconds, once per machine: the library is kept in the user's cache. Without a compiler, or where
PyTorch does not use GNU's OpenMP, the callers use PyTorch operations, which give the same numbers
up to the rounding of sums and exponentials; the log says so. The variable CXX names another
compiler; `CXX=none` turns the loops off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.data.cache import made_once
from tinyllama_lab.errors import CacheError

logger = logging.getLogger(__name__)

_LIBRARY = "fused_cpu.so"
_SOURCES = [Path(__file__).with_name(name) for name in ("fused_cpu.cpp", "lora_cpu.cpp")]
_HEADER = Path(__file__).with_name("bfloat16.h")
LONGEST = 4096  # keys of a row of attention scores, as in the source
_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    # vectorized loops need these two; NaN and infinity still count
    *("-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
    # peeled iterations would make the order of a sum depend on the address of a tensor
    *("--param", "vect-max-peeling-for-alignment=0"),
]
_COMPILER_TIMEOUT_S = 120
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TYPES = {"i": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
_PARAMETERS = {  # after the number of threads, in the letters of `_TYPES`
    "rms_norm": "nnppfipp",
    "rms_norm_backward": "nnppppp",
    "swiglu": "nnpp",
    "swiglu_backward": "nnppp",
    "cross_entropy": "nnppip",
    "causal_softmax": "nnnfp",
    "causal_softmax_backward": "nnnpfp",
    "gather": "nnnnnppfpppp",
    "scatter": "nnnnnppfpppp",
    "project": "nnnpnpifpn",
    "expand": "nnnpnpifpn",
    "reduce": "nnnpnpnfpi",
    "rescale": "nnpnppnpn",
    "rescale_backward": "nnpnpnpppn",
}


def can_run(*tensors: torch.Tensor) -> bool:
    """Return whether there are loops for these tensors: contiguous, on the CPU, of one dtype."""
    dtype = tensors[0].dtype
    return all(supports(t) and t.is_contiguous() and t.dtype == dtype for t in tensors)


def supports(tensor: torch.Tensor) -> bool:
    """Return whether there are loops for such tensors, contiguous or slices of columns."""
    # fake tensors, which have no memory, are a subclass
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return is_plain and tensor.dtype in _DTYPES and _library() is not None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rstd: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `x [rows, size]` and 1 / root mean square, which may be given."""
    out, measure = torch.empty_like(x), rstd is None
    if rstd is None:
        rstd = torch.empty(len(x), 1, dtype=torch.float32)
    _call("rms_norm", x.dtype, *x.shape, x, weight, eps, int(measure), rstd, out)
    return out, rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `x [rows, size]`."""
    out = torch.empty_like(x)
    _call("rms_norm_backward", x.dtype, *x.shape, grad, x, weight, rstd, out)
    return out


def swiglu(source: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up [rows, size]` of `source = [gate | up]`."""
    out = source.new_empty(len(source), source.shape[1] // 2)
    _call("swiglu", source.dtype, *out.shape, source, out)
    return out


def swiglu_backward(grad: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `source = [gate | up]`."""
    out = torch.empty_like(source)
    _call("swiglu_backward", source.dtype, *grad.shape, grad, source, out)
    return out


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, wanted: bool
) -> None:
    """Fill `losses [rows]` in float32.

    If the gradient is wanted, it overwrites `logits [rows, size]`.
    """
    _call("cross_entropy", logits.dtype, *logits.shape, logits, targets, int(wanted), losses)


def causal_softmax_(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Overwrite `scores [matrices, rows, size]` by causal probabilities; return them.

    Row n belongs to query `n % size`, whose keys are 0 to `n % size`.

    Raises:
        ValueError: a row is longer than `LONGEST`.
    """
    if scores.shape[2] > LONGEST:
        raise ValueError(f"rows must have at most {LONGEST} scores, got {scores.shape[2]}")
    _call("causal_softmax", scores.dtype, *scores.shape, scale, scores)
    return scores


def causal_softmax_backward_(
    grad: torch.Tensor, probabilities: torch.Tensor, scale: float
) -> torch.Tensor:
    """Overwrite the gradient of the probabilities by that of the scores; return it."""
    _call("causal_softmax_backward", grad.dtype, *grad.shape, probabilities, scale, grad)
    return grad


def move(
    heads: torch.Tensor,
    tokens: torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    turn: int,
    back: bool = False,
) -> None:
    """Copy the heads of tokens to `heads [sequences, heads, longest, size]`, or back.

    Args:
        heads: zero after the end of a sequence; contiguous.
        tokens: `[tokens, columns]`, of which the first hold the heads.
        spans: first token and length of every sequence.
        rotary: cosines and sines `[positions, size]`.
        turn: 1 to apply rotary positions, -1 for their inverse, 0 for neither.
        back: from `heads` to `tokens`.
    """
    sequences, count, longest, size = heads.shape
    sizes = sequences, count, longest, size, tokens.stride(0)
    tensors = (tokens, heads)
    _call("scatter" if back else "gather", heads.dtype, *sizes, *spans, turn, *rotary, *tensors)


def project(x: torch.Tensor, weight: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Compute `out [tokens, rank] = scale * x [tokens, inputs] @ weight [inputs, rank]`.

    This function and the next two take slices of columns of `x`, `h` and `out`; weights and
    totals are contiguous or transposed.

    Raises:
        ValueError: dtypes or strides are others.
    """
    _check_dtypes(x.dtype, weight, out)
    sizes = *x.shape, weight.shape[1]
    _call("project", x.dtype, *sizes, *_rows(x), *_matrix(weight), scale, *_rows(out))


def expand_(out: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
    """Compute `out [tokens, columns] += scale * h [tokens, rank] @ weight [rank, columns]`.

    Raises:
        ValueError: as in `project`.
    """
    _check_dtypes(h.dtype, weight, out)
    sizes = *h.shape, weight.shape[1]
    _call("expand", h.dtype, *sizes, *_rows(h), *_matrix(weight), scale, *_rows(out))


def reduce_(total: torch.Tensor, h: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """Compute `total [rank, columns] += scale * h [tokens, rank].T @ x [tokens, columns]`.

    Args:
        total: in float32.
        h: the left factor.
        x: the right factor.
        scale: a factor.

    Raises:
        ValueError: as in `project`.
    """
    _check_dtypes(h.dtype, x)
    _check_dtypes(torch.float32, total)
    sizes = *h.shape, x.shape[1]
    _call("reduce", h.dtype, *sizes, *_rows(h), *_rows(x), scale, *_matrix(total))


def rescale_(
    rows: torch.Tensor, gains: torch.Tensor, undropped: torch.Tensor | None, sums: torch.Tensor
) -> None:
    """Fill `sums = rows - undropped`, then `rows = sums * gains + undropped`.

    Args:
        rows: `[tokens, width]`; its rows may be slices, as those of the others.
        gains: `[width]` in float32.
        undropped: `[tokens, width]`; None for zeros.
        sums: `[tokens, width]`.
    """
    _check_dtypes(rows.dtype, sums, *([] if undropped is None else [undropped]))
    _check_dtypes(torch.float32, gains)
    past = (0, 0) if undropped is None else _rows(undropped)
    _call("rescale", rows.dtype, *rows.shape, *_rows(rows), gains, *past, *_rows(sums))


def rescale_backward(
    grad: torch.Tensor, sums: torch.Tensor, gains: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out = grad * gains`, all but `gains [width]` as `[tokens, width]`.

    Returns:
        The sums of `grad * sums` over the tokens, `[width]` in float32.
    """
    _check_dtypes(grad.dtype, sums, out)
    _check_dtypes(torch.float32, gains)
    products = torch.empty_like(gains)
    sizes = grad.shape
    tensors = *_rows(grad), *_rows(sums), gains, products, *_rows(out)
    _call("rescale_backward", grad.dtype, *sizes, *tensors)
    return products


def _check_dtypes(dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    """Refuse what the loops would read as other numbers."""
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise ValueError(f"the dtype must be {dtype}, got {tensor.dtype}")


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a tensor and the distance of its rows."""
    if tensor.stride(1) != 1 and tensor.shape[1] != 1:
        raise ValueError(f"rows must be contiguous, got strides {tensor.stride()}")
    return tensor, tensor.stride(0)


def _matrix(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a tensor and whether its memory holds the transpose."""
    if tensor.is_contiguous():
        return tensor, 0
    if not tensor.T.is_contiguous():
        raise ValueError(f"it must be contiguous or transposed, got strides {tensor.stride()}")
    return tensor, 1


def _call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | float) -> None:
    library = _library()
    assert library is not None, "callers ask `can_run` first"
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(library, f"{name}_{_DTYPES[dtype]}")(torch.get_num_threads(), *values)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if there is none; the log says why."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if reason := _why_not(command):
        logger.info("no fused loops, training is slower: %s", reason)
        return None
    try:
        texts = [path.read_text(encoding="utf-8") for path in (*_SOURCES, _HEADER)]
        made_of = "\n".join([*texts, _run([*command, "--version"]), *command, *_FLAGS, _cpu()])
        name = f"fused_cpu-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
        folder = made_once(name, functools.partial(_compile, command))
        before = _openmp_runtimes()
        library = ctypes.CDLL(str(folder / _LIBRARY))
    except (OSError, CacheError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).splitlines()
        text = " | ".join(lines[:5])
        logger.warning("no fused loops, training is slower: %s failed: %s", command[0], text)
        return None
    if added := _openmp_runtimes() - before:  # it would have threads of its own
        logger.warning("no fused loops, training is slower: %s uses %s", command[0], added)
        return None
    for kernel, letters in _PARAMETERS.items():
        for dtype in _DTYPES.values():
            function = getattr(library, f"{kernel}_{dtype}")
            function.argtypes = [_TYPES[letter] for letter in f"i{letters}"]
            function.restype = None
    return library


def _why_not(command: list[str]) -> str | None:
    """Return why the loops cannot be compiled here, or None."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not a C++ compiler of this machine"
    runtimes = _openmp_runtimes()
    if not runtimes or not all(name.startswith("libgomp") for name in runtimes):
        return f"PyTorch must use GNU's OpenMP, got {', '.join(sorted(runtimes)) or 'none'}"
    return None


def _compile(command: list[str], folder: Path) -> None:
    _run([*command, *_FLAGS, *map(str, _SOURCES), "-o", str(folder / _LIBRARY)])


def _run(command: list[str]) -> str:
    """Return what a command prints."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    printed: str = subprocess.run(command, timeout=_COMPILER_TIMEOUT_S, **options).stdout
    return printed


def _openmp_runtimes() -> set[str]:
    """Return the files of OpenMP runtimes in this process; none where that is unknown."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return set()
    return set(re.findall(r"/(lib[gi]?omp[^/\n]*\.so[^/\n]*)", maps))


def _cpu() -> str:
    """Return the instructions of this CPU, for which the library is compiled."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
