"""Chats that are logged in pieces: no scored answer is trained on, and few rows are lost.

These tests look for leaks in the simplest way: they compare questions and answers as texts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_rows import config, many, row
from tinyllama_lab.data.rows import LeftOut, RawRow, Turn
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.splits import Split, split_records, split_rows
from tinyllama_lab.errors import DataError

Exchange = tuple[str, str]
GREETING, THANKS = ("Hi", "Hello! How can I help?"), ("Thanks", "You are welcome.")


def chat(exchanges: Sequence[Exchange], **changes: Any) -> RawRow:
    turns = [
        Turn(r, t) for pair in exchanges for r, t in zip(("user", "assistant"), pair, strict=True)
    ]
    return row(*exchanges[-1], messages=tuple(turns), **changes)


def story(name: object, length: int) -> list[Exchange]:
    """Return a conversation that shares nothing with others."""
    return [(f"{name}: question {n}", f"{name}: answer {n}") for n in range(length)]


def pairs(row: RawRow, supervised: bool = False) -> list[Exchange]:
    """Return question and answer of every assistant turn, or of the supervised ones."""
    found, asked = [], ""
    for turn in row.messages:
        if turn.role == "user":
            asked = turn.content.casefold()
        elif turn.role == "assistant" and (turn.supervised or not supervised):
            found.append((asked, turn.content.casefold()))
    return found


def leaks(split: Split, known: Iterable[Exchange] = ()) -> int:
    """Count the training rows that learn an answer of a held-out row."""
    scored = {pair for each in split.heldout for pair in pairs(each)}
    scored -= {(q.casefold(), a.casefold()) for q, a in known}
    return sum(not scored.isdisjoint(pairs(each, supervised=True)) for each in split.train)


def names(rows: Iterable[RawRow]) -> Counter[str]:
    """Count the rows of each story; the last turn of a row contains its name."""
    return Counter(each.prompt.partition(":")[0] for each in rows)


def shuffled(rows: Sequence[RawRow]) -> list[RawRow]:
    return random.Random(0).sample(rows, len(rows))


def is_whole(split: Split) -> bool:
    """Return whether no story is on both sides and no row is lost."""
    return not split.dropped.counts and not names(split.train) & names(split.heldout)


def test_growing_prefixes_of_one_chat_stay_together() -> None:
    chats = [story(f"chat {n}", 6) for n in range(9)]
    rows = shuffled([chat(each[: length + 1]) for each in chats for length in range(6)])
    split = split_rows(rows, config(eval_n=9))
    assert is_whole(split) and leaks(split) == 0
    assert len(split.heldout) == 12  # two chats: a third is larger than what is left of 9 + 5
    assert len(split.train) == 42


@pytest.mark.parametrize("width", [3, 12])
def test_windows_that_slide_over_one_chat_stay_together(width: int) -> None:
    """With 12 exchanges per window, one answer is in 12 rows with different openings."""
    chats = [story(f"chat {n}", 30) for n in range(12)]
    rows = [chat(each[start : start + width]) for each in chats for start in range(31 - width)]
    split = split_rows(shuffled(rows), config(eval_n=60))
    assert is_whole(split) and leaks(split) == 0
    assert 60 <= len(split.heldout) <= 60 + len(rows) // 10


def test_branches_of_one_chat_stay_together() -> None:
    rows = []
    for n in range(30):
        trunk = story(f"chat {n}", 4)
        for branch in range(12):
            kept = trunk[: 1 + branch % 3]
            rows.append(chat([*kept, *story(f"chat {n}: {branch}", 2)]))
    split = split_rows(shuffled(rows), config(eval_n=40))
    assert is_whole(split) and leaks(split) == 0
    assert len(split.heldout) >= 40


def test_branches_that_are_logged_with_and_without_their_first_turn_stay_together() -> None:
    """An answer that twelve others follow is not small talk if it comes from one chat."""
    rows = []
    for n in range(30):
        trunk = story(f"chat {n}", 2)
        for branch in range(12):
            rows.append(chat([*trunk[branch % 2 :], *story(f"chat {n}: {branch}", 1)]))
    split = split_rows(shuffled(rows), config(eval_n=60))
    assert is_whole(split) and leaks(split) == 0 and len(split.heldout) >= 60


def test_prefixes_with_a_clock_in_the_system_turn_stay_together() -> None:
    rows = []
    for n in range(20):
        for length in range(1, 6):
            turns = chat(story(f"chat {n}", length)).messages
            clock = Turn("system", f"It is {n}:{length} o'clock.")
            rows.append(replace(chat(story(f"chat {n}", length)), messages=(clock, *turns)))
    split = split_rows(shuffled(rows), config(eval_n=20))
    assert is_whole(split) and leaks(split) == 0 and len(split.heldout) >= 20


def test_small_talk_gives_nothing_away() -> None:
    rows = [chat([*story(f"chat {n}", 2), THANKS]) for n in range(100)]
    rows += [chat([GREETING, *story(f"chat {n}", 2)]) for n in range(100, 115)]
    split = split_rows(shuffled(rows), config(eval_n=20))
    assert split.dropped == LeftOut()
    assert len(split.heldout) == 20 + 11
    assert leaks(split) > 0 == leaks(split, [GREETING, THANKS])


def test_what_few_conversations_share_is_no_small_talk() -> None:
    shared = [("The code?", "It is 4711."), ("The other code?", "It is 4712.")]
    rows = [chat([*story(f"chat {n}", 2), shared[n % 2]]) for n in range(18)]
    rows += [chat(story(f"other {n}", 3)) for n in range(100)]
    split = split_rows(shuffled(rows), config(eval_n=20))
    assert leaks(split) == 0 and split.dropped == LeftOut()


def test_one_conversation_of_a_hundred_is_no_small_talk() -> None:
    """Ten of 1,500 rows share an answer, and small talk needs more than 1 %."""
    rows = [chat([*story(f"chat {n}", 2), THANKS]) for n in range(10)]
    rows += [chat(story(f"other {n}", 3)) for n in range(1490)]
    split = split_rows(shuffled(rows), config(eval_n=200))
    assert leaks(split) == 0 and split.dropped == LeftOut()


@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("marks", [("", ""), ("val", "train")])
def test_a_long_common_beginning_costs_no_row(length: int, marks: tuple[str, str]) -> None:
    """Exchanges that always occur together count as one, and here it is in every chat."""
    shown = story("shown", length)
    rows = [chat([*shown, *story(n, 1)], split=marks[n % 5 != 0]) for n in range(200)]
    split = split_rows(shuffled(rows), config(eval_n=30, columns={"split": "split"}))
    assert split.dropped == LeftOut() and leaks(split, shown) == 0
    assert len(split.heldout) == (40 if any(marks) else 30 + 20)


@pytest.mark.parametrize("others", [0, 20, 60, 400])
def test_conversations_that_begin_with_the_same_greeting_lose_no_row(others: int) -> None:
    rows = [chat([GREETING, *story(f"chat {n}", 3)]) for n in range(200)]
    rows += [chat(story(f"other {n}", 3)) for n in range(others)]
    split = split_rows(shuffled(rows), config(eval_n=30))
    assert split.dropped == LeftOut() and leaks(split, [GREETING]) == 0
    assert len(split.heldout) == 30 + min(30, len(rows) // 10)
    if others < 200:  # else what is scored would be unlike most of what is trained on
        assert any(each.messages[0].content == GREETING[0] for each in split.heldout)


def test_a_chat_that_is_too_long_for_the_reserve_is_trained_on() -> None:
    long = story("long", 300)
    rows = [chat(long[: n + 1]) for n in range(300)] + [chat(story(n, 2)) for n in range(400)]
    split = split_rows(shuffled(rows), config(eval_n=16))
    assert is_whole(split) and leaks(split) == 0
    assert names(split.train)["long"] == 300 and len(split.heldout) == 32


def test_few_long_chats_are_held_out_whole() -> None:
    rows = [chat(story(n, 100)[: k + 1]) for n in range(3) for k in range(100 - n)]
    split = split_rows(shuffled(rows), config(eval_n=16))
    assert is_whole(split) and leaks(split) == 0
    assert (len(split.heldout), len(split.train)) == (98, 199)  # the smallest
    assert split.notes == (
        "rows that share a group or a beginning stay together, so 98 rows are held out for "
        "data.eval_n=16: 1 of 3 groups",
    )


def test_one_chat_cannot_be_divided() -> None:
    rows = [chat(story("only", 40)[: k + 1]) for k in range(40)]
    data = config(eval_n=8, n=8)
    split = split_rows(rows, data)
    assert (len(split.heldout), len(split.train)) == (0, 40)
    with pytest.raises(DataError, match="rows that share .* stay on one side, so no values of"):
        check_enough(split, data, "data=file")


def test_texts_that_continue_each_other_stay_together() -> None:
    """One column holds the whole chat, once for each of its answers."""
    rows = []
    for n in range(20):
        log = ""
        for length in range(5):
            prompt = f"{log}User: {n} asks {length}\nBot:"
            rows.append(row(prompt, f" {n} says {length}"))
            log = f"{prompt} {n} says {length}\n"
    split = split_rows(shuffled(rows), config(eval_n=12))
    sides = [{each.prompt.split()[1] for each in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and len(split.train) + len(split.heldout) == 100
    texts = [f"text {n} " + "and on " * k for n in range(20) for k in range(5)]
    for rows in ([row("", each) for each in texts], [row(each, each) for each in texts]):
        split = split_rows(shuffled(rows), config(eval_n=12))
        sides = [{r.response.split()[1] for r in part} for part in (split.train, split.heldout)]
        assert not sides[0] & sides[1] and len(split.train) + len(split.heldout) == 100


# ---- a user's own groups ---------------------------------------------------------------------


@given(
    labels=st.lists(st.sampled_from(["", " ", "a", "b", "c", "d", "e"]), max_size=80),
    eval_n=st.integers(1, 30),
)
def test_own_groups_stay_on_one_side_and_lose_no_row(labels: list[str], eval_n: int) -> None:
    rows = [row(f"question {n}", group=label) for n, label in enumerate(labels)]
    split = split_rows(rows, config(eval_n=eval_n))
    parts = [{r.group for r in part if r.group.strip()} for part in (split.train, split.heldout)]
    assert not parts[0] & parts[1]
    assert len(split.train) + len(split.heldout) == len(rows)
    assert split_rows(shuffled(rows), config(eval_n=eval_n)) == split
    if len({*filter(str.strip, labels)}) + sum(not label.strip() for label in labels) > 1:
        assert split.heldout


def test_groups_are_compared_without_case_and_spacing() -> None:
    labels = ["User A", " user  a", "USER A"]
    rows = [row(f"question {n}", group=labels[n % 3]) for n in range(9)]
    split = split_rows(rows + many(60), config(eval_n=20))
    for part in (split.train, split.heldout):
        assert sum(bool(each.group) for each in part) in (0, 9)


def test_large_groups_are_held_out_whole_and_it_is_said() -> None:
    rows = many(300, group="one") + [row(f"other {n}", group="two") for n in range(200)]
    split = split_rows(rows, config(eval_n=64))
    assert {each.group for each in split.heldout} == {"two"} and len(split.train) == 300
    assert "200 rows are held out for data.eval_n=64: 1 of 2 groups" in split.notes[0]


def test_groups_chain_through_what_their_rows_share() -> None:
    rows = [row("same", "x", group="a"), row("same", "y", group="b"), row("other", group="b")]
    split = split_rows(rows + many(60), config(eval_n=20))
    for part in (split.train, split.heldout):
        assert sum(bool(each.group) for each in part) in (0, 3)


# ---- marked splits ---------------------------------------------------------------------------

MARKED: dict[str, Any] = {"columns": {"split": "split"}}


def test_training_rows_that_teach_a_marked_answer_are_left_out() -> None:
    held = chat(story("a", 4)[1:], split="val", group="g")
    rows = [
        held,
        chat(story("a", 2), split="train", number=1),  # its last answer is a held-out one
        chat(story("a", 1), split="train", number=2),  # neither an answer nor the beginning
        chat([story("a", 2)[1], ("new", "turn")], split="train", number=3),  # the same beginning
        chat([("A: Question  2", "a: answer 2")], split="train", number=4),  # but for spelling
        chat([("a: question 2", "another answer")], split="train", number=5),
        chat(story("b", 1), split="train", group="g", number=6),
        chat(story("b", 2), split="train", group="h", number=7),
    ]
    split = split_rows(rows, config(**MARKED))
    assert split.heldout == [held]
    assert sorted(each.number for each in split.train) == [2, 5, 7]
    assert split.dropped.facts == {"in_heldout": 4} and split.dropped.first == {"in_heldout": 1}


def test_only_what_is_trained_on_gives_an_answer_away() -> None:
    held, other = story("a", 3), story("b", 2)

    def unsupervised(each: RawRow, *places: int) -> RawRow:
        turns = [replace(t, supervised=n not in places) for n, t in enumerate(each.messages)]
        return replace(each, messages=tuple(turns))

    first = unsupervised(chat([("so", "so"), held[1], other[0]], split="train", number=1), 3)
    second = chat([("well", "well"), held[2], other[1]], split="train", number=2)
    for learn, left_out in (("all", 1), ("last", 0)):
        # that the held-out row itself supervises its last turn alone changes nothing
        scored = unsupervised(chat(held, split="val"), 1, 3)
        split = split_rows([scored, first, second], config(learn=learn, **MARKED))
        assert split.dropped.counts["in_heldout"] == left_out
    last = chat([("well", "well"), held[1]], split="train", number=3)
    assert not split_rows([scored, last], config(learn="last", **MARKED)).train


def test_a_greeting_in_marked_rows_costs_no_row() -> None:
    rows = [
        chat([GREETING, *story(f"chat {n}", 2), THANKS], split="val" if n % 5 == 0 else "train")
        for n in range(100)
    ]
    split = split_rows(shuffled(rows), config(**MARKED))
    assert (len(split.heldout), len(split.train)) == (20, 80)


def test_prefixes_that_were_marked_at_random_are_left_out() -> None:
    """Each of the 9 chats has a held-out row, so none of them can be trained on."""
    rows = [
        chat(story(n, 10)[: k + 1], split="val" if k == n else "train")
        for n in range(9)
        for k in range(10)
    ]
    rows += [chat(story(f"other {n}", 3), split="train") for n in range(30)]
    split = split_rows(shuffled(rows), config(**MARKED))
    assert leaks(split) == 0 and len(split.train) == 30
    assert split.dropped.facts == {"in_heldout": 81}


# ---- any chats -------------------------------------------------------------------------------

turns = st.lists(
    st.tuples(st.sampled_from("pqrstuv"), st.sampled_from("xyz")), min_size=1, max_size=5
)
chats = st.lists(
    st.builds(chat, turns, group=st.sampled_from(["", "", "", "a", "b"])), max_size=40
)


@given(
    rows=chats, eval_n=st.integers(1, 20), marks=st.lists(st.booleans(), min_size=40, max_size=40)
)
def test_no_answer_that_is_scored_is_learned(
    rows: list[RawRow], eval_n: int, marks: list[bool]
) -> None:
    """Small talk is in at least ten rows, so exchanges in fewer rows must be on one side."""
    often = Counter(pair for each in rows for pair in set(pairs(each)))
    common = [pair for pair, count in often.items() if count >= 10]
    marked = [replace(r, split="dev" if m else "train") for r, m in zip(rows, marks, strict=False)]
    for given_rows in (rows, marked):
        if given_rows is marked and {r.split for r in marked} != {"dev", "train"}:
            continue
        split = split_rows(given_rows, config(eval_n=eval_n))
        assert leaks(split, common) == 0
        groups = [{r.group for r in part if r.group} for part in (split.train, split.heldout)]
        assert not groups[0] & groups[1]
        assert split.rows == len(rows)
        assert split_rows(shuffled(given_rows), config(eval_n=eval_n)) == split
        assert split_rows(given_rows, config(eval_n=eval_n, n="all")) == split


@pytest.mark.parametrize("as_chats", [True, False])
def test_a_greeting_that_many_groups_share_ties_none_to_another(as_chats: bool) -> None:
    """The chats are growing prefixes or single turns; each session has its own group."""
    records = []
    for n in range(18):
        talk = [("hi", "Hello!"), (f"my order {n}", f"it is late {n}"), (f"why {n}?", f"snow {n}")]
        for end in range(1, 4):
            made: dict[str, Any] = {"session_id": f"s {n}"}
            if as_chats:
                turns = [m for p in talk[:end] for m in zip(("user", "assistant"), p, strict=True)]
                made["messages"] = [{"role": "system", "content": f"day {n % 3}"}] + [
                    {"role": role, "content": text} for role, text in turns
                ]
            else:
                made |= dict(zip(("prompt", "response"), talk[end - 1], strict=True))
            records.append(made)
    found = split_records(records, config(eval_n=6))
    assert found.dropped.facts == {"duplicate": 18 - (3 if as_chats else 1)}
    held, train = (
        {row.group for row in rows if row.response != "Hello!"}
        for rows in (found.heldout, found.train)
    )
    assert len(held) in range(3, 7) and not held & train and len(held | train) == 18


def test_where_groups_leave_too_little_the_refusal_says_so_and_what_to_type() -> None:
    records = [{"prompt": f"q {n}", "response": f"r {n}", "who": "all", "n": n} for n in range(40)]
    typed = config(eval_n=8, columns={"group": "who"})
    with pytest.raises(DataError) as caught:
        check_enough(split_records(records, typed), typed, "data=file")
    assert str(caught.value).endswith(
        "rows of one 'who' stay on one side: to let them part, type data.columns.group='', or add "
        "rows"
    )
    free = config(eval_n=8, columns={"group": ""})
    check_enough(split_records(records, free), free, "data=file")


def test_chats_that_differ_in_their_tools_or_calls_are_no_duplicates() -> None:
    """One of the two may be usable alone, so both stay, on one side."""
    told = [chat(story(n, 2)) for n in range(30)]
    tools = [replace(each, tools='[{"type": "function"}]') for each in told]
    weighted = [
        replace(each, messages=(*each.messages[:-1], replace(each.messages[-1], supervised=False)))
        for each in told
    ]
    called = [
        replace(each, messages=(*each.messages[:-1], replace(each.messages[-1], extra="{}")))
        for each in told
    ]
    found = split_rows([*tools, *told, *weighted, *called, *told], config(eval_n=8))
    assert found.dropped.facts == {"duplicate": 30}
    held, train = ({row.prompt for row in rows} for rows in (found.heldout, found.train))
    assert len(found.heldout + found.train) == 120 and held and not held & train


def test_chats_that_are_left_out_are_not_counted_as_shortened() -> None:
    turns = [
        [
            {"role": role, "content": f"{text} {n // 2}"}
            for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
        ]
        for n in range(40)
    ]
    records = [{"messages": each[: 2 + (n < 10)]} for n, each in enumerate(turns)]
    found = split_records(records, config(eval_n=4))
    assert found.dropped.facts == {"duplicate": 20}
    said = "data: 5 of 20 chats are used up to their last answer (first: row 1)"
    assert said in found.notes
