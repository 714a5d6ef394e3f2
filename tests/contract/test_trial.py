"""A key covers exactly the science; an incomplete or changed result does not count."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import grid
from tinyllama_lab.config.axes import flatten
from tinyllama_lab.study import trial
from tinyllama_lab.study.trial import (
    SCIENCE,
    Result,
    State,
    TrialFolder,
    base_config,
    canonical_json,
    cell_key,
    digest,
    evaluation_key,
    former_keys,
    trial_key,
)
from tinyllama_lab.sweep.settings.compose import groups, option_values

CONFIG = grid.plain(*grid.SMALL)
PATHS = (".path", ".eval_path", ".revision")  # what they lead to is counted, as `identity`
LEAVES = [key for key in flatten({g: CONFIG[g] for g in SCIENCE}) if not key.endswith(PATHS)]
NOT_SCIENCE = [key for key in flatten(CONFIG) if key not in LEAVES]


def mutate(key: str) -> dict[str, Any]:
    """Return the configuration with another value of the same type at one key."""
    changed = json.loads(json.dumps(CONFIG))
    *groups, name = key.split(".")
    place = changed
    for group in groups:
        place = place[group]
    old = place[name]
    if isinstance(old, bool):
        place[name] = not old
    elif isinstance(old, int | float):
        place[name] = old + 1
    else:
        place[name] = [*old, "x"] if isinstance(old, list) else f"{old}x"
    return changed


@pytest.mark.parametrize("key", LEAVES)
def test_every_setting_of_the_science_changes_the_key_of_the_trial_or_of_the_evaluation(
    key: str,
) -> None:
    changed = mutate(key)
    trains_the_same = trial_key(changed) == trial_key(CONFIG)
    is_scored_alike = evaluation_key(changed["eval"]) == evaluation_key(CONFIG["eval"])
    assert (trains_the_same, is_scored_alike) == (key.startswith("eval."), key[:5] != "eval.")
    assert not {*former_keys(changed)} & {*former_keys(CONFIG)}


@pytest.mark.parametrize("key", NOT_SCIENCE)
def test_no_path_name_or_machine_changes_the_key(key: str) -> None:
    assert trial_key(mutate(key)) == trial_key(CONFIG)


@pytest.mark.parametrize(
    ("group", "own"),
    [("model", "local"), ("model", "hub"), ("data", "file"), ("data", "hub")],
)
def test_a_label_does_not_change_the_key(group: str, own: str) -> None:
    """The key is that of the option without a label, which trials had before labels existed."""
    plain = grid.plain(*grid.SMALL, f"{group}={own}")
    plain[group]["identity"] = "abc"
    named = {**plain, group: {**plain[group], "name": "mine"}}
    assert plain[group]["name"] == own and trial_key(named) == trial_key(plain)
    assert trial_key(base_config(named)) == trial_key(base_config(plain))
    other = {**plain, group: {**plain[group], "identity": "abd"}}
    assert trial_key(other) != trial_key(plain)


def test_the_names_of_the_options_stay_in_their_keys() -> None:
    fixed = {
        values[f"{group}.name"]
        for group in ("model", "data")
        for option in groups()[group]
        if (values := option_values(group, option))[f"{group}.source"] == "hub"
        and values[f"{group}.repo"] is not None
    }
    assert set(trial.SHIPPED) == fixed
    for name in fixed:
        group = "model" if "tinyllama" in name else "data"
        plain = grid.plain(*grid.SMALL, f"{group}={name}")
        assert trial_key(plain) != trial_key({**plain, group: {**plain[group], "name": "hub"}})


def test_both_kinds_of_settings_were_met() -> None:
    assert len(LEAVES) >= 40
    assert {"model.path", "data.path", "study", "sweeps_dir", "retry"} <= set(NOT_SCIENCE)
    assert {k.partition(".")[0] for k in NOT_SCIENCE} >= {"tracking", "hardware", "profile"}


def shuffled(value: Any, dice: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    items = list(value.items())
    dice.shuffle(items)
    return {name: shuffled(inner, dice) for name, inner in items}


def test_the_order_of_settings_does_not_change_the_key() -> None:
    dice = random.Random(0)
    assert {trial_key(shuffled(CONFIG, dice)) for _ in range(20)} == {trial_key(CONFIG)}


def test_a_cell_is_all_seeds_of_one_question() -> None:
    assert cell_key(mutate("seed")) == cell_key(CONFIG) != trial_key(CONFIG)
    assert cell_key(mutate("lora.r")) != cell_key(CONFIG)


@pytest.mark.parametrize("key", LEAVES)
def test_a_base_is_shared_by_all_trials_that_score_the_same_rows(key: str) -> None:
    own = {"seed", "data.n", "data.balance_by", "data.subset"}
    own |= {k for k in LEAVES if k.startswith("lora.")}
    own |= {k for k in LEAVES if k.startswith("train.") and k != "train.precision"}
    same = trial_key(base_config(mutate(key))) == trial_key(base_config(CONFIG))
    assert same == (key in own)


SCIENCE_EXAMPLE: dict[str, Any] = {
    "model": {"name": "m", "identity": "1", "path": "/anywhere"},
    "data": {"name": "d", "identity": "2", "n": 8, "path": None},
    "lora": {"r": 8, "alpha": None, "targets": ["q_proj", "v_proj"]},
    "quant": {"kind": "none"},
    "train": {"lr": 1e-3, "precision": "auto"},
    "eval": {"generations": 2},
    "seed": 0,
}


def test_keys_do_not_change_by_accident() -> None:
    assert digest(None) == "74234e98afe7"
    assert canonical_json({"b": [True, None, 0.001], "a": 1, "ä": "→"}) == (
        '{"a":1,"b":[true,null,0.001],"ä":"→"}'
    )
    assert trial_key(SCIENCE_EXAMPLE) == "6afc205c8420"
    assert cell_key(SCIENCE_EXAMPLE) == "dd483b3be779"
    assert evaluation_key(SCIENCE_EXAMPLE["eval"]) == "51b1552c41ac"
    assert trial_key({**SCIENCE_EXAMPLE, "extra": 1}) == trial_key(SCIENCE_EXAMPLE)


# ---- results -------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def ended(folder: Path, **fields: Any) -> TrialFolder:
    """Return a trial with a committed result that lists one file."""
    made = TrialFolder(folder / "r4-0123456789ab")
    made.write_config(CONFIG)
    made.adapter_dir.mkdir()
    (made.adapter_dir / "weights").write_bytes(b"12345")
    given_fields = {"metrics": {"eval/loss": 1.5}, **fields}
    made.commit(
        Result(made.key, made.name, State.DONE, **given_fields), [made.adapter_dir / "weights"]
    )
    return made


@given(
    data=st.dictionaries(st.text(), json_values, max_size=3),
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    state=st.sampled_from(State),
)
def test_a_result_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: Any, metrics: Any, state: State
) -> None:
    trial = TrialFolder(tmp_path_factory.mktemp("trial") / "x-0123456789ab")
    written = Result(trial.key, "x", state, {"class": "ä"}, ["a=1"], 2, metrics, data, {}, data)
    trial.commit(written)
    assert trial.read_result() == (written, None)


def test_a_trial_without_a_result_is_missing_without_a_reason(tmp_path: Path) -> None:
    assert TrialFolder(tmp_path / "x-0123456789ab").read_result() == (None, None)


def test_a_diverged_loss_survives_the_record(tmp_path: Path) -> None:
    result, why = ended(tmp_path, metrics={"eval/loss": float("inf")}).read_result()
    assert why is None and result and result.metrics["eval/loss"] == float("inf")


def rewrite(trial: TrialFolder, old: str, new: str) -> None:
    text = trial.result_file.read_text()
    assert old in text
    trial.result_file.write_text(text.replace(old, new))


DAMAGE = {
    "was changed": lambda t: rewrite(t, "1.5", "1.4"),
    "is damaged": lambda t: t.result_file.write_text(t.result_file.read_text()[:-20]),
    "is damaged ": lambda t: t.result_file.write_text(""),
    "is damaged  ": lambda t: t.result_file.write_text("[1, 2]"),
    "is damaged   ": lambda t: t.result_file.write_text('{"state": "done"}'),
    "is damaged    ": lambda t: t.result_file.write_text("[" * 100_000),
    "cannot be read": lambda t: t.result_file.write_bytes(b"\xff\xfe{}"),
    "weights is missing": lambda t: (t.adapter_dir / "weights").unlink(),
    "weights has 3 bytes, and": lambda t: (t.adapter_dir / "weights").write_bytes(b"123"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_result_that_is_not_whole_does_not_count_and_says_why(
    tmp_path: Path, reason: str
) -> None:
    trial = ended(tmp_path)
    DAMAGE[reason](trial)
    result, why = trial.read_result()
    assert result is None
    assert why and reason.strip() in why and str(trial.folder) in why


def test_the_result_of_another_trial_does_not_count(tmp_path: Path) -> None:
    other = TrialFolder(tmp_path / "r4-ffffffffffff")
    ended(tmp_path).folder.rename(other.folder)
    result, why = other.read_result()
    assert result is None and why and "belongs to another trial (0123456789ab)" in why


def test_no_bit_of_a_result_can_change_unseen(tmp_path: Path) -> None:
    trial = ended(tmp_path)
    whole, dice = trial.result_file.read_bytes(), random.Random(0)
    good = trial.read_result()[0]
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        trial.result_file.write_bytes(damaged)
        result, why = trial.read_result()
        assert (result is None and why) or result == good  # white space may change
