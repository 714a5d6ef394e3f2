"""`model=tinyllama data=dolly` from a hub on loopback, as a user types it; then without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hub_client import hub_client
from tests.hub_files import DOLLY, TINYLLAMA, dolly, tinyllama
from tests.hub_server import HubServer, hub_environment, hub_server
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.records import read_split
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State, TrialFolder

ROWS = 40
SWEEP = (
    *("-m", "model=tinyllama", "data=dolly", "data.n=16", "data.eval_n=8", "data.max_length=128"),
    *("eval.generations=2", "eval.max_new_tokens=4", "eval.latency_tokens=0"),
    *("seeds=1", "confirm=off", "tracking=none", "study=s", "hardware.threads=1"),
    "hardware.device=cpu",
)


@dataclass
class Machine:
    """A machine with an empty cache, whose hub is a server on loopback."""

    folder: Path
    server: HubServer

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command in its folder."""
        return subprocess.run(
            [sys.executable, "-m", "tinyllama_lab", *arguments],
            cwd=self.folder,
            env=hub_environment(self.folder / "home", self.server.url, **variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    @property
    def study(self) -> StudyFolder:
        """Return the study that the sweep fills."""
        return StudyFolder(self.folder / "sweeps", "s")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with hub_server() as server:
        server.add("model", TINYLLAMA, tinyllama(folder / "made"))
        server.add("dataset", DOLLY, dolly(ROWS))
        yield Machine(folder, server)


def identities(trial: TrialFolder) -> tuple[str, str]:
    """Return the commits of model and data that the trial's key counts."""
    config = trial.read_config()
    return config["model"]["identity"], config["data"]["identity"]


@pytest.mark.slow
def test_tinyllama_learns_dolly_from_the_hub_and_goes_on_without_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, study = machine.server, machine.study
    refused = machine.run(*SWEEP, HF_TOKEN="hf_wrong")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    head, *problems = refused.stderr.strip().splitlines()
    assert head == "error: 2 problems in the configuration; nothing was started:"
    assert [problem.split("=")[0] for problem in problems] == ["  - model.repo", "  - data.repo"]
    assert not study.folder.exists()

    first = machine.run(*SWEEP, "lora.r=4")
    assert first.returncode == 0, first.stderr + first.stdout
    assert first.stderr == ""
    (pack,) = study.packs()
    phases = [event["name"] for event in read_events(pack.events_file) if event["kind"] == "phase"]
    assert phases[:3] == ["starting", f"downloading {TINYLLAMA}", "reading the data"]
    for name in ("model.safetensors", "tokenizer.model", "databricks-dolly-15k.jsonl"):
        assert len(server.asked("GET", name)) == 1
    (trial,) = study.trials()
    commits = (server.commit("model", TINYLLAMA), server.commit("dataset", DOLLY))
    assert identities(trial) == commits
    adapter = json.loads((trial.adapter_dir / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (TINYLLAMA, commits[0])

    result, _ = trial.read_result()
    assert result is not None and result.state is State.DONE

    server.add("model", TINYLLAMA, {"config.json": b"{}"})  # main moves, and nobody asks
    server.close()
    again = machine.run(*SWEEP, "lora.r=4")
    assert again.returncode == 0 and "study s: 1 trial, 1 done, 0 to run" in again.stdout
    science: Science = part(Science, trial.read_config())
    for is_offline in ("0", "1"):  # what a worker reads before it trains
        monkeypatch.setenv("HF_HOME", str(machine.folder / "home"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", is_offline)
        base = load_base(science.model, science.quant, "fp32", "cpu")
        assert base.model.config.hidden_size == 32
        assert len(read_split(science.data).remaining) == ROWS


def test_a_plan_fetches_the_configuration_alone(tmp_path: Path) -> None:
    with hub_server() as server:
        server.add("model", TINYLLAMA, tinyllama(tmp_path / "made"))
        words = (*SWEEP, "data=travel", "data.style=chat")  # a chat template may ask for the date
        ended = Machine(tmp_path, server).run("plan", *words)
        paths = [each.path for each in server.requests if "/resolve/" in each.path]
    assert ended.returncode == 0, ended.stderr
    assert {path.rpartition("/")[2] for path in paths} == {"config.json"}


def test_a_model_in_shards_has_the_weights_of_the_one_file(tmp_path: Path) -> None:
    with hub_server() as server, hub_client(tmp_path / "home", server.url) as ask:
        server.add("model", TINYLLAMA, tinyllama(tmp_path / "whole"))
        server.add("model", "o/shards", tinyllama(tmp_path / "parts", shards=3))
        folders = ask(("model", TINYLLAMA, None), ("model", "o/shards", None))
    assert len(list(Path(str(folders[1])).glob("model-*-of-*.safetensors"))) > 2
    whole, shards = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
