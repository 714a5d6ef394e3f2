"""Writes the tokenizer of a model folder into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tinyllama_lab.core.models.loading import TRUSTED_FILES
from tinyllama_lab.errors import ModelError

# Names in llama.cpp of the ways to split a text before byte-pair merges, by what tokenizer.json
# says: the kinds of its steps, and the patterns they split at.
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (f"{_SHORT}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}", "ByteLevel"): "llama-bpe",
    (f"{_SHORT}|{_LETTERS}|\\p{{N}}|{_REST}", "ByteLevel"): "qwen2",
}


def add_tokenizer(writer: GGUFWriter, model: Path) -> None:
    """Write tokens, merges, special tokens and chat template.

    Raises:
        ModelError: llama.cpp cannot read a text as this tokenizer does.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, **TRUSTED_FILES)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE":
        raise ModelError(
            "GGUF files are written for BPE tokenizers, got "
            f"{content['model']['type']}; use merge instead"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    size = AutoConfig.from_pretrained(model, **TRUSTED_FILES).vocab_size
    tokens, types = _tokens(content, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if content["model"].get("byte_fallback"):  # converted from SentencePiece
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
        writer.add_add_space_prefix(str(first[0]).startswith("\u2581"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content))
        # llama.cpp refuses a tokenizer without merges, and a writer leaves out an empty list; no
        # text is read with this one, since what it joins is never a part of a text
        writer.add_token_merges(merges or [f"{tokenizer.eos_token} {tokenizer.eos_token}"])
    _add_special_tokens(writer, tokenizer, GenerationConfig.from_pretrained(model))
    # what a prompt begins with is part of the template, as it was in training
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return texts and types of all tokens; rows of the embedding without a token are unused."""
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    added = {each["id"]: each for each in content["added_tokens"]}
    texts |= {number: str(each["content"]) for number, each in added.items()}
    unknown = content["model"].get("unk_token")

    def kind(number: int) -> TokenType:
        if number not in texts:
            return TokenType.UNUSED
        if content["model"].get("byte_fallback") and texts[number].startswith("<0x"):
            return TokenType.BYTE  # also where a tokenizer lists them as special
        if number in added and texts[number] != unknown:
            return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        return TokenType.UNKNOWN if texts[number] == unknown else TokenType.NORMAL

    return [texts.get(n, f"[PAD{n}]") for n in range(size)], [kind(n) for n in range(size)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores with which llama.cpp merges pieces in the order of `merges`."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way a tokenizer splits a text before merging.

    Raises:
        ModelError: llama.cpp has no name for it.
    """
    step = content["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    key = tuple(
        each["pattern"].get("Regex") if each["type"] == "Split" else each["type"] for each in steps
    )
    merged = {character for m in content["model"]["merges"] for character in "".join(m)}
    if key == ("ByteLevel",) and not merged & set("0123456789"):
        # digits are never joined: the same tokens, and llama.cpp removes the space before a
        # punctuation mark from the texts of `gpt-2`
        key = ("Digits", "ByteLevel")
    if key not in SPLITS:
        raise ModelError(
            f"llama.cpp must know how a tokenizer splits a text, got {key}; use merge instead"
        )
    return SPLITS[key]


def _add_special_tokens(writer: GGUFWriter, tokenizer: Any, generation: Any) -> None:
    """Write the special tokens; the end of an answer is one of those that end a generation."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ends = generation.eos_token_id
    others = [n for n in (ends if isinstance(ends, list) else [ends]) if n is not None]
    if closing := [n for n in others if n != tokenizer.eos_token_id]:
        writer.add_eot_token_id(closing[0])
