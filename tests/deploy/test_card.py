"""The folder of an adapter: its tokenizer, and the card that a trial, a study and a user make."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from tests.packs import Lab
from tinyllama_lab import load_study
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.card import LOCAL_BASE, reproducing
from tinyllama_lab.core.models import tiny
from tinyllama_lab.data.cache import SMOLLM2_PACKAGE
from tinyllama_lab.deploy.__main__ import main
from tinyllama_lab.deploy.card import base_licence, data_licence
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder, trial_key

STORED = Path(__file__).parents[1] / "contract" / "stored_study"


@pytest.fixture(scope="module")
def study(another_lab: Lab) -> StudyFolder:
    """Two ranks with a system turn, trained on the tiny base in one pack."""
    study = StudyFolder(another_lab.folder / "sweeps", "tiny")
    trials = []
    for rank in (2, 4):
        changes = {"lora.r": rank, "train.lr": 0.05, "data.system": 'Say "namaste".'}
        config = another_lab.configure({**changes, "data.eval_n": 12})
        trials.append(TrialFolder(study.trials_dir / f"r{rank}-{trial_key(config)}"))
        trials[-1].write_config(config)
    another_lab.run(trials)
    # where `load_study` looks for it
    base = another_lab.base_trial(trials[0])
    shutil.copytree(base.folder, study.bases_dir / base.folder.name, dirs_exist_ok=True)
    return study


@pytest.fixture
def trial(study: StudyFolder) -> TrialFolder:
    """The trial of rank 4, without a card."""
    (found,) = [trial for trial in study.trials() if trial.name == "r4"]
    found.card_file.unlink(missing_ok=True)
    return found


def deploy(study: StudyFolder, *arguments: str) -> None:
    place = (f"sweeps_dir={study.root}", f"study={study.name}")
    main([arguments[0], *place, *arguments[1:]])


def front(trial: TrialFolder) -> dict[str, Any]:
    text = trial.card_file.read_text()
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def test_the_tokenizer_beside_an_adapter_renders_the_prompts_of_training(
    study: StudyFolder, another_lab: Lab
) -> None:
    for trial in study.trials():
        tokenizer = AutoTokenizer.from_pretrained(trial.adapter_dir)
        data = part(DataConfig, trial.read_config()["data"])
        for example in another_lab.data.prepare(data).heldout:
            messages = [{"role": "user", "content": example.prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert tuple(ids) == example.prompt_ids
        config = (trial.adapter_dir / "tokenizer_config.json").read_text()
        assert "local" not in config and str(tiny.folder()) not in config


def test_everybody_may_read_an_adapter_and_its_result_counts_on_what_was_trained(
    study: StudyFolder,
) -> None:
    for trial in study.trials():
        files = [path for path in trial.adapter_dir.rglob("*") if path.is_file()]
        assert len(files) >= 5
        mode = trial.config_file.stat().st_mode  # written in Python, by the umask
        assert {path.stat().st_mode for path in files} == {mode}
        result, _ = trial.read_result()
        assert result is not None
        assert {name for name in result.files if name.startswith("adapter/")} == {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        }
        for file in (trial.card_file, trial.adapter_dir / "chat_template.jinja"):
            kept = file.read_text()
            file.write_text("mine")
            assert trial.is_done
            file.write_text(kept)


def test_a_worker_writes_a_card_of_its_trial_that_the_hub_can_read(lab: Lab) -> None:
    trial = lab.trial({"lora.r": 4})
    (result,) = lab.run([trial])
    card = ModelCard.load(trial.card_file)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model is None and card.data.license is None
    assert card.data.eval_results is not None
    scores = {f"eval/{each.metric_type}": each.metric_value for each in card.data.eval_results}
    assert scores == pytest.approx(
        {name: value for name, value in result.metrics.items() if name.startswith("eval/")},
        abs=1e-6,
    )
    assert f"fingerprint `{result.data['train_fingerprint']}`" in card.text
    base, adapter = (f"{result.metrics[f'{part_}/loss']:.4f}" for part_ in ("base", "eval"))
    assert f"| loss (nats per token) | lower | {base} | {adapter} |" in card.text


def test_the_card_of_a_study_has_its_verdicts_and_the_intervals(
    study: StudyFolder, trial: TrialFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(study, "card", "trial=r=4")
    assert capsys.readouterr().out == f"written: {trial.card_file}\n"
    text = trial.card_file.read_text()
    loaded = load_study(study.name, study.root)
    for sentence in (*loaded.recommendation().sentences, *map(str, loaded.verdicts())):
        assert sentence in text
    assert loaded.verdicts()
    (own,) = [each for each in loaded.trials if each.key == trial.key]
    adapter, base = own.per_example(), loaded.base().per_example()
    difference = (adapter["loss"].sum() - base["loss"].sum()) / adapter["tokens"].sum()
    found = re.search(r"by (\S+) nats per token \(95 % interval (\S+) to (\S+)\)", text)
    assert found is not None
    size, low, high = map(float, found.groups())
    assert size == pytest.approx(difference, abs=6e-4)
    draws = np.random.default_rng(0).integers(0, len(base), (4000, len(base)))
    nats, tokens = (adapter["loss"] - base["loss"]).to_numpy(), adapter["tokens"].to_numpy()
    simple = np.percentile(nats[draws].sum(1) / tokens[draws].sum(1), [2.5, 97.5])
    width = simple[1] - simple[0]
    assert np.abs(simple - [low, high]).max() < 0.5 * width  # another bootstrap of 12 rows
    assert "not known; check before you publish" in text
    assert front(trial)["language"] == ["en"] and "license" not in front(trial)


def test_the_snippet_of_a_card_answers_as_chat_does(
    study: StudyFolder, trial: TrialFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(study, "card", "trial=r=4")
    code = snippet(trial.card_file.read_text())
    assert f'"{LOCAL_BASE}"' in code
    code = code.replace(LOCAL_BASE, str(tiny.folder())).replace("=256, do_sample", "=8, do_sample")
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=trial.adapter_dir, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    capsys.readouterr()
    deploy(study, "chat", "trial=r=4", "device=cpu", "tokens=8", "once=Your question")
    assert ended.stdout.strip() == capsys.readouterr().out.strip() != ""


def test_a_card_that_somebody_edited_is_kept_unless_forced(
    study: StudyFolder, trial: TrialFolder
) -> None:
    deploy(study, "card", "trial=r=4")
    deploy(study, "card", "trial=r=4", "license=mit")  # its own card may be replaced
    assert front(trial)["license"] == "mit"
    edited = trial.card_file.read_text().replace("What it is", "What I made")
    trial.card_file.write_text(edited)
    with pytest.raises(StudyError, match=r"must not replace .* was edited; set force=true"):
        deploy(study, "card", "trial=r=4")
    assert trial.card_file.read_text() == edited
    deploy(study, "card", "trial=r=4", "force=true")
    assert "What I made" not in trial.card_file.read_text()


def test_an_adapter_of_an_earlier_version_gets_tokenizer_card_and_modes(tmp_path: Path) -> None:
    shutil.copytree(STORED / "study", tmp_path / "sweeps" / "stored")
    shutil.copytree(STORED / "base", tmp_path / "sweeps" / "_base")
    study = StudyFolder(tmp_path / "sweeps", "stored")
    (first, *_) = [trial for trial in study.trials() if trial.name == "r2-seed0"]
    first.weights_file.chmod(0o600)
    before = first.weights_file.read_bytes()
    deploy(study, "card", "trial=r2-seed0")
    assert AutoTokenizer.from_pretrained(first.adapter_dir).chat_template
    assert first.weights_file.stat().st_mode == first.card_file.stat().st_mode
    assert first.weights_file.read_bytes() == before and first.is_done
    assert "local files" in first.card_file.read_text()


def test_a_card_holds_no_row_and_no_path(lab: Lab, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"A secret question {n}?", "response": f"A secret answer {n}."}
        for n in range(40)
    ]
    secret = tmp_path / "client" / "rows.jsonl"
    secret.parent.mkdir()
    secret.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"data.columns.prompt": "prompt", "data.columns.response": "response"}
    config = lab.configure({"data.path": str(secret), **columns}, data="file")
    trial = TrialFolder(tmp_path / "trials" / f"mine-{trial_key(config)}")
    trial.write_config(config)
    (result,) = lab.run([trial])
    assert str(result.state) == "done"
    for file in (trial.card_file, trial.adapter_dir / "tokenizer_config.json"):
        text = file.read_text()
        assert "secret" not in text and str(tmp_path) not in text


def test_the_command_of_a_card_names_the_trial_and_no_folder() -> None:
    typed = [
        *("data=file", 'data.path="/home/me/a client/my rows.jsonl"', "lora.r=8", "seeds=3"),
        *("model.path=~/models/mine", "study=s", "sweeps_dir=/data", "tune=train.lr"),
        *("tracking=none", "lora.targets=[q_proj,v_proj]", "hydra/launcher=inline"),
    ]
    assert shlex.split(reproducing(typed, 5)) == [
        *("python", "-m", "tinyllama_lab", "-m", "data=file", 'data.path="my rows.jsonl"'),
        *("lora.r=8", "model.path=mine", "lora.targets=[q_proj,v_proj]", "seed=5"),
        *("tune=null", "confirm=off"),
    ]


def test_a_licence_comes_from_a_card_or_is_not_known(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllama_lab.config.schema import ModelConfig

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = configure()
    data = part(DataConfig, config["data"])
    assert (data_licence(data).name, data_licence(data).languages) == ("apache-2.0", ("en",))
    hub = part(DataConfig, {**config["data"], "source": "hub", "repo": "o/d", "identity": "a1"})
    folder = tmp_path / "hub" / "datasets--o--d" / "snapshots" / "a1"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}")
    assert data_licence(hub).name is None
    for text, licence in (
        ("---\nlicense: cc-by-sa-3.0\nlanguage: [en, ne]\n---\n", "cc-by-sa-3.0"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("# no front matter\n", None),
    ):
        (folder / "README.md").write_text(text)
        assert data_licence(hub).name == licence
    local = {**config["model"], "source": "local", "path": str(folder)}
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_licence(part(ModelConfig, local)).name == "mit"
    packaged = {**config["model"], "source": "package", "repo": "o/m", "identity": "a2"}
    assert base_licence(part(ModelConfig, packaged)).name is None
    if find_spec(SMOLLM2_PACKAGE.replace("-", "_")) is None:
        pytest.skip(f"{SMOLLM2_PACKAGE} is not installed")
    packaged["identity"] = f"{SMOLLM2_PACKAGE}==0.1.2"
    assert base_licence(part(ModelConfig, packaged)).name == "apache-2.0"
