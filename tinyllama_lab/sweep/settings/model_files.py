"""Whether a base's tokenizer fits its embedding, ends its texts, and gives its prompts.

The worker finds the same when it loads the model. Here are the mistakes that the files show for
certain, before anything starts.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.config.schema import DataConfig, ModelConfig
from tinyllama_lab.data.snapshots import chat_template, read_settings
from tinyllama_lab.sweep.settings.stored_model import PLAIN, folder_of, model_type

# classes of tokenizers without an end-of-sequence token of their own
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# architectures for which transformers takes another class than `tokenizer_config.json` names
_OTHER_CLASS = ("qwen2", "phi3")
_FOREIGN = (b"image_token", b"audio_token", b"video_token")  # a text model has no rows for them
_LARGEST = 100_000_000  # bytes of a tokenizer that is read


def model_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    """Return the problems of a model's tokenizer and chat template.

    Args:
        model: the settings of the base.
        data: those of the data set, as far as they are known.
    """
    folder = folder_of(model)
    # it comes with this project, or is not downloaded yet; Mistral's own tokenizer is no JSON
    if folder is None or (folder / "tekken.json").exists():
        return []
    found = (
        _problem_of_end(folder),
        _problem_of_vocabulary(folder),
        _problem_of_template(folder, data),
    )
    return [problem for problem in found if problem]


def _problem_of_end(folder: Path) -> str | None:
    """Return the problem of a tokenizer without an end-of-sequence token."""
    kind = model_type(folder)
    settings = read_settings(folder / "tokenizer_config.json")
    if kind not in PLAIN or kind in _OTHER_CLASS or "auto_map" in settings:
        return None
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES:
        return None
    older = read_settings(folder / "special_tokens_map.json")
    if settings.get("eos_token") or older.get("eos_token"):
        return None
    return (
        f"a tokenizer needs an end-of-sequence token, got none in {folder}; name the token "
        f'that ends a text as "eos_token" in {folder}/tokenizer_config.json'
    )


def _problem_of_vocabulary(folder: Path) -> str | None:
    """Return the problem of tokens without a row in the embedding."""
    config = read_settings(folder / "config.json")
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    if model_type(folder) not in PLAIN or not isinstance(rows, int):
        return None
    if isinstance(padding, int) and padding >= rows:
        return (
            f"pad_token_id must be a row of the embedding, got {padding} and {rows} rows; "
            f"correct it in {folder}/config.json"
        )
    settings = folder / "tokenizer_config.json"
    foreign = settings.read_bytes() if settings.is_file() else b""
    file = folder / "tokenizer.json"
    if not file.is_file() or any(name in foreign for name in _FOREIGN):
        return None
    state = file.stat()
    count = _token_count(file, state.st_mtime_ns, state.st_size)
    if count <= rows:
        return None
    return (
        f"tokenizer and model must belong together, got {count} tokens and an embedding of "
        f"{rows} rows in {folder}; take the tokenizer that the model came with, or resize "
        f"the embedding with model.resize_token_embeddings({count}) and save the model"
    )


@lru_cache(maxsize=64)
def _token_count(file: Path, _changed_ns: int, size: int) -> int:
    """Return the highest id of a tokenizer plus 1; 0 if the file holds none."""
    content: Any = read_settings(file) if size <= _LARGEST else {}
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += range(len(vocabulary)) if isinstance(vocabulary, list) else []
    ids += [each.get("id") for each in added or () if isinstance(each, dict)]
    return max((each for each in ids if isinstance(each, int)), default=-1) + 1


def _problem_of_template(folder: Path, data: DataConfig) -> str | None:
    """Return the problem of chats without a chat template, once the columns are known."""
    columns = data.columns
    if data.style != "chat" or not data.has_text or columns.text:
        return None
    if chat_template(folder):
        return None
    if not (columns.messages or columns.system or columns.tools):
        return None  # prompts may be texts, which need none, or chats: the worker reads them
    return (
        "chats, system turns and tools need a tokenizer with a chat template, got none in "
        f"{folder}; take a model that was made for chats, or save a template with the "
        "tokenizer of this one"
    )
