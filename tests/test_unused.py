"""Settings that would have no effect: refused by name, with a command that works as typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import grid
import pytest
import searches
import yaml
from fake_worker import FakeWorkers

from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep import unused
from tinyllama_lab.sweep.compose import CONF_DIR, Cell, groups, option_values
from tinyllama_lab.sweep.unused import settle
from tinyllama_lab.trial import trial_key

QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


def cells(*overrides: str) -> list[Cell]:
    """Those of a multirun; what is typed replaces what `grid.SMALL` says."""
    return grid.cells(*overrides)


def problems(*overrides: str) -> list[str]:
    return settle(cells(*overrides))[1]


MISPLACED = [  # what was typed, and what to type instead
    (["model=smollm2", f"model.repo={QWEN}"], f"type model=hub model.repo={QWEN}"),
    (["model=tinyllama", f"model.repo={QWEN}"], f"type model=hub model.repo={QWEN}"),
    (["model=tiny_random", f"model.repo={QWEN}"], f"type model=hub model.repo={QWEN}"),
    (["model=local", "model.path=/m", f"model.repo={QWEN}"], f"model=hub model.repo={QWEN}"),
    (["model=smollm2", "model.path=/m"], "type model=local model.path=/m"),
    (["model=hub", "model.repo=a/b", "model.path=/m"], "type model=local model.path=/m"),
    (
        ["model=smollm2", "model.revision=v1"],
        "type model=hub model.repo=HuggingFaceTB/SmolLM2-135M-Instruct model.revision=v1",
    ),
    (["model.revision=v1"], "type model=hub model.repo=owner/name model.revision=v1"),
    (["data.path=mine.jsonl"], "type data=file data.path=mine.jsonl"),
    (["data=dolly", "data.path=mine.jsonl"], "type data=file data.path=mine.jsonl"),
    (["data=dolly", "data.repo=o/s"], "type data=hub data.repo=o/s"),
    (["data.eval_path=e.jsonl"], "type data=file data.path=my.jsonl data.eval_path=e.jsonl"),
    (
        ["data=file", "data.path=a.jsonl", "data.split=test"],
        "type data=hub data.repo=owner/name data.split=test",
    ),
    (["data.config=en"], "type data=hub data.repo=owner/name data.config=en"),
    (["data.revision=v1"], "type data=hub data.repo=owner/name data.revision=v1"),
    (["data.eval_split=test"], "type data=hub data.repo=owner/name data.eval_split=test"),
    (["model.source=hub"], "type model=hub"),
    (["model.source=package"], "type model=smollm2"),
    (["data.source=file"], "type data=file"),
    (["model.name=x"], "leave it out"),
    (["model=tinyllama", "model.name=x"], "leave it out"),
    (["data.name=x"], "leave it out"),
    (["model=local", "model.path=/m", "model.name=smollm2"], "choose another"),
    (["model.identity=abc"], "leave it out"),
    (["data=file", "data.path=a.jsonl", "data.identity=abc"], "leave it out"),
    (["data.rendering=7"], "leave it out"),
]


@pytest.mark.parametrize(("typed", "remedy"), MISPLACED, ids=lambda each: " ".join(each)[:60])
def test_a_setting_of_another_source_is_refused_with_the_one_that_uses_it(
    typed: list[str], remedy: str
) -> None:
    (problem,) = problems(*typed)
    key, _, value = typed[-1].partition("=")
    assert problem.startswith(f"{key} ") and value in problem and problem.endswith(remedy)
    if "type " in remedy:  # what to type is accepted when typed
        assert problems(*shlex.split(problem.partition("; type ")[2])) == []


FINE = [
    ["model=hub", f"model.repo={QWEN}", "model.revision=v1", "model.name=qwen"],
    ["model=local", "model.path=/m", "model.name=mine"],
    ["model=tinyllama", "model.revision=v1"],
    ["model=smollm2", "model.repo=HuggingFaceTB/SmolLM2-135M-Instruct"],  # what it is anyway
    ["data=file", "data.path=a.jsonl", "data.eval_path=b.jsonl", "data.name=mine"],
    ["data=hub", "data.repo=o/s", "data.config=en", "data.split=a", "data.eval_split=b"],
    ["data=alpaca", "data.split=test", "data.revision=v1"],
    ["data.path=null", "model.repo=null"],
    ["train.epochs=3"],
    ["train.max_steps=60"],
    ["train.epochs=1", "train.max_steps=60"],  # the default: nothing that was asked is lost
    ["eval.temperature=0.5", "eval.sample_seed=3"],
    ["data.style=instruction_response"],  # the travel set's own system turn is not typed
    ["data.columns.messages=m", "data.columns.prompt=null", "data.columns.response=null"],
    ["experiment=quickstart", "profile=embedded", "eval.generations=0"],
    ["experiment=quickstart", "profile=embedded", "eval.latency_tokens=0"],
    ["experiment=search_travel", "profile=embedded"],
]


@pytest.mark.parametrize("typed", FINE, ids=" ".join)
def test_what_has_an_effect_or_asks_for_nothing_is_taken(typed: list[str]) -> None:
    found, said = settle(cells(*typed))
    assert said == [] and [cell.raw for cell in found] == [cell.raw for cell in cells(*typed)]


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_experiment_is_taken(name: str) -> None:
    assert problems(f"experiment={name}", "model=smollm2") == []


IDLE = [
    (["train.max_steps=60", "train.epochs=3"], "train.epochs", "train.max_steps=null"),
    (["experiment=r1_alpaca", "train.epochs=3"], "train.epochs", "train.max_steps=null"),
    (["eval.sample_seed=3"], "eval.sample_seed", "eval.temperature=0.7"),
    (["eval.sample_seed=0,1,2"], "eval.sample_seed", "eval.temperature=0.7"),
    (["eval.generations=0", "eval.temperature=0.7"], "eval.temperature", "eval.generations=8"),
    (["eval.latency_batch=4"], "eval.latency_batch", "eval.latency_tokens=32"),
    (["data.style=instruction_response", "data.system=Hi"], "data.system", "data.style=chat"),
    (["data.style=instruction_response", "data.date=2026-01-31"], "data.date", "chat"),
    (["data.style=instruction_response", "data.learn=last"], "data.learn", "data.style=chat"),
    (["data.mask=all", "data.learn=last"], "data.learn", "data.mask=response"),
    (
        ["data.columns.messages=m", "data.columns.prompt=q"],
        "data.columns.prompt",
        "data.columns.messages=null",
    ),
]


@pytest.mark.parametrize(("typed", "key", "remedy"), IDLE, ids=lambda each: str(each)[:50])
def test_a_typed_setting_that_another_makes_meaningless_is_refused(
    typed: list[str], key: str, remedy: str
) -> None:
    (problem,) = problems(*typed)
    assert problem.startswith(f"{key} has no effect with ") and problem.endswith(remedy)


@pytest.mark.parametrize("change", [{"path": "mine.jsonl"}, {"name": "mine"}, {"identity": "x"}])
def test_an_experiment_file_is_checked_as_well(
    change: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cells()[0]
    cell.raw["data"] |= change  # as a file says it: nothing of it was typed
    (problem,) = settle([cell])[1]
    assert problem.startswith(f"data.{next(iter(change))} ")


def test_a_value_that_needs_quotes_is_shown_as_one_types_it() -> None:
    path = "/a folder/it's,1.jsonl"
    (problem,) = settle([_with_path(path)])[1]
    typed = shlex.split(problem.partition("; type ")[2])
    again = grid.COMPOSER(typed)
    assert again.raw["data"]["path"] == path and again.raw["data"]["source"] == "file"


def _with_path(path: str) -> Cell:
    cell = cells()[0]
    cell.raw["data"]["path"] = path
    return cell


def test_in_a_grid_over_options_each_takes_what_it_uses() -> None:
    typed = cells("model=tiny_random,local", "model.path=/m", "model.name=mine", "lora.r=2,4")
    found, said = settle(typed)
    assert said == []
    paths = {(cell.raw["model"]["source"], cell.raw["model"]["path"]) for cell in found}
    assert paths == {("random", None), ("local", "/m")}
    plain = [cell.raw for cell in cells("lora.r=2,4")]
    random = [cell.raw for cell in found if cell.raw["model"]["source"] == "random"]
    assert [trial_key(raw) for raw in random] == [trial_key(raw) for raw in plain]
    assert typed[0].raw["model"]["path"] == "/m"  # the cells that came in are as they were


def test_in_a_grid_a_repository_never_reaches_the_key_of_another_model() -> None:
    found, said = settle(cells("model=smollm2,hub", f"model.repo={QWEN}"))
    assert said == []
    assert [cell.raw["model"]["repo"] for cell in found] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        QWEN,
    ]


def test_a_setting_that_one_trial_uses_stays_as_it_was_typed_in_the_others() -> None:
    found, said = settle(cells("eval.temperature=0.0,0.7", "eval.sample_seed=3"))
    assert said == [] and [cell.raw["eval"]["sample_seed"] for cell in found] == [3, 3]


def test_a_file_of_an_option_is_read_with_what_it_builds_on() -> None:
    for group in ("model", "data", "train", "eval"):
        for option in groups()[group]:
            own = yaml.safe_load((CONF_DIR / group / f"{option}.yaml").read_text())
            read = option_values(group, option)
            composed = grid.plain(f"{group}={option}")[group]
            assert all(read[f"{group}.{key}"] == composed[key] for key in own if key in composed
                       and not isinstance(composed[key], dict))  # fmt: skip
    assert option_values("data", "dolly")["data.columns.messages"] is None
    assert option_values("data", "dolly")["data.columns.prompt"] == "instruction"


def test_every_setting_that_is_named_here_exists() -> None:
    known = grid.plain("profile=embedded")
    for key, other, _, _ in unused._IDLE:
        for name in (key, other):
            place: Any = known
            for part in name.split("."):
                place = place[part]


# ---- a search ------------------------------------------------------------------------------


def refused(root: Path, *typed: str, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        searches.search(root, FakeWorkers(), *typed, **settings)
    return caught.value.problems


def test_a_search_refuses_what_none_of_its_trials_uses(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "lora.r=2,4", "data.path=mine.jsonl")
    assert problem.startswith("data.path needs data=file")
    found = refused(tmp_path, "lora.r=2,4", "model.name=x,y")
    assert any(problem.startswith("model.name is a label") for problem in found)


def test_a_search_takes_what_some_of_its_trials_use(tmp_path: Path) -> None:
    typed = ("train.max_steps=null,2", "train.epochs=1.0,2.0")
    outcome = searches.search(tmp_path, FakeWorkers(), *typed, n_trials=4, sampler="grid")
    assert outcome.best
