"""Chooses the model and data of a command that names none (`profile=auto`), without torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import yaml

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.axes import shown_name
from tinyllama_lab.config.schema import Config
from tinyllama_lab.data import hub


@cache
def options_of(profile: str) -> dict[str, str]:
    """Return the options that a profile picks: `{"model": "smollm2", "data": "travel"}`."""
    defaults = yaml.safe_load((CONF_DIR / "profile" / f"{profile}.yaml").read_text())["defaults"]
    return {
        # an entry of the file is `override /model: smollm2`
        group.removeprefix("override /"): option
        for entry in defaults
        for group, option in entry.items()
    }


def auto_profile() -> tuple[str, str]:
    """Return the profile that `auto` means on this machine, and the reason."""
    if has_cuda():
        return "tinyllama", "a CUDA GPU is here"
    if hub.has_tinyllama():
        return "tinyllama", "TinyLlama's weights are in the local cache"
    return "embedded", "no CUDA GPU, and TinyLlama's weights are not in the local cache"


def auto_option(group: str) -> str:
    """Return the option of a configuration group that `auto` means on this machine."""
    return options_of(auto_profile()[0])[group]


def announcement(configs: Sequence[Config]) -> str:
    """Return the line that names model and data, why they were chosen, and the alternative."""
    pairs = list(dict.fromkeys((config.model.name, config.data.name) for config in configs))
    called = dict.fromkeys(
        f"{shown_name(vars(config.model))} on {shown_name(vars(config.data))}"
        for config in configs
    )
    names = ", ".join(called)
    profile = configs[0].profile
    if profile != "auto":
        return f"profile={profile}: {names}"
    chosen, reason = auto_profile()
    # a typed model or data set, or several of them
    if pairs != [(options_of(chosen)["model"], options_of(chosen)["data"])]:
        return f"model and data as asked for: {names}"
    other = "embedded" if chosen == "tinyllama" else "tinyllama"
    return f"profile=auto chose {chosen} ({reason}): {names}; force the other with profile={other}"


def has_cuda() -> bool:
    """Return whether the NVIDIA driver sees a GPU."""
    return gpu_count() > 0


def gpu_count() -> int:
    """Return the number of GPUs that the NVIDIA driver sees under `CUDA_VISIBLE_DEVICES`.

    The driver library is asked directly: importing torch would take seconds.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    # `cuInit` fails where the library is installed but no GPU can be used
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
