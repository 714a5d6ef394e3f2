"""Scores of texts equal those of the libraries' command lines and of a count by hand."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import pytest

from tinyllama_lab.core.evaluation.metrics import scores
from tinyllama_lab.core.evaluation.metrics.scores import (
    intent_macro_f1,
    left_out,
    signatures,
    text_scores,
)
from tinyllama_lab.metrics import METRICS

ALPACA = Path(__file__).parents[3] / "shared/data/alpaca_1k.jsonl"
HAND = [
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("a cat sits on a mat", "The cats were sitting on the mat."),
    ("", "Nothing was said."),
    ("Take bus 12 to Pokhara; it's 8 hours (about $10).", "Bus No. 12 goes to Pokhara in 8 h."),
    ("काठमाडौं नेपालको राजधानी हो।", "नेपालको राजधानी काठमाडौं हो।"),
    ("Crème brûlée — 100% “good”!", "Creme brulee is 100 % good."),
]
ROUGES = ("rouge1", "rouge2", "rougeL")
# the score of an answer that equals its reference; a metric that does not compare them is left out
HIGHEST = {
    **{"eval/bleu": 100.0, "eval/chrf": 100.0, "eval/exact_match": 1.0, "eval/token_f1": 1.0},
    **{f"eval/{name}": 1.0 for name in ROUGES},
}
INTENTS = {"eval/intent_accuracy", "eval/intent_macro_f1"}
FROM_MODULES = {name for name, metric in METRICS.items() if metric.library_module}


def perturbed(text: str, draw: random.Random) -> str:
    """Return the text with words dropped, doubled, swapped and misspelled."""
    words = []
    for word in text.split(" "):
        fate = draw.random()
        if fate > 0.1:
            words.append(word[::-1] if fate > 0.9 else word)
        if 0.5 < fate < 0.6:
            words += [word, "and"]
    if draw.random() < 0.5:
        words = words[len(words) // 2 :] + words[: len(words) // 2]
    return " ".join(words)


def alpaca(begin: int) -> list[tuple[str, str]]:
    """Return twenty shortened answers of Alpaca, without the line breaks that tools refuse."""
    if not ALPACA.exists():
        pytest.skip("shared/data/alpaca_1k.jsonl is not beside this checkout")
    lines = ALPACA.read_text(encoding="utf-8").split("\n")[begin : begin + 20]
    draw = random.Random(begin)
    references = [
        " ".join(" ".join(json.loads(line)["output"].split())[:700].split()) for line in lines
    ]
    return [(perturbed(reference, draw), reference) for reference in references]


@pytest.fixture(params=["hand", 0, 400, 900], ids=str)
def pairs(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """Return answers and their references."""
    return HAND if request.param == "hand" else alpaca(request.param)


@pytest.fixture
def files(pairs: list[tuple[str, str]], tmp_path: Path) -> tuple[Path, Path]:
    """Write them to files, one per line."""
    found = tmp_path / "answers.txt", tmp_path / "references.txt"
    for path, texts in zip(found, zip(*pairs, strict=True), strict=True):
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return found


def scored(pairs: list[tuple[str, str]]) -> dict[str, float]:
    return text_scores([answer for answer, _ in pairs], [reference for _, reference in pairs])


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-X", "utf8", "-m", *command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_bleu_and_chrf_are_those_of_sacrebleu_itself(
    pairs: list[tuple[str, str]], files: tuple[Path, Path]
) -> None:
    found = scored(pairs)
    answers, references = map(str, files)
    for kind in ("bleu", "chrf"):
        shown = run("sacrebleu", references, "-i", answers, "-m", kind, "-b", "-w", "12")
        assert found[f"eval/{kind}"] == pytest.approx(float(shown), abs=1e-9)
        full = json.loads(run("sacrebleu", references, "-i", answers, "-m", kind))
        assert signatures()[kind] == full["signature"]
    assert 0 < found["eval/bleu"] < 100 and 0 < found["eval/chrf"] < 100


def test_rouge_is_that_of_rouge_score_itself(
    pairs: list[tuple[str, str]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    answers, references = files
    table = tmp_path / "scores.csv"
    run(
        "rouge_score.rouge",
        f"--target_filepattern={references}",
        f"--prediction_filepattern={answers}",
        f"--output_filename={table}",
        "--use_stemmer",
        "--noaggregate",  # its aggregate is the median of random samples
    )
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(pairs)
    found = scored(pairs)
    for kind in ROUGES:
        # it writes six digits, but each is a ratio of counts of words, few enough to be found
        ratios = [Fraction(row[f"{kind}-F"]).limit_denominator(600) for row in rows]
        assert found[f"eval/{kind}"] == pytest.approx(float(sum(ratios)) / len(rows), abs=1e-9)
        assert 0 < found[f"eval/{kind}"] < 1
    assert signatures()["rouge"].endswith(f"|stemmer:porter|version:{version('rouge_score')}")


def test_rouge_counts_stems() -> None:
    assert scored([("he walked", "he walks")])["eval/rouge1"] == 1
    assert scored([("he walked", "he talks")])["eval/rouge1"] == 0.5


@pytest.mark.parametrize(
    "text", ["One two three four five.", "Line one\n\n  line two, line three"]
)
def test_identical_texts_have_the_highest_scores(text: str) -> None:
    found = scored([(text, text)] * 3)
    assert {name: found[name] for name in HIGHEST} == pytest.approx(HIGHEST)


def test_an_exact_match_ignores_white_space_only() -> None:
    pairs = [(" a\tb \n", "a b"), ("a b", "A b"), ("a b.", "a b"), ("नेपाल", "नेपाल")]
    assert scored(pairs)["eval/exact_match"] == 0.5


def test_empty_answers_score_zero() -> None:
    found = text_scores(["", " \n"], ["Intent: a", "Intent: b"], ["a", "b"])
    assert {found[name] for name in (*HIGHEST, *INTENTS)} == {0.0}


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("to the bus", "the bus", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("The Bus!", "the, bus", 1.0),
        ("a bus", "bus", 2 / 3),  # an article counts
        ("bus bus bus", "bus stop", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("it's $10", "its 10", 1.0),
        ("नेपाल।", "नेपाल", 1.0),
        ("«Straße»", "straße", 1.0),
        ("train", "bus", 0.0),
        ("?!", "bus", 0.0),
        ("", "?", 1.0),
    ],
)
def test_token_f1_counts_words_without_case_and_punctuation(
    answer: str, reference: str, f1: float
) -> None:
    assert scored([(answer, reference)])["eval/token_f1"] == pytest.approx(f1)
    assert scored([(reference, answer)])["eval/token_f1"] == pytest.approx(f1)


def test_means_are_over_answers() -> None:
    both, one, other = scored(HAND[:2]), scored(HAND[:1]), scored(HAND[1:2])
    for name in ("exact_match", "token_f1", *ROUGES):
        expected = fmean([one[f"eval/{name}"], other[f"eval/{name}"]])
        assert both[f"eval/{name}"] == pytest.approx(expected)


def test_scores_of_single_answers_have_those_of_all_as_their_mean(
    pairs: list[tuple[str, str]],
) -> None:
    found = scored(pairs)
    every = scores.example_scores(*map(list, zip(*pairs, strict=True)))
    assert len(every) == len(pairs)
    for name in ("exact_match", "token_f1", "bleu", *ROUGES):
        mean = fmean(each[name] for each in every)
        assert mean == pytest.approx(found[f"eval/{name}"], abs=1e-5)


def test_a_share_of_bleu_is_what_the_corpus_loses_without_the_answer(
    pairs: list[tuple[str, str]],
) -> None:
    shares = [each["bleu"] for each in scores.example_scores(*map(list, zip(*pairs, strict=True)))]
    without = [scored([*pairs[:n], *pairs[n + 1 :]])["eval/bleu"] for n in range(len(pairs))]
    for one, other in ((0, 1), (2, 3)):
        expected = (len(pairs) - 1) * (without[other] - without[one])
        assert shares[one] - shares[other] == pytest.approx(expected, abs=1e-4)


def test_intents_of_single_answers() -> None:
    every = scores.example_scores(["Intent: a", "x"], ["Intent: a\ny", "Intent: b\nn"], ["a", "b"])
    assert [each["intent_accuracy"] for each in every] == [1.0, 0.0]
    assert "intent_accuracy" not in scores.example_scores(["x"], ["y"], ["a"])[0]


NAMED = ["Intent: a", "Intent: a", "Intent: a", "Intent: b", "Intent: c", "none"]
WANTED = ["a", "a", "b", "b", "a", "d"]


def test_macro_f1_is_the_mean_over_the_intents_there_are() -> None:
    # a: 2 of 3 said, 2 of 3 found; b: 1 of 1, 1 of 2; d: never; c is nobody's
    assert intent_macro_f1(NAMED, WANTED) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    metrics = pytest.importorskip("sklearn.metrics")
    said = [answer.removeprefix("Intent: ") for answer in NAMED]
    expected = metrics.f1_score(WANTED, said, labels=["a", "b", "d"], average="macro")
    assert intent_macro_f1(NAMED, WANTED) == pytest.approx(expected)


@pytest.mark.parametrize("references", [["Intent: a", "b"], ["Intent: a", "Intent: c"], ["", ""]])
def test_intents_are_scored_only_if_the_data_has_them(references: list[str]) -> None:
    good = text_scores(["Intent: a", "x"], ["Intent: a\nyes", "Intent: b\nno"], ["a", "b"])
    assert (good["eval/intent_accuracy"], good["eval/intent_macro_f1"]) == (0.5, 0.5)
    found = text_scores(["Intent: a", "x"], references, ["a", "b"])
    assert found.keys() == good.keys() - {"eval/intent_accuracy", "eval/intent_macro_f1"}
    assert text_scores(["x"], ["Intent: a"], [""]).keys() == found.keys()


def test_every_registered_metric_of_texts_is_computed() -> None:
    assert scored(HAND).keys() == FROM_MODULES and FROM_MODULES >= HIGHEST.keys()


def test_a_missing_answer_is_an_error() -> None:
    with pytest.raises(ValueError):
        text_scores(["a"], ["a", "b"])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Import the metric modules again in a test, so that missing packages can be simulated."""
    for module in {"text_metric", *(METRICS[name].library_module for name in FROM_MODULES)}:
        name = f"tinyllama_lab.core.evaluation.metrics.{module}"
        monkeypatch.delitem(sys.modules, name, raising=False)
    scores._load.cache_clear()
    yield monkeypatch
    scores._load.cache_clear()


@pytest.mark.parametrize(
    ("library", "gone"),
    [
        ("sacrebleu", {"eval/bleu", "eval/chrf"}),
        ("rouge_score", {f"eval/{name}" for name in ROUGES}),
        ("evaluate", FROM_MODULES),
    ],
)
def test_metrics_of_missing_packages_are_left_out_and_named(
    library: str, gone: set[str], without: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == library or n.startswith(f"{library}.")]:
        without.delitem(sys.modules, name)
    without.setitem(sys.modules, library, None)
    found = text_scores(["Intent: a"], ["Intent: a"], ["a"])
    kept = (FROM_MODULES - gone) | INTENTS
    assert found.keys() == kept
    said = " ".join(left_out())
    assert all(name in said for name in gone) and f"{library} is not installed" in said
    assert not any(name in said for name in kept)
    assert not gone & {f"eval/{name}" for name in signatures()}


def test_the_libraries_are_imported_only_when_there_is_something_to_score() -> None:
    code = (
        "import sys, tinyllama_lab.core.worker\n"
        "print([n for n in ('evaluate', 'sacrebleu', 'rouge_score', 'nltk') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
