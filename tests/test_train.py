"""The training loop: equals a plain one, repeats itself, learns, stops and continues exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import get_scheduler

from tinyllama_lab.config import Science, part
from tinyllama_lab.core import checkpoint, lora
from tinyllama_lab.core.data import Example, encode
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.model import Base
from tinyllama_lab.core.order import batches
from tinyllama_lab.core.train import Progress, Run, train
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.events import EventLog, read_events
from tinyllama_lab.rows import Row
from tinyllama_lab.trial import Trial

DROPOUT = {"lora.dropout": 0.1, "train.max_steps": 6}


@pytest.fixture(scope="session")
def examples(tiny_base: Base, configure: Any) -> list[Example]:
    data = part(Science, configure({"data.style": "query_intent_response"})).data
    found = []
    for number in range(10):
        row = Row(
            "where " * (number % 3), "", f"to {number} " * (1 + number % 4), "go", "", (), ""
        )
        found.append(encode(row, data, tiny_base.tokenizer))
    return [example for example in found if example is not None]


@dataclass
class Fit:
    """Trains the tiny base; `weights` are those of the adapter afterwards."""

    base: Base
    examples: list[Example]
    configure: Any
    folder: Path
    weights: dict[str, torch.Tensor]

    def __call__(
        self,
        changes: dict[str, Any],
        name: str = "a",
        tokens: int = 4096,
        stopped: Callable[[], bool] = lambda: False,
        every: float = 1e9,
    ) -> Progress:
        science = part(Science, self.configure(changes))
        trial = Trial(self.folder / name)
        memory = PeakMemory(self.base.device)
        run = Run(trial, EventLog(trial.events_file), tokens, every, memory, stopped)
        adapted = lora.attach(self.base.model, science.lora, science.seed)
        try:
            return train(self.base, lora.trainable(adapted), self.examples, science, run)
        finally:
            parameters = lora.trainable(adapted).items()
            self.weights = {name: p.detach().clone() for name, p in parameters}
            lora.detach(adapted)

    def events(self, kind: str, name: str = "a") -> list[dict[str, Any]]:
        found = read_events(Trial(self.folder / name).events_file)
        return [event for event in found if event["kind"] == kind]


@pytest.fixture
def fit(tiny_base: Base, examples: list[Example], configure: Any, tmp_path: Path) -> Fit:
    return Fit(tiny_base, examples, configure, tmp_path, {})


def after(calls: int) -> Callable[[], bool]:
    """Says stop at the given call and from then on."""
    seen: list[int] = []
    return lambda: len(seen) >= calls or bool(seen.append(1))


def plain_loop(base: Base, examples: list[Example], science: Science) -> tuple[list[float], Any]:
    """What anyone would write with peft and torch: padded full batches, the loss of the model."""
    torch.manual_seed(science.seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0
    )
    model = peft.get_peft_model(base.model, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=science.train.lr, weight_decay=1.0)
    scheduler = get_scheduler("cosine", optimizer, 0, science.train.max_steps)
    losses = []
    model.train()
    for rows in batches(len(examples), science.train, science.seed):
        part_ = [examples[row] for row in rows]
        pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
            [torch.tensor(each) for each in lists], batch_first=True, padding_value=value
        )
        ids, learned = pad([e.ids for e in part_], 0), pad([e.learned for e in part_], False)
        mask = pad([[1] * len(e.ids) for e in part_], 0)
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(~learned, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = [w.detach().clone() for w in weights]
    model.unload()
    return losses, found


def test_equals_a_plain_loop(fit: Fit) -> None:
    changes = {"train.max_steps": 24, "train.warmup_ratio": 0.0, "train.weight_decay": 1.0}
    changes |= {"train.lr": 5e-3, "seed": 3}
    expected, weights = plain_loop(fit.base, fit.examples, part(Science, fit.configure(changes)))
    progress = fit(changes, tokens=150)
    assert progress.losses == pytest.approx(expected, rel=1e-5)
    assert progress.losses[-1] < progress.losses[0] - 0.3
    for found, wanted in zip(fit.weights.values(), weights, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_effective_batch_does_not_depend_on_micro_batches(fit: Fit, variant: str) -> None:
    changes = {"train.max_steps": 5, "lora.variant": variant}
    one = fit(changes, "one", tokens=10**6)
    weights = fit.weights
    many = fit(changes, "many", tokens=1)
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    assert many.tokens == one.tokens
    for name, value in fit.weights.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-2, atol=1e-4)


def test_two_runs_are_bit_identical_and_the_seed_matters(fit: Fit) -> None:
    first, weights = fit(DROPOUT, "one"), fit.weights
    torch.rand(3)  # whatever happened before does not count
    second = fit(DROPOUT, "two")
    assert first.losses == second.losses
    assert all(torch.equal(value, weights[name]) for name, value in fit.weights.items())
    assert fit({**DROPOUT, "seed": 1}, "three").losses != first.losses


def test_learns_a_few_rows_by_heart(fit: Fit) -> None:
    fit.examples = fit.examples[:2]
    changes = {"train.max_steps": 40, "train.lr": 5e-3, "train.batch_size": 2}
    losses = fit(changes).losses
    assert losses[-1] < losses[0] - 0.7  # a random head of this size cannot gain much more


def test_every_step_is_reported(fit: Fit) -> None:
    progress = fit({"train.epochs": 1.5})
    events = fit.events("metric")
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert {event["steps"] for event in events} == {4}
    assert [event["values"]["train/loss"] for event in events] == progress.losses
    assert all(event["values"]["train/grad_norm"] > 0 for event in events)
    assert max(event["values"]["train/lr"] for event in events) <= 1e-3
    assert events[-1]["tokens"] == progress.tokens
    assert progress.tokens_per_s == progress.warm_tokens / progress.warm_seconds > 0
    assert progress.warm_tokens < progress.tokens


def test_without_a_clip_norm_nothing_is_clipped(fit: Fit) -> None:
    changes = {"train.max_steps": 1, "train.clip_norm": None}
    free = fit(changes, "free")
    clipped = fit({**changes, "train.clip_norm": 1e-9}, "clipped")
    assert free.losses == clipped.losses
    norms = [fit.events("metric", name)[0]["values"]["train/grad_norm"] for name in
             ("free", "clipped")]  # fmt: skip
    assert norms[0] == norms[1] > 1e-3  # reported as it was before clipping


# ten rows, four a step, one row a micro-batch: call 10 comes in the middle of the third step
@pytest.mark.parametrize("call", [1, 3, 5, 10, 17, 24])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_stopped_run_continues_bit_identically(fit: Fit, call: int, every: float) -> None:
    whole = fit(DROPOUT, "whole", tokens=1)
    expected = fit.weights
    with pytest.raises(StoppedError):
        fit(DROPOUT, tokens=1, stopped=after(call - 1), every=every)
    saved, damaged = checkpoint.load(Trial(fit.folder / "a").checkpoint_dir)
    assert saved is not None and saved.step == (call - 1) // 4 and not damaged
    torch.rand(7)
    resumed = fit(DROPOUT, tokens=1)
    assert resumed.losses == whole.losses and resumed.tokens == whole.tokens
    assert all(torch.equal(value, fit.weights[name]) for name, value in expected.items())
    assert [event["step"] for event in fit.events("metric")] == [1, 2, 3, 4, 5, 6]
    assert fit(DROPOUT).losses == whole.losses  # finished: nothing is left to train


def test_a_run_that_is_stopped_again_and_again_gets_to_the_same_end(fit: Fit) -> None:
    whole, stops = fit(DROPOUT, "whole", tokens=1), 0
    expected = fit.weights
    for _ in range(20):
        try:
            resumed = fit(DROPOUT, tokens=1, stopped=after(6))
            break
        except StoppedError:
            stops += 1
    assert stops == 5 and resumed.losses == whole.losses
    assert all(torch.equal(value, fit.weights[name]) for name, value in expected.items())


def test_a_damaged_checkpoint_is_passed_over_and_reported(fit: Fit) -> None:
    whole = fit(DROPOUT, "whole")
    expected = fit.weights
    with pytest.raises(StoppedError):
        fit(DROPOUT, stopped=after(4), every=0.0)
    newest = Trial(fit.folder / "a").checkpoint_dir / "step-00000004"
    (newest / "state.safetensors").write_bytes(b"")
    assert fit(DROPOUT).losses == whole.losses
    assert all(torch.equal(value, fit.weights[name]) for name, value in expected.items())
    notes = [event["text"] for event in fit.events("note")]
    assert notes == ["damaged checkpoints passed over: step-00000004", "resumed after step 3"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(fit: Fit, poison: float) -> None:
    calls: list[int] = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * poison if len(calls) > 2 else output

    hook = fit.base.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(DivergedError, match=r"loss nan .* at step 3; lower train.lr"):
            fit({"train.max_steps": 5})
    finally:
        hook.remove()
    assert len(fit.events("metric")) == 2


def test_gradient_checkpointing_changes_no_loss(fit: Fit) -> None:
    plain = fit(DROPOUT, "plain")
    model = fit.base.model
    layers: list[int] = []
    hook = model.model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda *_: layers.append(1)
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        saving = fit(DROPOUT, "saving")
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        hook.remove()
    assert saving.losses == pytest.approx(plain.losses, rel=1e-6)
    assert len(layers) == 2 * len(saving.losses)  # each forward pass was done twice
