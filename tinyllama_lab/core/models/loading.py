"""The frozen base model and its tokenizer, from any source, on any device."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tinyllama_lab.config.axes import shown_name
from tinyllama_lab.config.schema import ModelConfig, QuantConfig
from tinyllama_lab.core.dataset.chat_template import closing_ids
from tinyllama_lab.core.models import smollm2, tiny
from tinyllama_lab.core.models.lora import whole_shape
from tinyllama_lab.core.models.quiet import no_progress_bar
from tinyllama_lab.data import hub
from tinyllama_lab.data.snapshots import check_task
from tinyllama_lab.errors import ModelError, one_line, shown
from tinyllama_lab.study.files import user_path
from tinyllama_lab.study.machine import cpu_has_fast_bf16

# code in a model folder never runs, and transformers does not ask whether it may
TRUSTED_FILES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_UNKNOWN = ("trust_remote_code", "does not recognize this architecture")  # of transformers
_NOT_TEXT = ("image", "audio", "video")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Base:
    """A frozen model that adapters are attached to and taken off again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    parameters: int
    closing_ids: tuple[int, ...] = ()  # end a completion, as the end-of-sequence token does
    weights: str = ""  # how they are stored, such as `nf4 of bfloat16`

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a generation."""
        return (int(self.tokenizer.eos_token_id), *self.closing_ids)


def load_base(
    model: ModelConfig,
    quant: QuantConfig,
    precision: str,
    requested_device: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load the base with its tokenizer and freeze it.

    Args:
        requested_device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        tokenizer: the result of `read_tokenizer`; None reads it here.

    Raises:
        ModelError: the device, the precision or the model is not available.
    """
    device = pick_device(requested_device)
    dtype = pick_dtype(precision, device)
    folder = model_folder(model)
    with _loading(model, folder):
        if tokenizer is None:
            tokenizer = load_tokenizer(folder)
            _check_tokenizer(tokenizer, folder)
        # before the weights, because those take the longest to read
        check_task(folder)
        base_model = load_weights(folder, quant, dtype, device)
    _check_finite(base_model, folder)
    _own_memory(base_model)
    _keep_stored(base_model)
    # PEFT writes both into `adapter_config.json`, so that an adapter finds its base
    base_model.name_or_path, base_model.config._commit_hash = base_name(model, folder)
    closing = (*_as_list(base_model.generation_config.eos_token_id), *closing_ids(tokenizer))
    base_model.generation_config = GenerationConfig()  # its penalties would not be greedy decoding
    base_model.requires_grad_(False).eval()
    parameters, weights = count_parameters(base_model), stored_as(model, quant, folder)
    return Base(base_model, tokenizer, device, dtype, parameters, closing, weights)


def load_weights(
    folder: Path, quant: QuantConfig, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return the model of a folder on a device, quantized as `quant` says.

    Raises:
        ModelError: the folder lacks some of the weights, or the model does not read text alone.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **TRUSTED_FILES}
    options["use_safetensors"] = True  # other files of weights are pickles
    if quant.kind != "none":
        options["quantization_config"] = quantization_config(quant, dtype)
        options["device_map"] = {"": str(device)}
    load: Any = AutoModelForCausalLM.from_pretrained
    with no_progress_bar():
        base_model, loading_info = load(folder, **options)
    if base_model.config.get_text_config() is not base_model.config:
        raise ModelError(
            f"model must be a decoder of text alone, got {type(base_model).__name__} in {folder}, "
            "which reads images or sound too; choose a model of text from the same family"
        )
    _check_weights(loading_info["missing_keys"], folder)
    return nn.Module.to(base_model, device) if quant.kind == "none" else base_model


@contextmanager
def _loading(model: ModelConfig, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AssertionError, SafetensorError, StrictDataclassError) as error:
        if any(words in str(error) for words in _UNKNOWN):
            check_task(folder)  # says so in the words of the driver
        if "trust_remote_code" in str(error):  # transformers advises to set it
            raise ModelError(
                f"model={shown_name(vars(model))} must be a model that transformers itself knows, "
                f"got {folder}, which brings code of its own (auto_map in config.json); such code "
                "is never run: choose another model"
            ) from error
        raise ModelError(
            f"model={shown_name(vars(model))} must be a causal language model as transformers "
            f"saves it, got {folder} ({one_line(str(error), 300)}); choose another model, or set "
            "model.path"
        ) from error


def read_tokenizer(model: ModelConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return the tokenizer of a base and its `position_count`; no weights are read.

    Raises:
        ModelError: the model is not available.
    """
    folder = model_folder(model)
    with _loading(model, folder):
        tokenizer = load_tokenizer(folder)
        _check_tokenizer(tokenizer, folder)
        return tokenizer, position_count(folder)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def base_name(model: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """Return the name of the base in saved adapters, and its commit.

    The name is a repository of the hub, or an absolute path if the model is not from the hub.
    """
    if is_packaged(model):
        return smollm2.REPO, None
    if model.source in ("local", "random"):
        return os.path.abspath(folder), None
    return str(model.repo), model.identity


def stored_as(model: ModelConfig, quant: QuantConfig, folder: Path) -> str:
    """Return how the weights of a base were stored, and how they are quantized here.

    The dtype of computation may differ; it is `environment.dtype` of a result.
    """
    if is_packaged(model):
        stored = f"{smollm2.quantization()}, dequantized"
    else:
        dtype = AutoConfig.from_pretrained(folder, **TRUSTED_FILES).dtype
        stored = str(dtype).removeprefix("torch.") if dtype else "weights of unstated precision"
    if quant.kind == "none":
        return stored
    return f"{quant.kind}{' (double)' if quant.double else ''} of {stored}"


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer with ids beyond the embedding; additional rows are common.

    Tokens for images or sounds are ignored, because a text model has no rows for them.
    """
    config = AutoConfig.from_pretrained(folder, **TRUSTED_FILES).get_text_config()
    rows = getattr(config, "vocab_size", None)
    foreign = {getattr(tokenizer, f"{kind}_token_id", None) for kind in _NOT_TEXT}
    count = max(set(tokenizer.get_vocab().values()) - foreign, default=-1) + 1
    if rows is not None and count > rows:
        raise ModelError(
            f"tokenizer and model must belong together, got {count} tokens and an embedding of "
            f"{rows} rows in {folder}; take the tokenizer that the model came with, or resize "
            f"the embedding with model.resize_token_embeddings({count}) and save the model"
        )
    if rows is not None and (getattr(config, "pad_token_id", None) or 0) >= rows:
        raise ModelError(
            f"pad_token_id must be a row of the embedding, got {config.pad_token_id} and {rows} "
            f"rows; correct it in {folder}/config.json"
        )


def _check_weights(missing: Collection[str], folder: Path) -> None:
    """Refuse a model with missing weights, which transformers would initialize at random."""
    if missing:
        raise ModelError(
            f"{folder} must hold every weight of a causal language model, got none for "
            f"{shown(', '.join(sorted(missing)), 200)}, which would be random; choose another "
            "model, or save it with its head"
        )


def _check_finite(model: nn.Module, folder: Path) -> None:
    """Refuse NaN and infinity in weights, on which no loss is finite at any learning rate."""
    parameters = ((name, p.detach()) for name, p in model.named_parameters() if p.numel())
    weights = {name: weight for name, weight in parameters if weight.is_floating_point()}
    # one pass without a copy: both ends are NaN if any value is
    ends = [torch.stack(torch.aminmax(weight)).float() for weight in weights.values()]
    are_finite = torch.stack(ends).isfinite().all(1).tolist()
    name = next((n for n, fine in zip(weights, are_finite, strict=True) if not fine), None)
    if name is not None:
        dtype = weights[name].dtype
        way = "set train.precision=fp32, or " if dtype == torch.float16 else ""
        raise ModelError(
            f"a base must have finite weights, got NaN or infinity in {shown(name)} of "
            f"{folder} as {str(dtype).removeprefix('torch.')}; {way}take another model"
        )


def _own_memory(model: nn.Module) -> None:
    """Copy weights out of the memory-mapped file, whose pages would stay in memory too."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:  # not quantized
            parameter.data = parameter.data.clone()


def _keep_stored(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It would do so in place at the first pass without gradients. Repacked weights have no
    backward and cannot be read by `dequantize_4bit`, so later trials would train on garbage.
    """
    modules: list[Any] = [*model.modules()]
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder; it always has a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUSTED_FILES)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"a tokenizer needs an end-of-sequence token, got none in {folder}; name the token "
            f'that ends a text as "eos_token" in {folder}/tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        # harmless: padding has no label and no token attends to it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def position_count(folder: Path) -> int | None:
    """Return the longest sequence, in tokens, that a model supports; None if unknown.

    With linear scaling of rotary positions this is `factor` times `max_position_embeddings`;
    other scalings include the factor already. `dynamic` and `longrope` depend on the longest row
    of a batch once it exceeds the original training length. The limit is that length, so that a
    row's result depends on that row alone.
    """
    config: Any = AutoConfig.from_pretrained(folder, **TRUSTED_FILES)
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    count = next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)
    rotary = getattr(text, "rope_parameters", None) or {}
    kind = rotary.get("rope_type")
    if count is not None and kind == "linear":
        return int(count * float(rotary.get("factor", 1.0)))
    if count is not None and kind in ("dynamic", "longrope"):
        original = rotary.get("original_max_position_embeddings")
        first = original or getattr(text, "original_max_position_embeddings", None)
        return min(count, int(first or count))
    return count


def model_folder(model: ModelConfig) -> Path:
    """Return a local folder with the weights; create or download it if necessary."""
    if model.source == "random":
        return tiny.folder()
    if model.source == "local":
        return user_path(str(model.path))
    if is_packaged(model):
        return smollm2.folder()
    return hub.download(str(model.repo), str(model.identity), "model")


def repo_to_download(model: ModelConfig) -> str | None:
    """Return the repository of a model that is not here yet; None if nothing is downloaded."""
    if model.source in ("local", "random") or is_packaged(model):
        return None
    repo = str(model.repo)
    return None if hub.cached_snapshot(repo, str(model.identity), "model") else repo


def is_packaged(model: ModelConfig) -> bool:
    return model.source == "package" and smollm2.is_identity(model.identity)


def pick_device(requested: str) -> torch.device:
    """Return the device; `auto` takes the GPU if there is one."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "hardware.device=cuda needs a CUDA GPU, and there is none; set hardware.device=auto"
        )
    use_cuda = requested != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto` is bf16 where that is fast, fp16 on older GPUs, else fp32."""
    if precision == "fp16" and device.type == "cpu":
        raise ModelError("train.precision=fp16 needs a CUDA GPU; set it to auto, bf16 or fp32")
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        # older GPUs only emulate bf16
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, counted before quantization."""
    return sum(whole_shape(parameter).numel() for parameter in model.parameters())


def quantization_config(quant: QuantConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantization settings for `from_pretrained`; matmuls run in `compute_dtype`.

    nf4, fp4 and double quantization are those of QLoRA (arXiv 2305.14314), int8 is LLM.int8()
    (arXiv 2208.07339).
    """
    if quant.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=compute_dtype,
    )
