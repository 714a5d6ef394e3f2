"""Whether the settings of an adapter fit the model, as far as its weights' names and sizes tell.

Nothing is loaded: the headers of safetensors hold both. The worker asks the model itself, which
knows more, such as what an expression matches in an architecture that is not in `matching.PLAIN`.
"""

from __future__ import annotations

import difflib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.config.axes import shown_name
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import Config, ModelConfig
from tinyllama_lab.config.targets import (
    EXPRESSION,
    expression_of,
    group_names,
    layer_numbers,
    missing_names,
    state_space_problem,
)
from tinyllama_lab.config.variants import INITIALISATIONS, VARIANTS
from tinyllama_lab.data import hub
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.files import user_path
from tinyllama_lab.sweep.settings.matching import has_module_names, matched, pattern_problem
from tinyllama_lab.sweep.settings.profile import has_cuda

Weights = Mapping[str, Sequence[int]]  # shapes by name

_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^lm_head$|^shared$")  # layers that take no adapter
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_HEAD = "lm_head"  # in no file where it is tied to the embedding
_HEADS = (_HEAD, "embed_out")
# layers, hidden size, that of the MLP, and that of keys, of the models that come without a file
_LLAMAS = {"random": (2, 64, 128, 32), "package": (30, 576, 1536, 192)}


@dataclass(frozen=True)
class _Model:
    """What the files of a model tell."""

    name: str
    kind: str | None  # `model_type` of its configuration
    weights: Weights

    @cached_property
    def linear(self) -> list[str]:
        """The names of the linear layers that may take an adapter."""
        return module_names(self.weights)

    @property
    def is_plain(self) -> bool:
        """Whether expressions can be matched with its names."""
        return has_module_names(self.kind, self.linear)


def adapter_problems(config: Config) -> list[str]:
    """Return the problems of the settings in `lora` for this model; at most one for each kind."""
    lora = config.lora
    problems = [*_problems_of_int8(config)]
    weights = None if lora.is_full else model_weights(config.model)
    if not weights:  # only the worker knows them
        return problems
    model = _Model(shown_name(vars(config.model)), _kind(config.model), weights)
    problem = _problem_of_targets(lora, model) or _problem_of_layers(lora, model)
    if problem:
        return [*problems, problem]
    return [*problems, *_problems_of_weights(lora, model)]


def folder_of(model: ModelConfig) -> Path | None:
    """Return the folder of a model on this machine; None if it is not downloaded yet."""
    if model.source == "local":
        return user_path(str(model.path))
    if model.source == "hub":
        return hub.cached_snapshot(str(model.repo), model.revision, "model")
    return None


def model_weights(model: ModelConfig) -> Weights | None:
    """Return the shapes of a model's weights by name; None if only the worker knows them.

    Raises:
        ModelError: a file is damaged.
    """
    if model.source in _LLAMAS:
        return _llama(*_LLAMAS[model.source])
    folder = folder_of(model)
    weights: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors") if folder else ():
        state = file.stat()
        weights |= _header(file, state.st_mtime_ns, state.st_size)
    return weights or None


def module_names(weights: Weights) -> list[str]:
    """Return the names of the linear layers that may take an adapter."""
    # only their weights are matrices, beside embeddings
    matrices = (n for n, shape in weights.items() if n.endswith(".weight") and len(shape) == 2)
    names = (name.removesuffix(".weight") for name in matrices)
    return sorted(name for name in names if not _EMBEDDING.search(_leaf(name)))


def _llama(layers: int, hidden: int, inner: int, keys: int) -> Weights:
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
    shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    blocks = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(layers)
        for name, shape in {**shapes, **norms}.items()
    }
    # nothing depends on the size of the vocabulary
    return {"model.embed_tokens.weight": (0, hidden), "model.norm.weight": (hidden,), **blocks}


def _problems_of_int8(config: Config) -> Iterator[str]:
    on_cpu = config.hardware.device != "cuda" and not has_cuda()
    this_machine = config.hardware.card.name is None
    variant = config.lora.variant
    if config.quant.kind == "int8" and on_cpu and this_machine and VARIANTS[variant].reads_weights:
        yield (
            f"lora.variant={variant} needs a GPU on an int8 base, got the CPU; "
            "set lora.variant=lora, or quant=nf4"
        )


def _kind(model: ModelConfig) -> str | None:
    """Return the architecture that `config.json` names; None if it names none."""
    if model.source in _LLAMAS:
        return "llama"
    folder = folder_of(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def _problem_of_targets(lora: LoraConfig, model: _Model) -> str | None:
    targets = lora.targets
    if not model.linear or targets == "all_linear":
        return None
    if isinstance(targets, str) and (expression := expression_of(targets)) is not None:
        return _problem_of_expression(expression, model)
    wanted = targets if isinstance(targets, list) else group_names(targets, model.linear)
    missing = missing_names(wanted, model.linear)
    if wanted and not missing:
        return None
    leaves = sorted({_leaf(name) for name in model.linear})
    return (
        f"lora.targets must name modules of the model, got {', '.join(missing) or targets}; "
        f"{model.name} has {', '.join(leaves)}; set lora.targets=all_linear or "
        f"lora.targets=[{_nearest(missing[0] if missing else '', leaves)}]"
    )


def _problem_of_expression(expression: str, model: _Model) -> str | None:
    if not model.is_plain:
        return None
    # the head may have another name in a file, or none
    modules = [name for name in _modules(model.weights) if _leaf(name) not in _HEADS]
    names, problem = matched(expression, tuple(modules))
    linear = set(model.linear)
    others = [name for name in names if name not in linear]
    if problem or (names and not others):
        return problem
    which = f", which matches {others[0]}" if others else ""
    return (
        f"lora.targets must match linear layers alone, got {EXPRESSION + expression!r}{which}; "
        f"{model.name} has layers such as {model.linear[0]}; set lora.targets=all_linear"
    )


def _problem_of_layers(lora: LoraConfig, model: _Model) -> str | None:
    numbers = [int(found[1]) for name in model.weights if (found := _LAYER.search(name))]
    if lora.layers == "all" or not numbers:
        return None
    count = max(numbers) + 1
    chosen = layer_numbers(lora.layers, count)
    if 0 <= min(chosen) <= max(chosen) < count:
        return None
    return (
        f"lora.layers must name layers of the model, got {lora.layers}; {model.name} has {count}, "
        f"from 0 to {count - 1}; set lora.layers=all"
    )


def _problems_of_weights(lora: LoraConfig, model: _Model) -> Iterator[str]:
    """Yield the problems of ranks, biases and whole modules."""
    weights = model.weights
    if missing := missing_names(lora.modules_to_save, _modules(weights)):
        leaves = sorted({_leaf(name.rpartition(".")[0]) for name in weights} | {_HEAD})
        yield (
            f"lora.modules_to_save must name modules of the model, got {missing[0]}; "
            f"{model.name} has {', '.join(leaves)}; "
            f"set lora.modules_to_save=[{_nearest(missing[0], leaves)}]"
        )
    adapted = _adapted(lora, model)
    if adapted is None:
        return
    if problem := state_space_problem(model.kind, adapted, model.linear, lora.targets):
        yield problem
    if problem := _problem_of_patterns(lora, model, adapted):
        yield problem
    biases = [name.removesuffix(".bias") for name in weights if name.endswith(".bias")]
    of_adapted = biases if lora.bias == "all" else set(biases) & set(adapted)
    if lora.bias != "none" and not of_adapted:
        yield (
            f"lora.bias={lora.bias} needs a model whose layers have biases, and {model.name} has "
            "none there; set lora.bias=none"
        )
    if problem := _problem_of_rank(lora, model, adapted):
        yield problem


def _problem_of_patterns(lora: LoraConfig, model: _Model, adapted: Sequence[str]) -> str | None:
    patterns, leaves = list(lora.rank_pattern or {}), sorted({_leaf(name) for name in adapted})
    plain = [name for name in patterns if re.fullmatch(r"[\w.]+", name)]
    if unused := missing_names(plain, adapted):
        return (
            f"lora.rank_pattern must name adapted modules, got {unused[0]!r}; adapted are "
            f"{', '.join(leaves)}; set 'lora.rank_pattern={{{_nearest(unused[0], leaves)}: 16}}'"
        )
    if not patterns or not model.is_plain:
        return None
    return pattern_problem(tuple(sorted(patterns)), tuple(adapted))


def _problem_of_rank(lora: LoraConfig, model: _Model, adapted: Sequence[str]) -> str | None:
    """Return the problem of a rank that the weights do not have, or None."""
    shapes = {name: model.weights[f"{name}.weight"] for name in adapted}
    if INITIALISATIONS[lora.init].shifts_base and not lora.rank_pattern:
        name = min(adapted, key=lambda each: min(shapes[each]))
        most = min(shapes[name])
        # a side of 1 is that of packed weights
        if lora.r > most > 1:  # PEFT would take fewer, and not load them again
            return (
                "lora.r must be at most the smaller side of every adapted weight when "
                f"lora.init={lora.init}, got {lora.r} and {name} with {most}; set lora.r={most}"
            )
    if lora.reads_rows and model.is_plain:
        # GPT-2 keeps its weights the other way round
        inputs = {name: shape[0 if model.kind == "gpt2" else 1] for name, shape in shapes.items()}
        name = min(adapted, key=inputs.__getitem__)
        if lora.r > inputs[name]:
            return (
                "lora.r must be at most the inputs of every adapted module when "
                f"lora.init={lora.init}, got {lora.r} and {name} with {inputs[name]}; "
                f"set lora.r={inputs[name]}"
            )
    return None


def _modules(weights: Weights) -> list[str]:
    """Return the names of all modules that hold weights, themselves or further down."""
    names = {_HEAD}
    for name in weights:
        parts = name.split(".")[:-1]
        names |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return sorted(names)


def _adapted(lora: LoraConfig, model: _Model) -> list[str] | None:
    """Return the names of the adapted modules; None where an expression may choose others."""
    names, targets = model.linear, lora.targets
    if isinstance(targets, str) and (expression := expression_of(targets)) is not None:
        if not model.is_plain:
            return None
        names = [*matched(expression, tuple(names))[0]]
    elif targets != "all_linear":
        wanted = targets if isinstance(targets, list) else group_names(targets, names)
        names = [name for name in names if _ends(name, wanted)]
    names = [name for name in names if not _ends(name, lora.modules_to_save)]
    if lora.layers != "all":
        numbers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
        chosen = layer_numbers(lora.layers, max(numbers.values(), default=0) + 1)
        names = [name for name in names if numbers.get(name) in chosen]
    return names or None


def _ends(module: str, names: Sequence[str]) -> bool:
    """Return whether a module's name is one of these, or ends with one after a dot."""
    return any(f".{module}".endswith(f".{name}") for name in names)


def _nearest(word: str, known: Sequence[str]) -> str:
    """Return the most similar of the known words, else the first."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.3)), known[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


@lru_cache(maxsize=64)
def _header(path: Path, _changed_ns: int, _bytes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file by name; other arguments name its version.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # limited: a damaged length must not fill the memory
            header: Any = json.loads(file.read(min(length, 100_000_000)))
        entries = [(n, entry) for n, entry in header.items() if isinstance(entry, dict)]
        return {n: tuple(map(int, e.get("shape", ()))) for n, e in entries if n != "__metadata__"}
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{path} must be a safetensors file; it cannot be read ({error})"
        ) from error
