"""The card of an adapter: the README of its folder, as the Hugging Face hub reads it.

A worker knows the trial alone. `deploy card` adds what its study found, intervals and licences.
No card holds a row of the data or a path of this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tinyllama_lab.config.axes import flatten_shown, spelled
from tinyllama_lab.config.command import setting, sweep_command, unquoted
from tinyllama_lab.config.schema import ModelConfig, Science, part
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.errors import shown
from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS, MINIMIZE, PERPLEXITY
from tinyllama_lab.output import code, markdown
from tinyllama_lab.study.trial import EVAL, MODEL_CONFIG, Result, TrialFolder

LIBRARY = "tinyllama_lab"
HERE = "."  # how the snippet names the adapter's own folder
LOCAL_BASE = "path/to/the/base"  # how it names a base that is not on the hub
Interval = tuple[float, float]
Bounds = Mapping[str, tuple[Interval, Interval]]  # by metric: 95 % intervals of base and adapter
_HUB = "https://huggingface.co"
_MARK = re.compile(r"\n<!-- written by tinyllama_lab: (\w+) -->\n\Z")
_OF_STUDY = ("study", "sweeps_dir", "retry", "seed", "seeds", "confirm", "tracking", "hydra")
_SETTINGS = ("lora.", "quant.", "train.", "data.style", "data.mask", "data.max_length", "seed")
_QUANT_OPTIONS = {
    "int8": "load_in_8bit=True",
    "4bit": (
        'load_in_4bit=True, bnb_4bit_quant_type="{kind}", '
        'bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype="{dtype}"'
    ),
}


@dataclass
class Card:
    """A card: what the hub reads, and below it what people read."""

    front: ModelCardData
    title: str
    sections: dict[str, str]  # by heading, in their order

    def text(self) -> str:
        """Return the file, with a mark by which `is_own` recognises it."""
        body = "\n\n".join(f"## {head}\n\n{text}" for head, text in self.sections.items())
        text = f"---\n{self.front.to_yaml()}\n---\n\n# {self.title}\n\n{body}\n"
        return f"{text}\n<!-- written by {LIBRARY}: {_digest(text)} -->\n"


def is_own(text: str) -> bool:
    """Return whether a card is as it was written, so that it may be replaced."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class BaseModel:
    """The base as an adapter names it."""

    repo: str | None  # on the hub; None where the base is a folder of this machine, or made here
    revision: str | None

    @classmethod
    def of(cls, trial: TrialFolder) -> BaseModel:
        """Read the base from the configuration that PEFT saved with the adapter.

        A model that was trained whole has none; its base is that of the trial.
        """
        if trial.adapter_config_file.name == MODEL_CONFIG:
            model: ModelConfig = part(ModelConfig, trial.read_config()["model"])
            return cls(model.repo, model.identity if model.source == "hub" else None)
        config = json.loads(trial.adapter_config_file.read_text(encoding="utf-8"))
        name = config.get("base_model_name_or_path")
        is_local = not name or PurePath(name).is_absolute()
        return cls(None if is_local else name, None if is_local else config.get("revision"))


@dataclass(frozen=True)
class Facts:
    """What a trial's own files say."""

    trial: TrialFolder
    science: Science
    result: Result
    base: BaseModel
    end_ids: tuple[int, ...]  # tokens that end an answer
    evaluation: Mapping[str, Any]  # the `eval` group of the metrics
    bounds: Bounds = field(default_factory=dict)

    @classmethod
    def of(cls, trial: TrialFolder, result: Result, end_ids: Sequence[int]) -> Facts:
        """Return the facts of a trial whose adapter is saved, scored as it was first."""
        config = trial.read_config()
        science: Science = part(Science, config)
        ends = tuple(dict.fromkeys(end_ids))
        return cls(trial, science, result, BaseModel.of(trial), ends, config[EVAL])


def trial_card(facts: Facts, adapter: str = HERE) -> Card:
    """Return the card of one trial.

    Args:
        facts: of the trial.
        adapter: how the snippet names the adapter: its own folder, or its name on the hub.
    """
    science = facts.science
    base = facts.base.repo or science.model.name
    sections = {
        "What it is": _what(facts),
        "How to load it": _snippet(facts, adapter),
        "Base": _base(facts),
        "Data": _data(facts),
        "Training": _training(facts),
        "Results": _results(facts),
        "Limits": _limits(facts),
    }
    kind = f"{base}, fine-tuned" if science.lora.is_full else f"a LoRA adapter for {base}"
    return Card(_front(facts), f"{facts.trial.name}: {kind}", sections)


def _front(facts: Facts) -> ModelCardData:
    data, repo = facts.science.data, facts.science.data.repo
    values = {
        name: value
        for name, value in facts.result.metrics.items()
        if name.startswith("eval/") and name in METRICS
    }
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=repo or data.name,
            dataset_name=f"{data.name}, held-out rows",
            dataset_config=data.config,
            dataset_revision=data.identity if repo else None,
            metric_type=name.removeprefix("eval/"),
            metric_name=METRICS[name].label,
            metric_value=round(value, 6),
        )
        for name, value in values.items()
    ]
    return ModelCardData(
        base_model=facts.base.repo,
        library_name="transformers" if facts.science.lora.is_full else "peft",
        pipeline_tag="text-generation",
        datasets=[repo] if repo else None,
        tags=_tags(facts.science),
        model_name=facts.trial.name if results else None,
        eval_results=results or None,
    )


def _tags(science: Science) -> list[str]:
    if science.lora.is_full:
        return [LIBRARY]
    return ["lora", "peft", LIBRARY, *(["qlora"] if science.quant.kind != "none" else [])]


def _what(facts: Facts) -> str:
    lora, result = facts.science.lora, facts.result
    size = METRICS["size/adapter_mib"].shown(result.metrics["size/adapter_mib"])
    version = result.environment.get("versions", {}).get(LIBRARY)
    made = f"It was trained and scored with {LIBRARY} {version or ''}".rstrip() + "."
    trained = f"{result.model['trainable_params']:,} trained parameters, {size} MiB"
    if lora.is_full:
        return f"A whole model, made from {_base_link(facts)}: {trained}. {made}"
    config = json.loads(facts.trial.adapter_config_file.read_text(encoding="utf-8"))
    targets = config["target_modules"]
    names = [targets] if isinstance(targets, str) else sorted(targets)
    modules = ", ".join(map(code, names))
    whole = [f"`{name}`" for name in lora.modules_to_save]
    whole += [{"none": "", "all": "all biases"}.get(lora.bias, "their biases")]
    more = ", ".join(filter(None, whole))
    return (
        f"A {VARIANTS[lora.variant].shown} adapter of rank {lora.r} on the modules {modules}"
        f"{f', with trained values of {more}' if more else ''}: "
        f"{trained}. It changes {_base_link(facts)}, which it needs to run. {made}"
    )


def _base_link(facts: Facts) -> str:
    repo = facts.base.repo
    return f"[{repo}]({_HUB}/{repo})" if repo else f"the base {code(facts.science.model.name)}"


def _snippet(facts: Facts, adapter: str) -> str:
    science, dtype = facts.science, facts.result.environment.get("dtype", "float32")
    options = [f'dtype="{dtype}"']
    if facts.base.revision:
        options.append(f'revision="{facts.base.revision}"')
    if (kind := science.quant.kind) != "none":
        pattern = _QUANT_OPTIONS.get(kind, _QUANT_OPTIONS["4bit"])
        quant = pattern.format(kind=kind, double=science.quant.double, dtype=dtype)
        options.append(f"quantization_config=BitsAndBytesConfig({quant})")
    imports = ["AutoModelForCausalLM", "AutoTokenizer"]
    imports += ["BitsAndBytesConfig"] if kind != "none" else []
    name = "folder" if science.lora.is_full else "adapter"
    where = "this folder, or its name on the hub" if adapter == HERE else "on the hub"
    lines = [
        *([] if science.lora.is_full else ["from peft import PeftModel"]),
        f"from transformers import {', '.join(imports)}",
        "",
        f'{name} = "{adapter}"  # {where}',
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        *_loading(facts, options),
        'messages = [{"role": "user", "content": "Your question"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
        "output = model.generate(",
        f"    **inputs, max_new_tokens=256, do_sample=False, eos_token_id={list(facts.end_ids)}",
        ")",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return (
        "The chat template of this folder's tokenizer renders the prompts of training.\n\n"
        "```python\n" + "\n".join(lines) + "\n```"
    )


def _loading(facts: Facts, options: Sequence[str]) -> list[str]:
    """Return the lines of the snippet that load the model."""
    if facts.science.lora.is_full:
        return ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    return [
        "base = AutoModelForCausalLM.from_pretrained(",
        f'    "{facts.base.repo or LOCAL_BASE}",',
        *(f"    {option}," for option in options),
        ")",
        "model = PeftModel.from_pretrained(base, adapter)",
    ]


def _base(facts: Facts) -> str:
    model, result = facts.science.model, facts.result
    lines = [f"- model: {_base_link(facts)}"]
    if facts.base.repo is None:
        made = "random weights, made for tests" if model.source == "random" else "a local folder"
        lines.append(f"- where it is: {made}; it is not on the hub under a name known here")
    if model.source == "package" and not facts.base.revision:
        lines.append(
            f"- trained on: the weights of the package `{model.identity}`, which may differ from "
            "those of the hub; on the latter the adapter was not measured"
        )
    else:
        lines.append(f"- revision: `{facts.base.revision or model.identity}`")
    lines.append(f"- weights: {result.model.get('weights', 'unknown')}")
    lines.append(f"- computed in: {result.environment.get('dtype', 'unknown')}")
    lines.append(f"- parameters: {result.model.get('parameters', 0):,}")
    return "\n".join(lines)


def _data(facts: Facts) -> str:
    data, counts = facts.science.data, facts.result.data
    identity = f"`{data.identity}`"
    if data.repo:
        source = f"[{data.repo}]({_HUB}/datasets/{data.repo}) of the hub, commit {identity}"
        source += f", configuration {code(data.config)}" if data.config else ""
        source += f", split {code(data.split)}" if data.split else ""
    elif data.kind.package_file:
        source = f"the data set {code(data.name)} of {LIBRARY}, digest {identity}"
    else:
        source = f"local files ({code(data.name)}), digest {identity}"
    dropped = counts.get("dropped") or {}
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    seen = counts.get("train_rows_seen", counts.get("train_rows"))
    lines = [
        f"- source: {source}",
        f"- rows of the source: {_count(counts, 'rows')}",
        f"- trained on: {seen:,} rows, {_count(counts, 'train_tokens')} tokens; fingerprint "
        f"`{counts.get('train_fingerprint')}`",
        f"- held out: {_count(counts, 'eval_rows')} rows, never trained on, "
        f"{_count(counts, 'eval_label_tokens')} scored tokens; fingerprint "
        f"`{counts.get('eval_fingerprint')}`",
        f"- left out: {reasons or 'none'}",
    ]
    if cut := counts.get("cut_rows"):
        lines.append(f"- cut at {data.max_length} tokens: {cut:,} training rows")
    return "\n".join(lines)


def _count(counts: Mapping[str, Any], name: str) -> str:
    value = counts.get(name)
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _training(facts: Facts) -> str:
    settings = flatten_shown(facts.trial.read_config())
    rows = [
        f"| `{key}` | {_cell(spelled(value))} |"
        for key, value in settings.items()
        if key.startswith(_SETTINGS)
    ]
    return "\n".join(
        [
            f"This command of {LIBRARY} trains it:",
            "",
            f"```bash\n{reproducing(facts.result.overrides, facts.science.seed)}\n```",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
        ]
    )


def _cell(text: str) -> str:
    return markdown(shown(text, len(text)))


def reproducing(overrides: Sequence[str], seed: int) -> str:
    """Return the command that trains a trial again; of a path, it holds the last part alone."""
    words = []
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split(".")[0].split("/")[0]
        if group in _OF_STUDY or group.startswith("tune"):
            continue
        text = unquoted(value)
        is_path = key.endswith("path") or text.startswith(("/", "~"))
        words.append(setting(key, PurePath(text).name) if is_path else override)
    return sweep_command(["-m", *words, f"seed={seed}", "tune=null", "confirm=off"])


def _results(facts: Facts) -> str:
    metrics = facts.result.metrics
    tuned = "fine-tuned" if facts.science.lora.is_full else "with the adapter"
    lines = [f"| metric | better | base | {tuned} |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        of_base = metrics.get(name.replace("eval/", "base/", 1))
        if not name.startswith("eval/") or name not in metrics or of_base is None:
            continue
        better = "lower" if metric.direction == MINIMIZE else "higher"
        unit = f" ({metric.unit})" if metric.unit else ""
        cells = [metric.shown(value) for value in (of_base, metrics[name])]
        for number, interval in enumerate(facts.bounds.get(name, ())):
            cells[number] += " [{}, {}]".format(*map(metric.shown, interval))
        label = {HELDOUT_LOSS: "loss", PERPLEXITY: "perplexity"}.get(name, metric.label)
        lines.append(f"| {label}{unit} | {better} | {cells[0]} | {cells[1]} |")
    rows, scored = _count(facts.result.data, "eval_rows"), facts.science.data.mask
    tokens = "responses" if scored == "response" else "tokens"
    notes = [f"Loss and perplexity are of the {tokens} of {rows} held-out rows."]
    if facts.bounds:
        notes.append(
            "Brackets hold 95 % intervals over these rows; they do not cover other seeds."
        )
    if generations := facts.evaluation["generations"]:
        notes.append(f"Scores of text are of the answers to at most {generations} of them.")
    return "\n".join([*lines, "", " ".join(notes)])


_CHOSEN_STEP = (
    "- Its step was chosen on the held-out rows (`train.keep=best`), so its results on them look "
    "a little too good."
)


def _limits(facts: Facts) -> str:
    environment, data = facts.result.environment, facts.science.data
    chosen = [_CHOSEN_STEP] if "heldout/optimism" in facts.result.metrics else []
    return "\n".join(
        [
            *chosen,
            f"- One training run, of seed {facts.science.seed}; other seeds give other adapters.",
            f"- Trained and measured on one machine: {environment.get('hardware', 'unknown')}.",
            f"- Scored on rows of `{data.name}` alone: other tasks may have become worse.",
            "- Nobody has checked its answers for truth, safety or bias. It keeps the faults of "
            "its base and of its data.",
        ]
    )
