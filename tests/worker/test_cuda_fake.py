"""The packed engine on CUDA, without a GPU: devices, dtypes, shapes and waits of the host.

`tests/fake_cuda.py` says what a fake device can show, and what it cannot: values and speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from tests.fake_cuda import A100, H100, T4, FakeCard, backward, fake_cuda, make_4_bit, tinyllama
from tests.llamas import (
    SHAPES,
    base_of,
    example,
    examples,
    gradients,
    items_of,
    llama,
    make_b_random,
    settings,
)
from tests.packs import Lab, never, quickly
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.elementwise import SwiGlu
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.meter import SHARE
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.core.training.loop import train_round
from tinyllama_lab.core.training.memory import LOGITS_MIB, Planner
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.trial import TrialFolder

BF16, FP16 = torch.bfloat16, torch.float16
CARDS = {"H100": (H100, BF16), "A100": (A100, BF16), "T4": (T4, FP16)}
MIXED = [settings(r=8), settings(r=16, targets="attention_qv"), settings(r=5, targets=["up_proj"])]
ROWS = examples((31, 64, 100, 17))
on_cards = pytest.mark.parametrize(("card", "dtype"), CARDS.values(), ids=CARDS)
Plant = Callable[[torch.Tensor], torch.Tensor]


def pack(base: Base, configs: list[LoraConfig] = MIXED, **options: Any) -> tuple[Any, list[Any]]:
    """Return an engine and work for an adapter of each configuration."""
    engine = PackedEngine(base, **options)
    adapters = [engine.add(config, seed) for seed, config in enumerate(configs)]
    return engine, [item for adapter in adapters for item in items_of(adapter, ROWS, 1)]


def check_step(engine: PackedEngine, items: list[WorkItem[Any]]) -> None:
    """Run forward and backward of a micro-batch, and check what they leave."""
    losses = engine.example_losses(items)
    assert (losses.shape, losses.dtype, losses.is_cuda) == ((len(items),), torch.float64, True)
    losses.sum().backward()
    for adapter in {id(item.adapter): item.adapter for item in items}.values():
        for name, matrix in gradients(adapter).items():
            assert (matrix.dtype, matrix.is_cuda) == (torch.float32, True), name


class Rounds:
    """Trainers on a base, and the rounds that they take."""

    def __init__(self, base: Base, configure: Any, folder: Path) -> None:
        changes = [
            {"lora.r": 8, "train.batch_size": 3, "train.max_steps": 3},
            {"lora.r": 16, "lora.targets": "attention_qv", "train.max_steps": 3},
        ]
        sciences = [part(Science, configure(change)) for change in changes]
        self.engine = PackedEngine(base)
        self.trainers = [
            AdapterTrainer(
                TrialFolder(folder / str(number)),
                science,
                self.engine.add(science.lora, science.seed),
                ROWS,
                base.dtype,
            )
            for number, science in enumerate(sciences)
        ]

    def take(self, rounds: int) -> None:
        for _ in range(rounds):
            # two micro-batches at least
            assert not train_round(self.engine, self.trainers, 256, never).failed


# The true configuration


def test_tinyllama_trains_a_pack_of_mixed_ranks_with_one_read_a_round(
    configure: Any, tmp_path: Path
) -> None:
    with fake_cuda(H100) as syncs:
        base = tinyllama(BF16)
        assert base.parameters == 1_100_048_384
        rounds = Rounds(base, configure, tmp_path)
        assert all(trainer.adapter.row is not None for trainer in rounds.trainers)
        syncs.clear()
        rounds.take(1)
    assert syncs.reads == ["loop.train_round"]
    assert syncs.waiting_copies == []


def test_an_fp16_round_reads_scales_only_where_the_device_is_idle(
    configure: Any, tmp_path: Path
) -> None:
    with fake_cuda(T4) as syncs:
        rounds = Rounds(tinyllama(FP16, layers=2), configure, tmp_path)
        assert all(trainer.scaler.is_enabled() for trainer in rounds.trainers)
        syncs.clear()
        rounds.take(3)
    # before forward and after the round's own read nothing is left to wait for
    round_, after = "loop.train_round", "loop._count"
    one_round = [round_, round_, round_, after, after]
    assert syncs.reads == 3 * one_round
    assert syncs.waiting_copies == []


def kept_by_a_layer() -> int:
    """Return the bytes that a token keeps in a block of TinyLlama for backward, counted by hand.

    Sources of the four layers in bf16 (the output of attention is that of `o_proj`), float32
    roots of two norms, rotated queries and keys and the values, the kernel's float32 log-sums of
    32 heads, and `h` of seven modules, whose ranks are padded to 16.
    """
    sources = 2 * (2048 + 2048 + 2048 + 2 * 5632)
    attention = 2 * (2048 + 256 + 256) + 4 * 32
    return sources + 2 * 4 + attention + 2 * 7 * 16


def test_the_planner_measures_and_divides_the_memory_of_a_card(
    data_cache: Any, configure: Any, hardware: dict[str, Any], tmp_path: Path
) -> None:
    with fake_cuda(H100) as syncs:
        base = tinyllama(BF16)
        lab = Lab(base, data_cache, configure, {**hardware, "device": "cuda"}, tmp_path)
        context, engine = lab.context(), PackedEngine(base)
        planner, row = Planner(context, engine), example(200)
        adapter = engine.add(settings(r=8), 0)
        syncs.clear()
        planner.measure(adapter, row)
        assert (syncs.reads, syncs.waiting_copies) == ([], [])
        # labels alone go on from the last block: twice a bf16 row, for the norm and the loss
        per_token = 22 * kept_by_a_layer() + row.labels / 200 * 2 * 2 * 2048
        assert planner._mib_per_token == pytest.approx(per_token / MIB, rel=0.01)
        assert context.micro_batch_tokens == 10 * 2048  # 2,048 for every 8 GiB
        adapters = [engine.adapter_mib(settings(r=8))] * 16
        assert planner.plan_training(adapters, 200, fixed=False) == 16
        assert (context.micro_batch_tokens, planner.checkpointing) == (10 * 2048, False)


def test_a_small_card_recomputes_and_splits_the_pack(
    data_cache: Any, configure: Any, hardware: dict[str, Any], tmp_path: Path
) -> None:
    with fake_cuda(T4):
        base = tinyllama(FP16, layers=2)
        lab = Lab(base, data_cache, configure, {**hardware, "device": "cuda"}, tmp_path)
        context, engine = lab.context(), PackedEngine(base)
        planner = Planner(context, engine)
        planner.measure(engine.add(settings(r=8), 0), example(200))
        count = planner.plan_training([1000.0] * 40, 200, fixed=False)
        assert (context.micro_batch_tokens, planner.checkpointing) == (256, True)
    # inputs of two blocks are kept, and one block is recomputed and in backward
    block = planner._mib_per_token / 2
    activations = 256 * (3 * block + 2 * 2048 * 2 / MIB) + LOGITS_MIB
    assert count == int((SHARE * 14 * 1024 - activations) / 1000) == 11


# Every branch, on two blocks of the same widths


BRANCHES: dict[str, tuple[list[LoraConfig], dict[str, Any]]] = {
    "mixed ranks and targets": (MIXED, {}),
    "one adapter": ([settings(r=64)], {}),
    "rslora": ([settings(r=8, variant="rslora"), settings(r=32, targets="mlp")], {}),
    "dropout": ([settings(dropout=0.1), settings(r=16, targets="attention_qv")], {}),
    "no kernels": (MIXED, {"triton": False}),
    "deterministic": (MIXED, {"mixed": False}),
}


@on_cards
@pytest.mark.parametrize(("configs", "options"), BRANCHES.values(), ids=BRANCHES)
def test_a_step_stays_on_the_device_in_one_dtype(
    configs: list[LoraConfig], options: dict[str, Any], card: FakeCard, dtype: torch.dtype
) -> None:
    with fake_cuda(card) as syncs:
        engine, items = pack(tinyllama(dtype, layers=2), configs, **options)
        syncs.clear()
        for micro_batch in engine.micro_batches(items, 512):
            check_step(engine, micro_batch)
    assert (syncs.reads, syncs.waiting_copies) == ([], [])


@on_cards
def test_recomputed_activations_have_the_same_devices_and_dtypes(
    card: FakeCard, dtype: torch.dtype
) -> None:
    with fake_cuda(card) as syncs:
        engine, items = pack(tinyllama(dtype, layers=1))
        engine.checkpoint_activations(True)
        syncs.clear()
        check_step(engine, items)
    assert (syncs.reads, syncs.waiting_copies) == ([], [])


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_other_llamas_run_too(changes: dict[str, Any]) -> None:
    with fake_cuda(H100):
        check_step(*pack(tinyllama(BF16, layers=1, **changes)))


@on_cards
@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4 double"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept dequantized"])
def test_4_bit_weights_are_dequantized_on_the_device(
    keep: bool, double: bool, card: FakeCard, dtype: torch.dtype
) -> None:
    with fake_cuda(card) as syncs:
        base = tinyllama(dtype, layers=1)
        make_4_bit(base.model, double)
        engine, items = pack(base, keep_dequantized=keep)
        joint = engine.model.layers[0].qkv.weight
        assert joint.is_quantized and (joint._dense is not None) == keep
        assert joint.dense().shape == (2048 + 2 * 256, 2048)
        syncs.clear()
        check_step(engine, items)
    assert (syncs.reads, syncs.waiting_copies) == ([], [])


@on_cards
@pytest.mark.parametrize("sampling", [None, TokenSampling(0.7, 0)], ids=["greedy", "sampled"])
def test_generation_reads_once_a_token(
    sampling: TokenSampling | None, card: FakeCard, dtype: torch.dtype
) -> None:
    ticks: list[int] = []
    with fake_cuda(card) as syncs:
        engine, items = pack(tinyllama(dtype, layers=2))
        syncs.clear()
        # every other row ends at the first token, so that the cache is compacted
        found = engine.generate(items, 4, sampling=sampling, on_token=lambda: ticks.append(1))
    assert Counter(map(len, found)) == {1: 6, 2: 3, 3: 1, 4: 2}
    assert syncs.reads == 4 * ["decode.decode"] and len(ticks) == 4


@on_cards
def test_a_whole_pack_is_trained_scored_and_saved(
    card: FakeCard,
    dtype: torch.dtype,
    tiny_base: Base,
    data_cache: Any,
    configure: Any,
    hardware: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quickly(monkeypatch)
    changes = [{"lora.r": 8}, {"lora.r": 16, "lora.targets": "attention_qv"}]
    with fake_cuda(card) as syncs:
        base = tinyllama(dtype, layers=2, tokenizer=tiny_base.tokenizer)
        lab = Lab(base, data_cache, configure, {**hardware, "device": "cuda"}, tmp_path)
        results = lab.run([lab.trial({"train.max_steps": 2, **change}) for change in changes])
    assert [result.state for result in results] == ["done", "done"]
    assert results[0].environment["hardware"] == card.name
    a_round = 3 if dtype == FP16 else 1  # with the scales of two trainers
    assert syncs.reads.count("loop.train_round") == 2 * a_round
    assert syncs.reads.count("losses.example_losses") == 1  # base and adapters in one batch


# What a fake device shows: every mistake of these kinds fails here, not on a GPU


def plant(monkeypatch: pytest.MonkeyPatch, method: str, mistake: Plant) -> None:
    """Make a mistake in the result of SwiGLU's forward or backward."""
    right = getattr(SwiGlu, method)

    def wrong(self: Any, *args: Any) -> Any:
        result = right(self, *args)
        return mistake(result) if method == "backward" else (mistake(result[0]), None)

    monkeypatch.setattr(SwiGlu, method, wrong)


def one_step(card: FakeCard = H100, dtype: torch.dtype = BF16) -> list[str]:
    """Run forward and backward of one block; return the reads."""
    with fake_cuda(card) as syncs:
        engine, items = pack(tinyllama(dtype, layers=1))
        syncs.clear()
        check_step(engine, items)
    return syncs.reads + syncs.waiting_copies


MISTAKES: dict[str, tuple[Plant, str]] = {
    "a tensor of the CPU": (lambda x: x + torch.ones(x.shape, dtype=x.dtype), "devices"),
    "another dtype": (lambda x: x.float(), "dtype|float32"),
    "a column too few": (lambda x: x[:, 1:], "shape|5631|11263"),
}
READS: dict[str, Plant] = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * x[0].tolist()[0],
    "bool": lambda x: x if bool(x.sum() > 0) else x * 2,
    "to the CPU": lambda x: x.cpu().to(x.device, non_blocking=True),
    "a copy that waits": lambda x: x * torch.tensor([2.0], dtype=x.dtype, device=x.device),
}
SIZES_FROM_VALUES: dict[str, Plant] = {
    "nonzero": lambda x: x + x.nonzero().sum(),
    "mask": lambda x: x + x[x > 0].sum(),
}
in_both = pytest.mark.parametrize("method", ["forward", "backward"])


@in_both
@pytest.mark.parametrize(("mistake", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_device_dtype_or_shape_fails(
    mistake: Plant, says: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, method, mistake)
    with pytest.raises((RuntimeError, AssertionError, ValueError), match=says):
        one_step()


@in_both
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_counted(read: Plant, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_step() == []
    plant(monkeypatch, method, read)
    assert one_step() == ["linear._Apply." + method]


@in_both
@pytest.mark.parametrize("read", SIZES_FROM_VALUES.values(), ids=SIZES_FROM_VALUES)
def test_a_size_that_depends_on_values_fails(
    read: Plant, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, method, read)
    with pytest.raises(DynamicOutputShapeException):
        one_step()


def test_the_backward_of_these_tests_is_that_of_autograd() -> None:
    found = []
    for run in (torch.Tensor.backward, backward):
        engine = PackedEngine(base_of(llama()))
        adapter = engine.add(settings(), 0)
        make_b_random(adapter)
        run(engine.example_losses(items_of(adapter, ROWS)).sum())
        found.append(gradients(adapter))
    expected, by_node = found
    assert all(torch.equal(by_node[name], matrix) for name, matrix in expected.items())
    assert any(matrix.any() for matrix in expected.values())
