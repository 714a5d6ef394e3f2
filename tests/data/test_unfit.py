"""Well-known data sets without prompts and responses: the message, and that its remedy works."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.data.test_rows import config
from tests.records import chat, rows_of
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.errors import DataError

ASKED, ANSWER = chat("q a")[0], {"role": "assistant", "content": "good"}
LOGGED = chat("hi", "hello", "q a")
WORSE = {"role": "assistant", "content": "bad"}
PART = {"type": "text", "text": "r"}

# data set, one of its rows, part of the message, the response that its settings train on
SUGGESTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "HH-RLHF": (
        {"chosen": "Human: q a\n\nAssistant: good", "rejected": "Human: q a\n\nAssistant: bad"},
        "preference data (column 'chosen' is preferred to 'rejected'); to train on the preferred "
        "transcripts alone",
        "Human: q a\n\nAssistant: good",
    ),
    "DPO pairs": (
        {"prompt": "q a", "chosen": "good one", "rejected": "bad one"},
        "preference data",
        "good one",
    ),
    "Orca DPO": (
        {"system": "s t", "question": "q a", "chosen": "good one", "rejected": "bad one"},
        "data.columns.system=system",
        "good one",
    ),
    "UltraFeedback, binarized": (
        {"prompt": "q a", "chosen": [ASKED, ANSWER], "rejected": [ASKED, WORSE]},
        "data.columns.messages=chosen",
        "good",
    ),
    "TRL, prompt apart": (
        {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [WORSE]},
        "preference data",
        "good",
    ),
    "preferences beside messages": (
        {"messages": [ASKED], "chosen": "good one", "rejected": "bad one"},
        "preference data",
        "good one",
    ),
    "a log of requests, odd name": (
        {"messages": [ASKED], "model_response": "good one"},
        "got chats in 'messages' that end before it, and model_response, which may hold it; to "
        "train on the earlier answers alone, type data.columns.messages=messages; to train on it",
        "good one",
    ),
    "a log of requests, numbers": ({"messages": [ASKED], "output": 35}, "it, and output", "35"),
    "Stack Exchange pairs": (
        {"question": "q a", "response_j": "good one", "response_k": "bad one"},
        "'response_j' is preferred to 'response_k'",
        "good one",
    ),
    "sentiment": (
        {"text": "I like it", "sentiment": "positive"},
        "got 'text' next to 'sentiment', which may be the target; to train on the texts "
        "alone, type data.columns.text=text data.style=text; to predict 'sentiment' from them",
        "positive",
    ),
    "airline tweets": (
        {"tweet_id": "7", "airline_sentiment": "neutral", "text": "I like it"},
        "next to 'airline_sentiment'",
        "neutral",
    ),
    "IMDB": (
        {"text": "I like it", "label": 1},
        "from them, first write numbers or letters such as '1' out in words, then type ",
        "1",
    ),
    "news categories": ({"text": "I like it", "category": "sport"}, "'category'", "sport"),
    "MBPP": ({"text": "Write it", "code": "def f(): pass"}, "'code'", "def f(): pass"),
    "BillSum": ({"text": "long one", "summary": "short one"}, "'summary'", "short one"),
    "CoLA": ({"sentence": "I like it", "label": "fine"}, "'sentence' next to 'label'", "fine"),
    "XSum, summary first": (
        {"summary": "short one", "document": "long one", "id": "1"},
        "response=summary",
        "short one",
    ),
    "SAMSum": ({"id": "1", "dialogue": "A: hi", "summary": "short one"}, "", "short one"),
    "HumanEval": (
        {"prompt": "def f():", "test": "assert f() ", "canonical_solution": "return 1"},
        "response=canonical_solution",
        "return 1",
    ),
}


def typed_of(message: str) -> dict[str, Any]:
    """Return the settings that a message says to type, as `config` takes them."""
    parse = OverridesParser.create().parse_override
    typed = [parse(word) for word in shlex.split(message.rpartition("type ")[2])]
    settings = {each.key_or_group.removeprefix("data."): str(each.value()) for each in typed}
    columns = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("columns.")}
    return {"columns": columns, "style": settings.get("style", "chat")}


@pytest.mark.parametrize("name", SUGGESTED)
def test_the_suggested_settings_train_on_the_intended_answer(name: str) -> None:
    record, words, response = SUGGESTED[name]
    with pytest.raises(DataError) as caught:
        recognise([record] * 3, config())
    message = str(caught.value)
    assert words in message and message.isprintable() and "\n" not in message
    assert not re.search(r"=(rejected|response_k)\b", message)
    rows, dropped = rows_of([record] * 3, **typed_of(message))
    assert ([row.response for row in rows], dropped) == ([response] * 3, {})


CHOICES = "got multiple choice"
FEEDBACK = "got feedback on answers (column 'label' says whether one is good); keep the rows"
ONE_MESSAGE = "must be a whole conversation, got one message in each"
RIVALS = "got several to choose from"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "OpenAI's preferences": (
        {
            "input": {"messages": [ASKED], "tools": []},
            "preferred_output": [ANSWER],
            "non_preferred_output": [WORSE],
        },
        "write what was asked and 'preferred_output' as one list 'messages' in each row",
    ),
    "a log of requests as OpenAI answers them": (
        {"messages": LOGGED, "choices": [{"index": 0, "message": ANSWER}]},
        "and choices, which may hold it; store it as text; to train on the earlier answers alone",
    ),
    "a log of requests, an answer as an object": (
        {"messages": LOGGED, "response": ANSWER},
        "and response, which may hold it",
    ),
    "a log of requests with two answers": (
        {"messages": LOGGED, "response": "a b", "output": "c d"},
        "response=response or type data.columns.prompt=messages data.columns.response=output",
    ),
    "SafeRLHF": (
        {"prompt": "q a", "response_0": "r s", "response_1": "t u", "safer_response_id": 1},
        RIVALS,
    ),
    "Arena": ({"conversation_a": [ASKED, ANSWER], "conversation_b": [ASKED, WORSE]}, RIVALS),
    "SHP": ({"history": "q a", "human_ref_A": "r s", "human_ref_B": "t u", "labels": 1}, RIVALS),
    "OASST": (
        {"message_id": "a", "parent_id": None, "text": "Hi there", "role": "prompter"},
        f"{ONE_MESSAGE} (column 'text' next to 'role')",
    ),
    "a tree of messages": (
        {"message_id": "a", "parent_id": "b", "text": "Hi there"},
        f"{ONE_MESSAGE} (column 'text' next to 'parent_id')",
    ),
    "messages in CSV": ({"chat_id": "1", "role": "user", "content": "Hi there"}, ONE_MESSAGE),
    "Telegram's export": (
        {"id": 1, "type": "message", "from": "Ann", "from_id": "user7", "text": "Hi there"},
        f"{ONE_MESSAGE} (column 'text' next to 'from'); write the messages of each "
        'conversation into one row, as {"messages": [{"role": "user", "content": "..."}, ...]}, '
        "with the role assistant for the speaker to imitate (Ann)",
    ),
    "Discord": (
        {"id": "1", "content": "Hi there", "author": {"id": "7", "name": "Ann"}},
        f"{ONE_MESSAGE} (column 'content' next to 'author')",
    ),
    "Instagram": (
        {"sender_name": "Ann", "timestamp_ms": 7, "content": "Hi there"},
        f"{ONE_MESSAGE} (column 'content' next to 'sender_name')",
    ),
    "Slack": ({"user": "U7", "type": "message", "text": "Hi there"}, ONE_MESSAGE),
    "Telegram": ({"id": 1, "from": "Ann", "text": "Hi there"}, ONE_MESSAGE),
    "LLaMA-Factory": (
        {"instruction": "q", "input": "", "output": "r", "history": [["q 0", "r 0"]]},
        "got earlier turns apart from the last (column 'history'); write both as one list "
        "'messages' in each row: first those of 'history', then 'instruction' and 'input' "
        "together as the last user turn, then 'output' as the last assistant turn; to train on "
        "the other columns alone, without the earlier turns, type "
        "data.columns.prompt=instruction ",
    ),
    "earlier turns beside a question": (
        {"question": "q", "answer": "r", "history": [["q 0", "r 0"]]},
        "first those of 'history', then 'question' as the last user turn, then 'answer' as the "
        "last assistant turn; to train on",
    ),
    "an answer in parts": (
        {"prompt": "q a", "response": [{"type": "thinking", "thinking": "h"}, PART]},
        "join the texts of the parts of each, or write each row as {",
    ),
    "CSV without a header": (
        {"Is it good?": "Is it so?", "positive": "positive"},
        "the first line of the file seems to hold data",
    ),
    "MMLU": (
        {"question": "q a?", "subject": "law", "choices": ["a", "b"], "answer": 1},
        f"{CHOICES} (choices in choices); an answer such as '1' says nothing",
    ),
    "CMMLU": ({"question": "q a?", "A": "a", "B": "b", "answer": "B"}, f"{CHOICES} (choices in A"),
    "ARC": (
        {"question": "q a?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
        CHOICES,
    ),
    "RACE": ({"article": "c d", "question": "q a?", "options": ["a"], "answer": "A"}, CHOICES),
    "choices as one text": ({"question": "q a?", "options": "A) a B) b", "answer": "B"}, CHOICES),
    "HellaSwag": ({"ctx": "A man", "endings": ["is b", "is c"], "label": "0"}, CHOICES),
    "WinoGrande": (
        {"sentence": "A man _", "option1": "a b", "option2": "c d", "answer": "1"},
        CHOICES,
    ),
    "SQuAD": (
        {"id": "a", "context": "c d", "question": "q a?", "answers": {"text": ["a b"]}},
        "got objects or lists in answers",
    ),
    "WMT": ({"translation": {"en": "a b", "de": "c d"}}, "got objects or lists in translation"),
    "structured output": (
        {"prompt": "q a", "response": {"name": "x"}},
        "data.columns.response must hold text, got objects or lists in 'response', such as "
        "\"{'name': 'x'}\"; store each as text, for example with json.dumps",
    ),
    "Natural Questions": ({"question": "q a", "answer": ["a b"]}, "lists in 'answer'"),
    "several chats a row": (
        {"messages": [chat("q", "r"), chat("q", "r")]},
        "got lists of lists in 'messages'; write each conversation into a row of its own",
    ),
    "arrays of NumPy within messages": (
        {"messages": "[{'role': 'user', 'content': 'q', 'calls': array([1], dtype=object)}]"},
        "got text in 'messages' that is not a JSON or Python list; write the set as JSON lines",
    ),
    "ChatGPT's export": (
        {
            "title": "A trip",
            "mapping": {
                "a": {"message": None, "parent": None, "children": ["b"]},
                "b": {"message": {"author": {"role": "user"}}, "parent": "a", "children": []},
            },
            "current_node": "b",
        },
        "got an export of ChatGPT (column 'mapping' holds each conversation as a tree); follow "
        "'parent' from 'current_node' back",
    ),
    "two people": (
        {
            "account": {"id": 7},
            "chat": [{"sender": "Ann", "text": "Hi"}, {"sender": "Ben", "text": "Ho"}],
        },
        "got Ann, Ben; in 'chat', 'sender' holds the speaker and 'text' the content; write each "
        'message as {"role": "user", "content": "..."}, with the role assistant for the speaker',
    ),
    "a person and an assistant": (
        {"log": [{"name": "Ann", "message": "Hi you"}, {"name": "bot", "message": "Ho you"}]},
        "got Ann; in 'log', 'name' holds the speaker and 'message' the content",
    ),
    "objects beside lists": (
        {"account": {"id": 7}, "steps": [{"do": "Open the door and go in"}, {"do": "Close it"}]},
        "got objects or lists in steps, account, such as",
    ),
    "DailyDialog": ({"dialog": ["hi", "ho"], "act": [1, 2]}, "got lists of texts without a role"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_sets_are_refused_with_the_right_reason(name: str) -> None:
    record, words = REFUSED[name]
    with pytest.raises(DataError) as caught:
        recognise([record] * 3, config())
    message = str(caught.value)
    assert words in message and message.isprintable() and "\n" not in message


@pytest.mark.parametrize(
    "record", [{"prompt": "q", "completion": "bad"}, {"messages": [ASKED, WORSE]}]
)
@pytest.mark.parametrize("labels", [(True, False), ("True", "False")])
def test_feedback_is_both_good_and_bad(record: dict[str, Any], labels: tuple[Any, Any]) -> None:
    """The whole data set decides: the first rows may all be good."""
    good, bad = ({**record, "label": label} for label in labels)
    records = [*[good] * 300, bad]
    with pytest.raises(DataError, match=re.escape(FEEDBACK)) as caught:
        recognise(records, config())
    typed = typed_of(str(caught.value))
    assert rows_of(records, **typed)[0][-1].response == "bad"
    for label in labels:
        assert len(rows_of([{**record, "label": label}] * 2)[0]) == 2


# refusals that suggest no settings, since the columns hold no text
NOT_TEXT = (
    *("OpenAI's preferences", "SQuAD", "WMT", "structured output", "Natural Questions"),
    *("several chats a row", "arrays of NumPy within messages", "DailyDialog"),
    *("CSV without a header", "ChatGPT's export", "two people"),
    *("a person and an assistant", "objects beside lists", "an answer in parts"),
)


@pytest.mark.parametrize("name", sorted({*REFUSED} - {*NOT_TEXT}))
def test_every_refusal_suggests_settings_that_train_on_the_columns_as_they_are(name: str) -> None:
    record, _ = REFUSED[name]
    with pytest.raises(DataError) as caught:
        recognise([record] * 3, config())
    rows, dropped = rows_of([record] * 3, **typed_of(str(caught.value)))
    assert (len(rows), dropped) == (3, {})


PROSE = "A small dog runs up the hill."
# data set, some rows: nothing here is a verdict, a choice, a speaker, a label or a split
PLAIN: dict[str, list[dict[str, Any]]] = {
    "sums with operands": [
        {"a": n, "b": 9 - n, "question": f"What is {n} + {9 - n}?", "answer": "9"} for n in (1, 2)
    ],
    "yes or no, and a count": [
        {"question": f"{PROSE} So?", "answer": "Y", "candidates_seen": n} for n in (1, 2)
    ],
    "tweets": [{"user": f"user {n}", "text": PROSE} for n in (1, 2)],
    "e-mails": [{"from": f"{n}@x.org", "to": "b@x.org", "text": PROSE} for n in (1, 2)],
    "an empty label": [{"text": PROSE, "label": label} for label in (None, "")],
    "how many rated it": [{"text": PROSE, "rating_count": n} for n in (1, 2)],
    "stars of a repository": [{"text": PROSE, "stars": n} for n in range(60)],
    "a country's code": [{"text": PROSE, "code": "de"} for _ in (1, 2)],
    "rows that are sound": [
        {"prompt": "q", "response": "r", "is_valid": n} for n in (True, False)
    ],
    "one side of a split": [{"prompt": "q", "response": "r", "is_test": "0"} for _ in (1, 2)],
    "marks and code": [{"prompt": "[INST] q", "response": "{\n r"} for _ in (1, 2)],
}


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_sets_are_accepted(name: str) -> None:
    rows, dropped = rows_of(PLAIN[name])
    assert (len(rows), dropped) == (len(PLAIN[name]), {})


def test_numbers_are_choices_where_the_answer_is_a_letter() -> None:
    record = {"question": "What is 2 + 2?", "A": "3", "B": "4", "answer": "B"}
    with pytest.raises(DataError, match=CHOICES):
        recognise([record] * 3, config())


def test_sets_that_look_like_unfit_ones_are_recognised() -> None:
    for record, response in (
        ({"prompt": "q", "messages": [ASKED, ANSWER], "chosen": "c", "rejected": "r"}, "good"),
        ({"question": "q", "options": {"A": "x"}, "answer": "Aspirin"}, "Aspirin"),
        ({"question": "q", "answer": "18"}, "18"),
        ({"instruction": "q", "output": "r", "history": []}, "r"),
        ({"text": "t u", "url": "u", "language": "en", "score": 2.5, "title": "T"}, "t u"),
        ({"prompt": "q", "completion": "r", "label": "good"}, "r"),
    ):
        rows, dropped = rows_of([record] * 2)
        assert ([row.response for row in rows], dropped) == ([response] * 2, {})


@pytest.mark.parametrize("name", ["response", "completion", "output", "Answer"])
@pytest.mark.parametrize("chats", ["messages", "conversations"])
def test_answers_beside_the_chats_are_trained_on(chats: str, name: str) -> None:
    earlier = chat("hi", "hello", "how are you?")
    records = [{"id": n, chats: earlier, name: f"good {n}"} for n in range(19)]
    data, line = recognise(records, config())
    assert (data.columns.prompt, data.columns.response) == (chats, name)
    assert line == (
        f"data: recognised conversations in the columns '{chats}' and '{name}'; not used: id"
    )
    rows, dropped = rows_of([*records, {chats: earlier, name: None}])
    assert dropped == {"empty_response": 1}
    assert [row.response for row in rows] == [f"good {n}" for n in range(19)]
    for row in rows:  # as the server was asked, and what it answered
        assert [turn.content for turn in row.messages[:-1]] == ["hi", "hello", "how are you?"]
        assert [turn.supervised for turn in row.messages if turn.role == "assistant"] == [0, 1]


def test_chats_that_hold_their_answers_are_read_as_before() -> None:
    whole = {"messages": chat("hi", "hello"), "response": "a b"}
    cut = {"messages": chat("hi", "hello", "bye"), "response": "a b"}
    for records in (
        [whole] * 8 + [cut] * 2,
        [{**cut, "response": None}] * 3,
        [cut] * 8 + [whole] * 2,
    ):
        data, _ = recognise(records, config())
        assert (data.columns.messages, data.columns.response) == ("messages", None)
    data, _ = recognise([cut] * 3, config(columns={"messages": "messages"}))
    assert (data.columns.messages, data.columns.response) == ("messages", None)


def test_a_passage_is_the_context() -> None:
    (row,), _ = rows_of([{"question": "q", "passage": "p", "answer": True}])
    assert (row.prompt, row.context, row.response) == ("q", "p", "true")


def test_typed_columns_are_not_a_target() -> None:
    data, _ = recognise([{"text": "t u", "label": "1"}], config(columns={"intent": "label"}))
    assert (data.style, data.columns.text) == ("text", "text")
    data, _ = recognise([{"text": "t u", "label": "1"}], config(style="text"))
    assert data.columns.text == "text"


PAIR = {"question": "q", "answer": "r"}


def test_a_row_whose_text_has_a_place_for_an_image_is_left_out_and_counted() -> None:
    llava = {"conversations": chat("<image>\nWhat?", "A dog.")}
    for cell in ("a/b.jpg", "https://example.org/a.jpg", ["a.jpg"], {"bytes": b"x"}):
        records = [llava | {"image": cell}, llava]
        typed = {"columns": {"messages": "conversations"}}
        assert rows_of(records, **typed)[1] == {"needs_media": 1}
    assert rows_of([llava | {"image": "a/b.jpg"}] * 2)[1] == {"needs_media": 2}
    tag = {"prompt": "How do I use the HTML tag <video>?", "response": "So."}
    for name, cell in (
        ("has_image", False),
        ("image_count", 0),
        ("image_count", "0"),
        ("image", ""),
    ):
        assert rows_of([{**tag, name: cell}])[1] == {}


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("image", {"bytes": b"x", "path": None}),
        ("images", [{"bytes": b"x"}]),
        ("audio", {"array": [0.1], "sampling_rate": 8000}),
        ("image", b"\x89PNG"),
        ("image", "data:image/png;base64,iVBO"),
    ],
)
def test_a_set_with_images_or_sounds_is_refused_with_what_to_type(name: str, cell: Any) -> None:
    for record in (PAIR, {"text": "he said so"}):
        records = [{**record, name: cell}, {**record, name: None}, record]
        with pytest.raises(DataError, match=f"got images, audio or video in '{name}'") as caught:
            recognise(records, config())
        typed = typed_of(str(caught.value))
        rows, dropped = rows_of(records, **typed)
        assert (len(rows), dropped) == (3, {})
        note = f"data: not used: {name} (images, audio or video)"
        assert recognise(records, config(**typed))[1] == note


@pytest.mark.parametrize("cell", ["a/b.PNG", "https://example.org/a.jpg", "data: he said so", 7])
def test_the_name_of_a_file_is_data_about_a_row(cell: Any) -> None:
    assert rows_of([{**PAIR, "image_path": cell}])[1] == {}
