"""The date that a study gives to chat templates that ask for it.

Some templates print today's date into the prompt, so that prompts and results would change from
day to day. `data.date` fixes it, and is part of the key of trials whose template asks.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from tinyllama_lab.config.schema import Config, ModelConfig
from tinyllama_lab.data import hub
from tinyllama_lab.data.snapshots import chat_template
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.files import user_path
from tinyllama_lab.study.study import StudyFolder

_CLOCK = "strftime_now"  # the function that a template calls for the date
_SETTING = "date_string"  # the variable that the templates of Llama 3 read instead


def dated(configs: Sequence[Config], study: StudyFolder) -> list[Config]:
    """Return the configurations with `data.date` only where the chat template asks for it.

    A missing date becomes that of the study's earlier trials, else today's. A date that was set
    for another model of the command is removed, because it would change the key for nothing.
    """
    configs = [config if _uses_date(config) else _at(config, None) for config in configs]
    undated = [config for config in configs if _is_undated(config)]
    if not undated:
        return configs
    day = _day_of(study) or datetime.date.today().isoformat()
    return [_at(config, day) if _is_undated(config) else config for config in configs]


def dated_if_here(configs: Sequence[Config], study: StudyFolder) -> list[Config]:
    """Return the same as `dated`, but leave configurations whose model is not downloaded yet.

    The date then stays unknown, but nothing is fetched to find out.
    """
    return [config if _is_away(config.model) else dated([config], study)[0] for config in configs]


def _is_away(model: ModelConfig) -> bool:
    if model.source != "hub":
        return False
    return hub.cached_snapshot(str(model.repo), str(model.identity), "model") is None


def _at(config: Config, day: str | None) -> Config:
    return replace(config, data=replace(config.data, date=day))


def date_problems(configs: Sequence[Config]) -> list[str]:
    """Return the problems of `data.date`: it is not a date, or no trial of the command uses it."""
    days = [config.data.date for config in configs if config.data.date is not None]
    today = datetime.date.today().isoformat()
    if bad := [day for day in days if not _is_day(day)]:
        return [f"data.date must be a date such as {today}, got {bad[0]!r}; set data.date={today}"]
    if not days or any(_uses_date(config) for config in configs):
        return []
    return [
        f"data.date={days[0]} has no effect: no chat template of this command asks for the date; "
        "leave it out"
    ]


def _is_day(text: str) -> bool:
    try:
        # `fromisoformat` also accepts 20260131, which would give the same day another key
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _uses_date(config: Config) -> bool:
    if config.data.date is None or config.data.style != "chat":
        return False
    template = template_of(config.model)
    # a template that is not here yet may ask for the date, so a typed one stays
    return template is None or _CLOCK in template or _SETTING in template


def _is_undated(config: Config) -> bool:
    data = config.data
    # a template that only reads `date_string` has a fixed date without it
    asks = data.style == "chat" and data.date is None
    return asks and _CLOCK in (template_of(config.model) or "")


def _day_of(study: StudyFolder) -> str | None:
    """Return the earliest date of the trials of a study; None if they have none."""
    days = set()
    for trial in study.trials():
        try:
            days.add(trial.read_config()["data"].get("date"))
        except StudyError:
            continue  # damaged; reported where the trial itself is needed
    return min(days - {None}, default=None)


@cache
def template_of(model: ModelConfig) -> str | None:
    """Return the chat template of a base, empty if it has none; None if it is not here yet.

    For models whose template is known to ask for no date (the random one, and SmolLM2 from its
    package), it is empty as well.
    """
    if model.source in ("random", "package"):
        return ""
    if model.source == "local":
        return chat_template(user_path(str(model.path)))
    return hub.chat_template(str(model.repo), str(model.identity))
