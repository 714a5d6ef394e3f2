"""Finds out whether packed batches of a base give what PEFT gives, before anything is trained.

An architecture that nobody has tested is then slow, and not wrong where the rows show it.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from tinyllama_lab.config.lora import plain_lora
from tinyllama_lab.core.context import raise_if_fatal
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.packed.any_decoder import UnknownPassError
from tinyllama_lab.core.engines.packed.apart import UnknownAttentionError
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_llama
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.meter import free_mib
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.out_of_memory import is_out_of_memory
from tinyllama_lab.errors import ModelError
from tinyllama_lab.metrics import MIB

# LLM.int8 multiplies in 16 bits what lies in a column with an outlier, in whichever row
INT8 = "in int8 the rows of one adapter change what others get"
LENGTHS = (21, 9, 18)  # tokens of the rows: two share a bucket of attention, one has its own
LONGEST_WINDOW = 1024  # where a sliding window is no longer, a row goes beyond it
SCALE = 0.02  # of the random B
BYTES_IN_FLOAT32 = 12  # a parameter of a copy of the base, of joined products, and to spare
NEW_TOKENS = 3  # generated after every row
# What losses and gradients may differ by from PEFT's, as a share. In half precision, rounding
# alone moves gradients of 30 layers by 4 to 7 %, in PEFT as in a pack, and losses by under 0.5 %.
SHARE = 1e-3
LOSS_IN_HALF, GRADIENT_IN_HALF, MOST_ROUNDING = 0.02, 0.05, 0.15
# What other neighbours may change in a row, as a share. The same layout gives the same bits, but
# experts multiply the rows of several sequences together, and some GPU kernels add in any order.
LOSS_BY_NEIGHBOURS, GRADIENT_BY_NEIGHBOURS, GRADIENT_IN_HALF_BY_NEIGHBOURS = 1e-6, 2e-5, 1e-3
_LORA = plain_lora(r=2, targets="all_linear")


def why_not_packed(base: Base, workers: int = 1) -> str | None:
    """Return why adapters of a base cannot train together, or None if they can.

    The forward pass of Llama is that of the tests. Any other is tried here, on a few rows.
    `workers` share the memory of a CPU.
    """
    if base.model.config.model_type == "llama" and why_not_llama(base.model) is None:
        return None
    if getattr(base.model, "is_loaded_in_8bit", False):
        return INT8
    try:
        return _difference(base, workers)
    except ModelError:  # of the adapters that try it
        return "PEFT cannot adapt all of its linear layers"
    except (UnknownPassError, UnknownAttentionError) as error:
        return f"packed batches do not run: {error}"
    except Exception as error:  # raised by the model, in whatever way
        raise_if_fatal(error)
        if is_out_of_memory(error):
            raise
        return f"its forward pass does not take packed rows ({type(error).__name__}: {error})"


def _in_float32(base: Base, workers: int) -> Base | None:
    """Return a copy of a base in half precision, where rounding cannot be the reason.

    None if it is exact already, has 4 bits, or leaves too little memory.
    """
    if base.dtype == torch.float32 or _has_4_bits(base):
        return None
    free = free_mib(base.device) / (workers if base.device.type == "cpu" else 1)
    if BYTES_IN_FLOAT32 * base.parameters / MIB > free:
        return None
    return replace(base, model=copy.deepcopy(base.model).float(), dtype=torch.float32)


def _has_4_bits(base: Base) -> bool:
    return getattr(base.model, "is_loaded_in_4bit", False)


def _difference(base: Base, workers: int) -> str | None:
    """Return in what packed rows differ from rows that PEFT runs alone, or None."""
    rows = _rows(base, 0)
    with closing(PackedEngine(base)) as engine:
        losses, gradient, tokens = _tried(base, engine, rows, together=True)
        reason = _by_neighbours(base, engine, rows, _rows(base, 1))
    if reason is not None:
        precise = _in_float32(base, workers)
        return _difference(precise, workers) if precise else reason
    expected, of_peft, of_transformers = _tried(base, PeftEngine(base), rows, together=False)
    is_exact = base.dtype == torch.float32
    apart = ((losses - expected).abs().max() / expected.abs().mean()).item()
    if not apart <= (SHARE if is_exact else LOSS_IN_HALF):  # NaN neither
        return f"packed rows have other losses than in PEFT, by {apart:.1%}"
    in_half = MOST_ROUNDING if _has_4_bits(base) else GRADIENT_IN_HALF
    apart = ((gradient - of_peft).norm() / of_peft.norm()).item()
    if not apart <= (SHARE if is_exact else in_half):
        if apart <= MOST_ROUNDING and (precise := _in_float32(base, workers)):
            return _difference(precise, workers)
        return f"packed gradients differ from PEFT's by {apart:.1%}"
    # in half precision, rounding decides between tokens that are almost as likely
    if is_exact and tokens != of_transformers:
        return "packed rows generate other tokens than in PEFT"
    return None


def _by_neighbours(
    base: Base, engine: PackedEngine, rows: list[Example], others: list[Example]
) -> str | None:
    """Return what rows get from their neighbours in a pack, or None.

    Every second row is kept, and the rest replaced by others of the same lengths. Unlike the
    difference from PEFT, what the kept rows then give does not depend on rounding.
    """
    is_exact = base.dtype == torch.float32
    most = GRADIENT_BY_NEIGHBOURS if is_exact else GRADIENT_IN_HALF_BY_NEIGHBOURS
    for kept in (0, 1):
        mixed = [row if n % 2 == kept else others[n] for n, row in enumerate(rows)]
        found = [_of_kept(engine, each, kept) for each in (rows, mixed)]
        (losses, gradient), (beside_others, other_gradient) = found
        apart = ((losses - beside_others).abs().max() / losses.abs().mean()).item()
        if not apart <= (LOSS_BY_NEIGHBOURS if is_exact else 0.0):
            return f"packed rows change the losses of their neighbours, by {apart:.1e}"
        apart = ((gradient - other_gradient).norm() / gradient.norm()).item()
        if not apart <= most:
            return f"packed rows change the gradients of their neighbours, by {apart:.1e}"
    return None


def _of_kept(
    engine: PackedEngine, rows: list[Example], kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of every second row, and the gradient of an adapter that all wear."""
    adapter = _random_adapter(engine)
    try:
        losses = engine.example_losses([WorkItem(adapter, row) for row in rows])[kept::2]
        losses.sum().backward()
        return losses.detach().cpu(), adapter.gradients.clone().cpu()
    finally:
        engine.remove(adapter)


def _rows(base: Base, seed: int) -> list[Example]:
    """Return rows of random tokens, of which one is longer than a sliding window."""
    config: Any = base.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    lengths = [*LENGTHS]
    if isinstance(window, int) and window <= LONGEST_WINDOW:
        lengths.append(window + 5)
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = tuple(torch.randint(config.vocab_size, (length,), generator=draw).tolist())
        rows.append(Example(ids, (True,) * length, ids, "", "", ""))
    return rows


def _tried(
    base: Base, engine: Engine[Any], rows: list[Example], together: bool
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Return what rows give with an adapter and without one.

    These are the loss of every row, the adapter's gradient, and generated tokens.
    """
    adapter = _random_adapter(engine)
    try:
        items = [WorkItem(wearer, row) for wearer in (adapter, None) for row in rows]
        batches = [items] if together else [[item] for item in items]
        losses = []
        for batch in batches:
            found = engine.example_losses(batch)
            if found.requires_grad:
                found.sum().backward()
            losses.append(found.detach())
        values = adapter.named([p.grad for p in adapter.parameters if p.grad is not None])
        gradient = torch.cat([values[name].float().flatten() for name in sorted(values)])
        # to an end: where there is none, transformers forbids the tokens that would be one
        tokens = [_until_end(base, ids) for ids in engine.generate(items, NEW_TOKENS, stop=True)]
    finally:
        engine.remove(adapter)
    return torch.cat(losses).cpu(), gradient.cpu(), tokens


def _random_adapter(engine: Engine[Any]) -> Any:
    """Return a new adapter whose B is random, so that all of it has a gradient."""
    adapter = engine.add(_LORA, 0)
    named = adapter.named(adapter.parameters)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(named):
            if ".lora_B." in name:
                noise = torch.randn(named[name].shape, generator=draw)
                named[name] = (SCALE * noise).to(named[name])
        for parameter, value in zip(adapter.parameters, adapter.values(named), strict=True):
            parameter.copy_(value)
    adapter.updated()
    return adapter


def _until_end(base: Base, tokens: list[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    return list(itertools.takewhile(lambda token: token not in base.end_ids, tokens))
