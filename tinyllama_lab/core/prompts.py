"""Rows to prompt and response text, in the three prompt styles.

A rendered row is a list of segments; the loss is taken on the tokens of those that are marked
as learned. Segments are tokenized one by one, so the border between prompt and response lies
at the same token in training and in generation, where the model only sees the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config import DataConfig
from tinyllama_lab.errors import DataError
from tinyllama_lab.rows import Row


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the model learns to write it."""

    text: str
    learned: bool


def render(row: Row, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The row in the style `data.style`; the last segment is a response and ends the sequence."""
    eos = str(tokenizer.eos_token)
    if data.style == "instruction_response":
        context = f"### Context:\n{row.context}\n\n" if row.context else ""
        prompt = f"### Instruction:\n{row.prompt}\n\n{context}### Response:\n"
        return [Segment(prompt, False), Segment(row.response + eos, True)]
    if data.style == "query_intent_response":
        answer = f"Intent: {row.intent}\nResponse: {row.response}"
        return [Segment(f"Query: {row.prompt}\n", False), Segment(answer + eos, True)]
    return _render_chat(_messages(row, data), tokenizer, eos)


def _messages(row: Row, data: DataConfig) -> list[dict[str, str]]:
    if row.messages:
        turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
    else:
        prompt = f"{row.prompt}\n\n{row.context}" if row.context else row.prompt
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": row.response},
        ]
    if data.system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": data.system})
    return turns


def _render_chat(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, eos: str
) -> list[Segment]:
    """Every assistant turn is learned, with the token that closes it."""
    if not tokenizer.chat_template:
        raise DataError(
            "data.style=chat needs a tokenizer with a chat template, and this model has none; "
            "set data.style=instruction_response"
        )
    segments: list[Segment] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _template(turns[:index], tokenizer, True)
        full = _template(turns[: index + 1], tokenizer, False)
        if not (prompt.startswith(done) and full.startswith(prompt)):
            raise DataError(
                "data.style=chat needs a chat template that only appends, turn by turn, and this "
                "model's does not; set data.style=instruction_response"
            )
        answer = full[len(prompt) :]
        if eos in answer:
            answer = answer[: answer.rfind(eos) + len(eos)]
        elif index == len(turns) - 1:  # turns are closed by another token: only the end gets it
            answer += eos
        segments += [Segment(prompt[len(done) :], False), Segment(answer, True)]
        done = prompt + answer
    return segments


def _template(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, generate: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    )
