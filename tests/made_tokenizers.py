"""Small tokenizers that work as those of well-known models do, with their chat templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello there, where is the next lake? It is in Pokhara, near the old town.",
    "Say it in French: bonjour! What is the price of a ticket to Kathmandu?",
    "You are a guide. Be brief. The user asks, the assistant answers yes or no.",
    "system user assistant model start end of turn header id Instruction Response Context",
] * 4

# the templates of the models themselves, shortened where they only handle tools
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _sentencepiece(specials: list[str], normalizer: Any, before: Any, space: bool) -> Tokenizer:
    """BPE over characters with byte fallback; a word begins with the space before it."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # in training alone
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    raw.normalizer, raw.pre_tokenizer = normalizer, before
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if space else [])])
    raw.add_special_tokens([_special(text) for text in specials])
    return raw


def _with_start(raw: Tokenizer, start: str) -> None:
    number = raw.token_to_id(start)
    raw.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, number)]
    )


def _tinyllama(template: str) -> PreTrainedTokenizerFast:
    """As in `tokenizer.json` of Llama 2 and TinyLlama: a space before every piece."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw = _sentencepiece(["<unk>", "<s>", "</s>"], normalizer, None, True)
    _with_start(raw, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def _metaspace() -> PreTrainedTokenizerFast:
    """As `LlamaTokenizer` of transformers builds it: a space before the first piece alone."""
    before = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    raw = _sentencepiece(["<unk>", "<s>", "</s>"], None, before, True)
    _with_start(raw, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=ZEPHYR,
    )


def _byte_level(specials: list[str], **names: Any) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([_special(text) for text in specials])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def _llama3() -> PreTrainedTokenizerFast:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>"]
    made = _byte_level(
        specials,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
    )
    _with_start(made.backend_tokenizer, "<|begin_of_text|>")
    return made


def _qwen() -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(
        specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _qwen_base() -> PreTrainedTokenizerFast:
    """Its template closes turns with a token that is not the end-of-sequence token."""
    made = _qwen()
    made.eos_token = "<|endoftext|>"
    return made


def _gemma() -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    raw = _sentencepiece(specials, normalizers.Replace(" ", "▁"), None, False)
    _with_start(raw, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=GEMMA,
    )


MADE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "TinyLlama": lambda: _tinyllama(ZEPHYR),
    "Llama 2": lambda: _tinyllama(LLAMA2),
    "LlamaTokenizer": _metaspace,
    "Llama 3": _llama3,
    "Qwen": _qwen,
    "Qwen base": _qwen_base,
    "Gemma": _gemma,
}
# what ends an answer, as each model's own template has it
CLOSING = {
    "TinyLlama": "</s>",
    "Llama 2": "</s>",
    "LlamaTokenizer": "</s>",
    "Llama 3": "<|eot_id|>",
    "Qwen": "<|im_end|>",
    "Qwen base": "<|im_end|>",
    "Gemma": "<end_of_turn>",
}
