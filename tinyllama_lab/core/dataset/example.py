"""One row as tokens, with the loss mask and the supervised text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from tinyllama_lab.data.splits import clusters as row_clusters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # what tokenizers with byte fallback call a byte
_UNKNOWN = "\ufffd"  # what an incomplete character decodes to
# byte-level BPE writes a printable byte as that character of Latin-1, the others from U+0100 on
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_OF = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(0x100 + number): byte for number, byte in enumerate(_OTHERS)},
}


@dataclass(frozen=True)
class Example:
    """One token sequence. `loss_mask[i]` says whether token `i` is supervised."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    prompt_ids: tuple[int, ...]  # up to the last response: what generation starts from
    prompt: str
    reference: str
    intent: str
    is_cut: bool = False  # supervised tokens lie beyond `data.max_length`
    is_folded: bool = False  # its system turn became a part of the first user turn
    is_trimmed: bool = False  # its answers lost the white space that they began with
    number: int = 0  # of the record it was made from, from 1
    group: str = ""  # that the data says it belongs to
    text: tuple[str, ...] = ()  # what its labels stand for; of held-out rows alone

    @property
    def labels(self) -> int:
        """Return the number of supervised tokens; the first token has no prediction."""
        return sum(self.loss_mask[1:])

    @property
    def text_bytes(self) -> int:
        """Return the size of `text` in UTF-8 bytes."""
        return sum(len(part.encode()) for part in self.text)


def with_text(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the examples with their supervised text.

    Neighbouring labels are decoded together, because a character may consist of several tokens.
    Special tokens have no text. White space around a run belongs to the prompt format and is
    removed. A character that `data.max_length` cuts is left out.
    """
    added = tokenizer.added_tokens_decoder.items()
    textless = {n for n, each in added if each.special and not _BYTE.fullmatch(str(each))}
    return [replace(each, text=_supervised_text(each, tokenizer, textless)) for each in examples]


def _supervised_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, textless: set[int]
) -> tuple[str, ...]:
    """Return the text of each run of labels, without textless tokens."""
    pairs = zip(example.ids[1:], example.loss_mask[1:], strict=True)
    runs = [
        [token for token, _ in run if token not in textless]
        for is_label, run in groupby(pairs, key=lambda pair: pair[1])
        if is_label
    ]
    decoded = (str(tokenizer.decode(run, clean_up_tokenization_spaces=False)) for run in runs)
    return tuple(text.strip().strip(_UNKNOWN).strip() for text in decoded)


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a token as a Python literal: its text, or `b'...'` for a part of a character."""
    text = str(tokenizer.decode([token]))
    name = str(tokenizer.convert_ids_to_tokens(token))
    if _UNKNOWN not in text:
        return repr(text)
    if match := _BYTE.fullmatch(name):
        return repr(bytes.fromhex(match[1]))
    is_byte_level = all(character in _BYTE_OF for character in name)
    return repr(bytes(_BYTE_OF[character] for character in name) if is_byte_level else text)


def clusters(examples: Sequence[Example]) -> list[int]:
    """Return, for each example, the number of the first example in its cluster."""
    labels = [
        [token for token, supervised in zip(each.ids, each.loss_mask, strict=True) if supervised]
        for each in examples
    ]
    return row_clusters.clusters(labels, [each.group for each in examples])
