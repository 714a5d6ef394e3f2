"""The files in `conf/`: every one composes, says what it is for, and holds the only default."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import grid
from tinyllama_lab.config import CONF_DIR, command
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import flatten
from tinyllama_lab.config.schema import Config
from tinyllama_lab.config.sources import SOURCES
from tinyllama_lab.config.validate import known_keys
from tinyllama_lab.sweep.search.parse import parse_space
from tinyllama_lab.sweep.settings import profile
from tinyllama_lab.sweep.settings.compose import groups

FILES = sorted(path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml"))
NEEDED = {  # what an option cannot do without
    **{
        f"data={name}": f"data.{k.settings[0]}={k.example}"
        for name, k in SOURCES.items()
        if k.settings
    },
    "model=local": "model.path=/a/folder",
    "model=hub": "model.repo=owner/name",
    "lora=full": "train.precision=fp32",
}
OPTIONS = [
    f"{path.parent}={path.stem}"
    for path in FILES
    if len(path.parts) == 2 and not path.stem.startswith("_")
]
EXPERIMENTS = [option for option in OPTIONS if option.startswith("experiment=")]


def load(*overrides: str) -> Config:
    extra = [NEEDED[option] for option in overrides if option in NEEDED]
    return config.load(grid.plain(*overrides, *extra))


@pytest.fixture(params=["embedded", "tinyllama"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `profile=auto` stands for, whatever machine this is."""
    monkeypatch.setattr(profile, "auto_profile", lambda: (request.param, "for a test"))
    grid._hydra_config.cache_clear()
    return str(request.param)


def test_every_file_is_an_option_a_base_or_the_root() -> None:
    bases = [path for path in FILES if path.stem.startswith("_")]
    hydras = [path for path in FILES if path.parts[0] == "hydra"]
    assert len(FILES) == len(OPTIONS) + len(bases) + len(hydras) + 1
    for base in bases:  # a base that no option builds on would never be composed
        users = [f for f in (CONF_DIR / base.parent).glob("*.yaml") if base.stem in f.read_text()]
        assert len(users) >= 1
    assert len(EXPERIMENTS) >= 6
    assert sorted(OPTIONS) == sorted(
        f"{group}={option}" for group, options in groups().items() for option in options
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_to_a_good_configuration(option: str) -> None:
    data = load(*dict.fromkeys(["profile=embedded", option])).data
    assert data.train_rows is None or data.train_rows >= 1


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_runs_on_the_embedded_profile(option: str) -> None:
    loaded = load(option, "profile=embedded")
    assert (loaded.model.name, loaded.data.name) == ("smollm2", "travel")


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_names_its_study_and_its_command(option: str) -> None:
    name = option.partition("=")[2]
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    sweeps = yaml.safe_load(text).get("hydra")
    command = f"#   python -m tinyllama_lab {'-m ' if sweeps else ''}experiment={name}\n"
    assert command in text
    assert load(option, "profile=embedded").study == name


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_what_an_experiment_sweeps_are_settings_with_good_values(option: str) -> None:
    name = option.partition("=")[2]
    raw = yaml.safe_load((CONF_DIR / "experiment" / f"{name}.yaml").read_text())
    swept = raw.get("hydra", {}).get("sweeper", {}).get("params", {})
    axes = [f"{key}={value}" for key, value in swept.items()]
    if {"override /hydra/sweeper": "optuna"} in raw.get("defaults", []):
        assert parse_space(axes, {}, {})[1] == []
        return
    made = grid.cells(option, "profile=embedded", *axes)
    assert len(made) > 1 or not axes
    for cell in made:
        config.load(cell.raw)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_opens_with_its_purpose_and_is_short(path: Path) -> None:
    lines = (CONF_DIR / path).read_text().splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    assert first.startswith("# ") and first.endswith((".", "?")) and len(first) <= 99
    assert len(lines) <= (35 if path == Path("config.yaml") else 25)


def test_every_setting_has_its_default_in_conf_and_nowhere_else() -> None:
    assert sorted(flatten(grid.plain("profile=embedded"))) == sorted(known_keys(Config))

    def check(cls: Any) -> None:
        for item in dataclasses.fields(cls):
            assert item.default is item.default_factory is dataclasses.MISSING, item.name
            kind = typing.get_type_hints(cls)[item.name]
            if dataclasses.is_dataclass(kind):
                check(kind)

    check(Config)


def test_a_report_has_the_defaults_of_conf() -> None:
    root = yaml.safe_load((CONF_DIR / "config.yaml").read_text())
    assert (command.STUDY, command.SWEEPS_DIR) == (root["study"], root["sweeps_dir"])


def names(*overrides: str) -> tuple[str, str]:
    raw = grid.plain(*overrides)
    return raw["model"]["name"], raw["data"]["name"]


AUTO = {"embedded": ("smollm2", "travel"), "tinyllama": ("tinyllama", "dolly")}


def test_the_typed_model_beats_profile_beats_experiment_beats_auto(chosen: str) -> None:
    assert names() == names("profile=auto") == AUTO[chosen]
    assert names("experiment=r0_edge_travel") == ("tinyllama_v01", "bitext_travel")
    assert names("experiment=r0_edge_travel", "profile=auto") == ("tinyllama_v01", "bitext_travel")
    assert names("experiment=r0_edge_travel", "profile=embedded") == ("smollm2", "travel")
    everything = ("experiment=r0_edge_travel", "profile=embedded", "model=tiny_random")
    assert names(*everything) == names(*reversed(everything)) == ("tiny_random", "travel")
    assert names("profile=tinyllama", "data=travel") == ("tinyllama", "travel")


def test_profile_auto_says_what_it_chose_and_how_to_force_the_other(chosen: str) -> None:
    (other,) = set(AUTO) - {chosen}
    line = profile.announcement([load()])
    assert chosen in line and "for a test" in line and f"profile={other}" in line
    typed = load("model=tiny_random", "profile=auto")
    assert profile.announcement([typed]).startswith("model and data as asked for: tiny_random on ")
    forced = profile.announcement([load("profile=embedded")])
    assert forced == "profile=embedded: smollm2 on travel"
