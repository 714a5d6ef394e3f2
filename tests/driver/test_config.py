"""The schema: types and bounds of every setting, and the messages for mistakes."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import (
    Config,
    HardwareConfig,
    Science,
    kinds_of,
    part,
    value_problem,
)
from tinyllama_lab.config.validate import known_keys, nearest
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.trial import trial_key

KEYS = known_keys(Config)
EXTENDING = Path(__file__).parents[2] / "docs" / "extending.md"


def changed(**values: Any) -> dict[str, Any]:
    """Return the small configuration with other values: `changed(**{"lora.r": 0})`."""
    raw = grid.plain(*grid.SMALL)
    for key, value in values.items():
        *groups, name = key.split(".")
        place = raw
        for group in groups:
            place = place[group]
        place[name] = value
    return raw


def problems(**values: Any) -> list[str]:
    """Return the problems of the small configuration with these values."""
    try:
        config.load(changed(**values))
    except ConfigError as error:
        return error.problems
    return []


def test_a_good_configuration_is_taken_as_it_is() -> None:
    loaded = config.load(changed(**{"lora.r": 4, "train.lr": 1}))
    assert dataclasses.asdict(loaded) == changed(**{"lora.r": 4, "train.lr": 1})
    assert loaded.lora.scale_alpha == 16.0  # whatever the rank
    assert config.load(changed(**{"lora.r": 4, "lora.alpha": None})).lora.scale_alpha == 8.0


@pytest.mark.parametrize("key", ["data.source", "lora.variant"])
def test_a_choice_that_a_recipe_can_add_names_the_recipe(key: str) -> None:
    (problem,) = problems(**{key: "po"})
    (recipe,) = re.findall("; type one of them, or add one: '(.+)' in docs/extending.md$", problem)
    assert f"\n## {recipe}\n" in EXTENDING.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("frist_1", "first_1"),
        ("first1", "first_1"),
        ("First_4", "first_4"),
        ("lst_12", "last_12"),
        ("last_0", "last_8"),
        ("last", "last_8"),
        ("last-3", "last_3"),
        ("al", "all"),
        ("every", "all"),
        ("_3", "last_3"),
        ("", "last_8"),
    ],
)
def test_layers_that_are_none_get_the_most_similar_ones(typed: str, meant: str) -> None:
    (problem,) = problems(**{"lora.layers": typed})
    assert problem.startswith("lora.layers must be all, first_ or last_ and a number")
    assert problem.endswith(f"got {typed!r}; set lora.layers={meant}")


BROKEN = {
    "lora.r": [0, -1, 1025, 8.0, "8", True, None, [8]],
    "lora.alpha": [0, -2.0, math.nan, math.inf, False],
    "lora.dropout": [1, 1.0, -0.1, math.nan, "0"],
    "lora.targets": ["q_proj", "attn", 3, [1], None],
    "lora.variant": ["LoRA", "", None],
    "data.n": [0, 1.5, True, "many"],
    "data.max_length": [7, None],
    "data.drop_containing": ["error", [1], None],
    "data.columns": [None, "prompt", 3],
    "quant.kind": ["int4", None, 4],
    "quant.double": [0, 1, "yes", None],
    "train.epochs": [0, -1, 1001, math.inf],
    "train.lr": [0, 1.01, math.nan, math.inf, -math.inf, "1e-3"],
    "train.clip_norm": [0, -1, math.inf],
    "train.max_steps": [0, 1.0, True],
    "eval.generations": [-1, None],
    "seed": [-1, 2**31, True, None, 0.0],
    "retry": ["always", None],
    "profile": ["none", None],
    "study": ["", "../x", "a/b", ".hidden", "_base", "a" * 65, "a..b", "a b", "a\n", 7, None],
    "hardware.checkpoint_every_s": [0, math.inf],
    "hardware.device": ["gpu"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values]
)
def test_a_broken_rule_is_named_with_its_key_and_value(key: str, value: Any) -> None:
    (problem,) = problems(**{key: value})
    assert problem.startswith(f"{key} must be ")
    assert repr(value) in problem or str(value) in problem


ON_THE_BOUND = {
    "lora.r": [1, 1024],
    "lora.alpha": [0.5, 3],
    "lora.dropout": [0, 0.999],
    "lora.targets": [["q_proj", "v_proj"], "mlp", "regex:.*_proj"],
    "lora.layers": ["all", "first_1", "last_30", [0, 29]],
    "lora.rank_pattern": [None, {"down_proj": 1, r"layers\.0\..*": 1024}],
    "train.lr": [1, 1e-9],
    "train.epochs": [0.01, 1000],
    "train.clip_norm": [None, 1],
    "seed": [0, 2**31 - 1],
    "study": ["a" * 64, "0", "r=8".replace("=", "-"), "A.b_c-9"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ON_THE_BOUND.items() for value in values]
)
def test_a_value_on_its_bound_is_taken(key: str, value: Any) -> None:
    assert problems(**{key: value}) == []
    assert value_problem(key, value) is None


@pytest.mark.parametrize("key", KEYS)
def test_no_setting_takes_what_is_no_value_of_its_kind(key: str) -> None:
    assert all(value_problem(key, bad) for bad in (math.nan, math.inf, object(), {"a": 0}, {1: 1}))


@pytest.mark.parametrize("key", KEYS)
def test_true_is_never_a_number_and_a_number_is_never_true(key: str) -> None:
    is_flag = bool in kinds_of(key)  # a card's are null where there is no card
    assert (value_problem(key, True) is None) == is_flag
    if is_flag:
        assert value_problem(key, 1)


FP32 = {"train.precision": "fp32"}
FULL = {"lora.variant": "full"}
OF_BASE: list[dict[str, Any]] = [{"lora.bias": "all"}, {"lora.modules_to_save": ["lm_head"]}]
WITHOUT: list[tuple[str, dict[str, Any]]] = [  # what weights of the base cannot be trained with
    ("lora.", {"train.precision": "auto"}),
    ("lora.", {"train.precision": "bf16"}),
    ("lora.", {"quant.kind": "nf4"}),
    ("lora.init=pissa needs", {"lora.init": "pissa"}),
]
CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("model.path must", {"model.source": "local"}),
    ("data.path must", {"data.source": "file"}),
    ("model.repo must", {"model.source": "hub", "model.repo": None}),
    ("data.repo must", {"data.source": "hub"}),
    (
        "data.style must be chat",
        {"data.columns.messages": "m", "data.style": "query_intent_response"},
    ),
    ("data.style must be chat", {"data.columns.tools": "t", "data.style": "text"}),
    ("data.style must be text", {"data.columns.text": "t"}),
    ("data.columns.split must", {"data.eval_path": "val.jsonl"}),  # travel has the column
    ("data.columns.split must", {"data.eval_split": "validation"}),
    (
        "data.columns.intent must",
        {"data.style": "query_intent_response", "data.columns.intent": None},
    ),
    ("quant.double=true needs", {"quant.double": True}),
    ("quant.double=true needs", {"quant.double": True, "quant.kind": "int8"}),
    ("lora.targets must name", {"lora.targets": []}),
    *((start, {**FULL, **FP32, **changes}) for start, changes in WITHOUT[:3]),
    ("train.loraplus_ratio needs", {**FULL, **FP32, "train.loraplus_ratio": 16}),
    *(
        (start, {**of_base, **FP32, **changes})
        for of_base in OF_BASE
        for start, changes in WITHOUT
    ),
]


@pytest.mark.parametrize(("start", "values"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(
    start: str, values: dict[str, Any]
) -> None:
    (problem,) = problems(**values)
    assert problem.startswith(start)
    assert "set " in problem or "needs quant=nf4" in problem


@pytest.mark.parametrize(
    ("key", "expression", "says"),
    [
        ("lora.rank_pattern", "(?i)Q_proj", "global flags not at the start of the expression"),
        ("lora.rank_pattern", "q_proj)", "unbalanced parenthesis"),
        ("lora.targets", "q_proj|(?i)K_proj", "global flags not at the start of the expression"),
        ("lora.targets", "q{99999999999999999999}", "the repetition number is too large"),
        ("lora.targets", "(" * 3000 + ")" * 3000, "maximum recursion depth exceeded"),
    ],
    ids=lambda text: text[:20],
)
def test_an_expression_that_peft_cannot_compile_is_refused(
    key: str, expression: str, says: str
) -> None:
    (problem,) = problems(
        **{key: f"regex:{expression}" if key == "lora.targets" else {expression: 8}}
    )
    assert problem.startswith(f"{key} must hold regular expressions of Python, got {expression!r}")
    assert says in problem and problem.endswith("; a module's name alone is one, such as q_proj")


def test_trained_weights_of_the_base_must_be_float32() -> None:
    assert problems(**{"lora.modules_to_save": ["lm_head"]}) == [
        "lora.modules_to_save trains weights of the base, which needs train.precision=fp32, got "
        "auto; set train.precision=fp32"
    ]
    assert problems(**{"lora.bias": "all", "quant.kind": "nf4", **FP32}) == [
        "lora.bias=all trains weights of the base, which needs quant=none, got nf4; set quant=none"
    ]
    assert problems(**FULL) == [
        "lora.variant=full trains weights of the base, which needs train.precision=fp32, got "
        "auto; set train.precision=fp32"
    ]
    assert not any(problems(**each, **FP32) for each in (*OF_BASE, FULL))


def test_all_contradictions_come_together() -> None:
    several = {
        "model.source": "local",
        "data.source": "file",
        "quant.double": True,
        "lora.targets": [],
    }
    assert len(problems(**several)) == 4


def test_all_broken_rules_come_together_and_each_once() -> None:
    raw = changed(**{"lora.r": 0, "train.lr": "x", "data.columns.prompt": 3})
    raw["train"]["lerning_rate"] = 1
    raw["extra"] = raw["lora"]["rank"] = 8
    del raw["eval"]["generations"], raw["tracking"]
    with pytest.raises(ConfigError) as caught:
        config.load(raw)
    starts = [problem.partition(" ")[0] for problem in caught.value.problems]
    assert sorted(starts) == sorted(
        ["lora.r", "train.lr", "data.columns.prompt", "train.lerning_rate", "extra", "lora.rank"]
        + ["eval.generations", "tracking"]
    )
    assert str(caught.value).startswith("8 problems in the configuration; nothing was started")
    assert ConfigError(["same", "same"]).problems == ["same"]


@pytest.mark.parametrize("raw", [None, 3, [], "lora"])
def test_a_group_that_is_no_group_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigError, match="must be a group of settings"):
        config.load({**changed(), "lora": raw})


def test_a_part_is_checked_like_the_whole() -> None:
    assert part(HardwareConfig, changed()["hardware"]).max_attempts == 3
    science = {k: v for k, v in changed().items() if k in Science.__dataclass_fields__}
    assert part(Science, science).lora.r == 8
    with pytest.raises(ConfigError, match="devise is not a setting"):
        part(HardwareConfig, {**changed()["hardware"], "devise": "cpu"})


def edits(word: str, dice: random.Random) -> str:
    """Return typing errors: a letter lost, doubled, added, replaced, or swapped with the next."""
    at = dice.randrange(len(word))
    letter = dice.choice(string.ascii_lowercase)
    pair = word[at : at + 2][::-1]
    return dice.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + letter + word[at:],
            word[:at] + letter + word[at + 1 :],
            word[:at] + pair + word[at + 2 :],
        ]
    )


def misspelt(seed: int, each: int = 10) -> list[tuple[str, str]]:
    """Return pairs of a mistyped key and the intended one."""
    dice = random.Random(seed)
    pairs = [(edits(key, dice), key) for key in KEYS for _ in range(each)]
    return [(typed, meant) for typed, meant in pairs if typed not in KEYS]


def test_the_nearest_key_is_the_one_that_was_meant() -> None:
    pairs = misspelt(seed=0)
    wrong = [(t, m, nearest(t, KEYS)) for t, m in pairs if f"'{m}'" not in nearest(t, KEYS)]
    assert len(pairs) >= 300
    assert len(wrong) <= 0.05 * len(pairs), wrong


@pytest.mark.parametrize(
    ("typed", "meant"), [("r", "lora.r"), ("warmup_ratio", "train.warmup_ratio")]
)
def test_a_forgotten_group_is_found(typed: str, meant: str) -> None:
    assert nearest(typed, KEYS) == f"; did you mean '{meant}'?"


def test_nothing_is_suggested_for_a_word_like_no_other() -> None:
    assert nearest("qwertyuiop", KEYS) == ""


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ({"lora.layers": [2, 0, 2]}, {"lora.layers": [0, 2]}, True),
        ({"lora.layers": [0, 2]}, {"lora.layers": "all"}, False),
        ({"lora.rank_pattern": {"q_proj": 8}}, {"lora.rank_pattern": None}, True),
        ({"lora.rank_pattern": {}}, {"lora.rank_pattern": None}, True),
        (
            {"lora.modules_to_save": ["b", "a", "b"]} | FP32,
            {"lora.modules_to_save": ["a", "b"]} | FP32,
            True,
        ),
        ({"lora.modules_to_save": ["a"]} | FP32, FP32, False),
        ({"lora.bias": "all"} | FP32, {"lora.bias": "lora_only"} | FP32, False),
        # without an adapter, its settings mean nothing
        ({"lora.r": 4, "lora.targets": "mlp", "lora.alpha": 3} | FULL | FP32, FULL | FP32, True),
        ({"lora.init": "pissa", "lora.bias": "all"} | FULL | FP32, FULL | FP32, True),
        (FULL | FP32, FP32, False),
        ({"lora.rank_pattern": {"q_proj": 4}}, {"lora.rank_pattern": None}, False),
        # the first may be an exception from the second, so it counts
        ({"lora.rank_pattern": {"0.q": 8, "q": 4}}, {"lora.rank_pattern": {"q": 4}}, False),
    ],
)
def test_equal_adapters_have_one_key(
    one: dict[str, Any], other: dict[str, Any], are_equal: bool
) -> None:
    first, second = (trial_key(resolved(config.load(changed(**each)))) for each in (one, other))
    assert (first == second) == are_equal
