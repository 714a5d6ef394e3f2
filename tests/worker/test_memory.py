"""The plan for the memory: micro-batch first, then recomputation, then fewer adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.llamas import WORDS, base_of, example, examples, items_of, llama, settings
from tests.packs import QUIET, Lab, Wrapped, quickly
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.generate import cache_bytes
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.load import Scored, scoring_load
from tinyllama_lab.core.meter import _container_bytes
from tinyllama_lab.core.training import memory
from tinyllama_lab.core.training.memory import (
    HEAP_SLACK,
    LOGITS_MIB,
    Planner,
)
from tinyllama_lab.metrics import MIB

KERNELS = 192
LAYERS, WIDTH, PER_TOKEN = 4, 256, 0.5  # MiB that a token keeps
ADAPTER = 10.0  # MiB


class FakeAdapter:
    """An adapter without parameters."""

    parameters: list[torch.nn.Parameter] = []
    trainable_params = 0


class FakeEngine:
    """Keeps a fixed number of bytes for every token of an example."""

    grows_evenly = False
    max_concurrent = None
    checkpointing = False
    parameter_bytes = 16

    def __init__(self) -> None:
        self.wanted: list[bool] = []

    def checkpoint_activations(self, wanted: bool) -> None:
        self.wanted.append(wanted)
        self.checkpointing = wanted

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        tokens = sum(len(item.example.ids) for item in items)
        kept = torch.zeros(1, tokens, int(PER_TOKEN * MIB / 4), requires_grad=True)
        return (kept * 2.0).exp().sum(dim=(0, 2))[:1]  # exp keeps its result

    def random_state(self) -> dict[str, torch.Tensor]:
        return {}

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        return None


def planner(
    free: float,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int = 1024,
    checkpointing: bool = False,
    workers: int | None = None,
) -> tuple[Planner, Any]:
    """Return a planner that has measured, on a machine with `free` MiB of memory."""
    config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH, vocab_size=WORDS)
    base = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        model=SimpleNamespace(config=config, parameters=list),
    )
    context: Any = SimpleNamespace(
        base=base,
        memory=SimpleNamespace(now_mib=lambda: 100.0),
        hardware=SimpleNamespace(gradient_checkpointing=checkpointing, workers=workers),
        micro_batch_tokens=tokens,
        kernels=KERNELS,
    )
    monkeypatch.setattr(memory, "free_mib", lambda device: free)
    context_class: Any = type("WorkerContext", (), {"fitting_tokens": _Setter()})
    shaped = context_class()
    vars(shaped).update(vars(context))
    engine: Any = FakeEngine()
    made = Planner(shaped, engine)
    made.measure(FakeAdapter(), example(8))
    return made, shaped


class _Setter:
    """Sets the micro-batch of all later forward passes."""

    def __set__(self, context: Any, tokens: int) -> None:
        context.micro_batch_tokens = tokens


def needed(tokens: int, adapters: int, checkpointing: bool = False) -> float:
    """Return the needed MiB: kept tokens, two blocks with gaps, a chunk of logits, adapters."""
    kept = tokens * PER_TOKEN
    block = kept / LAYERS
    if checkpointing:
        kept = block + tokens * LAYERS * WIDTH * 4 / MIB
    return HEAP_SLACK * (kept + 2 * block) + LOGITS_MIB + 10 * adapters


def test_a_pack_that_fits_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, context = planner(needed(1024, 3) + 1, monkeypatch)
    assert made.plan_training([ADAPTER] * 3, 60, False) == 3
    assert made.facts() == {
        "micro_batch_tokens": 1024,
        "gradient_checkpointing": False,
        "baseline_mib": 100,
        "kept_mib_per_token": PER_TOKEN,
        "largest_micro_batch": 0,
    }
    assert context.micro_batch_tokens == 1024


@pytest.mark.parametrize(("fits", "tokens"), [(512, 512), (300, 256), (256, 256)])
def test_the_micro_batch_is_reduced_first(
    fits: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, context = planner(needed(fits, 3) + 1, monkeypatch)
    assert made.plan_training([ADAPTER] * 3, 60, False) == 3
    assert (context.micro_batch_tokens, made.checkpointing) == (tokens, False)


def test_activations_are_recomputed_second(monkeypatch: pytest.MonkeyPatch) -> None:
    made, context = planner(needed(256, 5, checkpointing=True) + 1, monkeypatch)
    assert made.plan_training([ADAPTER] * 5, 60, False) == 5
    assert (context.micro_batch_tokens, made.checkpointing) == (256, True)


def test_a_micro_batch_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, context = planner(needed(512, 3) + 1, monkeypatch)
    made.plan_training([ADAPTER] * 3, 60, True)
    assert context.micro_batch_tokens == 1024


def test_the_pack_is_split_last(monkeypatch: pytest.MonkeyPatch) -> None:
    free = needed(256, 2, checkpointing=True) + 1
    assert free < needed(256, 1)
    made, context = planner(free, monkeypatch)
    assert made.plan_training([ADAPTER] * 5, 60, False) == 2
    assert (context.micro_batch_tokens, made.checkpointing) == (256, True)
    assert made._engine.checkpointing is True


def test_workers_side_by_side_share_the_memory_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = needed(256, 2, checkpointing=True) + 1
    made, _ = planner(3 * free, monkeypatch, workers=3)
    assert made.plan_training([ADAPTER] * 5, 60, False) == 2


@pytest.mark.parametrize("free", [0.0, -5.0])
def test_one_adapter_and_the_longest_example_are_always_tried(
    free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, context = planner(free, monkeypatch)
    assert made.plan_training([ADAPTER] * 2, 700, False) == 1
    assert (context.micro_batch_tokens, made.checkpointing) == (700, True)


def test_adapters_are_counted_by_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    free = needed(256, 5, checkpointing=True) + 1
    made, _ = planner(free, monkeypatch, tokens=256, checkpointing=True)
    assert made.plan_training([ADAPTER, 3 * ADAPTER, ADAPTER, ADAPTER], 60, False) == 3
    free = needed(256, 5, checkpointing=True) + 1
    made, _ = planner(free, monkeypatch, tokens=256, checkpointing=True)
    assert made.plan_training([3 * ADAPTER, 3 * ADAPTER], 60, False) == 1


def test_a_low_token_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    free = needed(64, 1, checkpointing=True) + 1
    made, context = planner(free, monkeypatch, tokens=64, checkpointing=True)
    assert made.plan_training([ADAPTER] * 2, 8, False) == 1 and context.micro_batch_tokens == 64


def test_gradient_checkpointing_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = planner(10**6, monkeypatch, checkpointing=True)
    assert (
        made.plan_training([ADAPTER], 8, False) == 1
        and made.facts()["gradient_checkpointing"] is True
    )
    assert made._engine.wanted == [False, True]  # measured without, trained with


def test_shrinking_ends_at_the_longest_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, context = planner(10**6, monkeypatch, tokens=30)
    made.plan_training([ADAPTER], 8, False)
    said = []
    while done := made.remedy(torch.OutOfMemoryError()):
        said.append(done)
    assert said == [
        "out of memory; micro-batches of 15 tokens now",
        "out of memory; micro-batches of 7 tokens now",
        "out of memory; activations are recomputed now",
    ]
    assert (context.micro_batch_tokens, made.checkpointing) == (7, True)


def test_the_prediction_is_the_highest_and_includes_used_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, _ = planner(10**6, monkeypatch)
    made.predict([ADAPTER] * 2, [300])
    made.predict([ADAPTER], [100])
    kept, logits = 300 * PER_TOKEN, 300 * WORDS * 4 / MIB
    initial = ADAPTER * 4 / 16  # PEFT's values, beside weight, gradient and two moments
    kernels = memory.SHAPE_KERNELS_MIB
    expected = 100 + 2 * ADAPTER + kept + 2 * kept / LAYERS + logits + initial + kernels
    assert made.predicted() == {
        "memory/predicted_mib": pytest.approx(memory.PEAKS_VARY * expected)
    }


def test_what_is_measured_keeps_every_block_though_training_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, _ = planner(10**6, monkeypatch, checkpointing=True)
    made.plan_training([ADAPTER], 250, fixed=False)
    made.predict([ADAPTER], [50])
    least = 100 + ADAPTER + 250 * PER_TOKEN  # of the longest example, before the first step
    overhead = memory.SHAPE_KERNELS_MIB + ADAPTER
    # a forward pass: six times what a block keeps, and logits
    overhead += 6 * 250 * PER_TOKEN / LAYERS + 250 * WORDS * 4 / MIB
    predicted = made.predicted()["memory/predicted_mib"]
    assert least < predicted / memory.PEAKS_VARY < least + overhead


def test_gaps_in_the_heap_grow_with_micro_batches_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for count, later in ((1, 0), (2, 0), (8, 0), (300, 10**9)):
        made, _ = planner(10**6, monkeypatch)
        made.pass_over(later)
        made.predict([ADAPTER], list(range(301 - count, 301)))
        peaks.append(made.predicted()["memory/predicted_mib"])
    assert peaks == sorted(set(peaks))
    kernels = memory.PINNED * memory.KERNEL_MIB * KERNELS - memory.SHAPE_KERNELS_MIB
    kept = 300 * PER_TOKEN
    gaps = memory.MOST_GAPS * (kept + memory.BLOCKS_IN_HAND * kept / LAYERS)
    assert peaks[-1] - peaks[0] == pytest.approx(memory.PEAKS_VARY * (gaps + kernels))


def test_a_gpu_has_no_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    made, context = planner(10**6, monkeypatch)
    context.base.device = torch.device("meta")
    made.predict([ADAPTER], [300] * 8)
    kept = 300 * PER_TOKEN
    expected = 100 + ADAPTER + kept + 2 * kept / LAYERS + LOGITS_MIB
    assert made.predicted() == {"memory/predicted_mib": pytest.approx(expected)}


# ---- what is measured ----------------------------------------------------------------------


def kept_bytes(engine: Any, items: Sequence[WorkItem[Any]]) -> int:
    """Count the bytes that are kept for the backward pass, each storage once."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in engine.held}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = engine.example_losses(items)
    assert losses.requires_grad
    return sum(found.values())


class Held(Wrapped):
    """Records which tensors belong to the base."""

    held: list[torch.Tensor]

    @classmethod
    def on(cls, make: Callable[[Any], Any]) -> Held:
        base = base_of(llama())
        made = cls(make(base))
        made.held = list(base.model.state_dict().values())
        return made


def test_kept_bytes_grow_with_the_tokens() -> None:
    engine = Held.on(PackedEngine)
    adapter = engine.add(settings(), 0)
    one = kept_bytes(engine, items_of(adapter, [example(40)]))
    two = kept_bytes(engine, items_of(adapter, [example(40), example(40)]))
    five = kept_bytes(engine, items_of(adapter, [example(40)] * 5))
    # tables of positions are there once
    assert five - two == pytest.approx(3 * (two - one), rel=0.01)
    assert two == pytest.approx(2 * one, rel=0.1)


def test_gradient_checkpointing_keeps_fewer_bytes() -> None:
    engine = Held.on(PackedEngine)
    items = items_of(engine.add(settings(), 0), examples((40, 30)))
    whole = kept_bytes(engine, items)
    engine.checkpoint_activations(True)
    assert kept_bytes(engine, items) < 0.4 * whole


@pytest.mark.parametrize("make", [PackedEngine, PeftEngine])
@pytest.mark.parametrize("rank", [2, 32])
def test_the_measurement_is_near_the_kept_bytes(rank: int, make: Any, lab: Lab) -> None:
    engine = Held.on(make)
    context = lab.context()
    context.base = base_of(llama())
    made = Planner(context, engine)
    item = items_of(engine.add(settings(r=rank), 0), [example(200)])[0]
    made.measure(item.adapter, item.example)
    measured = (made._mib_per_token or 0.0) * 200 * MIB
    assert measured == pytest.approx(kept_bytes(engine, [item]), rel=0.15)


@pytest.mark.parametrize("make", [PackedEngine, PeftEngine])
def test_measuring_changes_no_weight_and_no_random_state(make: Any, lab: Lab) -> None:
    engine = make(lab.base)
    made = Planner(lab.context(), engine)
    adapter = engine.add(settings(dropout=0.5), 0)
    before = [parameter.detach().clone() for parameter in adapter.parameters]
    state = torch.get_rng_state()
    made.measure(adapter, example(20))
    engine.remove(adapter)
    assert made.is_ready and torch.equal(torch.get_rng_state(), state)
    for parameter, value in zip(adapter.parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None or not parameter.grad.any()


def test_a_pack_that_memory_splits_trains_every_trial(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    monkeypatch.setattr(memory, "free_mib", lambda device: LOGITS_MIB + 0.0)
    trials = [lab.trial({**QUIET, "seed": seed}) for seed in (1, 2, 3)]
    found = lab.run(trials, lab.context())
    facts = [each.environment for each in found]
    assert [each.error for each in found] == [None] * 3
    assert all(each["gradient_checkpointing"] for each in facts)
    assert all(each["adapters_at_once"] == 1 for each in facts)
    assert all(each["micro_batch_tokens"] == 256 for each in facts)


@pytest.mark.parametrize(
    ("limit", "current", "free"),
    [("max", "5", float("inf")), ("100", "60", 70.0), ("100", "160", 0.0)],
)
def test_the_limit_of_a_container_counts_without_its_file_cache(
    limit: str, current: str, free: float, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(current + "\n")
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 20\ninactive_file 10\n")
    assert _container_bytes(tmp_path) == free
    (tmp_path / "memory.stat").unlink()
    assert _container_bytes(tmp_path) <= free
    assert _container_bytes(tmp_path / "nowhere") == float("inf")


@pytest.mark.parametrize("kind", [PackedEngine, PeftEngine])
def test_only_prompts_that_are_answered_need_a_cache(kind: Any) -> None:
    base = base_of(llama())
    counts = {"generations": 2, "max_new_tokens": 10, "latency_tokens": 4, "latency_batch": 3}
    evaluation: Any = SimpleNamespace(**counts)
    lengths = (5, 7, 6, 900)  # the last is neither answered nor timed
    rows = [replace(row, prompt_ids=row.ids) for row in examples(lengths)]
    engine = kind(base)
    adapters = [engine.add(settings(r=2), 0)] if kind is PeftEngine else [object(), object()]
    scored = [Scored(each, rows, [], evaluation) for each in (None, *adapters)]
    load = scoring_load(base, engine, scored, 2000)
    together = 2 * len(scored) if kind is PackedEngine else 2  # PEFT answers for one at a time
    tokens = max(together * (7 + 10), 3 * (7 + 4 + 1))
    assert load.cache_mib == cache_bytes(base, tokens) / MIB
