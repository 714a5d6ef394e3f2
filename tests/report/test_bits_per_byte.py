"""Bits per byte: the right text, the same for all tokenizers, and what it may compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.made_tokenizers import MADE
from tests.packs import QUIET, Lab, result
from tests.studies import first_evaluation, simulated_study, write_generations
from tests.worker.test_chat_template import TURNS, chat
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.dataset.dataset import Encoder
from tinyllama_lab.core.dataset.example import Example, with_text
from tinyllama_lab.core.evaluation.losses import ExampleLoss, loss_metrics
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import Comparison, make_comparison
from tinyllama_lab.report.analysis.contrasts import main_effects
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.recommendation import advise
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.caveats import caveats, method_notes
from tinyllama_lab.report.findings import finding
from tinyllama_lab.report.page.page import write_report
from tinyllama_lab.study.study import StudyFolder

ANSWERS = tuple(turn.content for turn in TURNS if turn.role == "assistant")


@pytest.fixture
def settings(configure: Any) -> Any:
    def make(**changes: Any) -> DataConfig:
        changes = {"system": None, "max_length": 512, **changes}
        built: DataConfig = part(
            DataConfig, configure({f"data.{k}": v for k, v in changes.items()})["data"]
        )
        return built

    return make


# ---- the text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_bits_per_byte_count_the_text_of_the_answers_for_any_tokenizer(
    name: str, settings: Any
) -> None:
    """Templates, special tokens and white space of a format are not part of the text."""
    tokenizer = MADE[name]()
    example = Encoder(tokenizer, settings())(chat(*TURNS))
    (found,) = with_text([example], tokenizer)
    assert found.text == ANSWERS
    assert found.text_bytes == sum(len(text.encode()) for text in ANSWERS) > sum(map(len, ANSWERS))


@pytest.mark.parametrize("name", ["TinyLlama", "Qwen"])
def test_other_styles_have_the_text_that_they_supervise(name: str, settings: Any) -> None:
    tokenizer = MADE[name]()
    row = RawRow("Where?", "", "In Pokhara.", "route", "", (), "")
    for style, text in (
        ("instruction_response", "In Pokhara."),
        ("query_intent_response", "Intent: route\nResponse: In Pokhara."),
    ):
        example = Encoder(tokenizer, settings(style=style))(row)
        assert with_text([example], tokenizer)[0].text == (text,)


def test_a_first_token_that_nothing_predicts_is_no_part_of_the_text(settings: Any) -> None:
    row = RawRow("", "", "Hello there", "", "", (), "")
    for name, text in (("Llama 3", "Hello there"), ("Qwen", None)):
        tokenizer = MADE[name]()
        example = Encoder(tokenizer, settings(style="text"))(row)
        (found,) = with_text([example], tokenizer)
        first = tokenizer.decode(example.ids[:1])
        assert found.text == (text or "Hello there".removeprefix(first).strip(),)


def test_a_character_that_is_cut_does_not_count() -> None:
    tokenizer = MADE["Qwen"]()
    ids = tuple(tokenizer("yes काठ", add_special_tokens=False)["input_ids"])
    assert len(ids) > len("yes काठ")  # a character is several tokens
    for cut in (1, 2):
        example = Example(ids[:-cut], (False, *[True] * (len(ids) - cut - 1)), (), "", "", "")
        (found,) = with_text([example], tokenizer)
        assert "yes का".endswith(found.text[0]) and "\ufffd" not in found.text[0]


# ---- the number ----------------------------------------------------------------------------


def test_bits_are_nats_over_ln_2_over_bytes() -> None:
    losses = [ExampleLoss(0, 30.0, 9, 0, 1, 20), ExampleLoss(1, 12.0, 4, 1, 2, 0)]
    assert loss_metrics(losses)["eval/bits_per_byte"] == pytest.approx(42 * 1.4426950409 / 20)
    without = loss_metrics([ExampleLoss(0, 30.0, 9, 0, 1)])
    assert without.keys() == {"eval/loss", "eval/perplexity"}


def test_trials_and_bases_have_bits_per_byte(lab: Lab) -> None:
    trial = lab.trial({**QUIET, "data.max_length": 600})
    (found,) = lab.run([trial])
    file = first_evaluation(trial).per_example_file
    records = [json.loads(line) for line in file.read_text().splitlines()]
    # the tiny model's tokens are bytes, and one more closes each answer
    assert [r["bytes"] for r in records] == [r["tokens"] - 1 for r in records]
    nats, size = (sum(r[name] for r in records) for name in ("loss", "bytes"))
    assert found.metrics["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert found.data["eval_bytes"] == size
    base = result(lab.base_trial(trial))
    assert found.metrics["base/bits_per_byte"] == base.metrics["eval/bits_per_byte"]
    assert base.data["eval_text_fingerprint"] == found.data["eval_text_fingerprint"]


# ---- who is compared -----------------------------------------------------------------------


def two_models(root: Path, **facts: Any) -> StudyFolder:
    """Return ranks 2 and 8 of two models; the second has tokens twice as long, and is worse."""
    study = simulated_study(
        root,
        {"model.name": ["tiny_random", "smollm2"], "lora.r": [2, 8]},
        seeds=(0,),
        steps=0,
        examples=32,
        seed_noise=0.001,
        example_noise=0.01,
    )
    for trial in study.trials():
        found = trial.read_result()[0]
        assert found is not None
        is_second = trial.read_config()["model"]["name"] == "smollm2"
        file = first_evaluation(trial).per_example_file
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            record["bytes"] = 4 * record["tokens"]
            if is_second:
                record["tokens"] //= 2
                record["loss"] *= 1.1
        file.write_text("\n".join(map(json.dumps, records)) + "\n")
        name = "second" if is_second else "first"
        nats, size = (sum(r[key] for r in records) for key in ("loss", "bytes"))
        found.metrics["eval/bits_per_byte"] = nats / math.log(2) / size
        found.model |= {"name": name, "revision": name}
        found.data |= {"eval_fingerprint": name, "eval_text_fingerprint": "text"}
        found.data |= facts if is_second else {}
        trial.commit(found)
    return study


def sums(found: Comparison, model: str, rank: int) -> float:
    """Compute bits per byte of the trials of a model and rank with numpy, from their files."""
    values = []
    for trial in found.trials:
        config = trial.row.trial.read_config()
        if (config["model"]["name"], config["lora"]["r"]) == (model, rank):
            text = first_evaluation(trial.row.trial).per_example_file.read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            nats, size = (np.array([r[k] for r in rows]) for k in ("loss", "bytes"))
            values.append(nats.sum() / size.sum() / np.log(2))
    return float(np.mean(values))


def test_models_with_other_tokens_are_compared_by_the_same_text(tmp_path: Path) -> None:
    found = make_comparison(read_study(two_models(tmp_path)).trials)
    assert len(found.trials) == 4 and not found.left_out
    effect = next(e for e in main_effects(found) if e.key == "model.name")
    first, second = effect.first, effect.second
    expected = np.mean([sums(found, second, r) - sums(found, first, r) for r in (2, 8)])
    assert effect.estimate.difference == pytest.approx(expected)
    text = finding(effect, 0.02)
    assert (
        "bits per byte in this one run (95 %" in text
        and "perplexity" not in text
        and "nats" not in text
    )
    assert ", both at learning rate 0.003, which was not tuned" in text
    cells = rank_cells(found)
    assert cells[0].loss == pytest.approx(min(sums(found, "tiny_random", r) for r in (2, 8)))
    assert "nats" not in " ".join(advise(cells).sentences)
    effects = main_effects(found)
    notes = " ".join([*caveats(found, effects, cells), *method_notes(found, effects, Settings())])
    margin = 0.02 * np.mean([1 / 4, 1 / 8]) / math.log(2)  # 4 bytes a token, and 8
    assert f"the margin ({found.measure.margin(0.02):g} bits per byte) decides" in notes
    assert found.measure.margin(0.02) == pytest.approx(margin, rel=0.05)
    assert "different tokens for the same held-out text" in notes
    assert "nats" not in seed_spread(found).sentence


def test_the_page_names_the_unit_and_has_the_scores_of_answers(tmp_path: Path) -> None:
    study = two_models(tmp_path)
    for number, trial in enumerate(study.trials()):
        scores = [{"rougeL": 0.1 * number + 0.01 * answer} for answer in range(32)]
        write_generations(
            trial, [{"prompt": "p", "reference": "r", "output": "o", "scores": s} for s in scores]
        )
    analysis = Analysis(read_study(study))
    page = write_report(study, analysis).read_text()
    margin = f"{analysis.comparison.measure.margin(0.02):g}"
    verdicts = page.split('id="verdicts"')[1].split("</section>")[0]
    assert f"to show {margin} bits" in verdicts and "0.02 nats" not in verdicts
    assert "held-out loss (bits per byte)" in page and "difference (bits per byte)" in page
    assert f"here {margin} bits per byte" in page
    table = page.split("Metrics of the completions</caption>")[1].split("</table>")[0]
    assert "ROUGE-L" in table and "points" in table


def test_the_best_row_is_marked_by_bits_per_byte(tmp_path: Path) -> None:
    rows = read_study(two_models(tmp_path)).trials
    (best,) = [row for row in rows if row.is_best]
    trials = [row for row in rows if not row.is_base]
    bits = {
        row.trial.key: row.result.metrics["eval/bits_per_byte"] for row in trials if row.result
    }
    assert best.trial.key == min(bits, key=lambda key: bits[key])


@pytest.mark.parametrize("facts", [{"eval_text_fingerprint": "other"}, {}])
def test_trials_on_other_text_are_not_compared_and_named(tmp_path: Path, facts: Any) -> None:
    study = two_models(tmp_path, **facts)
    if not facts:  # files from before bytes were counted
        for trial in study.trials():
            if trial.read_config()["model"]["name"] == "smollm2":
                file = first_evaluation(trial).per_example_file
                text = file.read_text()
                file.write_text(text.replace('"bytes"', '"characters"'))
    found = make_comparison(read_study(study).trials)
    assert len(found.trials) == 2 and found.measure.unit == "nats per token"
    assert len(found.left_out) == 2 and all("its base is" in text for text in found.left_out)


def test_a_minority_on_other_text_is_left_out_with_the_reason(tmp_path: Path) -> None:
    study = two_models(tmp_path)
    trial = study.trials()[0]
    found = trial.read_result()[0]
    assert found is not None
    found.data["eval_text_fingerprint"] = "other"
    trial.commit(found)
    (reason,) = make_comparison(read_study(study).trials).left_out
    assert "it was scored on other held-out text" in reason
