"""Renders the chat template of a model, which anyone may have written, within limits."""

from __future__ import annotations

from typing import Any

from tinyllama_lab.config.limited import limited
from tinyllama_lab.errors import ModelError

_LONGEST = 2**26  # characters of a conversation; rows of files are shorter


def render(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """Return what a chat template makes of messages, as `apply_chat_template` does.

    transformers runs the template in Jinja's sandbox, in which it has no access to Python.

    Raises:
        ModelError: the template takes too much time or memory, or writes too much.
    """
    what = "the chat template of the model"
    remedy = "set data.style=instruction_response, or take another model"
    with limited(what, remedy):
        rendered = tokenizer.apply_chat_template(messages, **options)
    if isinstance(rendered, str) and len(rendered) > _LONGEST:
        raise ModelError(
            f"{what} must write at most {_LONGEST} characters, got {len(rendered)}; {remedy}"
        )
    return rendered
