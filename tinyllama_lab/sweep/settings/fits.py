"""Whether the settings of an adapter fit the model, as far as its weights' names and sizes tell.

The worker asks the model itself, which knows more, such as what an expression matches in an
architecture that is not in `stored_model.PLAIN`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import Config
from tinyllama_lab.config.targets import (
    EXPRESSION,
    expression_of,
    group_names,
    layer_numbers,
    missing_names,
    state_space_problem,
)
from tinyllama_lab.config.variants import INITIALISATIONS, VARIANTS
from tinyllama_lab.sweep.settings.matching import matched, pattern_problem
from tinyllama_lab.sweep.settings.profile import has_cuda
from tinyllama_lab.sweep.settings.stored_model import HEAD, LAYER, StoredModel, leaf, stored_model

_HEADS = (HEAD, "embed_out")


def adapter_problems(config: Config) -> list[str]:
    """Return the problems of the settings in `lora` for this model; at most one for each kind.

    Raises:
        ModelError: a file of the model is damaged.
    """
    lora = config.lora
    problems = [*_problems_of_int8(config)]
    model = None if lora.is_full else stored_model(config.model)
    if model is None:  # only the worker knows it
        return problems
    problem = _problem_of_targets(lora, model) or _problem_of_layers(lora, model)
    if problem:
        return [*problems, problem]
    return [*problems, *_problems_of_weights(lora, model)]


def _problems_of_int8(config: Config) -> Iterator[str]:
    on_cpu = config.hardware.device != "cuda" and not has_cuda()
    this_machine = config.hardware.card.name is None
    variant = config.lora.variant
    if config.quant.kind == "int8" and on_cpu and this_machine and VARIANTS[variant].reads_weights:
        yield (
            f"lora.variant={variant} needs a GPU on an int8 base, got the CPU; "
            "set lora.variant=lora, or quant=nf4"
        )


def _problem_of_targets(lora: LoraConfig, model: StoredModel) -> str | None:
    targets = lora.targets
    if not model.linear or targets == "all_linear":
        return None
    if isinstance(targets, str) and (expression := expression_of(targets)) is not None:
        return _problem_of_expression(expression, model)
    wanted = targets if isinstance(targets, list) else group_names(targets, model.linear)
    missing = missing_names(wanted, model.linear)
    if wanted and not missing:
        return None
    leaves = sorted({leaf(name) for name in model.linear})
    return (
        f"lora.targets must name modules of the model, got {', '.join(missing) or targets}; "
        f"{model.name} has {', '.join(leaves)}; set lora.targets=all_linear or "
        f"lora.targets=[{_nearest(missing[0] if missing else '', leaves)}]"
    )


def _problem_of_expression(expression: str, model: StoredModel) -> str | None:
    if not model.can_match:
        return None
    # the head may have another name in a file, or none
    modules = [name for name in model.modules if leaf(name) not in _HEADS]
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


def _problem_of_layers(lora: LoraConfig, model: StoredModel) -> str | None:
    numbers = [int(found[1]) for name in model.weights if (found := LAYER.search(name))]
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


def _problems_of_weights(lora: LoraConfig, model: StoredModel) -> Iterator[str]:
    """Yield the problems of ranks, biases and whole modules."""
    weights, saved = model.weights, lora.modules_to_save
    # transformers joins and renames modules of others, such as the experts of a mixture
    if model.is_plain and (missing := missing_names(saved, model.modules)):
        leaves = sorted({leaf(name.rpartition(".")[0]) for name in weights} | {HEAD})
        yield (
            f"lora.modules_to_save must name modules of the model, got {missing[0]}; "
            f"{model.name} has {', '.join(leaves)}; "
            f"set lora.modules_to_save=[{_nearest(missing[0], leaves)}]"
        )
    adapted = _adapted(lora, model)
    if adapted == [] and saved and model.is_plain:
        yield (
            "lora.targets and lora.layers must match linear layers outside "
            f"{', '.join(saved)}, got {lora.targets!r} and {lora.layers!r}; {model.name} has "
            f"layers such as {model.linear[0]}; set lora.modules_to_save=[]"
        )
    if not adapted:
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


def _problem_of_patterns(
    lora: LoraConfig, model: StoredModel, adapted: Sequence[str]
) -> str | None:
    patterns, leaves = list(lora.rank_pattern or {}), sorted({leaf(name) for name in adapted})
    plain = [name for name in patterns if re.fullmatch(r"[\w.]+", name)]
    if unused := missing_names(plain, adapted):
        return (
            f"lora.rank_pattern must name adapted modules, got {unused[0]!r}; adapted are "
            f"{', '.join(leaves)}; set 'lora.rank_pattern={{{_nearest(unused[0], leaves)}: 16}}'"
        )
    if not patterns or not model.can_match:
        return None
    return pattern_problem(tuple(sorted(patterns)), tuple(adapted))


def _problem_of_rank(lora: LoraConfig, model: StoredModel, adapted: Sequence[str]) -> str | None:
    """Return the problem of a rank that the weights do not have, or None."""
    if not model.is_plain:  # a matrix may be no linear layer, such as the router of experts
        return None
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
    if lora.reads_rows:
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


def _adapted(lora: LoraConfig, model: StoredModel) -> list[str] | None:
    """Return the names of the adapted modules; None where only the worker knows them."""
    names, targets = model.linear, lora.targets
    if isinstance(targets, str) and (expression := expression_of(targets)) is not None:
        if not model.can_match:
            return None
        names = [*matched(expression, tuple(names))[0]]
    elif targets != "all_linear":
        wanted = targets if isinstance(targets, list) else group_names(targets, names)
        names = [name for name in names if _ends(name, wanted)]
    names = [name for name in names if not _lies_in(name, lora.modules_to_save)]
    if lora.layers != "all":
        numbers = {name: int(found[1]) for name in names if (found := LAYER.search(name))}
        chosen = layer_numbers(lora.layers, max(numbers.values(), default=0) + 1)
        names = [name for name in names if numbers.get(name) in chosen]
    return names


def _ends(module: str, names: Sequence[str]) -> bool:
    """Return whether a module's name is one of these, or ends with one after a dot."""
    return any(f".{module}".endswith(f".{name}") for name in names)


def _lies_in(module: str, names: Sequence[str]) -> bool:
    """Return whether a module is one of these, or lies in one."""
    return any(f".{name}." in f".{module}." for name in names)


def _nearest(word: str, known: Sequence[str]) -> str:
    """Return the most similar of the known words, else the first."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.3)), known[0])
