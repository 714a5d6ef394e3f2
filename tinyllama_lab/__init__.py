"""Sweeps of LoRA and QLoRA fine-tunes of small language models, run and compared.

    import tinyllama_lab as lab

    study = lab.run_sweep(["lora.r=8,16", "data.n=64"], study="ranks")
    print(study.recommendation())
    study.to_frame()

docs/python-api.md shows more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllama_lab.errors import LabError
    from tinyllama_lab.report.loaded_study import Recommendation, Study, Verdict, load_study
    from tinyllama_lab.report.loaded_trial import Trial
    from tinyllama_lab.sweep.python_api import run_sweep

__version__ = "0.1.0"
# Raised by hand when a change may move the losses of trials by more than their last digits.
# 2: PiSSA and OLoRA in bfloat16; weight decay spares norms and biases of a fully trained base.
NUMERICS = 2
__all__ = [
    "LabError",
    "Recommendation",
    "Study",
    "Trial",
    "Verdict",
    "load_study",
    "run_sweep",
]
_READING = "tinyllama_lab.report.loaded_study"
_MODULES = {"LabError": "tinyllama_lab.errors", "run_sweep": "tinyllama_lab.sweep.python_api"}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: the command line pays for none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, _READING)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
