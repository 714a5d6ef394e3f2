"""The fused loops give what PyTorch operations give; without a compiler there are none."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed import fused_cpu
from tinyllama_lab.core.engines.packed.elementwise import rotated

SEEDS: Iterator[int] = itertools.count()
DTYPES = (torch.float32, torch.bfloat16)
# not if the loops cannot run: where there is a compiler, code that it refuses must fail the tests
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or sys.platform != "linux",
    reason="this machine has no C++ compiler",
)
both = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Let a test load the library again, from an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused_cpu._library.cache_clear()
    yield monkeypatch
    fused_cpu._library.cache_clear()


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every tensor of a test other values, and the same ones in every run."""
    monkeypatch.setattr(sys.modules[__name__], "SEEDS", itertools.count())


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(next(SEEDS))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def close(
    found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Compare with a result in float64, up to a few roundings of values of size `scale`."""
    allowed = 4 * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(found.double(), expected, rtol=allowed, atol=allowed)


@needs_compiler
@both
def test_norm_and_its_gradient(dtype: torch.dtype) -> None:
    x, weight, grad = draw(5, 37, dtype=dtype), draw(37, dtype=dtype), draw(5, 37, dtype=dtype)
    exact = x.double().requires_grad_()
    expected = functional.rms_norm(exact, (37,), weight.double(), 1e-5)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    found, rstd = fused_cpu.rms_norm(x, weight, 1e-5)
    close(found, expected.detach(), dtype)
    close(rstd[:, 0], x.double().square().mean(1).add(1e-5).rsqrt(), torch.float32)
    assert torch.equal(fused_cpu.rms_norm(x, weight, 1e-5, rstd)[0], found)
    close(fused_cpu.rms_norm_backward(grad, x, weight, rstd), wanted, dtype)


@needs_compiler
@both
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    source, grad = draw(4, 46, dtype=dtype, scale=3), draw(4, 23, dtype=dtype)
    source[0, :4] = torch.tensor([100.0, -100.0, 1e30, -1e30])
    exact = source.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    found, gradient = fused_cpu.swiglu(source), fused_cpu.swiglu_backward(grad, source)
    close(found[1:], expected.detach()[1:], dtype)
    close(gradient[1:], wanted[1:], dtype)
    close(found[0, :2], expected.detach()[0, :2], dtype)
    assert found.isfinite().all()


@needs_compiler
@both
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    logits, targets = draw(6, 101, dtype=dtype, scale=5), torch.arange(0, 60, 10)
    exact, losses = logits.double().requires_grad_(), torch.empty(6)
    expected = functional.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    before = logits.clone()
    fused_cpu.cross_entropy_(logits, targets, losses, wanted=False)
    close(losses, expected.detach(), torch.float32)
    assert torch.equal(logits, before)
    fused_cpu.cross_entropy_(logits, targets, losses, wanted=True)
    close(losses, expected.detach(), torch.float32)
    close(logits, wanted, dtype)


@needs_compiler
@both
@pytest.mark.parametrize("longest", [1, 16, 45])
def test_causal_softmax_and_its_gradient(longest: int, dtype: torch.dtype) -> None:
    scores = draw(2, 3 * longest, longest, dtype=dtype, scale=4)
    grad = draw(2, 3 * longest, longest, dtype=dtype)
    exact = scores.double().requires_grad_()
    ahead = torch.full((longest, longest), -math.inf).triu_(1).repeat(3, 1).double()
    expected = (exact / 8 + ahead).softmax(dim=-1)
    found = fused_cpu.causal_softmax_(scores, 1 / 8)
    close(found, expected.detach(), dtype)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    gradient = fused_cpu.causal_softmax_backward_(grad, found, 1 / 8)
    # of the rounded probabilities, and the difference of two terms
    close(gradient, wanted, dtype, scale=1.0 if dtype == torch.float32 else 4.0)
    assert not gradient[:, 0, 1:].any() and not found[:, 0, 1:].any()


@needs_compiler
@both
def test_heads_are_turned_and_moved_there_and_back(dtype: torch.dtype) -> None:
    angles = draw(7, 4).repeat(1, 2)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    spans = torch.tensor([5, 0]), torch.tensor([7, 5])
    tokens = draw(12, 32, dtype=dtype)
    heads = torch.full((2, 3, 7, 8), math.nan, dtype=dtype)
    fused_cpu.move(heads, tokens[:, 8:], spans, rotary, 1)
    source = tokens[:, 8:].view(12, 3, 8)
    cos, sin = (table[:, None] for table in rotary)
    close(heads[0], rotated(source[5:], cos, sin).transpose(0, 1).double(), dtype)
    close(heads[1, :, :5], rotated(source[:5], cos[:5], sin[:5]).transpose(0, 1).double(), dtype)
    assert not heads[1, :, 5:].any()
    back = torch.zeros_like(tokens)
    fused_cpu.move(heads, back[:, 8:], spans, rotary, -1, back=True)
    close(back[:, 8:], tokens[:, 8:].double(), dtype)
    assert not back[:, :8].any()


@needs_compiler
@both
@pytest.mark.parametrize(
    ("tokens", "rank", "wide"), [(1, 1, 1), (9, 4, 33), (130, 16, 48), (300, 40, 576)]
)
def test_matmuls_of_adapters(tokens: int, rank: int, wide: int, dtype: torch.dtype) -> None:
    x, h = draw(tokens, wide + 3, dtype=dtype)[:, 3:], draw(tokens, rank + 2, dtype=dtype)[:, 2:]
    a, b = draw(rank, wide, dtype=dtype) / wide**0.5, draw(wide, rank, dtype=dtype)
    exact_x, exact_h, exact_a, exact_b = (t.double() for t in (x, h, a, b))
    for weight, exact in ((a.T, exact_a.T), (b, exact_b)):
        out = draw(tokens, rank + 5, dtype=dtype)
        others = out[:, :5].clone()
        fused_cpu.project(x, weight, 0.5, out[:, 5:])
        close(out[:, 5:], 0.5 * exact_x @ exact, dtype, scale=wide)
        assert torch.equal(out[:, :5], others)
    for weight, exact in ((b.T, exact_b.T), (a, exact_a)):
        out = draw(tokens, wide + 1, dtype=dtype)
        expected = out[:, 1:].double() + 0.5 * exact_h @ exact
        fused_cpu.expand_(out[:, 1:], h, weight, 0.5)
        close(out[:, 1:], expected, dtype, scale=rank**0.5)
    for total in (draw(rank, wide), draw(wide, rank).T):
        expected = total.double() + 0.5 * exact_h.T @ exact_x
        fused_cpu.reduce_(total, h, x, 0.5)
        close(total, expected, torch.float32, scale=tokens**0.5)


@needs_compiler
def test_matmuls_of_adapters_do_not_depend_on_the_threads() -> None:
    x, a, threads = draw(70, 100), draw(4, 100), torch.get_num_threads()
    outs = []
    for count in (1, threads, 3):
        torch.set_num_threads(count)
        h, out, total = torch.empty(70, 4), torch.zeros(70, 100), torch.zeros(4, 100)
        fused_cpu.project(x, a.T, 1.0, h)
        fused_cpu.expand_(out, h, a, 1.0)
        fused_cpu.reduce_(total, h, x, 1.0)
        outs.append(torch.cat([h.flatten(), out.flatten(), total.flatten()]))
    torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_compiler
@both
@pytest.mark.parametrize("is_dropped", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (9, 130), (70, 576)])
def test_outputs_are_scaled_and_their_gradient(
    tokens: int, width: int, is_dropped: bool, dtype: torch.dtype
) -> None:
    rows, gains = draw(tokens, width + 3, dtype=dtype), draw(width)
    others, exact = rows[:, :3].clone(), rows[:, 3:].double()
    undropped = draw(tokens, width + 2, dtype=dtype)[:, 2:] if is_dropped else None
    past = torch.zeros_like(exact) if undropped is None else undropped.double()
    sums = torch.empty(tokens, width + 1, dtype=dtype)[:, 1:]
    fused_cpu.rescale_(rows[:, 3:], gains, undropped, sums)
    close(sums, exact - past, dtype, scale=4)
    close(rows[:, 3:], (exact - past) * gains.double() + past, dtype, scale=16)
    assert torch.equal(rows[:, :3], others)

    grad = draw(tokens, width + 5, dtype=dtype)
    out = torch.full_like(grad, 7.0)
    products = fused_cpu.rescale_backward(grad[:, 5:], sums, gains, out[:, 5:])
    close(out[:, 5:], grad[:, 5:].double() * gains.double(), dtype)
    expected = (grad[:, 5:].double() * sums.double()).sum(0)
    close(products, expected, torch.float32, scale=tokens)
    assert bool((out[:, :5] == 7.0).all())


@needs_compiler
def test_sums_over_tokens_do_not_depend_on_the_threads() -> None:
    grad, sums, gains, threads = draw(70, 300), draw(70, 300), draw(300), torch.get_num_threads()
    products = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        products.append(fused_cpu.rescale_backward(grad, sums, gains, torch.empty_like(grad)))
    torch.set_num_threads(threads)
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])


@needs_compiler
@both
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    def rows_with_nan(result: torch.Tensor) -> list[int]:
        return result.isnan().flatten(1).any(1).nonzero().flatten().tolist()

    x, ones = draw(3, 48, dtype=dtype), torch.ones(48, dtype=dtype)
    x[1, 40] = math.nan
    assert rows_with_nan(fused_cpu.rms_norm(x, ones, 1e-5)[0]) == [1]
    assert rows_with_nan(fused_cpu.swiglu(x)) == [1]
    losses, logits = torch.zeros(3), x.clone()
    fused_cpu.cross_entropy_(logits, torch.tensor([0, 0, 0]), losses, wanted=True)
    assert rows_with_nan(losses[:, None]) == rows_with_nan(logits) == [1]
    scores = draw(3, 48, 48, dtype=dtype)
    scores[1, 47, 40] = math.nan
    assert rows_with_nan(fused_cpu.causal_softmax_(scores, 1.0)) == [1]
    h, out, total = draw(3, 5, dtype=dtype), draw(3, 48, dtype=dtype), draw(5, 48)
    fused_cpu.project(x, draw(48, 5, dtype=dtype), 1.0, projected := torch.empty_like(h))
    assert rows_with_nan(projected) == [1]
    fused_cpu.expand_(out, projected, draw(5, 48, dtype=dtype), 1.0)
    assert rows_with_nan(out) == [1]
    fused_cpu.reduce_(total, h, x, 1.0)
    assert total.isnan().any(0).nonzero().flatten().tolist() == [40]


@needs_compiler
def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight = draw(9, 100, dtype=torch.bfloat16), draw(100, dtype=torch.bfloat16)
    alone = [fused_cpu.rms_norm(row[None].clone(), weight, 1e-5)[0] for row in x]
    assert torch.equal(torch.cat(alone), fused_cpu.rms_norm(x, weight, 1e-5)[0])
    together, scores = torch.empty(9), x.clone()
    fused_cpu.cross_entropy_(scores, torch.arange(9), together, wanted=True)
    for n, row in enumerate(x):
        loss = torch.empty(1)
        fused_cpu.cross_entropy_(row[None].clone(), torch.tensor([n]), loss, wanted=False)
        assert loss[0] == together[n]


@needs_compiler
def test_other_tensors_are_left_to_pytorch() -> None:
    one = torch.zeros(4, 4)
    assert fused_cpu.can_run(one, one)
    assert not fused_cpu.can_run(one.double())
    assert not fused_cpu.can_run(one.T[:2])
    assert not fused_cpu.can_run(one, one.bfloat16())
    assert fused_cpu.supports(one.T[:2]) and not fused_cpu.supports(one.double())


def test_what_the_loops_would_misread_is_refused() -> None:
    one, half = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the dtype must be torch.float32, got torch.bfloat16"):
        fused_cpu.project(one, half, 1.0, one)
    with pytest.raises(ValueError, match="the dtype must be torch.float32, got torch.bfloat16"):
        fused_cpu.reduce_(half, half, half, 1.0)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        fused_cpu.expand_(one, one.T, one, 1.0)
    with pytest.raises(ValueError, match="contiguous or transposed"):
        fused_cpu.project(one[:, :2], torch.zeros(2, 8)[:, ::2], 1.0, one)
    with pytest.raises(ValueError, match="the dtype must be torch.float32, got torch.bfloat16"):
        fused_cpu.rescale_(one, half[0], None, one)
    with pytest.raises(ValueError, match="the dtype must be torch.float32, got torch.bfloat16"):
        fused_cpu.rescale_backward(one, half, one[0], one)
    with pytest.raises(ValueError, match="at most 4096 scores"):
        fused_cpu.causal_softmax_(torch.zeros(1, 1, 4097), 1.0)


def test_without_a_compiler_there_are_no_loops(
    reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    reloaded.setenv("CXX", "none")
    assert not fused_cpu.can_run(torch.zeros(1))
    assert "no fused loops, training is slower: none is not a C++ compiler" in caplog.text


@needs_compiler
def test_a_compiler_may_come_with_options(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setenv("CXX", "c++ -Wall")
    assert fused_cpu.can_run(torch.zeros(1))


def test_another_openmp_than_that_of_pytorch_is_not_used(
    reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    reloaded.setattr(fused_cpu, "_openmp_runtimes", lambda: {"libgomp.so.1", "libiomp5.so"})
    assert not fused_cpu.can_run(torch.zeros(1))
    assert "PyTorch must use GNU's OpenMP, got libgomp.so.1, libiomp5.so" in caplog.text


def test_a_compiler_that_fails_is_reported(
    reloaded: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    reloaded.setenv("CXX", str(broken))
    reloaded.setattr(fused_cpu, "_openmp_runtimes", lambda: {"libgomp.so.1"})
    assert not fused_cpu.can_run(torch.zeros(1))
    assert "no fused loops" in caplog.text and "no such flag" in caplog.text
