"""`deploy push`, against a hub on loopback: what arrives, what does not, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from tests.hub_files import DOLLY, TINYLLAMA, dolly, tinyllama
from tests.hub_server import TOKEN, Fault, HubServer, hub_environment, hub_server
from tests.packs import Lab
from tinyllama_lab.data import hub_requests
from tinyllama_lab.deploy.__main__ import main
from tinyllama_lab.errors import ConfigError, LabError, StudyError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder, trial_key

ROWS = 40
SWEEP = (
    *("-m", "model=tinyllama", "data=dolly", "data.n=16", "data.eval_n=8", "data.max_length=128"),
    *("eval.generations=0", "eval.latency_tokens=0", "lora.r=4", "train.precision=fp32"),
    *("seeds=1", "confirm=off", "tracking=none", "study=s", "hardware.threads=1"),
    "hardware.device=cpu",
)
UPLOADED = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def run(folder: Path, server: HubServer, home: str, *words: str) -> str:
    """Run Python in a folder, on a machine of its own."""
    environment = hub_environment(
        folder / home, server.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1"
    )
    ended = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_and_runs_elsewhere_as_its_card_says(
    server: HubServer, tmp_path: Path
) -> None:
    server.add("model", TINYLLAMA, tinyllama(tmp_path / "made"))
    server.add("dataset", DOLLY, dolly(ROWS))
    run(tmp_path, server, "home", "-m", "tinyllama_lab", *SWEEP)
    (trial,) = StudyFolder(tmp_path / "sweeps", "s").trials()
    deploy = ("-m", "tinyllama_lab.deploy")
    out = run(tmp_path, server, "home", *deploy, "push", "study=s", "to=me/lodge")
    assert out == f"uploaded: {server.url}/me/lodge\n"
    assert server.uploads.made[0]["visibility"] == "private"
    (files,) = server.uploads.commits
    assert files.keys() == UPLOADED
    for name in UPLOADED - {"README.md", "adapter_config.json"}:
        assert files[name] == (trial.adapter_dir / name).read_bytes()
    config = json.loads(files["adapter_config.json"])
    commit = server.commit("model", TINYLLAMA)
    assert (config["base_model_name_or_path"], config["revision"]) == (TINYLLAMA, commit)
    for name in UPLOADED - {"tokenizer.json", "adapter_model.safetensors"}:
        text = files[name].decode()
        assert str(tmp_path) not in text and "Kathmandu" not in text  # no folder, no row

    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == TINYLLAMA and front["datasets"] == [DOLLY]
    assert front["language"] == ["en"]
    assert "license" not in front  # base and data have different ones
    assert "TinyLlama-1.1B-Chat-v1.0: `apache-2.0`" in card and "15k: `cc-by-sa-3.0`" in card

    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'adapter = "me/lodge"' in code
    code = code.replace("max_new_tokens=256", "max_new_tokens=8")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = run(tmp_path / "elsewhere", server, "home", "-c", code)
    chat = ("chat", "study=s", "tokens=8", "device=cpu", "once=Your question")
    assert elsewhere.strip() == run(tmp_path, server, "home", *deploy, *chat).strip() != ""


@pytest.fixture(scope="module")
def study(another_lab: Lab) -> StudyFolder:
    """One adapter of the tiny base."""
    study = StudyFolder(another_lab.folder / "sweeps", "tiny")
    config = another_lab.configure({"lora.r": 2})
    trial = TrialFolder(study.trials_dir / f"r2-{trial_key(config)}")
    trial.write_config(config)
    another_lab.run([trial])
    return study


@pytest.fixture
def push(
    study: StudyFolder, server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Any:
    """Pushes with a token that may write."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # read from the environment once
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(hub_requests, "WAITS_S", (0.01, 0.01))
    server.faults.clear()
    server.uploads.commits.clear()

    def run(to: str = "me/tiny", *arguments: str) -> None:
        place = (f"sweeps_dir={study.root}", f"study={study.name}", "trial=best")
        main(["push", *place, f"to={to}", *arguments])

    return run


def test_what_is_private_does_not_go_to_a_repository_that_is_public(
    push: Any, server: HubServer
) -> None:
    server.add("model", "me/shown", {"README.md": b"mine"})
    before = list(server.uploads.commits)
    with pytest.raises(ConfigError, match=r"me/shown is public; set private=false to publish"):
        push("me/shown")
    assert server.uploads.commits == before


def test_a_base_of_this_machine_is_not_named_by_its_folder(
    push: Any,
    server: HubServer,
    study: StudyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (trial,) = study.trials()
    assert str(study.root) not in trial.card_file.read_text()
    (trial.adapter_dir / "notes.txt").write_text("rows of mine")
    push("me/open", "private=false")
    assert server.uploads.made[-1]["visibility"] == "public"
    (files,) = server.uploads.commits
    assert files.keys() == UPLOADED
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    assert b'from_pretrained(\n    "path/to/the/base"' in files["README.md"]
    assert "the base is not on the hub" in capsys.readouterr().err

    import peft

    from tinyllama_lab.config.schema import Science, part
    from tinyllama_lab.core.models.loading import load_base

    for name, content in files.items():  # what arrived is an adapter that PEFT reads
        (tmp_path / name).write_bytes(content)
    science: Science = part(Science, trial.read_config())
    base = load_base(science.model, science.quant, "fp32", "cpu")
    peft.PeftModel.from_pretrained(base.model, str(tmp_path))


def test_an_edited_card_is_uploaded_unless_it_names_a_folder(
    push: Any, server: HubServer, study: StudyFolder
) -> None:
    (trial,) = study.trials()
    kept = trial.card_file.read_text()
    try:
        trial.card_file.write_text("# Mine\n")
        push()
        assert server.uploads.commits[0]["README.md"] == b"# Mine\n"
        trial.card_file.write_text(f"# Mine\n\nIt is in {study.root}/tiny.\n")
        with pytest.raises(StudyError, match=r"must not name a folder .* README\.md holds"):
            push()
    finally:
        trial.card_file.write_text(kept)
    assert len(server.uploads.commits) == 1


@pytest.mark.parametrize("to", ["", "me", "me/", "me/a/b", "me/a--b", "me/a b", "me/.."])
def test_a_name_that_is_no_repository_is_refused(push: Any, server: HubServer, to: str) -> None:
    with pytest.raises(ConfigError, match="to must be a repository such as to=user/name"):
        push(to)
    assert not server.uploads.commits


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_TOKEN", "", "write access, from .*, got none; run `hf auth login` or set HF_TOKEN"),
        ("HF_TOKEN", "hf_wrong", "got one that the hub does not know"),
        ("HF_TOKEN", "hf_other", "must be a repository that your token may write to, got 403"),
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE forbids it"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "http://127.0.0.1:9 does not answer"),
    ],
)
def test_an_upload_that_cannot_work_says_why(
    push: Any,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(LabError, match=message) as caught:
        push()
    assert "hf_" not in str(caught.value)  # a token is never printed
    assert not server.uploads.commits


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("/repos/create", "POST", 404, times=9), "that the hub has, got 404"),
        (Fault("/commit/main", "POST", 403, times=9), "your token may write to, got 403"),
        (Fault("/repos/create", "POST", 503, times=9), "must answer the upload .* got 503"),
        (Fault("/lfs/objects/batch", "POST", 400, times=9), "to=me/tiny failed: .*400"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    push: Any, server: HubServer, fault: Fault, message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(LabError, match=message):
        push()
    assert not server.uploads.commits


def test_a_busy_hub_is_asked_again(push: Any, server: HubServer) -> None:
    server.faults = [Fault("/repos/create", "POST", 503, times=1)]
    push()
    assert len(server.uploads.commits) == 1
