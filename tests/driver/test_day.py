"""Chat templates that ask for the date get the same one in a whole study."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import Config
from tinyllama_lab.data import hub
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.settings import day
from tinyllama_lab.sweep.settings.day import date_problems, dated

ASKS = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
OWN = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def model_folder(folder: Path, template: Any, file: str = "chat_template.jinja") -> Path:
    path = folder / file
    path.parent.mkdir(parents=True)
    text = json.dumps({"chat_template": template}) if file.endswith(".json") else template
    path.write_text(text)
    return folder


def configured(folder: Path, **data: Any) -> Config:
    raw = grid.plain(*grid.SMALL)
    raw["model"] |= {"name": "mine", "source": "local", "path": str(folder), "identity": "1"}
    raw["data"] |= {"identity": "2", **data}
    return config.load(raw)


def keep(study: StudyFolder, each: Config) -> None:
    """Write a trial of the study like the driver."""
    plain = resolved(each)
    study.trial(plain, "r8").write_config(plain)


def today() -> str:
    return datetime.date.today().isoformat()


DATED = {
    "in a file": ("chat_template.jinja", ASKS),
    "in the settings": ("tokenizer_config.json", ASKS),
    "one of several": ("tokenizer_config.json", [{"name": "default", "template": ASKS}]),
    "of a purpose": ("additional_chat_templates/tool_use.jinja", ASKS),
}


@pytest.mark.parametrize("kind", DATED)
def test_a_template_that_asks_for_the_date_gets_today_in_a_new_study(
    tmp_path: Path, kind: str
) -> None:
    file, template = DATED[kind]
    each = configured(model_folder(tmp_path / "m", template, file))
    (found,) = dated([each], StudyFolder(tmp_path, "s"))
    assert found.data.date == today()
    assert dataclasses.replace(found, data=each.data) == each


def test_a_study_keeps_the_day_of_its_first_trials(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "sweeps", "s")
    first = configured(model_folder(tmp_path / "m", ASKS), date="2024-02-03")
    keep(study, first)
    wider = configured(tmp_path / "m", n=4)
    (found,) = dated([wider], study)
    assert found.data.date == "2024-02-03"
    (again,) = dated([configured(tmp_path / "m")], study)
    assert trial_key(resolved(again)) == trial_key(resolved(first))
    (other,) = dated([configured(tmp_path / "m")], StudyFolder(tmp_path / "sweeps", "other"))
    assert trial_key(resolved(other)) != trial_key(resolved(first))


def test_a_template_without_a_date_gets_none(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "sweeps", "s")
    keep(study, configured(model_folder(tmp_path / "a", ASKS), date="2024-02-03"))
    for name, template in (("m", PLAIN), ("n", OWN)):
        each = configured(model_folder(tmp_path / name, template))
        assert dated([each], study) == [each]
    plain_style = configured(tmp_path / "a", style="instruction_response")
    assert dated([plain_style], study) == [plain_style]
    shipped = config.load(grid.plain(*grid.SMALL))
    assert dated([shipped], study) == [shipped]


def test_a_model_folder_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "~mine", ASKS)
    (found,) = dated([configured(Path("~mine"))], StudyFolder(tmp_path, "s"))
    assert found.data.date == today()


def test_a_date_that_is_typed_stays(tmp_path: Path) -> None:
    each = configured(model_folder(tmp_path / "m", ASKS), date="2023-01-01")
    assert dated([each], StudyFolder(tmp_path, "s")) == [each]
    assert date_problems([each]) == []
    assert date_problems([configured(model_folder(tmp_path / "n", OWN), date="2023-01-01")]) == []


def test_in_a_grid_a_date_reaches_no_model_that_does_not_ask_for_it(tmp_path: Path) -> None:
    asks = configured(model_folder(tmp_path / "m", ASKS), date="2023-01-01")
    plain = configured(model_folder(tmp_path / "n", PLAIN), date="2023-01-01")
    assert date_problems([asks, plain]) == []
    first, second = dated([asks, plain], StudyFolder(tmp_path, "s"))
    assert first == asks and second == configured(tmp_path / "n")
    assert trial_key(resolved(second)) == trial_key(resolved(configured(tmp_path / "n")))


def test_a_date_that_is_none_or_has_no_effect_is_refused(tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "m", PLAIN)
    unused = [configured(plain, date="2023-01-01"), configured(plain, date="2023-01-01", n=4)]
    (found,) = date_problems(unused)
    assert "data.date=2023-01-01 has no effect" in found
    asks = configured(model_folder(tmp_path / "n", ASKS), date="2023-01-01")
    assert date_problems([*unused, asks]) == []  # one of the models of a sweep uses it
    for bad in ("01.02.2023", "2023-02-30", "2023-W05-1", "today", ""):
        (found,) = date_problems([configured(plain, date=bad)])
        assert repr(bad) in found and f"set data.date={today()}" in found
    assert date_problems([configured(plain)]) == []


def test_the_template_of_a_hub_model_is_asked_for_where_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    template: str | None = ASKS
    monkeypatch.setattr(hub, "chat_template", lambda *names: asked.append(names) or template)
    day.template_of.cache_clear()
    raw = grid.plain(*grid.SMALL)
    raw["model"] |= {"name": "x", "source": "hub", "repo": "o/m", "identity": "c0"}
    each = config.load(raw)
    assert dated([each, each], StudyFolder(tmp_path, "s"))[0].data.date == today()
    assert asked == [("o/m", "c0")]
    template = None  # offline: the worker says what is missing
    day.template_of.cache_clear()
    assert dated([each], StudyFolder(tmp_path, "s")) == [each]
    told = dataclasses.replace(each.data, date=today())
    assert date_problems([dataclasses.replace(each, data=told)]) == []
    day.template_of.cache_clear()
