"""Whole studies on disk without any training: losses are drawn, every file is a real one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests import grid
from tinyllama_lab.config.axes import folder_name
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Evaluation, Result, State, TrialFolder, base_config

Values = dict[str, Any]
Effect = Callable[[Values], float]  # of the swept values, seed included: mean loss a token
States = Callable[[Values], State | None]  # None: begun, and without a result
GROUPS = ("model", "data", "lora", "quant", "train", "eval", "seed")
PROMPTS = (
    ("Which bus goes from Kathmandu to Pokhara?", "transport", "Take the tourist bus at seven."),
    ("What shall I pack for ten days in May?", "packing_list", "Pack a fleece and a rain jacket."),
    ("Who helps when I am ill in Biratnagar?", "health_clinic", "See a doctor at the clinic."),
    ("How much is a permit for Mustang?", "permit", "A permit is 500 dollars for ten days."),
)
ENVIRONMENT = {
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "tinyllama_lab": "0.1.0"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "hardware": "a processor (2 cores)",
    "device": "cpu",
    "dtype": "float32",
    "memory_basis": "resident set",
}

# twelve settings that a random search draws from: lists of values, or a range of a logarithm
SEARCHED: dict[str, list[Any] | tuple[float, float]] = {
    "lora.r": [4, 8, 16, 32],
    "lora.targets": ["attention_qv", "attention", "all_linear"],
    "lora.variant": ["lora", "dora", "rslora"],
    "lora.init": ["default", "gaussian"],
    "lora.dropout": [0.0, 0.05, 0.1],
    "lora.layers": ["all", "last_8", [16, 17, 18, 19, 20, 21]],
    "data.n": [250, 500, 1000],
    "quant.kind": ["none", "nf4"],
    "train.lr": (5e-5, 2e-3),
    "train.epochs": [1, 2, 3],
    "train.batch_size": [4, 8, 16],
    "train.optimizer": ["adamw", "adamw_8bit"],
}


def rank_and_rows(values: Values) -> float:
    """An effect: more rows help much, a higher rank a little, the precision hardly."""
    rank, rows = values.get("lora.r", 8), _rows(values)
    nf4 = 0.004 if values.get("quant.kind") == "nf4" else 0.0
    return 1.9 - 0.12 * math.log2(rows / 250) - 0.015 * math.log2(rank) + nf4


def every_done(values: Values) -> State | None:
    return State.DONE


def simulated_study(
    root: Path,
    keys: Mapping[str, Sequence[Any]] | Sequence[Values],
    seeds: Sequence[int] = (0, 1, 2),
    effect: Effect = rank_and_rows,
    examples: int = 64,
    *,
    name: str = "s",
    states: States = every_done,
    seed_noise: float = 0.01,
    example_noise: float = 0.1,
    steps: int = 30,
    with_base: bool = True,
    prompts: Sequence[tuple[str, str, str]] = PROMPTS,
    facts: Mapping[str, Any] | None = None,
) -> StudyFolder:
    """Write a study: one trial for every combination of `keys` and `seeds`.

    Args:
        root: the folder of studies.
        keys: swept keys and their values, for example `{"lora.r": [4, 8]}`; no seeds. Or, as of a
            search, the combinations themselves.
        seeds: every combination is written once for each.
        effect: the true mean loss a token under some swept values.
        examples: held-out examples; the same in every trial.
        name: of the study, a folder below `root`.
        states: how a trial ended under some swept values.
        seed_noise: standard deviation of a training run's luck, nats per token.
        example_noise: that of an example's own answer to a setting.
        steps: metric events of every trial.
        with_base: whether the bases were scored.
        prompts: prompt, intent and reference of what is written.
        facts: added to `data` of every result.
    """
    study = StudyFolder(root, name)
    plain = grid.plain(*grid.SMALL, "tracking=none")
    plain = {group: plain[group] for group in GROUPS}
    plain["model"]["identity"] = plain["data"]["identity"] = "1"
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 60, examples)
    hardness = generator.normal(0, 0.4, examples)
    combinations = _grid(keys) if isinstance(keys, Mapping) else keys
    swept = [*combinations[0], *(["seed"] if len(seeds) > 1 else [])]
    planned = []
    for combination, seed in product(combinations, seeds):
        values = {**combination, "seed": seed}
        config = configured(plain, values)
        # like a plan, before any folder is written: each new folder makes the next look-up slow
        planned.append((values, config, study.trial(config, folder_name(config, swept))))
    for values, config, trial in planned:
        write_config(trial, config)
        luck = generator.normal(0, seed_noise) + generator.normal(0, example_noise, examples)
        losses = tokens * np.maximum(0.05, effect(values) + hardness + luck)
        _end(trial, values, states(values), losses, tokens, steps, prompts, facts or {})
        if with_base:
            write_base(study, config, tokens * np.maximum(0.05, 3.5 + hardness), tokens, prompts)
    return study


def searched_values(trials: int) -> list[Values]:
    """Return what a random search of twelve settings could have drawn, the same at every call."""
    generator = np.random.default_rng(0)
    return [
        {
            key: values[generator.integers(len(values))]
            if isinstance(values, list)
            else float(np.exp(generator.uniform(*np.log(values))))
            for key, values in SEARCHED.items()
        }
        for _ in range(trials)
    ]


def _grid(keys: Mapping[str, Sequence[Any]]) -> list[Values]:
    return [dict(zip(keys, chosen, strict=True)) for chosen in product(*keys.values())]


def configured(plain: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A configuration with other values; alpha follows the rank unless it is given."""
    config = copy.deepcopy(dict(plain))
    for key, value in values.items():
        *groups, last = key.split(".")
        place = config
        for group in groups:
            place = place[group]
        place[last] = value
    if "lora.alpha" not in values:
        config["lora"]["alpha"] = 2.0 * config["lora"]["r"]
    return config


def write_config(trial: TrialFolder, config: Mapping[str, Any]) -> None:
    """As `TrialFolder.write_config`, many times as fast."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(dict(config), Dumper=yaml.CSafeDumper, sort_keys=False)
    trial.config_file.write_text(text)


def read_config(trial: TrialFolder) -> dict[str, Any]:
    """As `TrialFolder.read_config`, likewise; a stranger's file could crash this parser."""
    config: dict[str, Any] = yaml.CSafeLoader(trial.config_file.read_text()).get_single_data()
    return config


def first_evaluation(trial: TrialFolder) -> Evaluation:
    """The evaluation that the trial's result names; `eval/` where it has no result yet."""
    result, _ = trial.read_result()
    return trial.evaluation_in(result) if result else Evaluation(trial.eval_dir)


def write_losses(
    trial: TrialFolder, losses: Any, tokens: Any, evaluation: Evaluation | None = None
) -> None:
    """`per_example.jsonl` of an evaluation; without one, in `eval/` as earlier versions had it."""
    evaluation = evaluation or first_evaluation(trial)
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"example": number, "loss": float(loss), "tokens": int(count)})
        for number, (loss, count) in enumerate(zip(losses, tokens, strict=True))
    ]
    evaluation.per_example_file.write_text("\n".join(lines) + "\n")


def write_generations(trial: TrialFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """`eval/generations.jsonl`."""
    trial.eval_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    first_evaluation(trial).generations_file.write_text("".join(lines))


def write_base(
    study: StudyFolder, config: dict[str, Any], losses: Any, tokens: Any, prompts: Any = PROMPTS
) -> TrialFolder:
    """The base's own evaluation, once."""
    kind = f"{config['model']['name']}-{config['quant']['kind']}"
    base = study.base(config, kind)
    if not base.result_file.exists():
        write_config(base, base_config(config))
        write_losses(base, losses, tokens)
        write_generations(base, _written(prompts, "The base says: I do not know."))
        metrics = _scores(float(np.sum(losses) / np.sum(tokens)))
        data = {"eval_fingerprint": "e0", "eval_rows": len(tokens)}
        base.commit(Result(base.key, base.name, State.DONE, metrics=metrics, data=data))
    return base


def _end(
    trial: TrialFolder,
    values: Values,
    state: State | None,
    losses: Any,
    tokens: Any,
    steps: int,
    prompts: Any,
    facts: Mapping[str, Any],
) -> None:
    if steps:
        _write_events(trial, float(losses.sum() / tokens.sum()), steps)
    if state is None:
        return
    typed = [f"{key}={value}".replace("'", "").replace(" ", "") for key, value in values.items()]
    result = Result(trial.key, trial.name, state, overrides=[*grid.SMALL, *typed])
    result.environment = dict(ENVIRONMENT)
    result.model = {"name": "tiny_random", "revision": "1", "parameters": 1000}
    result.data = _facts(values, len(tokens)) | dict(facts)
    result.metrics = {"perf/trial_seconds": 60.0}
    if state is State.DONE:
        write_losses(trial, losses, tokens)
        write_generations(trial, _written(prompts, f"{trial.name} says: take the bus."))
        result.metrics |= _scores(float(losses.sum() / tokens.sum())) | _costs(values)
    else:
        message = {State.OOM: "out of memory", State.DIVERGED: "the loss was nan"}
        said = message.get(state, "the worker was killed")
        result.error = {"class": str(state), "message": said, "log_tail": ""}
    trial.commit(result)


def _rows(values: Values) -> int:
    """Training rows; a set has 2,000 in all."""
    rows = values.get("data.n", 500)
    return 2000 if rows == "all" else int(rows)


def _facts(values: Values, examples: int) -> dict[str, Any]:
    rows = _rows(values)
    return {
        "train_fingerprint": f"t{rows}",
        "eval_fingerprint": "e0",
        "train_rows": rows,
        "eval_rows": examples,
        "train_label_tokens": 40 * rows,
        "dropped": {"too long": 3},
        "overlap_rows": 0,
        "train_lengths": {"edges": [0, 32, 64, 96, 128], "counts": [rows // 8, rows // 2, 60, 4]},
    }


def _costs(values: Values) -> dict[str, float]:
    rank, rows = values.get("lora.r", 8), _rows(values)
    nf4 = values.get("quant.kind") == "nf4"
    seconds = rows * (0.05 + 0.0004 * rank) * (1.4 if nf4 else 1.0)
    return {
        "perf/train_seconds": seconds,
        "perf/train_tflop": rows * (0.04 + 0.0003 * rank),
        "perf/trial_seconds": seconds + 20,
        "perf/train_tokens_per_s": 85 * rows / seconds,
        "perf/decode_tokens_per_s": 21.0 - 0.05 * rank - (6 if nf4 else 0),
        "memory/train_peak_mib": (900 if nf4 else 2100) + 6.0 * rank,
        "memory/alone_mib": (900 if nf4 else 2100) + 6.0 * rank,
        "size/adapter_mib": 1.17 * rank,
    }


def _scores(loss: float) -> dict[str, float]:
    near = max(0.0, 1 - loss / 3.5)
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/intent_accuracy": near,
        "eval/bleu": 40 * near,
        "eval/rougeL": 0.7 * near,
        "train/loss": loss - 0.1,
    }


def _written(prompts: Any, output: str) -> list[dict[str, str]]:
    return [
        {"prompt": prompt, "reference": reference, "output": output, "intent": intent}
        for prompt, intent, reference in prompts
    ]


def _write_events(trial: TrialFolder, loss: float, steps: int) -> None:
    log = EventLog(trial.events_file)
    for step in range(1, steps + 1):
        now = loss + 1.6 * math.exp(-5 * step / steps) + 0.05 * math.sin(step * 2.3)
        log.append("metric", step=step, values={"train/loss": now, "train/lr": 1e-3}, steps=steps)
