"""The tokens of a chat equal those of the tokenizer's template; its answers are supervised."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.made_tokenizers import CHATML, CLOSING, MADE
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.dataset.chat_template import ChatTemplate, closing_ids
from tinyllama_lab.core.dataset.dataset import Encoder, Example
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.errors import DataError

TURNS = (
    Turn("user", "Where is the next lake?"),
    Turn("assistant", "Hello there. In Pokhara \N{SLIGHTLY SMILING FACE}."),
    Turn("user", "Say it in French: \n bonjour!"),
    Turn("assistant", "Bonjour"),
)
SYSTEM = Turn("system", "You are a guide.")


def chat(*turns: Turn, **changes: Any) -> RawRow:
    return RawRow("", "", turns[-1].content, "", "", turns, "", **changes)


def messages(turns: Any) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.fixture
def settings(configure: Any) -> Any:
    def make(**changes: Any) -> DataConfig:
        changes = {"system": None, "max_length": 512, **changes}
        config = configure({f"data.{k}": v for k, v in changes.items()})
        built: DataConfig = part(DataConfig, config["data"])
        return built

    return make


def supervised(example: Example) -> list[list[int]]:
    """Return the supervised runs of tokens."""
    pairs = zip(example.ids, example.loss_mask, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1])
    return [[token for token, _ in group] for is_supervised, group in groups if is_supervised]


def expected(
    tokenizer: PreTrainedTokenizerBase, turns: Any, number: int, closing: str
) -> tuple[int, list[int]]:
    """Return the start and the tokens of an answer, computed with transformers alone."""
    whole = tokenizer.apply_chat_template(messages(turns))["input_ids"]
    before = tokenizer.apply_chat_template(messages(turns[:number]), add_generation_prompt=True)
    begin = len(before["input_ids"])
    assert whole[:begin] == before["input_ids"]
    end = whole.index(tokenizer.convert_tokens_to_ids(closing), begin) + 1
    return begin, whole[begin:end]


@pytest.mark.parametrize("name", MADE)
def test_ids_equal_those_of_the_whole_chat_and_answers_are_supervised(
    name: str, settings: Any
) -> None:
    tokenizer, closing = MADE[name](), CLOSING[name]
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    whole = tokenizer.apply_chat_template(messages(TURNS))["input_ids"]
    assert list(example.ids) == whole[: len(example.ids)]
    assert not tokenizer.decode(whole[len(example.ids) :]).strip()
    (_, first), (begin, last) = (expected(tokenizer, TURNS, n, closing) for n in (1, 3))
    assert supervised(example) == [first, last]
    assert list(example.prompt_ids) == whole[:begin]
    texts = [tokenizer.decode(ids[:-1]).strip() for ids in (first, last)]
    assert texts == [TURNS[1].content, TURNS[3].content]
    asked = [f"{turn.role}: {turn.content}" for turn in TURNS[:3]]
    assert (example.prompt, example.reference) == ("\n".join(asked), TURNS[3].content)
    alone = Encoder(tokenizer, settings())(chat(*TURNS[:2]))
    assert alone.prompt == TURNS[0].content
    assert closing_ids(tokenizer) == [last[-1]]  # what generation stops at


@pytest.mark.parametrize("name", ["TinyLlama", "LlamaTokenizer"])
def test_an_answer_has_no_space_in_front_that_the_whole_chat_does_not_have(
    name: str, settings: Any
) -> None:
    tokenizer = MADE[name]()
    (answer,) = supervised(Encoder(tokenizer, settings())(chat(*TURNS[2:])))
    alone = tokenizer("Bonjour", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(answer)[0].startswith("▁")


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("style", ["instruction_response", "query_intent_response"])
def test_plain_styles_have_one_start_and_one_supervised_end(
    name: str, style: str, settings: Any
) -> None:
    tokenizer = MADE[name]()
    row = RawRow("Where is the lake?", "", "Hello there.", "route", "", (), "")
    prompt, response = {
        "instruction_response": (
            "### Instruction:\nWhere is the lake?\n\n### Response:\n",
            "Hello there.",
        ),
        "query_intent_response": (
            "Query: Where is the lake?\n",
            "Intent: route\nResponse: Hello there.",
        ),
    }[style]
    example = Encoder(tokenizer, settings(style=style))(row)
    body = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    start = tokenizer("Hello")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    assert list(example.ids) == [*start, *body, tokenizer.eos_token_id]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(example.prompt_ids) == [*start, *before]
    (answer,) = supervised(example)
    assert answer == [*body[len(before) :], tokenizer.eos_token_id]


@pytest.mark.parametrize("after", ["</s>", "<s> </s>"])
def test_an_end_that_the_tokenizer_adds_by_itself_is_there_once(after: str, settings: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = MADE["TinyLlama"]()
    numbers = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    single = f"<s> $A {after}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=numbers
    )
    row = RawRow("Where?", "", "Hello</s>", "", "", (), "")
    example = Encoder(tokenizer, settings(style="instruction_response"))(row)
    assert example.ids.count(tokenizer.eos_token_id) == 1
    assert example.ids[-1] == tokenizer.eos_token_id and example.loss_mask[-1]
    assert example.ids.count(tokenizer.bos_token_id) == 1


def test_a_ready_made_text_is_supervised_from_its_first_token(settings: Any) -> None:
    tokenizer = MADE["TinyLlama"]()
    row = RawRow("", "", "<s>Hello there, where is the lake?</s>", "", "", (), "")
    example = Encoder(tokenizer, settings(style="text"))(row)
    body = tokenizer("Hello there, where is the lake?")["input_ids"]
    assert list(example.ids) == [*body, tokenizer.eos_token_id]
    assert all(example.loss_mask)
    assert example.prompt_ids == example.ids[: len(example.prompt_ids)]
    assert 1 < len(example.prompt_ids) < len(body)


def test_a_ready_made_text_that_is_too_long_is_cut(settings: Any) -> None:
    tokenizer = MADE["Qwen"]()
    text = "Hello there, where is the lake? " * 40
    example = Encoder(tokenizer, settings(style="text", max_length=32))(
        RawRow("", "", text, "", "", (), "")
    )
    assert list(example.ids) == tokenizer(text)["input_ids"][:32] and example.is_cut
    assert len(example.prompt_ids) == 17 and all(example.loss_mask)
    assert example.reference == tokenizer.decode(example.ids[17:])
    assert example.prompt == tokenizer.decode(example.ids[:17])  # what is shown is what is given


# ---- which answers -------------------------------------------------------------------------


def test_an_answer_of_weight_0_is_read_and_not_supervised(settings: Any) -> None:
    tokenizer = MADE["Qwen"]()
    turns = (TURNS[0], dataclasses.replace(TURNS[1], supervised=False), *TURNS[2:])
    plain = Encoder(tokenizer, settings())(chat(*TURNS))
    example = Encoder(tokenizer, settings())(chat(*turns))
    assert example.ids == plain.ids
    assert supervised(example) == supervised(plain)[1:]
    early = (TURNS[0], TURNS[1], TURNS[2], dataclasses.replace(TURNS[3], supervised=False))
    example = Encoder(tokenizer, settings())(chat(*early))
    assert supervised(example) == supervised(plain)[:1]
    assert (example.prompt, example.reference) == (TURNS[0].content, TURNS[1].content)


def test_only_the_last_answer_is_supervised_if_asked(settings: Any) -> None:
    tokenizer = MADE["Llama 3"]()
    every = Encoder(tokenizer, settings())(chat(*TURNS))
    last = Encoder(tokenizer, settings(learn="last"))(chat(*TURNS))
    assert last.ids == every.ids and supervised(last) == supervised(every)[1:]


def test_a_chat_without_a_supervised_answer_is_left_out(settings: Any) -> None:
    turns = [TURNS[0], dataclasses.replace(TURNS[1], supervised=False)]
    with pytest.raises(UnusableRow) as caught:
        Encoder(MADE["Qwen"](), settings())(chat(*turns))
    assert caught.value.reason == "nothing_supervised"


def test_a_greeting_before_the_first_question_is_not_supervised(settings: Any) -> None:
    tokenizer = MADE["Qwen"]()
    example = Encoder(tokenizer, settings())(chat(Turn("assistant", "Hi!"), *TURNS))
    assert supervised(example) == supervised(Encoder(tokenizer, settings())(chat(*TURNS)))


# ---- templates of all kinds ----------------------------------------------------------------


def with_template(template: str) -> PreTrainedTokenizerFast:
    made = MADE["Qwen"]()
    made.chat_template = template
    return made


def test_text_that_a_template_adds_between_turns_is_not_supervised(settings: Any) -> None:
    template = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>' + '\n---\n'")
    tokenizer = with_template(template)
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    whole = tokenizer.apply_chat_template(messages(TURNS))["input_ids"]
    assert list(example.ids) == whole[: len(example.ids)]
    texts = [tokenizer.decode(ids) for ids in supervised(example)]
    assert texts == [f"{TURNS[n].content}<|im_end|>" for n in (1, 3)]


def test_a_template_that_closes_turns_with_plain_text_ends_with_the_end_token(
    settings: Any,
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = with_template(template)
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    texts = [tokenizer.decode(ids) for ids in supervised(example)]
    assert texts == [f" {TURNS[1].content}\n", f" {TURNS[3].content}\n<|im_end|>"]
    assert closing_ids(tokenizer) == [tokenizer.eos_token_id]


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] END }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ AFTER }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("end", "after"), [("+ '<|im_end|>'", "'\n'"), ("", "('<|im_end|>' if A else '') + '\n'")]
)
def test_generation_marks_decide_and_the_closing_token_is_learned_in_any_case(
    end: str, after: str, settings: Any
) -> None:
    after = after.replace(" if A else ''", " if m['role'] == 'assistant' else ''")
    tokenizer = with_template(MARKED.replace("END", end).replace("AFTER", after))
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    plain = Encoder(MADE["Qwen"](), settings())(chat(*TURNS))
    assert example.ids == plain.ids and example.loss_mask == plain.loss_mask


def test_reasoning_that_a_template_writes_before_the_last_answer_is_learned(
    settings: Any,
) -> None:
    template = CHATML.replace(
        "message['content']",
        "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '')"
        " + message['content']",
    )
    tokenizer = with_template(template)
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    assert list(example.ids) == tokenizer.apply_chat_template(messages(TURNS))["input_ids"][:-1]
    texts = [tokenizer.decode(ids) for ids in supervised(example)]
    assert texts[-1] == "<think>\n\n</think>\n\nBonjour<|im_end|>"
    assert texts[0] == f"{TURNS[1].content}<|im_end|>"


@pytest.mark.parametrize("name", ["Gemma"])
@pytest.mark.parametrize("source", ["turn", "column", "setting"])
def test_a_system_turn_that_the_template_rejects_joins_the_first_user_turn(
    name: str, source: str, settings: Any
) -> None:
    tokenizer = MADE[name]()
    row, data = chat(*TURNS), settings()
    if source == "turn":
        row = chat(SYSTEM, *TURNS)
    elif source == "column":
        row = chat(*TURNS, system=SYSTEM.content)
    else:
        data = settings(system=SYSTEM.content)
    example = Encoder(tokenizer, data)(row)
    first = dataclasses.replace(TURNS[0], content=f"{SYSTEM.content}\n\n{TURNS[0].content}")
    whole = tokenizer.apply_chat_template(messages((first, *TURNS[1:])))["input_ids"]
    assert list(example.ids) == whole[: len(example.ids)] and example.is_folded
    assert len(supervised(example)) == 2


def test_a_system_turn_that_a_template_drops_silently_is_kept(settings: Any) -> None:
    template = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    tokenizer = with_template(template)
    for text in (SYSTEM.content, "lake"):  # which is a part of what the user says
        example = Encoder(tokenizer, settings())(chat(Turn("system", text), *TURNS))
        assert f"{text}\n\nWhere is" in tokenizer.decode(list(example.ids)) and example.is_folded


UNUSABLE: list[tuple[str, tuple[Turn, ...], str, str]] = [
    ("Llama 2", (TURNS[0], *TURNS), "template_refused", "roles must alternate"),
    ("Gemma", (TURNS[1], *TURNS), "template_refused", "roles must alternate"),
    ("Gemma", (SYSTEM, TURNS[0], *TURNS), "template_refused", "roles must alternate"),
    (
        "Qwen",
        (TURNS[0], Turn("assistant", "Hi", extra='{"tool_calls": []}')),
        "tool_calls",
        "no place",
    ),
]


@pytest.mark.parametrize(("name", "turns", "reason", "words"), UNUSABLE)
def test_a_chat_that_a_template_cannot_write_is_left_out(
    name: str, turns: tuple[Turn, ...], reason: str, words: str, settings: Any
) -> None:
    tokenizer = MADE[name]()
    with pytest.raises(UnusableRow, match=words) as caught:
        Encoder(tokenizer, settings())(chat(*turns))
    assert caught.value.reason == reason


def joining() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which two line breaks are one token, as in Qwen."""
    made = MADE["Qwen"]()
    made.add_tokens(["\n\n"])
    return made


@pytest.mark.parametrize("style", ["chat", "instruction_response"])
def test_white_space_that_would_join_the_prompt_is_removed(style: str, settings: Any) -> None:
    encode = Encoder(joining(), settings(style=style))
    one = RawRow("Where?", "", "Hello there", "", "", (), "")
    found = encode(dataclasses.replace(one, response="\n Hello there"))
    assert found.is_trimmed and not encode(one).is_trimmed
    assert (found.ids, found.loss_mask) == (encode(one).ids, encode(one).loss_mask)
    if style == "chat":
        spaced = [dataclasses.replace(TURNS[n], content=f"\n{TURNS[n].content}") for n in (1, 3)]
        found = encode(chat(TURNS[0], spaced[0], TURNS[2], spaced[1]))
        assert found.ids == encode(chat(*TURNS)).ids and found.is_trimmed


def test_a_prompt_that_the_tokenizer_joins_to_every_answer_is_refused(settings: Any) -> None:
    tokenizer = joining()
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant' }}{% endif")
    tokenizer.add_tokens(["assistant\n"])
    with pytest.raises(UnusableRow, match="joins the prompt and the answer"):
        Encoder(tokenizer, settings())(chat(*TURNS))


QWEN3 = CHATML.replace(
    "message['content']",
    "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '')"
    " + message['content'].split('</think>')[-1].lstrip('\n')",
)
PHI3 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [QWEN3, PHI3], ids=["Qwen3", "Phi-3"])
@pytest.mark.parametrize("following", ["d", "e", "end", "im", "|", "user", "Yes", "ok", ""])
@pytest.mark.parametrize(
    "answer", ["Choose a, b, c or d.", "Yes", "<think>\nhm\n</think>\n\nIt is ok"]
)
def test_an_answer_ends_with_its_closing_token_whatever_the_next_turn_says(
    answer: str, following: str, template: str, settings: Any
) -> None:
    tokenizer = with_template(template)
    turns = (TURNS[0], Turn("assistant", answer), Turn("user", following), TURNS[3])
    found = supervised(Encoder(tokenizer, settings())(chat(*turns)))
    written = answer.rpartition("</think>\n\n")[2] if template == QWEN3 else answer
    assert tokenizer.decode(found[0]) == f"{written}<|im_end|>"
    assert tokenizer.decode(found[1]).endswith("Bonjour<|im_end|>")


def test_answers_may_be_closed_by_another_token_than_the_last_one(settings: Any) -> None:
    """In gpt-oss, `<|end|>` closes every answer but the last, and `<|return|>` the last."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|endoftext|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(template)
    texts = [tokenizer.decode(x) for x in supervised(Encoder(tokenizer, settings())(chat(*TURNS)))]
    assert texts == [f"{TURNS[1].content}<|im_end|>", f"{TURNS[3].content}<|endoftext|>"]


EOM = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}"
    "{{ '<|python_tag|>' + m['tool_calls'][0]['name'] + '.call()<|eom_id|>' }}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("ends_with_call", [False, True])
def test_a_tool_call_may_be_closed_by_a_token_of_its_own(
    ends_with_call: bool, settings: Any
) -> None:
    """Llama 3.1 does that."""
    tokenizer = with_template(EOM)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|python_tag|>", "<|eom_id|>"]}
    )
    call = Turn("assistant", "", extra=json.dumps({"tool_calls": [{"name": "find"}]}))
    turns = (TURNS[0], call) if ends_with_call else (TURNS[0], call, Turn("tool", "1"), TURNS[3])
    found = supervised(Encoder(tokenizer, settings())(chat(*turns)))
    assert tokenizer.decode(found[0]) == "<|python_tag|>find.call()<|eom_id|>"
    assert [tokenizer.decode(ids) for ids in found[1:]] == ["Bonjour<|im_end|>"][ends_with_call:]


def test_a_closing_token_need_not_be_special(settings: Any) -> None:
    tokenizer = MADE["Qwen base"]()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|done|>")
    tokenizer.add_tokens(["<|done|>"])
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    texts = [tokenizer.decode(ids) for ids in supervised(example)]
    assert texts == [f"{TURNS[n].content}<|done|>" for n in (1, 3)]
    assert closing_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|done|>")]


def test_a_chat_that_is_too_long_is_trained_on_the_answers_that_fit(settings: Any) -> None:
    tokenizer = MADE["Qwen"]()
    whole = Encoder(tokenizer, settings())(chat(*TURNS))
    first = whole.loss_mask.index(True)
    limit = whole.ids.index(tokenizer.eos_token_id, first) + 3  # inside the next question
    example = Encoder(tokenizer, settings(max_length=limit))(chat(*TURNS))
    assert example.ids == whole.ids[:limit] and supervised(example) == supervised(whole)[:1]
    assert len(example.prompt_ids) == first and example.is_cut
    assert (example.prompt, example.reference) == (TURNS[0].content, TURNS[1].content)


def test_reasoning_that_a_template_cannot_write_makes_the_row_unusable(settings: Any) -> None:
    thought = dataclasses.replace(TURNS[3], extra=json.dumps({"reasoning_content": "Hm."}))
    with pytest.raises(UnusableRow, match="no place for reasoning"):
        Encoder(MADE["Qwen"](), settings())(chat(*TURNS[:3], thought))


def test_long_chats_are_aligned_turn_by_turn(settings: Any) -> None:
    for name in MADE:
        tokenizer, closing = MADE[name](), CLOSING[name]
        turns = [
            Turn("assistant" if n % 2 else "user", f"Say {n} in French: bonjour {n}!")
            for n in range(24)
        ]
        found = supervised(Encoder(tokenizer, settings(max_length=4000))(chat(*turns)))
        assert found == [expected(tokenizer, turns, n, closing)[1] for n in range(1, 24, 2)]


def test_text_that_a_template_leaves_out_is_noticed(settings: Any) -> None:
    tokenizer = with_template(CHATML.replace("message['content']", "message['content'][:9]"))
    with pytest.raises(UnusableRow, match="text of a user turn") as caught:
        Encoder(tokenizer, settings())(chat(*TURNS))
    assert caught.value.reason == "text_lost"


def test_tools_reach_a_template_that_has_a_place_for_them(settings: Any) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
        "message['content']",
        "message['content'] + (message['tool_calls'] | tojson if 'tool_calls' in message else '')",
    )
    tokenizer = with_template(template)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    call = [{"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}]
    turns = (
        TURNS[0],
        Turn("assistant", "", extra=json.dumps({"tool_calls": call})),
        Turn("tool", "found"),
        TURNS[3],
    )
    example = Encoder(tokenizer, settings())(chat(*turns, tools=json.dumps(tools)))
    raw = [
        {**m, **json.loads(t.extra or "{}")} for m, t in zip(messages(turns), turns, strict=True)
    ]
    whole = tokenizer.apply_chat_template(raw, tools=tools)["input_ids"]
    assert list(example.ids) == whole[: len(example.ids)]
    assert json.dumps(call) in tokenizer.decode(supervised(example)[0])


def test_several_templates_without_a_default_are_refused_for_chats_only(settings: Any) -> None:
    tokenizer = MADE["Qwen"]()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    assert closing_ids(tokenizer) == []
    with pytest.raises(DataError, match="needs a chat template that is the default"):
        Encoder(tokenizer, settings())(chat(*TURNS))
    Encoder(tokenizer, settings(style="instruction_response"))(
        RawRow("q", "", "r", "", "", (), "")
    )


# ---- the date ------------------------------------------------------------------------------

DATED = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set day = 'never' %}{%- endif %}{{ 'Today: ' + day + '\n' }}" + CHATML
)


def test_a_template_that_asks_for_the_date_gets_the_one_that_is_set(settings: Any) -> None:
    plain = Encoder(with_template("{{ 'Today: 03 Feb 2024\n' }}" + CHATML), settings())
    dated = Encoder(with_template(DATED), settings(date="2024-02-03"))
    assert dated(chat(*TURNS)) == plain(chat(*TURNS))


def test_a_template_that_asks_for_the_date_is_refused_without_one(settings: Any) -> None:
    with pytest.raises(DataError, match=r"set data.date=\d{4}-\d\d-\d\d$"):
        Encoder(with_template(DATED), settings())
    computed = DATED.replace("strftime_now('%d %b %Y')", "strftime_now(m)")
    with pytest.raises(DataError, match="set data.style=instruction_response"):
        Encoder(with_template(computed), settings(date="2024-02-03"))


def test_a_template_with_a_day_of_its_own_takes_the_one_that_is_set(settings: Any) -> None:
    own = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    tokenizer = with_template(own + "{{ date_string }}" + CHATML)
    texts = [
        tokenizer.decode(list(Encoder(tokenizer, settings(date=day))(chat(*TURNS)).ids))
        for day in (None, "2025-12-31")
    ]
    assert [text[:11] for text in texts] == ["26 Jul 2024", "31 Dec 2025"]


def test_a_line_break_at_the_beginning_of_a_dated_template_stays(settings: Any) -> None:
    template = ChatTemplate(with_template("\nGuide." + DATED), "2024-02-03")
    text = template.render([{"role": "user", "content": "x"}], None)
    assert text.startswith("\nGuide.Today: 03 Feb 2024")
