"""Three parts of the data: training rows, held-out rows, and rows for confirmation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import grid
from tests.data.test_rows import config, row
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.config.schema import load as load_config
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.data.formats.cells import is_test
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.splits import normalise, split_records, split_rows
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.settings.identify import Identifier

MARKED: dict[str, Any] = {"columns": {"split": "split"}}


def prompts(rows: list[RawRow]) -> set[str]:
    return {normalise(each.prompt) for each in rows}


# ---- what is marked ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "Test", "testing", "test-00000-of-00002", "data/test"])
def test_names_of_rows_for_confirmation(name: str) -> None:
    assert is_test(name)


@pytest.mark.parametrize("name", ["validation", "val_test", "heldout", "dev", "train", "latest"])
def test_names_of_rows_for_something_else(name: str) -> None:
    assert not is_test(name)


def test_validation_rows_choose_and_test_rows_confirm() -> None:
    counts = {"train": 30, "val": 8, "test": 6}
    rows = [row(f"{name} {n}", split=name) for name, of in counts.items() for n in range(of)]
    split = split_rows(rows, config(eval_n=4, **MARKED))
    assert {each.split for each in split.heldout} == {"val"} and len(split.heldout) == 8
    assert {each.split for each in split.test} == {"test"} and len(split.test) == 6
    assert len(split.train) == 30 and split.rows == 44
    rows.append(row("test 3", "another answer", split="train"))
    assert split_rows(rows, config(eval_n=4, **MARKED)).dropped.facts == {"in_heldout": 1}


marked = st.lists(
    st.builds(
        row,
        st.text("abAB ", min_size=1, max_size=3).filter(str.strip),
        st.text("abAB ", min_size=1, max_size=3).filter(str.strip),
        split=st.sampled_from(["train", "train", "Test"]),
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@given(rows=marked, eval_n=st.integers(1, 10))
def test_with_test_rows_marked_held_out_rows_are_chosen_by_content(
    rows: list[RawRow], eval_n: int
) -> None:
    assume({"train", "Test"} <= {each.split for each in rows})
    split = split_rows(rows, config(eval_n=eval_n, **MARKED))
    assert {each.split for each in split.test} == {"Test"}
    assert {each.split for each in (*split.train, *split.heldout)} <= {"train"}
    parts = [prompts(each) for each in (split.train, split.heldout, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) and split.rows == len(rows)
    assert split.resplit is not None and split.resplit(eval_n).test == split.test


@pytest.mark.parametrize(
    ("named", "confirms"),
    [
        ({"eval_path": "my/test.jsonl"}, True),
        ({"eval_path": "test/val.jsonl"}, False),
        ({"eval_split": "test[:50%]"}, True),
        ({"eval_split": "validation"}, False),
    ],
)
def test_the_name_of_a_held_out_set_decides_its_use(named: dict[str, str], confirms: bool) -> None:
    records = [{"prompt": f"q {n}", "response": "r"} for n in range(40)]
    own = [{"prompt": f"own {n}", "response": "r"} for n in range(9)]
    split = split_records(records, config(eval_n=5, **named), own)
    assert len(split.test) == 9 * confirms
    assert all(each.prompt.startswith("own") != confirms for each in split.heldout)
    assert any("for confirmation alone" in note for note in split.notes) == confirms


def written(path: Path, *names: str) -> Path:
    rows = [
        {"prompt": f"q {n} {name}", "response": f"answer {n}", "split": name}
        for name in names
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.mark.parametrize("names", [(), ("train", "val"), ("train", "val", "test")])
def test_only_data_sets_that_mark_test_rows_get_another_key(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """The expected key is computed as before there were confirmation rows, with rendering 3."""
    path = written(tmp_path / "a.jsonl", *(names or ("",)))
    raw = grid.plain("model=tiny_random", "data=file", f"data.path={path}", "data.eval_n=4")
    found = Identifier()(load_config(raw))
    plain: Any = json.loads(json.dumps(raw))
    plain["model"]["identity"], plain["data"] = found.model.identity, vars(found.data).copy()
    plain["data"]["columns"] = vars(found.data.columns)
    before = {**plain, "data": {**plain["data"], "rendering": 3}}
    assert (trial_key(plain) != trial_key(before)) == ("test" in names)


# ---- what is scored ----------------------------------------------------------------------------


def data_of(path: Path, **changes: Any) -> DataConfig:
    raw = grid.plain("data=file")["data"] | {"path": str(path), **changes}
    built: DataConfig = part(DataConfig, raw)
    return built


def distinct(path: Path, count: int, **more: Any) -> Path:
    """Return rows whose answers have nothing in common."""
    answers = [hashlib.sha256(str(n).encode()).hexdigest()[:24] for n in range(count)]
    rows = [
        {"prompt": f"question {n}", "response": answer, **{k: v(n) for k, v in more.items()}}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_the_three_parts_share_no_row(tmp_path: Path, tiny_base: Base) -> None:
    cache = DataCache(tiny_base.tokenizer)
    data = data_of(distinct(tmp_path / "a.jsonl", 200), eval_n=20, n=50)
    chosen, confirming = cache.prepare(data), cache.prepare(data, scored="confirmation")
    assert [e.number for e in chosen.train] == [e.number for e in confirming.train]
    parts = [{e.number for e in each} for each in (chosen.train, chosen.heldout)]
    parts.append({e.number for e in confirming.heldout})
    assert [len(each) for each in parts] == [50, 20, 20] and len(set.union(*parts)) == 90
    reserve = cache.examine(data).split.heldout
    assert [e.number for e in confirming.heldout] == [each.number for each in reserve[20:40]]
    assert chosen.facts["confirmation_rows"] == confirming.facts["confirmation_rows"] == 20
    assert chosen.facts["eval_fingerprint"] != confirming.facts["eval_fingerprint"]
    assert chosen.facts["train_fingerprint"] == confirming.facts["train_fingerprint"]
    assert confirming.facts["overlap_rows"] == 0


def test_rows_that_belong_to_a_scored_row_are_not_used_to_confirm(
    tmp_path: Path, tiny_base: Base
) -> None:
    """Rows belong together by their group, by similar answers, or by the same question."""
    cache = DataCache(tiny_base.tokenizer)
    path = distinct(tmp_path / "a.jsonl", 90, split=lambda n: ("train", "val", "test")[n // 30])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    same: list[dict[str, Any]] = [{"set": "g"}, {}, {"prompt": rows[32]["prompt"]}]
    same[1] = {"response": rows[31]["response"][:-1] + "!"}
    for number, changes in enumerate(same):
        rows[60 + number] |= changes
    rows[30] |= {"set": "g"}
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    columns = dict(prompt="prompt", response="response", split="split", group="set")
    columns = grid.plain("data=file")["data"]["columns"] | columns
    found = cache.examine(data_of(path, eval_n=30, columns=columns))
    assert {each.number for each in found.confirmation} == set(range(64, 91))


def test_without_rows_to_confirm_a_trial_says_what_to_do(tmp_path: Path, tiny_base: Base) -> None:
    path = written(tmp_path / "a.jsonl", "train", "val")
    with pytest.raises(DataError, match=r"eval.rows=confirmation needs rows .* mark some as test"):
        DataCache(tiny_base.tokenizer).prepare(data_of(path, eval_n=20), scored="confirmation")
