"""A model of TinyLlama's true shape, with random weights: trained, scored, saved, and in PEFT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.packs import result
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.study.pack import BaseSettings, Pack, Task, Work
from tinyllama_lab.study.trial import TrialFolder, trial_key

PARAMETERS = 1_100_048_384
MOST_BYTES = 6 * 10**9
SETTINGS: dict[str, Any] = {
    "model.source": "local",
    "train.precision": "bf16",
    "train.max_steps": 2,
    "train.batch_size": 2,
    "train.lr": 3e-3,
    "data.style": "text",
    "data.max_length": 64,
    "data.eval_n": 3,
    "eval.generations": 1,
    "eval.max_new_tokens": 2,
    "eval.latency_tokens": 0,
}
ADAPTERS = [{"lora.r": 8}, {"lora.r": 16, "lora.targets": "attention_qv"}]

# flushing 2.2 GB would take longer than everything else
MAKE = """
import os
os.fsync = lambda descriptor: None
from benchmarks import tinyllama
print(tinyllama.folder())
"""
# PEFT and transformers alone: the sums of the losses of every adapter and row
PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
asked, options = json.loads(sys.argv[1]), {"dtype": torch.bfloat16}
if asked["kind"] == "nf4":
    options["device_map"] = {"": "cpu"}
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
model = AutoModelForCausalLM.from_pretrained(asked["model"], **options)
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
first, second = asked["adapters"]
model = PeftModel.from_pretrained(model, first, "0").eval()
model.load_adapter(second, "1")
ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, asked["rows"])), True, 0)
labels = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, asked["rows"])), True, -100)
for adapter in ("0", "1"):
    model.set_adapter(adapter)
    with torch.no_grad():  # no token sees the padding after it
        logits = model(input_ids=ids).logits.float()
    for scores, right in zip(logits, labels):
        print(float(torch.nn.functional.cross_entropy(scores[:-1], right[1:], reduction="sum")))
"""


def run(program: str, *arguments: str) -> list[str]:
    """Run a program in a process of its own; return the lines that it printed."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\n")


def run_worker(folder: Path) -> int:
    """Run the worker of a pack; return the most bytes that were resident.

    The kernel's own peak would not do, because the worker resets it between its phases.
    """
    command = [sys.executable, "-m", "tinyllama_lab.core.worker", str(folder)]
    peak_kib = 0
    with (folder / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while worker.poll() is None:
            status = Path(f"/proc/{worker.pid}/status").read_text()
            peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak_kib = max(peak_kib, *map(int, peaks), 0)
            time.sleep(0.02)
    assert worker.returncode == 0, (folder / "worker.log").read_text()
    return 1024 * peak_kib


@pytest.fixture(scope="module")
def model_folder(cache_home: Path) -> Iterator[Path]:
    """The model: 2.2 GB on the disk while these tests run."""
    folder = Path(run(MAKE)[0])
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"{n} plus {n} is {2 * n}."}) for n in range(40)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_two_adapters_train_on_tinyllamas_shape_and_score_the_same_in_peft(
    kind: str,
    model_folder: Path,
    rows_file: Path,
    configure: Any,
    data_cache: DataCache,
    hardware: dict[str, Any],
    tmp_path: Path,
) -> None:
    paths: dict[str, Any] = {
        "model.path": str(model_folder),
        "data.path": str(rows_file),
        "quant.kind": kind,
    }
    if kind == "nf4":  # a token would dequantize a billion weights
        paths["eval.generations"] = 0
    configs = [configure({**SETTINGS, **paths, **changes}, data="file") for changes in ADAPTERS]
    trials = [TrialFolder(tmp_path / "trials" / f"true-{trial_key(config)}") for config in configs]
    for trial, config in zip(trials, configs, strict=True):
        trial.write_config(config)
    pack, base = Pack(tmp_path / "packs" / "1"), TrialFolder(tmp_path / "_base" / "true-base")
    tasks = [Task(trial, base, ("x=1",)) for trial in trials]
    pack.write(Work(tasks, BaseSettings.of(configs[0]), {**hardware, "threads": 1}, "tiny"))

    peak_bytes = run_worker(pack.folder)

    weights_bytes = 2 * PARAMETERS if kind == "none" else PARAMETERS // 2
    assert weights_bytes < peak_bytes < MOST_BYTES
    results = [result(trial) for trial in trials]
    assert [each.state for each in results] == ["done", "done"], results[0].error
    assert {each.model["parameters"] for each in results} == {PARAMETERS}
    examples = data_cache.prepare(part(Science, configs[0]).data).heldout
    asked = {
        "kind": kind,
        "model": str(model_folder),
        "adapters": [str(trial.adapter_dir) for trial in trials],
        "rows": [example.ids for example in examples],
    }
    in_peft = list(map(float, run(PEFT, json.dumps(asked))[:-1]))
    stored = [
        json.loads(line)["loss"]
        for trial, each in zip(trials, results, strict=True)
        for line in trial.evaluation_in(each).per_example_file.read_text().splitlines()
    ]
    assert len(stored) == 6 and stored == pytest.approx(in_peft, rel=0.01)
    for each in results:  # what was learned is far more than the rounding of bf16
        assert each.metrics["eval/loss"] < 0.95 * each.metrics["base/loss"]
