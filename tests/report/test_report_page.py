"""The page of a study: its content, escaping, and damaged input."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests import studies
from tests.studies import first_evaluation
from tinyllama_lab.report.__main__ import main as report
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.curves import MOST_POINTS, read_curves
from tinyllama_lab.report.analysis.importance import importances
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.page import page
from tinyllama_lab.report.page.origin import data_sets, repeat, shared_settings
from tinyllama_lab.report.page.written import MOST_TRIALS, read_written
from tinyllama_lab.report.table import write_table
from tinyllama_lab.report.text import clean, csv_cell, label, script_json
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, TrialFolder

GRID = {"lora.r": [4, 8], "data.n": [250, 500]}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;t\x07\x9b31m\u202e"


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the library, which has five megabytes; the browser's tests use the real one."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")


class Reader(HTMLParser):
    """Reads a page: text by section, elements by name, and the content of the JSON elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []  # of the table of trials
        self._section, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._inside = tag
        if tag == "section":
            self._section = str(given["id"])
        if tag == "script":
            self.scripts.append("")
        if self._section == "trials" and tag == "tr":
            self.rows.append([])
        if self._section == "trials" and tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in ("script", "style") else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            said = self.sections.get(self._section, "") + data
            self.sections[self._section] = said
            if self._section == "trials" and self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    @property
    def charts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    @property
    def written(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[1])
        return found


def made(study: StudyFolder, settings: Settings | None = None) -> Reader:
    """Write and read the page of a study."""
    path = page.write_report(study, Analysis(read_study(study), settings or Settings()))
    assert path == study.report_file == study.folder / "report" / "index.html"
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Return a study of twelve trials, of which one failed and one has no result."""

    def states(values: studies.Values) -> State | None:
        if values == {"lora.r": 8, "data.n": 250, "seed": 2}:
            return State.OOM
        return None if values == {"lora.r": 4, "data.n": 250, "seed": 1} else State.DONE

    return studies.simulated_study(
        tmp_path_factory.mktemp("studies"),
        GRID,
        states=states,
        seed_noise=0.001,
        example_noise=0.02,
    )


@pytest.fixture(scope="module")
def read(study: StudyFolder) -> Reader:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")
        return made(study)


# ---- what the page says --------------------------------------------------------------------


def test_the_sections_come_in_order(read: Reader) -> None:
    found = [given["id"] for tag, given in read.tags if tag == "section"]
    names = "headline trials verdicts effects curves costs settings completions data repeat"
    assert found == names.split()


def test_a_page_made_with_other_settings_names_them_at_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = studies.simulated_study(tmp_path / "sweeps", {"lora.r": [4, 8]}, seeds=[0], steps=0)
    # a second page is written over the first
    for words, named in (
        ([], ""),
        (["margin=0.1"], "margin=0.1 (default: 0.02)"),
        (["cost=size", "pairs=all"], "cost=size (default: compute), pairs=all (default: neigh"),
        (["margin=0.02"], ""),
    ):
        report([f"study={study.name}", *words])
        printed = capsys.readouterr().out
        text = Reader(study.report_file.read_text(encoding="utf-8")).sections["headline"]
        for said in (printed, text):
            assert ("the page was made with" in said) == bool(named) and named in said
    report([f"study={study.name}", "correction=fdr_bh"])
    text = Reader(study.report_file.read_text(encoding="utf-8")).sections["headline"]
    start = "Not the defaults: the page was made with correction=fdr_bh (default: holm); "
    again = f"python -m tinyllama_lab report study={study.name} makes it with the defaults again."
    assert " ".join(text.split()).startswith(f"In short {start}{again}")


def test_all_settings_at_once_is_a_section_only_where_it_has_a_chart(
    read: Reader, tmp_path: Path
) -> None:
    def parts(page: Reader) -> list[bool]:
        links = [given.get("href") for tag, given in page.tags if tag == "a"]
        return ["settings" in page.sections, "#settings" in links, "parallel" in page.charts]

    assert parts(read) == [True, True, True]
    # as in the demo: six trials are too few
    few = made(studies.simulated_study(tmp_path, {"lora.r": [4, 16]}, steps=0))
    assert parts(few) == [False, False, False]


def test_the_headline_has_recommendation_state_and_verdicts(read: Reader) -> None:
    said = " ".join(read.sections["headline"].split())
    assert "Take r=" in said
    assert "partial: 11 of 12 trials have ended, a worker may still be running" in said
    assert "1 of them without a score (1 oom)" in said
    assert "training rows: 250 → 500: 500 is better than 250" in said
    for word in ("held-out loss", "nats per token", "perplexity", "margin", "Holm", "seed"):
        assert word in said


def test_every_trial_and_base_is_in_the_table(read: Reader) -> None:
    rows = [[cell.strip() for cell in row] for row in read.rows if row]
    assert len(rows) == 12 + 1
    states = [
        next(cell for cell in row if re.match("base$|done|oom|missing", cell)) for row in rows
    ]
    assert states.count("oom") == states.count("missing") == 1
    assert sum("out of memory" in row for row in rows) == 1
    assert sum("done, best" in row for row in rows) == 1
    assert "BLEU" in read.sections["trials"] and "decode tok/s" in read.sections["trials"]


def test_scores_of_the_harness_have_their_columns(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, {"lora.r": [4, 8]}, seeds=[0])
    trial = study.trials()[0]
    result, _ = trial.read_result()
    assert result is not None
    result.metrics["harness/arc_easy/acc"] = 0.4321
    trial.commit(result)
    read = made(study)
    assert "arc_easy acc" in read.sections["trials"] and "0.432" in read.sections["trials"]


def test_the_verdicts_say_what_it_costs_and_what_was_left_out(read: Reader) -> None:
    said = read.sections["verdicts"]
    assert "500 is better than 250" in said and "▼" in said and "s of training" in said
    assert "r=8 n=250 seed=2: oom (out of memory)" in said
    assert "One seed" not in said


def test_one_seed_is_noted_to_leave_out_the_variance_of_seeds(tmp_path: Path) -> None:
    read = made(studies.simulated_study(tmp_path, GRID, seeds=[0]))
    assert "nothing was shown about other training runs" in read.sections["verdicts"]
    assert "all 4 trials that were started have ended" in read.sections["headline"]


def test_every_chart_says_its_finding_and_has_its_data(read: Reader) -> None:
    drawn = [given for _, given in read.tags if "data-chart" in given]
    assert len(drawn) == 7
    for given in drawn:
        assert given["role"] == "img"
        assert given["aria-label"] == read.charts[str(given["data-chart"])]["finding"]
    assert sum(tag == "figcaption" for tag, _ in read.tags) == len(drawn)
    assert set(read.charts) >= {"cost-time", "cost-memory", "cost-size", "cost-decode"}


def test_importances_are_shares_and_the_strongest_key_leads(study: StudyFolder) -> None:
    shares = importances(make_comparison(read_study(study).trials))
    assert shares[0][0] == "data.n"
    assert all(0 <= share <= 1 for _, share in shares)


def test_the_command_repeats_the_grid(study: StudyFolder) -> None:
    found = repeat(study, read_study(study).trials)
    (command,) = found.commands
    assert command.startswith("python -m tinyllama_lab -m model=tiny_random data=travel ")
    for words in ("lora.r=4,8", "data.n=250,500", "seed=0,1,2", "study=s", "sweeps_dir="):
        assert f" {words}" in command
    assert any("1 trial has no result" in note for note in found.notes)


def test_the_command_names_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, where in (("sweeps", "study=s"), ("others", "study=s sweeps_dir=others")):
        study = studies.simulated_study(tmp_path / folder, {"lora.r": [4, 8]}, seeds=[0], steps=0)
        (command,) = repeat(study, read_study(study).trials).commands
        assert command.endswith(where)


def test_what_all_trials_share_is_listed(read: Reader, study: StudyFolder) -> None:
    shown = dict(shared_settings(read_study(study).trials))
    assert shown["lora.targets"] == "all_linear" and "train.lr" in read.sections["repeat"]
    assert not {"lora.r", "lora.alpha", "data.n", "seed"} & shown.keys()


def test_the_page_names_the_data_and_the_machine(read: Reader) -> None:
    assert "too long: 3" in read.sections["data"]
    assert "fingerprint of the held-out rows" in read.sections["data"]
    assert "a processor (2 cores)" in read.sections["repeat"]


def test_the_files_beside_the_page_are_there_and_linked(study: StudyFolder, read: Reader) -> None:
    write_table(study, read_study(study))
    links = {str(given["href"]) for tag, given in read.tags if tag == "a"}
    local = {link for link in links if not link.startswith("#")}
    assert {"table.csv", "effects.png", "quality_cost.png", "learning_curves.png"} <= local
    assert all((study.report_dir / link).exists() for link in local)
    anchors = {f"#{given['id']}" for _, given in read.tags if "id" in given}
    assert links - local <= anchors


def test_the_page_loads_nothing_from_the_network(read: Reader, study: StudyFolder) -> None:
    for _, given in read.tags:
        for name in ("src", "href"):
            assert not re.match("(https?:)?//", given.get(name) or "")
    assert not re.search("https?://", study.report_file.read_text())
    policy = next(g["content"] for t, g in read.tags if t == "meta" and "http-equiv" in g)
    assert str(policy).startswith("default-src 'none'")


def test_curves_are_thinned_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, {"lora.r": [4]}, seeds=[0], steps=500)
    (trial,) = study.trials()
    log = studies.EventLog(trial.events_file)
    log.append("metric", step=500, values={"train/loss": math.nan})
    (curve,) = read_curves(read_study(study).trials).drawn
    assert len(curve.steps) == MOST_POINTS and curve.steps[-1] == 500
    assert curve.losses[-1] is None


def test_held_out_losses_are_rings_beside_the_training_loss(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, {"lora.r": [4, 8]}, seeds=[0], steps=20)
    rings = "Rings are losses on held-out rows"
    assert rings not in page.write_report(study, Analysis(read_study(study))).read_text()
    (trial, _) = study.trials()
    for step, loss in ((10, 2.5), (20, math.nan), (10, 2.25)):  # one was taken again
        EventLog(trial.events_file).append("heldout", step=step, values={"heldout/loss": loss})
    rows = read_study(study)
    found = {curve.row.trial.name: curve.heldout for curve in read_curves(rows.trials).drawn}
    assert sorted(found.values(), key=len) == [{}, {10: 2.25}] and found[trial.name]
    text = page.write_report(study, Analysis(rows)).read_text()
    assert rings in text and "held out after step" in text


def test_a_curve_is_a_running_mean_and_keeps_its_length(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, {"lora.r": [4]}, seeds=[0], steps=0)
    (trial,) = study.trials()
    for step in range(1, 33):
        loss = 3.0 + (-1) ** step
        EventLog(trial.events_file).append("metric", step=step, values={"train/loss": loss})
    (curve,) = read_curves(read_study(study).trials).drawn
    assert curve.steps == list(range(1, 33))
    assert all(loss is not None and 2.6 < loss < 3.4 for loss in curve.losses[2:-2])


def test_the_answers_shown_first_are_of_different_settings(tmp_path: Path) -> None:
    keys = {"lora.r": [4, 8], "quant.kind": ["none", "nf4"]}
    study = studies.simulated_study(tmp_path, keys, seeds=[0, 1, 2], steps=0)
    written = read_written(read_study(study).trials)
    base, *others = [written.trials[number]["label"] for number in written.first]
    assert base == "base (quant=none)" and len(others) == 3
    assert len({text.partition(" seed=")[0] for text in others}) == 3
    assert "quant=none" in others[0]


def test_the_base_shown_first_is_that_of_the_best_trial(tmp_path: Path) -> None:
    keys = {"data.name": ["travel", "alpaca"]}

    def effect(values: studies.Values) -> float:
        return 1.0 if values["data.name"] == "alpaca" else 2.0

    study = studies.simulated_study(tmp_path, keys, seeds=[0], effect=effect, steps=0)
    rows = [row for row in read_study(study).trials if row.is_base]
    base, best = (read_written(read_study(study).trials).first[number] for number in (0, 1))
    config = rows[base].trial.read_config()
    assert config["data"]["name"] == "alpaca" and best >= len(rows)


def test_the_first_sentence_names_what_all_trials_share(
    tmp_path: Path, study: StudyFolder
) -> None:
    assert (
        "The model tiny_random was fine-tuned on the data set" in made(study).sections["headline"]
    )
    keys: dict[str, list[Any]] = {"data.name": ["travel", "alpaca"]}
    two = made(studies.simulated_study(tmp_path, keys, seeds=[0], steps=0))
    assert "The model tiny_random was fine-tuned several times" in two.sections["headline"]
    keys = {"data.path": ["/home/me/a.jsonl"], "lora.r": [2, 4]}
    own = made(studies.simulated_study(tmp_path, keys, seeds=[0], steps=0, name="own"))
    assert "on the data set a.jsonl several times" in own.sections["headline"]


def test_a_single_run_is_described_as_one(tmp_path: Path) -> None:
    facts = {"train_rows": 62, "train_rows_seen": 32}
    study = studies.simulated_study(tmp_path, {}, seeds=[0], steps=0, facts=facts)
    read = made(study)
    words = " ".join(" ".join(read.sections.values()).split())
    for wrong in ("several times", "different settings", "all 1 trials", "1 of 1 settings"):
        assert wrong not in words
    assert "was fine-tuned on the data set travel once" in words
    assert "the one trial that was started has ended" in words
    assert "training rows seen by a trial" in read.sections["data"]
    facts = data_sets(read_study(study).trials)[0][0].facts
    assert list(facts.items())[:2] == [
        ("training rows", "62"),
        ("training rows seen by a trial", "32"),
    ]


def test_a_search_with_goals_of_its_own_gets_no_recommendation(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, GRID, steps=0)
    assert "the star is the recommendation" in made(study).sections["costs"]
    record = {"lines": ["1"], "command": ["x"], "objectives": ["size/adapter_mib"]}
    study.search_file.write_text(json.dumps(record | {"constraints": []}))
    found = made(study)
    said = found.sections["headline"]
    assert "rank: 4 → 8" in said and "Take r=" not in said
    assert " alone " not in said and "was chosen by" not in said and "largest" not in said
    assert "recommendation" not in found.sections["costs"]
    assert "recommended" not in json.dumps(found.charts)


def test_answers_are_found_by_prompt(read: Reader) -> None:
    assert [each["prompt"] for each in read.written["prompts"]] == [
        p for p, _, _ in studies.PROMPTS
    ]
    labels = [trial["label"] for trial in read.written["trials"]]
    assert labels[0] == "base" and len(labels) == 11
    assert read.written["trials"][0]["outputs"][0]["output"] == "The base says: I do not know."


# ---- nothing escapes -----------------------------------------------------------------------


def answers(trial: TrialFolder, *rows: Any) -> None:
    studies.write_generations(trial, rows)


def test_markup_in_texts_is_escaped(tmp_path: Path) -> None:
    evil = [(EVIL, EVIL, EVIL)]
    keys = {"data.name": [EVIL, "b"], "lora.r": [4, 8]}
    study = studies.simulated_study(tmp_path, keys, seeds=[0], prompts=evil)
    for trial in study.trials():
        trial.write_config(trial.read_config())
    normal = made(
        studies.simulated_study(tmp_path, keys | {"data.name": ["a", "b"]}, [0], name="t")
    )
    text = (made(study), study.report_file.read_text())[1]
    read = Reader(text)
    assert len(read.scripts) == len(normal.scripts)
    assert not [tag for tag, given in read.tags if tag == "img" or "onerror" in given]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert read.written["prompts"][0]["prompt"].startswith("</script><script>alert(1)")
    assert "<script>" in read.sections["trials"]  # the head of its short form


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("नमस्ते\u200d 👍🏽\n\tx", "नमस्ते\u200d 👍🏽\n\tx"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("a\r\nb\rc", "a\nb\\rc"),
        ("\ud800", "\\ud800"),
        ("a" * 30_000, "a" * 20_000 + "… (10000 more characters)"),
    ],
)
def test_control_characters_are_spelled_out(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_scripts_get_no_nan_and_no_end_tag() -> None:
    text = script_json({"a": [math.nan, math.inf, 1.5], "b": ("</script>", "\u2028"), "c": True})
    assert (
        text
        == '{"a":[null,null,1.5],"b":["\\u003c/script\\u003e","\\u2028"],"c":true}'.replace(
            "\\u2028", "\\\\u2028"
        )
    )
    assert json.loads(text)["b"][0] == "</script>"


def test_charts_show_markup_as_text() -> None:
    assert label('<a href="x">y</a>') == '&lt;a href="x"&gt;y&lt;/a&gt;'
    assert len(label("x" * 100)) == 60


def test_long_values_stand_whole_on_the_page_and_short_elsewhere(tmp_path: Path) -> None:
    prompts = ["You answer.\n" + "briefly " * 400 + end for end in "ab"]
    study = studies.simulated_study(tmp_path, {"data.system": [*prompts, "c"]}, seeds=[0])
    read = made(study)
    cells = [row[1] for row in read.rows if row and row[0] != "base"]
    assert len(set(cells)) == len(cells) == 3 and max(map(len, cells)) <= 48
    whole = "".join(read.sections.values())
    assert all(prompt in whole for prompt in prompts)
    assert "system=c" not in whole.partition("Long values, whole")[2].partition("Machines")[0]
    write_table(study, read_study(study))
    assert "briefly " * 9 not in study.table_file.read_text()


def test_contrasts_of_long_values_have_a_line_and_a_name_each(tmp_path: Path) -> None:
    prompts = ["You answer " + "briefly " * 20 + end for end in "abc"]
    read = made(studies.simulated_study(tmp_path, {"data.system": prompts}, seeds=[0]))
    drawn = read.charts["effects"]
    assert sorted(y for trace in drawn["data"] for y in trace["y"]) == [0, 1, 2]
    assert len(set(drawn["layout"]["yaxis"]["ticktext"])) == 3


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+2", "'+1+2"),
        ("-x", "'-x"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'=1"),
        ("\r=1", "'\\r=1"),
        ("-1.5", "-1.5"),
        ("+3e-4", "+3e-4"),
        ("r=4", "r=4"),
        (-2.5, "-2.5"),
        (None, ""),
    ],
)
def test_no_cell_of_the_csv_is_a_formula(value: Any, cell: str) -> None:
    assert csv_cell(value) == cell


def test_the_csv_has_every_row_and_is_guarded(tmp_path: Path) -> None:
    keys = {"data.name": ["=cmd|' /C calc'!A0", "b\n,c"], "train.lr": [-1.0, 2.0]}
    study = studies.simulated_study(tmp_path, keys, seeds=[0])
    made(study)
    with (study.report_dir / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows].count("trial") == 4
    trials = [row for row in rows if row["kind"] == "trial"]
    assert {row["data.name"] for row in trials} == {"'=cmd|' /C calc'!A0", "b ,c"}
    assert {row["train.lr"] for row in trials} == {"-1.0", "2.0"}
    assert all(float(row["eval/loss"]) > 0 for row in trials)


# ---- bad input -----------------------------------------------------------------------------


def test_one_trial_alone(tmp_path: Path) -> None:
    read = made(studies.simulated_study(tmp_path, {"lora.r": [4]}, seeds=[0]))
    assert "Only one setting" in read.sections["headline"]
    assert "nothing can be compared yet" in read.sections["verdicts"]
    assert "effects" not in read.charts and "curves" in read.charts


@pytest.mark.parametrize("state", [State.FAILED, State.DIVERGED, None])
def test_without_a_trial_that_is_done(tmp_path: Path, state: State | None) -> None:
    study = studies.simulated_study(tmp_path, GRID, states=lambda _: state, steps=0)
    read = made(study)
    assert "No recommendation" in read.sections["headline"]
    assert read.charts == {} or set(read.charts) == {"lengths"}
    assert not list(study.report_dir.glob("*.png"))


def test_no_trials_at_all(tmp_path: Path) -> None:
    assert "holds no trials yet" in made(StudyFolder(tmp_path, "empty")).sections["headline"]


def test_trials_of_other_held_out_sets_stand_apart(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, GRID)
    trial = study.trials()[0]
    result = trial.read_result()[0]
    assert result is not None
    trial.commit(Result(**{**vars(result), "data": {"eval_fingerprint": "other"}}))
    read = made(study)
    assert "scored on other held-out tokens" in read.sections["verdicts"]
    assert not [given for tag, given in read.tags if given.get("class") == "best"]
    assert "done, best" not in read.sections["trials"]


def test_damaged_files_are_named_or_passed_over(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, GRID)
    first, second, third, fourth = study.trials()[:4]
    first.result_file.write_text("{")
    first_evaluation(second).per_example_file.write_text('{"loss": 1}\nnonsense')
    first_evaluation(third).per_example_file.unlink()
    with third.events_file.open("ab") as file:
        file.write(b"\x00\xff\n{}\n")
    first_evaluation(fourth).generations_file.write_bytes(
        b'\xff\xfe\n[]\n{"prompt": 1}\n{"prompt": "p", "reference": "\\ud800", "output": "'
        + b"x" * 100_000
        + b'", "intent": null, "sampled": "s"}\n'
    )
    read = made(study)
    assert "is damaged" in read.sections["verdicts"]
    assert read.sections["verdicts"].count("held-out examples are missing or damaged") == 2
    assert "3 damaged lines" in read.sections["completions"]
    odd = next(each for each in read.written["prompts"] if each["prompt"] == "p")
    assert odd["reference"] == "\\ud800"


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    study = studies.simulated_study(tmp_path, {"lora.r": [4, 8, 16], "data.n": [250, 500]})
    for trial in study.trials()[::2]:
        result = trial.read_result()[0]
        assert result is not None
        bad = dict.fromkeys(result.metrics, math.nan)
        trial.commit(Result(**{**vars(result), "metrics": bad}))
    read = made(study)
    assert "NaN" not in read.scripts[0] + read.scripts[1]
    assert "parallel" in read.charts


def test_unexpected_types_of_facts_do_not_break_the_page(tmp_path: Path) -> None:
    facts = {"dropped": [1], "train_lengths": {"edges": [0, "x"], "counts": None}}
    read = made(studies.simulated_study(tmp_path, GRID, facts=facts))
    assert "lengths" not in read.charts


def test_two_thousand_trials_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the real library
    monkeypatch.setattr(TrialFolder, "read_config", studies.read_config)
    keys = {"lora.r": [2, 4, 8, 16, 32], "data.n": [250, 500, 1000, 2000]}
    study = studies.simulated_study(
        tmp_path, keys, seeds=range(100), steps=1, prompts=[("p" * 900, "i", "r" * 900)] * 8
    )
    assert len(study.trials()) == 2000
    rows = read_study(study)
    path = page.write_report(study, Analysis(rows))
    assert path.stat().st_size < 15e6
    written = read_written(rows.trials)
    assert len(written.trials) == MOST_TRIALS + 1
    assert "The 40 trials with the lowest held-out loss are here" in written.notes[0]
    curves = read_curves(rows.trials)
    assert len(curves.drawn) == 40 and len(curves.left_out) == 1960
