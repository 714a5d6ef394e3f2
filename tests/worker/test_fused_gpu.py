"""The Triton kernels, run by Triton's interpreter on the CPU, against PEFT and plain PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.llamas import base_of, example, examples, gradients, items_of, llama, settings
from tests.worker.test_packed_linear import Named, nonzero_adapters, peft_gradients, same
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed import elementwise, fused_gpu
from tinyllama_lab.core.engines.packed.batch import lay_out
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.segments import Segments

# ranks above and below what a tensor core takes, and modules that not all of them have
CONFIGS = [
    settings(r=8),
    settings(r=3, targets="attention_qv"),
    settings(r=17, targets=["o_proj", "k_proj", "down_proj"]),
    settings(r=4, targets="mlp", variant="rslora"),
]
LENGTHS = (3, 40, 2)  # a span of one tile, and one of two

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: install the extra `triton`"
)


def items_of_all(adapters: Sequence[Any]) -> list[WorkItem[Any]]:
    """Return rows of every adapter, and of the bare base."""
    items: list[WorkItem[Any]] = items_of(None, [example(35)])
    for number, adapter in enumerate(adapters):
        items += items_of(adapter, examples(length + number for length in LENGTHS))
    return items


def trained(engine: PackedEngine, configs: Sequence[LoraConfig]) -> tuple[Any, list[Named]]:
    """Return losses and gradients; rows come in two micro-batches, and an adapter is in both."""
    adapters = nonzero_adapters(engine, configs)
    items = items_of_all(adapters)
    losses = []
    for piece in (items[:6], items[6:]):
        losses.append(engine.example_losses(piece))
        losses[-1].sum().backward()
    return torch.cat(losses).detach(), [gradients(adapter) for adapter in adapters]


@interpreted
def test_losses_and_gradients_are_those_of_peft() -> None:
    base = base_of(llama(num_hidden_layers=1))
    losses, found = trained(PackedEngine(base, triton=True), CONFIGS)
    engine = PackedEngine(base)
    for number, adapter in enumerate(nonzero_adapters(engine, CONFIGS)):
        rows = examples(length + number for length in LENGTHS)
        expected, wanted = peft_gradients(base, CONFIGS[number], adapter, rows)
        own = losses[1 + 3 * number : 4 + 3 * number]
        assert own.tolist() == pytest.approx(expected, rel=1e-5)
        same(found[number], wanted)


@interpreted
def test_generated_tokens_are_those_without_kernels() -> None:
    base = base_of(llama(num_hidden_layers=1))
    written = []
    for triton in (True, False):
        engine = PackedEngine(base, triton=triton)
        adapters = nonzero_adapters(engine, CONFIGS[:2])
        items = [item for a in (None, *adapters) for item in items_of(a, [example(9, prompt=5)])]
        written.append(engine.generate(items, 4, stop=False))
    assert written[0] == written[1] and written[0][0] != written[0][1]


@interpreted
def test_an_adapter_of_nan_does_not_change_the_others() -> None:
    engine = PackedEngine(base_of(llama(num_hidden_layers=1)), triton=True)
    good, bad = nonzero_adapters(engine, CONFIGS[:2])
    rows = examples(LENGTHS)
    engine.example_losses(items_of(good, rows)).sum().backward()
    expected = gradients(good)
    good.zero_grad()
    with torch.no_grad():
        bad.flat.fill_(torch.nan)
    bad.updated()
    engine.example_losses([*items_of(good, rows), *items_of(bad, rows)]).sum().backward()
    same(gradients(good), expected)
    assert not torch.isfinite(next(iter(gradients(bad).values()))).any()


@pytest.mark.parametrize("config", [settings(dropout=0.1), settings(r=129)])
def test_dropout_and_very_high_ranks_go_without_kernels(config: LoraConfig) -> None:
    engine = PackedEngine(base_of(llama(num_hidden_layers=1)), triton=True)
    adapters = nonzero_adapters(engine, [CONFIGS[0], config])
    rows = examples(LENGTHS)
    items = [item for a in adapters for item in items_of(a, rows, 0, 1)]
    assert lay_out(items, torch.device("cpu")).segments is None
    assert lay_out(items_of(adapters[0], rows, 0, 1), torch.device("cpu")).segments is not None


def test_adapters_that_share_no_matmul_go_without_kernels() -> None:
    engine = PackedEngine(base_of(llama()), mixed=False, triton=True)
    items = items_of(nonzero_adapters(engine, CONFIGS[:1])[0], examples(LENGTHS))
    assert lay_out(items, torch.device("cpu")).segments is None


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_are_tried_before_they_are_used(dtype: torch.dtype) -> None:
    assert fused_gpu._works_on.__wrapped__(torch.device("cpu"), dtype)
    # of each pair of ranks: result, gradient of x, and both gradients of three modules
    assert len(fused_gpu._lora_differences(torch.device("cpu"), dtype)) == 3 * (2 + 2 * 3)


@interpreted
def test_kernels_that_fail_or_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("PTX of this card is not supported")

    def doubled(
        self: Segments, place: Any, h: torch.Tensor, result: torch.Tensor, is_b: bool
    ) -> None:
        for _ in range(2):
            original(self, place, h, result, is_b)

    device, original = torch.device("cpu"), Segments._expand
    monkeypatch.setattr(Segments, "_expand", doubled)
    assert not fused_gpu._works_on.__wrapped__(device, torch.float32)
    assert "are wrong" in caplog.text
    monkeypatch.setattr(Segments, "_launch", failing)
    assert not fused_gpu._works_on.__wrapped__(device, torch.float32)
    assert "PTX of this card is not supported" in caplog.text


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@interpreted
def test_the_norm_and_its_gradient() -> None:
    source, weight, grad = (
        random(5, 48).requires_grad_(),
        random(48, seed=1),
        random(5, 48, seed=2),
    )
    expected = functional.rms_norm(source, (48,), weight, 1e-5)
    expected.backward(grad)
    plain = source.detach()
    found, rstd = fused_gpu.rms_norm(plain, weight, 1e-5)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(fused_gpu.rms_norm_backward(grad, plain, weight, rstd), source.grad)


@interpreted
def test_a_norm_of_columns_reads_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo 2 norms the queries of a joint product."""
    joint, weight = random(5, 80), random(48, seed=1)
    expected = functional.rms_norm(joint[:, :48], (48,), weight, 1e-5)
    monkeypatch.setattr(elementwise, "_loops", lambda *tensors: fused_gpu)
    found = elementwise.NormAlone.apply(joint[:, :48], elementwise.RmsNorm(weight, 1e-5))
    torch.testing.assert_close(found, expected)


@interpreted
def test_swiglu_and_its_gradient() -> None:
    source, grad = random(5, 80).requires_grad_(), random(5, 40, seed=1)
    gate, up = source.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    expected.backward(grad)
    torch.testing.assert_close(fused_gpu.swiglu(source.detach()), expected.detach())
    torch.testing.assert_close(fused_gpu.swiglu_backward(grad, source.detach()), source.grad)


@interpreted
def test_rotary_positions_turn_queries_and_keys_and_back() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    queries, keys, size = 4, 2, 8
    positions = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
    angles = torch.outer(torch.arange(3.0), 0.5 ** torch.arange(size // 2))
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    joint = random(5, (queries + 2 * keys) * size)
    found = fused_gpu.rotary(joint, cos, sin, positions, (queries + keys) * size)
    heads = joint.view(1, 5, -1, size).transpose(1, 2)
    q, k = apply_rotary_pos_emb(
        heads[:, :queries], heads[:, queries : queries + keys], cos[positions][None],
        sin[positions][None],
    )  # fmt: skip
    expected = torch.cat([q, k, heads[:, queries + keys :]], dim=1).transpose(1, 2).reshape(5, -1)
    torch.testing.assert_close(found, expected)
    back = fused_gpu.rotary(found, cos, sin, positions, (queries + keys) * size, backwards=True)
    torch.testing.assert_close(back, joint)
