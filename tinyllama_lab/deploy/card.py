"""`deploy card`: what a trial, its study and its exports say, as the README of the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoTokenizer
from yaml import YAMLError

from tinyllama_lab.config.axes import words
from tinyllama_lab.config.schema import DataConfig, ModelConfig, Science, part
from tinyllama_lab.core.card import HERE, Card, Facts, Interval, is_own, trial_card
from tinyllama_lab.core.dataset.chat_template import closing_ids
from tinyllama_lab.core.models import smollm2
from tinyllama_lab.core.models.loading import TRUSTED_FILES, read_tokenizer, repo_to_download
from tinyllama_lab.data.hub import cached_snapshot
from tinyllama_lab.data.snapshots import Kind
from tinyllama_lab.deploy.selection import Selection
from tinyllama_lab.deploy.trained import prompt_format
from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS, PERPLEXITY
from tinyllama_lab.report.analysis.example_losses import Losses, read_losses
from tinyllama_lab.report.analysis.statistics import compare
from tinyllama_lab.report.exports import HEADS, export_line, export_sentences
from tinyllama_lab.report.loaded_study import Study, load_study
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.files import make_readable, user_path, write_atomic
from tinyllama_lab.study.trial import CARD, TrialFolder

_CHOSEN = (
    "- The held-out rows may have chosen its settings and its seed, so its own results on them "
    "look a little too good. A recommendation that is confirmed says so, with other rows."
)
_UNKNOWN = "not known; check before you publish"


@dataclass(frozen=True)
class Licence:
    """The licence of a model or a data set, as the hub names licences; None if it is not known."""

    name: str | None = None
    languages: tuple[str, ...] = ()


def write_card(selection: Selection, licence: str, force: bool) -> Path:
    """Complete the adapter's folder, write its card, and return the card's path.

    Raises:
        StudyError: the card was edited, and `force` is false.
    """
    trial = selection.trial.row.trial
    if not force and is_edited(trial):
        raise StudyError(
            f"card must not replace what you wrote, and {trial.card_file} was edited; set "
            "force=true, or keep it"
        )
    complete(trial)
    write_atomic(trial.card_file, full_card(selection, licence).text())
    return trial.card_file


def is_edited(trial: TrialFolder) -> bool:
    """Return whether the adapter has a card that this project did not write."""
    file = trial.card_file
    return file.exists() and not is_own(file.read_text(encoding="utf-8", errors="replace"))


def complete(trial: TrialFolder) -> bool:
    """Add the tokenizer to an adapter of an earlier version; return whether it is there.

    It is not where the base would have to be downloaded for it.
    """
    folder = trial.adapter_dir
    make_readable(folder)
    if not any(folder.glob("tokenizer*")):
        science: Science = part(Science, trial.read_config())
        if repo_to_download(science.model):
            return False
        prompt_format(trial, read_tokenizer(science.model)[0]).save_tokenizer(folder)
    return True


def full_card(selection: Selection, licence: str = "", adapter: str = HERE) -> Card:
    """Return the card of a trial with what its study found.

    Args:
        selection: the trial.
        licence: of the adapter; empty takes that of base and data, if it is one and the same.
        adapter: how the snippet names the adapter.

    Raises:
        StudyError: a file of the study is damaged.
    """
    row = selection.trial.row
    if row.result is None:
        raise StudyError(f"a card needs a trial with a result, and {row.trial.folder} has none")
    facts = Facts.of(row.trial, row.result, _end_ids(row.trial))
    pair = _losses(selection)
    bounds = _bounds(*pair) if pair else {}
    facts = replace(facts, evaluation=row.evaluations.settings, bounds=bounds)
    card = trial_card(facts, adapter)
    if pair:
        card.sections["Results"] += f"\n\n{_difference(*pair)}"
    limits = card.sections.pop("Limits")
    study = load_study(selection.study.name, selection.study.root)
    card.sections["What its study found"] = _findings(study, selection)
    if exported := _exports(row.trial):
        card.sections["Exports"] = exported
    base, data = base_licence(facts.science.model), data_licence(facts.science.data)
    chosen = licence or (base.name if base.name == data.name else None)
    card.sections["Licences"] = _licences(facts, base, data, chosen)
    if len(study.trials) > 1:
        limits += f"\n{_CHOSEN}"
    card.sections["Limits"] = limits
    card.front.license = chosen or None
    card.front.language = sorted(set(data.languages)) or None
    return card


def _end_ids(trial: TrialFolder) -> Sequence[int]:
    """Return the tokens that end an answer; none where the folder has no tokenizer."""
    if not any(trial.adapter_dir.glob("tokenizer*")):
        return ()
    tokenizer = AutoTokenizer.from_pretrained(trial.adapter_dir, **TRUSTED_FILES)
    return (int(tokenizer.eos_token_id), *closing_ids(tokenizer))


def _losses(selection: Selection) -> tuple[Losses, Losses] | None:
    """Return the losses of base and adapter on the same rows; None where there are none."""
    row = selection.trial.row
    base = read_losses(row.base.per_example_file) if row.base else None
    adapter = read_losses(row.evaluations.per_example_file)
    if base is None or adapter is None or len(set(adapter.clusters)) < 2:
        return None
    same = base.tokens.shape == adapter.tokens.shape and (base.tokens == adapter.tokens).all()
    return (base, adapter) if same else None


def _bounds(base: Losses, adapter: Losses) -> dict[str, tuple[Interval, Interval]]:
    """Return the 95 % intervals over held-out rows, by metric."""
    low_high = [
        compare(losses.nats[None], losses.tokens, clusters=losses.clusters).interval()
        for losses in (base, adapter)
    ]
    of_base, of_adapter = ((float(low), float(high)) for low, high in low_high)
    perplexities = [(math.exp(low), math.exp(high)) for low, high in (of_base, of_adapter)]
    return {
        HELDOUT_LOSS: (of_base, of_adapter),
        PERPLEXITY: (perplexities[0], perplexities[1]),
    }


def _difference(base: Losses, adapter: Losses) -> str:
    nats = (adapter.nats - base.nats)[None]
    estimate = compare(nats, adapter.tokens, clusters=adapter.clusters)
    size, (low, high) = estimate.difference, estimate.interval()
    return (
        f"On the same rows, the adapter changes the loss by {size:+.3f} nats per token (95 % "
        f"interval {low:+.3f} to {high:+.3f}), and the perplexity by {_percent(size)} "
        f"({_percent(low)} to {_percent(high)})."
    )


def _percent(nats: float) -> str:
    return f"{100 * math.expm1(nats):+.1f} %"


def _findings(study: Study, selection: Selection) -> str:
    """Return recommendation, verdicts and notes of the study."""
    recommendation, trial = study.recommendation(), selection.trial
    is_taken = any(taken.key == trial.key for taken in recommendation.trials)
    this = f"This adapter, {words(trial.swept) or trial.name}, "
    this += "has the recommended setting." if is_taken else "does not have a recommended setting."
    done = sum(each.state == "done" for each in study.trials)
    found = [str(verdict) for verdict in study.verdicts()]
    return "\n".join(
        [
            f"The study has {done} trained adapters. {this}",
            "",
            "\n>\n".join(f"> {text}" for text in recommendation.sentences),
            *(["", *(f"- {text}" for text in found)] if found else []),
            *(["", "Notes:", "", *(f"- {text}" for text in study.notes())]),
        ]
    )


def _exports(trial: TrialFolder) -> str:
    """Return the table of measured exports; empty where nothing was measured."""
    rows, problem = Exports(trial.deploy_dir).read_measured()
    if problem:
        raise StudyError(problem)
    if not rows:
        return ""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    lines += [f"| {' | '.join(export_line(row))} |" for row in rows]
    return "\n".join(
        [
            "Measured after the export, each beside the adapter as trained. They are not part of "
            "this folder. `perplexity` is the change with its 95 % interval over held-out rows; "
            "`same` is the share of the adapter's tokens that the form would choose too.",
            "",
            *lines,
            "",
            *(f"- {text}" for text in export_sentences(rows)),
        ]
    )


def base_licence(model: ModelConfig) -> Licence:
    """Return the licence of a base: from its card, or from the file of the package."""
    if model.source == "local":
        return _card_licence(user_path(str(model.path)), "model")
    if model.source == "random":
        return Licence()  # nobody's work
    if smollm2.is_identity(model.identity):
        return Licence(*smollm2.licence())
    if (snapshot := cached_snapshot(str(model.repo), model.identity, "model")) is not None:
        return _card_licence(snapshot, "model")
    return Licence()


def data_licence(data: DataConfig) -> Licence:
    """Return the licence of a data set: from its card, or of the package."""
    if data.kind.licence:
        return Licence(data.kind.licence, data.kind.languages)
    snapshot = cached_snapshot(data.repo, data.identity, "dataset") if data.repo else None
    return _card_licence(snapshot, "dataset") if snapshot else Licence()


def _card_licence(folder: Path, kind: Kind) -> Licence:
    """Return what the card in a folder says; a card that cannot be read says nothing."""
    try:
        load: Any = (ModelCard if kind == "model" else DatasetCard).load
        data = load(folder.joinpath(CARD), ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError):
        return Licence()
    names, languages = _list(data.license), _list(data.language)
    return Licence(names[0] if len(names) == 1 else None, tuple(languages))


def _list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [value] if value else []


def _licences(facts: Facts, base: Licence, data: Licence, chosen: str | None) -> str:
    name = facts.science.data.repo or facts.science.data.name
    own = f"`{chosen}`" if chosen else "not chosen, since base and data name no common one"
    return "\n".join(
        [
            f"- base, {facts.base.repo or facts.science.model.name}: {_named(base)}",
            f"- data, {name}: {_named(data)}",
            f"- this adapter: {own}",
            "",
            "The licences of base and data may forbid some uses of an adapter that was made of "
            "them. They are what the cards of both say; nobody has checked them.",
        ]
    )


def _named(licence: Licence) -> str:
    return f"`{licence.name}`" if licence.name else _UNKNOWN
