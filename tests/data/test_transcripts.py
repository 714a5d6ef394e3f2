"""Chats and other texts in one column: what they share is found as in lists of messages."""

from __future__ import annotations

import random
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.data.test_rows import config
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.splits import conversations
from tinyllama_lab.data.splits.overlap import count_overlap
from tinyllama_lab.data.splits.splits import Split, split_records
from tinyllama_lab.data.splits.transcripts import read_transcript

Exchange = tuple[str, str]
PAIRS = [("q one", "a one"), ("q two", "a two")]


def labelled(asks: str, answers: str, between: str = "\n") -> Callable[[Sequence[Exchange]], str]:
    return lambda pairs: between.join(f"{asks}{q}{between}{answers}{a}" for q, a in pairs)


def wrapped(asks: str, answers: str, start: str = "", end: str = "") -> Any:
    return lambda pairs: start + "".join(f"{asks}{q}{end}{answers}{a}{end}" for q, a in pairs)


FORMATS: dict[str, Callable[[Sequence[Exchange]], str]] = {
    "ChatML": wrapped(
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_end|>\n",
    ),
    "Llama 2": wrapped("<s>[INST] ", " [/INST] "),
    "Llama 2, system": wrapped("<s>[INST] ", " [/INST] ", "[INST] <<SYS>>\nBe.\n<</SYS>>\n\n"),
    "Llama 3": wrapped(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "Gemma": wrapped(
        "<start_of_turn>user\n", "<start_of_turn>model\n", "<bos>", "<end_of_turn>\n"
    ),
    "Zephyr": wrapped("<|user|>\n", "<|assistant|>\n", "<|system|>\nBe.</s>\n", "</s>\n"),
    "DeepSeek": wrapped("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    "Alpaca": labelled("### Instruction:\n", "### Response:\n", "\n\n"),
    "headings": labelled("## User\n", "## Assistant\n", "\n\n"),
    "Vicuna": labelled("USER: ", "ASSISTANT: ", " "),
    "Vicuna, closed": wrapped("USER: ", "ASSISTANT: ", end="</s>"),
    "Guanaco": labelled("### Human: ", "### Assistant: ", ""),
    "Human": labelled("Human: ", "Assistant: ", "\n\n"),
    "User": labelled("User: ", "Bot: "),
    "markdown": labelled("**User:** ", "**Assistant**: "),
    "Q and A": labelled("Q: ", "A: "),
    "Q and A in one line": labelled("Q: ", "A: ", " "),
    "questions": labelled("Question: ", "Answer: "),
    "tags": wrapped("<human>: ", "\n<bot>: ", end="\n"),
    "unknown": labelled("Customer: ", "Agent: "),
    "Chinese": labelled("\u7528\u6237\uff1a", "\u52a9\u624b\uff1a"),
    "with times": labelled("[12:01] Alice: ", "[12:02] Bob: "),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_text_exchanges(name: str) -> None:
    found = read_transcript(FORMATS[name](PAIRS), is_whole=True).exchanges
    if name in ("unknown", "Chinese", "with times"):  # nobody says who answers
        assert found == (PAIRS[0], ("a one", "q two"), PAIRS[1])
    else:
        assert list(found) == PAIRS


def test_a_plain_text_exchanges_nothing() -> None:
    for text in ("", "a: b", "It is so.\nIs it?", "# Title\n\nSome text (see [1]).", "x < y > z"):
        assert read_transcript(text, is_whole=True).exchanges == ()
    assert read_transcript("Name: x\nPlace: y", is_whole=False).exchanges == ()


def both_sides(rows: Sequence[dict[str, str]], **settings: Any) -> tuple[Split, int]:
    """Return a split, and the overlap that the independent check counts."""
    data = config(n="all", **settings)
    split = split_records(random.Random(0).sample(rows, len(rows)), data)
    again = split_records(rows, data)
    assert (again.train, again.heldout) == (split.train, split.heldout)  # whatever their order
    everything = [*split.train, *split.heldout]
    return split, count_overlap(split.train, split.heldout, everything, data)


@pytest.mark.parametrize("name", FORMATS)
def test_windows_of_a_chat_that_is_written_out_stay_together(name: str) -> None:
    """30 chats of six exchanges, in five windows of two: one exchange is in two rows."""
    rows, chats = [], {}
    for chat in range(30):
        pairs = [(f"asks {chat}-{n}", f"says {chat}-{n}") for n in range(6)]
        for start in range(5):
            text = FORMATS[name](pairs[start : start + 2])
            chats[text] = chat
            rows.append({"text": text})
    split, overlap = both_sides(rows)
    sides = [{chats[row.response] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and overlap == 0
    assert len(split.heldout) >= 16 and split.rows == 150 and not split.dropped.counts


@pytest.mark.parametrize("name", FORMATS)
def test_the_check_of_its_own_sees_written_out_chats(name: str) -> None:
    pairs = [(f"asks {n}", f"says {n}") for n in range(4)]
    texts = [FORMATS[name](pairs[start : start + 2]) for start in range(3)]
    first, second, third = to_rows([{"text": text} for text in texts], config())[0]
    found = [count_overlap([each], [first], [], config()) for each in (second, third)]
    assert found == [1, 0]


@pytest.mark.parametrize("column", ["prompt", "context"])
def test_windows_that_are_prompts_stay_together(column: str) -> None:
    """The history is in or before the prompt; only the last answer has its own column."""
    rows = []
    for chat in range(30):
        pairs = [(f"asks {chat}-{n}", f"says {chat}-{n}") for n in range(6)]
        for start in range(5):
            text = FORMATS["User"](pairs[start : start + 2])
            prompt, _, answer = text.rpartition(" ")
            prompt, _, said = prompt.rpartition(" ")
            history, asked, last = prompt.rpartition("User: ")
            if column == "context":
                rows.append({"context": history, "prompt": last.removesuffix("\nBot:")})
            else:
                rows.append({"prompt": history + asked + last})
            rows[-1]["response"] = f" {said} {answer}"
    split, overlap = both_sides(rows)
    sides = [
        {row.response.split()[1].split("-")[0] for row in part}
        for part in (split.train, split.heldout)
    ]
    assert not sides[0] & sides[1] and overlap == 0 and len(split.heldout) >= 16


def test_other_answers_to_a_written_out_question_stay_together() -> None:
    rows = [
        {"text": f"### Instruction:\nasks {n}\n\n### Response:\nsays {n} {answer}"}
        for n in range(40)
        for answer in range(3)
    ]
    split, _ = both_sides(rows)
    sides = [{row.response.split()[3] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and split.rows == 120 and not split.dropped.counts


WORDS = [f"w{n}" for n in range(5000)]


def prose(seed: int, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def english(seed: int) -> str:
    return " ".join(prose(seed, 600))


def chinese(seed: int) -> str:
    return "".join(chr(0x4E00 + int(word[1:])) for word in prose(seed, 3000))


def with_labels(seed: int, labels: Sequence[str]) -> str:
    words = iter(prose(seed, 600))
    lines = [" ".join(word for word, _ in zip(words, range(12), strict=False)) for _ in range(50)]
    return "\n".join(f"{labels[n % len(labels)]}: {line}" for n, line in enumerate(lines))


def remarks(seed: int) -> str:
    """Return lines that look like turns of speakers but are not."""
    return with_labels(seed, ["Note", "Figure 1", "else", "name"])


def play(seed: int) -> str:
    return with_labels(seed, ["ROMEO", "JULIET"])


def chat_log(seed: int) -> str:
    return with_labels(seed, ["User", "Bot"])


@pytest.mark.parametrize("write", [english, chinese, remarks, play, chat_log])
@pytest.mark.parametrize(("width", "step"), [(250, 200), (250, 125), (517, 460), (450, 400)])
def test_pieces_of_a_text_that_overlap_stay_together(
    write: Callable[[int], str], width: int, step: int
) -> None:
    """The splitter counts characters, so it cuts words."""
    rows, texts = [], {}
    for n in range(40):
        for start in range(0, 5 * step, step):
            text = write(n)[start : start + width]
            if len(text) < width:
                continue
            texts[text] = n
            rows.append({"text": text})
    split, overlap = both_sides(rows)
    sides = [{texts[row.response] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and overlap == 0
    assert len(split.heldout) >= 16 and len(split.train) + len(split.heldout) == len(rows)
    first, second, third = to_rows([*rows[:2], rows[-1]], config())[0]
    found = [count_overlap([each], [second], [], config()) for each in (first, third)]
    assert found == [1, 0]


@pytest.mark.parametrize("label", ["", "Note: "])
def test_texts_that_share_a_paragraph_stay_together(label: str) -> None:
    rows, texts = [], {}
    for n in range(40):
        shared = " ".join(prose(n, 20))
        for part in range(3):
            around = [" ".join(prose(1000 + 10 * n + 2 * part + k, 20)) for k in range(2)]
            text = "\n\n".join(label + each for each in (around[0], shared, around[1]))
            texts[text] = n
            rows.append({"text": text})
    split, overlap = both_sides(rows)
    sides = [{texts[row.response] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and overlap == 0 and len(split.train) >= 80


def test_pieces_that_are_cut_in_a_word_belong_to_the_whole() -> None:
    rows, texts = [], {}
    for n in range(30):
        for length in (700, 1000, len(english(n))):
            texts[english(n)[:length]] = n
            rows.append({"text": english(n)[:length]})
    split, overlap = both_sides(rows)
    sides = [{texts[row.response] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and overlap == 0 and len(split.heldout) >= 16


def test_a_short_text_that_ends_another_stays_with_it() -> None:
    short = [f"what is the capital of country {n}" for n in range(60)]
    rows = [{"text": start + text} for text in short for start in ("", "please tell me: ")]
    split, _ = both_sides(rows)
    sides = [{row.response.split()[-1] for row in part} for part in (split.train, split.heldout)]
    assert not sides[0] & sides[1] and len(split.heldout) >= 16


def test_a_text_that_repeats_itself_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole log beside one of its pieces; the number of compared letters is bounded."""
    looked_up = 0

    def counted(ordered: list[str], text: str) -> int:
        nonlocal looked_up
        looked_up += len(text)
        return bisect_left(ordered, text)

    monkeypatch.setattr(conversations, "bisect_left", counted)
    line = "worker started the job number one two three and went on quietly"
    texts = [f"{line} 7 done", "\n".join([line] * 1000), *(english(n) for n in range(60))]
    rows = to_rows([{"text": text} for text in texts], config())[0]
    found = conversations.candidates(rows, config())
    assert looked_up < sum(map(len, texts))
    assert max(len(each.memberships) for each in found) <= 64  # the words compared


def test_the_check_of_its_own_keeps_only_where_texts_may_meet() -> None:
    """The check must not need memory for each letter of the held-out texts."""
    rows = to_rows([{"text": " ".join(prose(n, 5000))} for n in range(20)], config())[0]
    tracemalloc.start()
    count_overlap(rows[:10], rows[10:], rows, config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * sum(len(row.response) for row in rows)


@pytest.mark.parametrize("hashes", [1, 3, 6, 7, 79])
def test_up_to_six_hashes_mark_a_turn_in_the_middle_of_a_line(hashes: int) -> None:
    """Six as in a heading: more are a banner, in which no position is tried as a mark."""
    marks = "#" * hashes
    found = read_transcript(f"So.{marks}Human: q one{marks}Assistant: a one", is_whole=True)
    assert found.exchanges == ((PAIRS[0],) if hashes <= 6 else ())


def test_turns_of_one_side_that_follow_each_other_are_one() -> None:
    text = "User: one\nUser: two\nBot: three\nBot: four\nUser: five\nUser: six"
    assert read_transcript(text, True) == ((("one two", "three four"),), "five six", True)


FEW_SHOT = "".join(f"Q: example {n}\nA: shown {n}\n" for n in range(4))
NOTICE = "\n".join(f"# line {n} of a long notice that stands in every file" for n in range(4))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (FEW_SHOT, ""),
        (NOTICE + "\n", ""),
        (NOTICE + "\n", "\n" + NOTICE),
        ("Below is a task that is to be done as well as you can do it.\n", ""),
        ("", "\nUser: Thanks!\nBot: Bye.\nUser: bye\nBot: bye bye"),
    ],
)
@pytest.mark.parametrize("column", ["text", "prompt"])
def test_what_every_text_has_gives_nothing_away(before: str, after: str, column: str) -> None:
    rows = [{"text": f"{before}Q: asks {n}\nA: says {n}{after}"} for n in range(200)]
    if column == "prompt":
        rows = [
            {"prompt": f"{before}{after}Q: asks {n}", "response": f"says {n}"} for n in range(200)
        ]
    split, overlap = both_sides(rows)
    assert (len(split.heldout), len(split.train), overlap) == (16 + 16, 168, 0)
    if "User:" in after:
        return
    plain = [{"text": f"{before}{' '.join(prose(n, 30))}{after}"} for n in range(200)]
    split, overlap = both_sides(plain)
    assert (len(split.heldout), len(split.train), overlap) == (16 + 16, 168, 0)
