"""Each way to write a search space has the meaning that it has in Hydra."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.sweep.search.parse import parse_space
from tinyllama_lab.sweep.search.space import Choice, Interval, Space, values_of


def space(*typed: str, params: Any = None, when: Any = None) -> Space:
    found, problems = parse_space(typed, params or {}, when or {})
    assert problems == []
    return found


def problem(*typed: str, params: Any = None, when: Any = None) -> str:
    (found,) = parse_space(typed, params or {}, when or {})[1]
    return found


@pytest.mark.parametrize(
    ("typed", "axis"),
    [
        ("lora.r=4,8", Choice("lora.r", (4, 8), ("4", "8"))),
        ("lora.r=choice(4,8,4)", Choice("lora.r", (4, 8), ("4", "8"))),
        ("quant=choice(none,nf4)", Choice("quant", ("none", "nf4"), ("none", "nf4"))),
        ("quant=glob(n*)", Choice("quant", ("nf4", "none"), ("nf4", "none"))),
        (
            "quant.double=choice(true,false)",
            Choice("quant.double", (True, False), ("True", "False")),
        ),
        ("train.clip_norm=null,1.0", Choice("train.clip_norm", (None, 1.0), ("null", "1.0"))),
        (
            "lora.targets=choice(mlp,[q_proj,v_proj])",
            Choice("lora.targets", ("mlp", "[q_proj,v_proj]"), ("mlp", "[q_proj,v_proj]")),
        ),
        ("lora.r=range(4,16,4)", Interval("lora.r", 4, 12, False, 4, True)),
        ("lora.r=range(1,4)", Interval("lora.r", 1, 3, False, 1, True)),
        ("lora.dropout=range(0,0.3,0.1)", Interval("lora.dropout", 0, 0.2, False, 0.1, False)),
        ("lora.r=interval(1,64)", Interval("lora.r", 1, 64, False, 1, True)),
        ("lora.r=tag(log, interval(1,64))", Interval("lora.r", 1, 64, True, 1, True)),
        ("lora.dropout=interval(0,0.1)", Interval("lora.dropout", 0, 0.1, False, None, False)),
        ("train.lr=interval(1e-5,1e-3)", Interval("train.lr", 1e-5, 1e-3, False, None, False)),
        (
            "train.lr=tag(log, interval(1e-5, 1e-3))",
            Interval("train.lr", 1e-5, 1e-3, True, None, False),
        ),
        ("train.epochs=interval(1,3)", Interval("train.epochs", 1, 3, False, None, False)),
        ("seed=shuffle(range(0,4))", Interval("seed", 0, 3, False, 1, True)),
    ],
)
def test_what_is_typed_becomes_an_axis(typed: str, axis: Choice | Interval) -> None:
    (found,) = space(typed).axes
    if isinstance(axis, Interval):
        assert isinstance(found, Interval) and found.step == pytest.approx(axis.step)
        assert (found.low, found.is_integer, found.log) == (axis.low, axis.is_integer, axis.log)
        assert found.high == pytest.approx(axis.high)
    else:
        assert found == axis


GRIDS = (
    ("lora.r=range(4,33,4)", "seed=0,1"),
    ("lora.r=range(2,9,3)", "lora.dropout=range(0,0.3,0.1)"),
    ("quant=none,nf4", "lora.targets=[q_proj],mlp", "data.n=16"),
)


@pytest.mark.parametrize("typed", GRIDS)
def test_the_cells_of_a_finite_space_are_those_of_hydras_own_grid(typed: tuple[str, ...]) -> None:
    parser = OverridesParser.create()
    expected = BasicSweeper.split_arguments(parser.parse_overrides(list(typed)), None)[0]
    found = space(*typed)

    def values(overrides: list[str]) -> frozenset[tuple[str, Any]]:
        parsed = parser.parse_overrides(overrides)
        pairs = [(o.key_or_group, o.value()) for o in parsed]
        return frozenset((k, round(v, 9) if isinstance(v, float) else str(v)) for k, v in pairs)

    ours = [values(found.overrides(cell)) for cell in found.cells()]
    assert found.is_finite and len(ours) == len(expected)
    assert set(ours) == {values(each) for each in expected}


def test_a_setting_with_a_condition_exists_for_some_choices_only() -> None:
    found = space(
        "quant.double=true,false",
        "quant=none,nf4,fp4",
        when={"quant": {"double": "quant=nf4,fp4"}},
    )
    assert [axis.key for axis in found.axes] == ["quant", "quant.double"]
    cells = list(found.cells())
    assert {"quant": "none"} in cells and len(cells) == 5
    assert found.overrides({"quant": "none"}) == ["quant=none"]
    assert found.swept() == ["quant.kind", "quant.double"]


def test_conditions_may_hang_on_one_another() -> None:
    found = space(
        "lora.r=2,4", "lora.alpha=1,2", "lora.dropout=0.1,0.2",
        when={"lora.alpha": "lora.r=4", "lora.dropout": "lora.alpha=2"},
    )  # fmt: skip
    assert len(list(found.cells())) == 1 + 1 + 2


def test_what_is_typed_wins_over_a_file_and_single_values_are_shared() -> None:
    params = {"lora": {"r": "choice(4,8)", "dropout": 0.1}, "train.lr": "interval(0.1,0.2)"}
    found = space("lora.r=16", params=params)
    assert [axis.key for axis in found.axes] == ["train.lr"]
    assert set(found.shared) == {"lora.r=16", "lora.dropout=0.1"}


@given(st.floats(1e-5, 1e-3))
def test_a_number_is_typed_with_six_digits_and_stays_inside(value: float) -> None:
    (axis,) = space("train.lr=interval(1e-5,1e-3)").axes
    typed = float(axis.text(value))
    assert 1e-5 <= typed <= 1e-3 and typed == pytest.approx(value, rel=1e-5)


def test_a_space_is_the_same_in_any_order() -> None:
    both = list(product(("lora.r=4,8",), ("seed=0,1", "seed=1,0")))
    spaces = [space(*typed) for typed in both] + [space("seed=0,1", "lora.r=4,8")]
    assert spaces[0].described() == spaces[2].described()
    assert spaces[0].described() != space("lora.r=4,8").described()
    assert values_of(spaces[0].axes[0]) == [4, 8]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lora.targets=interval(1,3)", "lora.targets is not a number, got an interval; type"),
        ("quant=range(1,3)", "quant is not a number, got a range"),
        ("train.deterministic=interval(0,1)", "train.deterministic is not a number"),
        ("lora.r=interval(0.5,4)", "lora.r must be an integer, got an interval from 0.5"),
        ("lora.r=interval(8,4)", "lora.r must have an interval from low to high, got 8"),
        ("lora.r=interval(4,4096)", "lora.r must be at most 1024, got 4096"),
        ("lora.dropout=interval(0,1)", "lora.dropout must be less than 1, got 1"),
        ("lora.r=choice(0,4)", "lora.r must be at least 1, got 0"),
        ("lora.r=choice(a,4)", "lora.r must be an integer, got 'a'"),
        ("quant=choice(none,nf5)", "quant must be one of"),
        ("train.lr=tag(log,interval(0,1))", "train.lr must be above 0 on a logarithmic scale"),
        ("train.lr=tag(log,range(0.1,0.5,0.1))", "type tag(log, interval(low, high))"),
        ("lora.r=range(4,4)", "lora.r must have a range with values in it"),
        ("quant=glob(x*)", "quant must have values to choose from, got none"),
        ("loar.r=choice(4,8)", "loar.r is not a setting; did you mean 'lora.r'?"),
        ("lora.r=8", "a search needs a setting to search, got single values only"),
    ],
)
def test_a_mistake_is_one_clear_sentence(typed: str, said: str) -> None:
    assert said in problem(typed)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ({"lora.alpha": "lora.r=4"}, "lora.alpha is not searched"),
        ({"seed": "quant=nf4"}, "quant is not searched as a choice"),
        ({"seed": "lora.r=5"}, "lora.r is never 5"),
        ({"seed": "lora.r="}, "must be like quant=nf4,fp4"),
        ({"seed": "lora.r=4", "lora.r": "seed=0"}, "must not go in circles"),
    ],
)
def test_a_condition_that_cannot_be_is_refused(when: dict[str, str], said: str) -> None:
    assert said in problem("lora.r=4,8", "seed=0,1", when=when)


def test_a_file_with_values_that_nobody_can_type_is_refused() -> None:
    assert "must hold values as on the command line" in problem(
        "seed=0,1", params={"lora.r": "cho(("}
    )
