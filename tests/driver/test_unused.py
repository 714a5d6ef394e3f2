"""Settings without an effect are refused by name, with a command that works as typed."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import grid, searches
from tests.fake_worker import FakeWorkers
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.schema import NO_CARD, Config, load
from tinyllama_lab.config.validate import known_keys
from tinyllama_lab.errors import ConfigError, without_password
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.plan import make_plan
from tinyllama_lab.sweep.settings import unused
from tinyllama_lab.sweep.settings.compose import Cell, groups, option_values
from tinyllama_lab.sweep.settings.unused import drop_unused

QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


def cells(*overrides: str) -> list[Cell]:
    """Return the cells of a multirun; typed settings replace those of `grid.SMALL`."""
    return grid.cells(*overrides)


def problems(*overrides: str) -> list[str]:
    return drop_unused(cells(*overrides))[1]


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
    (["model=local", "model.path=/m", "model.name=smollm2"], "choose another name"),
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
    ["experiment=quickstart", "profile=embedded", "eval.generations=0", "eval.max_new_tokens=64"],
    ["eval.generations=0", "eval.max_new_tokens=64"],  # the default
    ["data=bitext_travel", "data.n=all"],  # balanced by its own file
    ["quant=nf4", "hardware.keep_dequantized=true"],
    ["tracking=mlflow", "tracking.folder=a"],
    ["experiment=quickstart", "profile=embedded", "eval.latency_tokens=0"],
    ["experiment=search_travel", "profile=embedded"],
]


@pytest.mark.parametrize("typed", FINE, ids=" ".join)
def test_a_setting_with_an_effect_or_null_is_accepted(typed: list[str]) -> None:
    found, said = drop_unused(cells(*typed))
    assert said == [] and [cell.raw for cell in found] == [cell.raw for cell in cells(*typed)]


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_experiment_is_taken(name: str) -> None:
    assert problems(f"experiment={name}", "model=smollm2") == []


IDLE = [
    (["train.max_steps=60", "train.epochs=3"], "train.epochs", "train.max_steps=null"),
    (["experiment=r1_alpaca", "train.epochs=3"], "train.epochs", "train.max_steps=null"),
    (["eval.sample_seed=3"], "eval.sample_seed", "eval.temperature=0.7"),
    (["eval.sample_seed=0,1,2"], "eval.sample_seed", "eval.temperature=0.7"),
    (
        ["eval.max_new_tokens=64", "eval.generations=0", "eval.temperature=0.7"],
        "eval.temperature",
        "eval.generations=8",
    ),
    (["eval.generations=0"], "eval.max_new_tokens", "eval.generations=8"),
    (["data.n=all", "data.balance_by=intent"], "data.balance_by", "data.n=100"),
    (["data.style=text", "data.mask=all"], "data.mask", "data.style=chat"),
    (["tracking.uri=sqlite:///a.db"], "tracking.uri", "tracking=mlflow"),
    (["tracking.folder=runs"], "tracking.folder", "tracking=mlflow"),
    (
        ["tracking=mlflow", "tracking.uri=sqlite:///a.db", "tracking.folder=runs"],
        "tracking.folder",
        "tracking.uri=null",
    ),
    (["hardware.keep_dequantized=true"], "hardware.keep_dequantized", "quant=nf4"),
    (["quant=int8", "hardware.keep_dequantized=true"], "hardware.keep_dequantized", "quant=nf4"),
    (["hardware.device=cpu", "hardware.gpus=[0]"], "hardware.gpus", "hardware.device=auto"),
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
    (problem,) = drop_unused([cell])[1]
    assert problem.startswith(f"data.{next(iter(change))} ")


def test_a_value_that_needs_quotes_is_shown_as_one_types_it() -> None:
    path = "/a folder/it's,1.jsonl"
    (problem,) = drop_unused([_with_path(path)])[1]
    typed = shlex.split(problem.partition("; type ")[2])
    again = grid.COMPOSER(typed)
    assert again.raw["data"]["path"] == path and again.raw["data"]["source"] == "file"


def _with_path(path: str) -> Cell:
    cell = cells()[0]
    cell.raw["data"]["path"] = path
    return cell


def test_in_a_grid_over_options_each_takes_what_it_uses() -> None:
    typed = cells("model=tiny_random,local", "model.path=/m", "model.name=mine", "lora.r=2,4")
    found, said = drop_unused(typed)
    assert said == []
    paths = {(cell.raw["model"]["source"], cell.raw["model"]["path"]) for cell in found}
    assert paths == {("random", None), ("local", "/m")}
    plain = [cell.raw for cell in cells("lora.r=2,4")]
    random = [cell.raw for cell in found if cell.raw["model"]["source"] == "random"]
    assert [trial_key(raw) for raw in random] == [trial_key(raw) for raw in plain]
    assert typed[0].raw["model"]["path"] == "/m"  # the cells that came in are as they were


def test_in_a_grid_a_repository_never_reaches_the_key_of_another_model() -> None:
    found, said = drop_unused(cells("model=smollm2,hub", f"model.repo={QWEN}"))
    assert said == []
    assert [cell.raw["model"]["repo"] for cell in found] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        QWEN,
    ]


def test_what_one_trial_of_a_grid_uses_makes_no_second_key_of_the_others() -> None:
    found, said = drop_unused(cells("eval.temperature=0.0,0.7", "eval.sample_seed=3,4"))
    assert said == []
    asked = [(cell.raw["eval"]["temperature"], cell.raw["eval"]["sample_seed"]) for cell in found]
    assert asked == [(0.0, 0), (0.0, 0), (0.7, 3), (0.7, 4)]
    (plain,) = cells()
    assert {trial_key(cell.raw) for cell in found[:2]} == {trial_key(plain.raw)}


def test_a_column_goes_back_to_that_of_its_own_option() -> None:
    typed = ["data=alpaca", "data.columns.messages=null,m", "data.columns.prompt=q"]
    found, said = drop_unused(cells(*typed))
    assert said == []
    columns = [cell.raw["data"]["columns"] for cell in found]
    assert [each["prompt"] for each in columns] == ["q", "instruction"]


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


# ---- every setting ---------------------------------------------------------------------------

# what has an effect whatever else is set, or is refused by `config.py` beside what excludes it
ALWAYS = {
    *("data.style", "data.n", "data.eval_n", "data.max_length", "data.drop_containing"),
    *(f"data.columns.{name}" for name in ("messages", "text", "system", "tools", "intent")),
    *("data.columns.split", "data.columns.group"),
    *("lora.rank_pattern", "lora.variant"),
    *("quant.kind", "quant.double", "seed"),
    *("train.max_steps", "train.batch_size", "train.lr", "train.schedule", "train.warmup_ratio"),
    *("train.optimizer", "train.loraplus_ratio", "train.label_smoothing", "train.neftune_alpha"),
    *("train.weight_decay", "train.clip_norm", "train.max_loss", "train.precision"),
    *("train.deterministic", "train.eval_every", "train.keep", "train.patience"),
    *("eval.generations", "eval.latency_tokens", "eval.harness"),
    *("profile", "study", "sweeps_dir", "retry", "confirm", "deploy", "eval.rows"),
    *("tracking.enabled", "hardware.device", "plan.skip_unfit"),
    # all or none of these, which the schema checks
    *(f"hardware.card.{name}" for name in vars(NO_CARD)),
    *("hardware.threads", "hardware.micro_batch_tokens", "hardware.gradient_checkpointing"),
    *("hardware.checkpoint_every_s", "eval.general", "seeds", "tune", "tune_budget"),
    "tune_values",  # without `tune` refused where grids are expanded
}


FULL = ("train.precision=fp32", "lora=full")


@pytest.mark.parametrize("typed", ["lora.r=4", "lora.targets=mlp", "lora.init=olora"])
def test_settings_of_an_adapter_are_refused_where_there_is_none(typed: str) -> None:
    (problem,) = problems(*FULL, typed)
    key, _, value = typed.partition("=")
    assert problem.startswith(f"{key} has no effect with lora.variant=full, got ")
    assert problem.endswith("; leave it out, or set lora.variant=lora") and value in problem
    assert problems(*FULL) == [] and problems(*FULL, "train.optimizer=lion") == []


def test_a_grid_with_a_whole_model_gives_one_trial_of_it(tmp_path: Path) -> None:
    def labels(*typed: str) -> list[str]:
        made, found = drop_unused(cells("study=s", f"sweeps_dir={tmp_path}", FULL[0], *typed))
        assert found == []
        configs = [config.load(cell.raw) for cell in made]
        planned = make_plan(made, configs, StudyFolder(tmp_path, "s")).trials
        return [each.label for each in planned]

    assert labels("lora=default,full") == ["variant=lora", "variant=full"]
    assert labels("lora.variant=dora,full") == ["variant=dora", "variant=full"]
    assert labels("lora=default,full", "lora.r=4,8") == [
        "r=4 variant=lora",
        "r=8 variant=lora",
        "variant=full",
    ]
    assert labels("lora=full")[0].startswith("model=tiny_random variant=full n=")


def test_every_setting_has_a_rule_for_when_it_has_an_effect() -> None:
    """Add a new setting to `ALWAYS`, or to the table of settings that depend on another."""
    groups_of = {
        "always": ALWAYS,
        "idle": {key for key, _, _, _ in unused._IDLE},
        "of a source": {
            f"{group}.{name}" for group in ("model", "data") for name in (*unused._WHERE, "name")
        },
        "filled in": {
            f"{group}.{name}"
            for group in ("model", "data")
            for name in (*unused._FILLED_IN, "source")
        },
    }
    for key in known_keys(Config):
        found = [name for name, keys in groups_of.items() if key in keys]
        assert len(found) == 1, f"{key} is {found or 'not known'}"


def test_every_setting_that_is_named_in_the_tables_exists() -> None:
    known = {*known_keys(Config), "hydra/launcher"}
    named = {name for key, other, _, _ in unused._IDLE for name in (key, other)}
    assert named <= known and ALWAYS <= known


def test_a_refused_address_is_shown_without_its_password() -> None:
    (problem,) = problems("tracking.uri=http://me:secret@host")
    assert "me:***@host" in problem and "secret" not in problem


def test_what_the_launcher_ignores_is_refused() -> None:
    (cell,) = cells("hardware.workers=2")
    inside = dataclasses.replace(cell, choices={**cell.choices, "hydra/launcher": "inline"})
    (problem,) = drop_unused([inside])[1]
    assert problem.startswith("hardware.workers has no effect with hydra/launcher=inline")
    assert drop_unused([cell])[1] == []


@pytest.mark.parametrize("typed", [each[0] for each in IDLE], ids=" ".join)
def test_both_ways_out_of_a_refusal_are_taken(typed: list[str]) -> None:
    (problem,) = problems(*typed)
    key = problem.partition(" ")[0]
    (way_out,) = re.findall(r"; leave it out, or set (\S+)$", problem)
    whole = [*grid.SMALL, "tracking=none", *typed]
    kept = [text for text in whole if not text.startswith(f"{key}=")]
    for asked in (kept, [*whole, way_out]):
        last = {text.partition("=")[0]: text for text in asked}  # as the user edits the line
        again = drop_unused([grid.COMPOSER([text.split(",")[0] for text in last.values()])])[1]
        assert not [text for text in again if text.startswith(f"{key} ")]


# ---- a search ------------------------------------------------------------------------------


def test_ranks_of_single_modules_are_refused_beside_full_fine_tuning() -> None:
    plain = grid.plain(*FULL, "study=s", "lora.rank_pattern={down_proj: 16}")
    with pytest.raises(
        ConfigError, match=r"lora\.rank_pattern has no effect with lora\.variant=f"
    ):
        load(plain)


def refused(root: Path, *typed: str, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        searches.search(root, FakeWorkers(), *typed, **settings)
    return caught.value.problems


def test_a_search_refuses_what_none_of_its_trials_uses(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, "data=travel", "lora.r=2,4", "data.path=mine.jsonl")
    assert problem.startswith("data.path needs data=file")
    found = refused(tmp_path, "lora.r=2,4", "model.name=x,y")
    assert any(problem.startswith("model.name is a label") for problem in found)


def test_a_search_takes_what_some_of_its_trials_use(tmp_path: Path) -> None:
    typed = ("train.max_steps=null,2", "train.epochs=1.0,2.0")
    outcome = searches.search(tmp_path, FakeWorkers(), *typed, n_trials=4, sampler="grid")
    assert outcome.best


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://u:secret@host/x?a=1", "http://u:***@host/x?a=1"),
        ("https://host/mlflow?token=abc&page=2", "https://host/mlflow?token=***&page=2"),
        ("https://host?page=2&X-Api-Key=abc#top", "https://host?page=2&X-Api-Key=***#top"),
        ("postgresql://host/db?user=u&password=p'w", "postgresql://host/db?user=u&password=***'w"),
        ("sqlite:///a?mode=ro", "sqlite:///a?mode=ro"),
    ],
)
def test_secrets_in_addresses_are_never_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown
