"""Completions that join and leave while others go on: each as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoders import decoder
from tests.llamas import base_of, llama, settings
from tests.packs import take_off_adapters
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.deploy.completer import (
    Completer,
    Completion,
    PackedCompleter,
    PeftCompleter,
    Request,
    TextStream,
)
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.trial import TrialFolder

NAMES = ("r=2", "r=4")
LASTING = tuple(range(5, 15))  # the tiny base goes on for long after it


@pytest.fixture(scope="module")
def trained(another_lab: Any) -> dict[str, TrialFolder]:
    """Two trained adapters of one base."""
    rank = {name: int(name[2:]) for name in NAMES}
    trials = {name: another_lab.trial({"lora.r": rank[name], "train.lr": 0.05}) for name in NAMES}
    another_lab.run(list(trials.values()))
    return trials


@pytest.fixture(params=[PackedCompleter, PeftCompleter])
def completer(request: Any, tiny_base: Any, trained: dict[str, TrialFolder]) -> Any:
    """Both kinds, with the adapters loaded."""
    made = request.param(tiny_base)
    for name, trial in trained.items():
        made.load(name, trial)
    yield made
    take_off_adapters(tiny_base.model)


def expected(
    base: Any, trial: TrialFolder | None, prompt: tuple[int, ...], tokens: int
) -> list[int]:
    """What transformers and PEFT generate greedily."""
    import peft

    model: Any = base.model
    if trial is not None:
        model = peft.PeftModel.from_pretrained(model, str(trial.adapter_dir)).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(tokens):
            chosen = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, chosen[None, None]], dim=1)
            if int(chosen) in base.end_ids:
                break
    if trial is not None:
        model.unload()
    answer = ids[0, len(prompt) :].tolist()
    return [token for token in answer if token not in base.end_ids]


def test_an_adapter_with_biases_answers_beside_the_bare_base(
    configure: Any, tmp_path: Path, trained: dict[str, TrialFolder]
) -> None:
    trial = TrialFolder(tmp_path / "biased-0123456789ab")
    trial.write_config(configure({"lora.bias": "all"}))
    base = base_of(decoder("qwen2"))
    adapter = PeftEngine(base).add(settings(bias="all"), 0)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.add_(0.2 * torch.ones_like(parameter))
    adapter.save(trial.adapter_dir)
    adapter.detach()
    made, fresh = PeftCompleter(base), base_of(decoder("qwen2"))
    made.load("biased", trial)
    prompt = tuple(range(5, 15))
    begun = {name: made.begin(Request(name, prompt, 9)) for name in (None, "biased")}
    run_all(made)
    assert begun[None].ids == expected(fresh, None, prompt, 9)
    assert begun["biased"].ids == expected(fresh, trial, prompt, 9) != begun[None].ids
    with pytest.raises(StudyError, match="answers alone here.*start again with trial="):
        made.load("r=2", trained["r=2"])


def run_all(completer: Completer) -> None:
    while not completer.is_idle:
        completer.step()


def test_requests_of_all_adapters_and_the_base_are_completed_as_if_alone(
    completer: Completer, tiny_base: Any, trained: dict[str, TrialFolder]
) -> None:
    adapters: list[str | None] = ["r=4", None, "r=2", "r=4"]
    prompts = [tuple(range(5, 5 + length)) for length in (9, 4, 13, 6)]
    begun: list[Completion] = []
    for adapter, prompt in zip(adapters, prompts, strict=True):
        begun.append(completer.begin(Request(adapter, prompt, 12)))
        completer.step()  # the earlier ones go on while the next joins
    run_all(completer)
    take_off_adapters(tiny_base.model)
    for adapter, prompt, completion in zip(adapters, prompts, begun, strict=True):
        trial = trained[adapter] if adapter else None
        assert completion.ids == expected(tiny_base, trial, prompt, 12)
        assert completion.reason == ("length" if len(completion.ids) == 12 else "stop")


def test_a_cancelled_completion_leaves_and_the_others_stay_right(
    completer: Completer, tiny_base: Any, trained: dict[str, TrialFolder]
) -> None:
    first = completer.begin(Request("r=2", tuple(range(7, 15)), 12))
    second = completer.begin(Request("r=4", tuple(range(20, 30)), 12))
    completer.step()
    first.reason = "cancelled"
    run_all(completer)
    take_off_adapters(tiny_base.model)
    assert len(first.ids) <= 1
    assert second.ids == expected(tiny_base, trained["r=4"], tuple(range(20, 30)), 12)


def test_a_drawn_answer_depends_on_its_seed_and_not_on_its_company(completer: Completer) -> None:
    def draw(seed: int, others: int) -> list[int]:
        request = Request("r=4", tuple(range(5, 12)), 10, TokenSampling(1.5, seed))
        for number in range(others):
            completer.begin(Request(None, tuple(range(30, 34 + number)), 5))
        completion = completer.begin(request)
        run_all(completer)
        return completion.ids

    assert draw(1, 0) == draw(1, 3)
    assert draw(1, 0) != draw(2, 0)


def test_more_requests_than_rows_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch, tiny_base: Any
) -> None:
    monkeypatch.setattr("tinyllama_lab.deploy.completer.MOST_ROWS", 2)
    completer = PackedCompleter(tiny_base)
    begun = [completer.begin(Request(None, (5, 6, 7 + n), 6)) for n in range(5)]
    assert len(completer.step()) == 2
    run_all(completer)
    assert all(c.ids == expected(tiny_base, None, c.request.prompt_ids, 6) for c in begun)


def test_a_long_request_that_left_takes_no_room_of_later_ones(tiny_base: Any) -> None:
    completer = PackedCompleter(tiny_base)
    long, short = (completer.begin(Request(None, LASTING, tokens)) for tokens in (1000, 20))
    completer.step()
    long.reason = "cancelled"
    late = completer.begin(Request(None, LASTING, 20))
    completer.step()
    assert {keys.shape[2] for keys in completer._decoder._keys} == {30}
    run_all(completer)
    for each in (short, late):
        assert each.ids == expected(tiny_base, None, each.request.prompt_ids, 20)


def test_a_cleared_completer_forgets_its_completions_and_goes_on(
    completer: Completer, tiny_base: Any
) -> None:
    before = completer.begin(Request("r=2", tuple(range(7, 15)), 12))
    completer.step()
    completer.clear()
    assert completer.is_idle and len(before.ids) == 1
    after = completer.begin(Request(None, tuple(range(7, 15)), 6))
    run_all(completer)
    take_off_adapters(tiny_base.model)
    assert len(before.ids) == 1
    assert after.ids == expected(tiny_base, None, tuple(range(7, 15)), 6)


def test_a_frozen_adapter_takes_the_memory_of_its_weights_alone() -> None:
    base = base_of(llama().bfloat16())
    base.dtype = torch.bfloat16
    adapter = PackedEngine(base).add(settings(r=4), 0)
    adapter.freeze()
    tensors = adapter.flat, adapter.compute_weights, adapter.gradients
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors
    }
    sizes = sum(storage.nbytes() for storage in storages.values())
    assert adapter.compute_weights.dtype == torch.bfloat16
    assert sizes <= 2 * adapter.layout.size + 4
    assert all(parameter.grad is None for parameter in adapter.parameters)


def test_an_adapter_of_another_base_is_refused(
    completer: Completer, trained: dict[str, TrialFolder], tmp_path: Any
) -> None:
    from tinyllama_lab.core.engines.peft import PeftEngine

    engine = PeftEngine(base_of(llama()))
    adapter = engine.add(settings(r=4), 0)
    other = TrialFolder(tmp_path / "other-0123456789ab")
    other.write_config(trained["r=4"].read_config())
    adapter.save(other.adapter_dir)
    with pytest.raises(StudyError, match="does not fit"):
        completer.load("other", other)


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces = {1: b"caf", 2: b"\xc3", 3: b"\xa9", 4: b"!", 5: b"\xf0"}
    stream = TextStream(lambda ids: b"".join(pieces[n] for n in ids).decode(errors="replace"))
    assert [stream.push(n) for n in (1, 2, 3, 4, 5)] == ["caf", "", "é", "!", ""]
    assert stream.end() == "\ufffd"
