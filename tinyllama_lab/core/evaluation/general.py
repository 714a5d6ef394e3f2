"""Unrelated text: short English passages that no trial trains on, to measure forgetting.

They were written for this project: encyclopedic and everyday prose, instructions, dialogue and
some code. They are scored as plain text, without a prompt and without an end.
"""

from __future__ import annotations

import json
from pathlib import Path

from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.dataset.example import Example, with_text
from tinyllama_lab.core.dataset.prompts import TextTokenizer

PASSAGES = Path(__file__).with_name("general.jsonl")


def general_examples(cache: DataCache) -> list[Example]:
    """Return the passages as examples, cut at the model's longest sequence."""
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    texts = [str(json.loads(line)["text"]) for line in lines]
    tokenizer = TextTokenizer(cache.tokenizer)
    examples = []
    for number, text in enumerate(texts, start=1):
        ids = tuple(tokenizer.whole(text, len(text)).ids[:-1])[: cache.positions]
        examples.append(Example(ids, (True,) * len(ids), (), "", text, "", number=number))
    return with_text(examples, cache.tokenizer)
