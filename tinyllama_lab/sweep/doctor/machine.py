"""Checks of packages, devices and programs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import webbrowser
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tinyllama_lab.config.schema import Config
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.machine import cpu_name
from tinyllama_lab.sweep.doctor.finding import Finding, ok, problem, warning

PACKAGE = "tinyllama_lab"
_BUSY = 0.5  # of the cores; above it, timings are off
_LITTLE_MIB = 2048  # of free memory
_TRIED_BY = {"nf4": ("nf4", "fp4"), "int8": ("int8",)}  # values of `quant.kind`
_UI = "http://127.0.0.1:5000"


def packages(name: str = PACKAGE) -> Iterator[Finding]:
    """Compare the versions of Python and of all packages with those that this package needs."""
    try:
        metadata, needed = importlib.metadata.metadata(name), importlib.metadata.requires(name)
    except importlib.metadata.PackageNotFoundError:
        yield warning("packages", f"{name} is not installed, so versions are unknown; make setup")
        return
    python, wanted = platform.python_version(), str(metadata["Requires-Python"] or "")
    if python in SpecifierSet(wanted, prereleases=True):
        yield ok("python", f"{python}, {sys.executable}")
    else:
        yield problem("python", f"must be {wanted}, got {python}; make setup PYTHON=python3.12")
    requirements = [Requirement(text) for text in needed or ()]
    count = 0
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            yield problem(
                "packages",
                f"{requirement.name} must be {requirement.specifier}, got {version}; type: "
                f'pip install "{requirement.name}{requirement.specifier}"',
            )
            count = -len(requirements)
    if count > 0:
        yield ok("packages", f"all {count} have versions that {name} can use")


def devices(answer: Mapping[str, Any] | str, config: Config) -> Iterator[Finding]:
    """Judge what the probe of PyTorch found.

    Args:
        answer: of `Forecasting.probe`.
        config: the command, which may need a GPU or quantization.
    """
    if isinstance(answer, str):
        yield problem("torch", f"PyTorch must start, got {answer}; make setup installs it again")
        return
    memory = psutil.virtual_memory()
    yield ok("cpu", f"{cpu_name()}, PyTorch uses {answer['threads']} threads")
    free_mib = memory.available // MIB
    text = f"{free_mib:,} of {memory.total // MIB:,} MiB free"
    few = f"{text}: few models fit; end other programs"
    yield warning("memory", few) if free_mib < _LITTLE_MIB else ok("memory", text)
    yield _gpu(answer, config)
    if not answer["has_openmp"]:
        yield warning("openmp", "this PyTorch has no OpenMP, so it uses one core; make setup")
    yield from _precision(answer, config)
    if answer["device"] == "cpu" or config.hardware.device == "cpu":
        yield _loops(answer["loops"])


def _gpu(answer: Mapping[str, Any], config: Config) -> Finding:
    if answer["gpus"]:
        names = (f"{gpu['name']} ({gpu['memory_mib']:,} MiB)" for gpu in answer["gpus"])
        return ok("gpu", ", ".join(names))
    # a card is only planned for, which the check of the whole command says
    if config.hardware.device == "cuda" and config.hardware.card.name is None:
        return problem(
            "gpu",
            "hardware.device=cuda needs a CUDA GPU, and PyTorch sees none; set "
            "hardware.device=auto, or install the driver and a PyTorch with CUDA",
        )
    apple = " (Apple's is not used)" if answer["has_mps"] else ""
    return ok("gpu", f"no CUDA GPU{apple}: training runs on the CPU")


def _precision(answer: Mapping[str, Any], config: Config) -> Iterator[Finding]:
    wanted = config.train.precision
    if answer["bf16"]:
        word = problem if wanted == "bf16" else warning
        yield word("bf16", f"a matmul fails ({answer['bf16']}); set train.precision=fp32")
    elif answer["has_fast_bf16"]:
        yield ok("bf16", "computed by the hardware; train.precision=auto takes it")
    elif wanted == "bf16":
        yield warning("bf16", "is emulated here, and slow; set train.precision=auto")
    else:
        yield ok("bf16", "is emulated here; train.precision=auto takes another precision")
    for kind in ("nf4", "int8"):
        reason, is_used = answer[kind], config.quant.kind in _TRIED_BY[kind]
        if not reason:
            yield ok(kind, f"bitsandbytes multiplies on {answer['device']}")
            continue
        word = problem if is_used else warning
        name = config.quant.kind if is_used else kind
        text = f"quant={name} needs bitsandbytes, whose matmul fails here ({reason})"
        yield word(kind, f"{text}; set quant=none, or type: pip install -U bitsandbytes")


def _loops(reason: str) -> Finding:
    if not reason:
        return ok("compiler", "the loops in C++ are compiled")
    if os.environ.get("CXX") == "none":
        return warning("compiler", "CXX=none turns the loops in C++ off: training is slower")
    return warning(
        "compiler",
        f"no loops in C++, so training on the CPU is slower: {reason}; install g++, or name a "
        "compiler in CXX",
    )


def load(cores: int | None = None, average: float | None = None) -> Finding:
    """Say whether other programs keep the cores busy.

    Args:
        cores: of the machine; None asks the system.
        average: of the last minute; None asks the system.
    """
    cores = cores or os.cpu_count() or 1
    busy = os.getloadavg()[0] if average is None else average
    text = f"{busy:.1f} of {cores} cores were busy in the last minute"
    if busy > _BUSY * cores:
        return warning("load", f"{text}: timings will be off; end other programs to measure")
    return ok("load", text)


def browser() -> Finding:
    """Say whether a browser can show the pages."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        host = platform.node() or "this-machine"
        return warning(
            "browser",
            f"none here: `ui` is at {_UI}, from elsewhere after ssh -L 5000:127.0.0.1:5000 {host}",
        )
    return ok("browser", f"one is here; `ui` is at {_UI}")


def llama_cpp() -> Finding:
    """Say whether exported GGUF files can be measured."""
    if importlib.util.find_spec("llama_cpp") is None:
        return warning(
            "llama.cpp",
            "not installed, so exported GGUF files cannot be measured; if you need it, type: pip "
            "install llama-cpp-python",
        )
    return ok("llama.cpp", "is installed")
