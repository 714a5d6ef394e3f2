"""A study in Python: frames, verdicts and recommendation, on studies with known losses."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tinyllama_lab as lab
from tests.studies import simulated_study
from tinyllama_lab.report.__main__ import main as write_report
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import State

RANKS, ROWS, SEEDS = [4, 16], [250, 1000], (0, 1, 2)


def ends(values: dict[str, Any]) -> State | None:
    """One trial ran out of memory, and one has no result."""
    if values == {"lora.r": 16, "data.n": 1000, "seed": 2}:
        return State.OOM
    return None if values == {"lora.r": 16, "data.n": 1000, "seed": 1} else State.DONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    root = tmp_path_factory.mktemp("api") / "sweeps"
    return simulated_study(root, {"lora.r": RANKS, "data.n": ROWS}, SEEDS, states=ends)


@pytest.fixture(scope="module")
def printed(folder: StudyFolder) -> str:
    """Return what the report of a study prints, and write its files."""
    text = io.StringIO()
    with redirect_stdout(text):
        write_report([f"sweeps_dir={folder.root}", "study=s"])
    return text.getvalue()


@pytest.fixture
def study(folder: StudyFolder) -> lab.Study:
    return lab.load_study("s", sweeps_dir=folder.root)


@pytest.fixture
def trial(study: lab.Study) -> lab.Trial:
    return study.trials[0]


# ---- the frame -----------------------------------------------------------------------------


def test_the_frame_has_a_row_for_every_trial_with_its_swept_keys_and_state(
    study: lab.Study,
) -> None:
    frame = study.to_frame()
    head, swept = list(frame.columns[:5]), set(frame.columns[5:8])
    assert head == ["trial", "key", "state", "compared", "best"]
    assert swept == {"data.n", "lora.r", "seed"} and frame.columns[-1] == "error"
    combinations = {(r, n, s) for r in RANKS for n in ROWS for s in SEEDS}
    assert set(zip(frame["lora.r"], frame["data.n"], frame["seed"], strict=True)) == combinations
    assert len(frame) == len(study) == len(combinations)
    assert frame["state"].value_counts().to_dict() == {"done": 10, "oom": 1, "missing": 1}
    assert list(frame["compared"]) == list(frame["state"] == "done")


def test_the_frame_holds_every_metric_as_the_result_files_have_it(study: lab.Study) -> None:
    frame = study.to_frame().set_index("key")
    for trial in study.trials:
        path = trial.folder / "result.json"
        metrics = json.loads(path.read_text())["metrics"] if path.is_file() else {}
        shown = frame.loc[trial.key].drop(frame.columns[:7]).drop("error").dropna()
        assert shown.to_dict() == metrics == trial.metrics
    assert frame["eval/loss"].dtype == float


def test_the_frame_and_the_table_of_the_report_agree(
    study: lab.Study, folder: StudyFolder
) -> None:
    write_report([f"sweeps_dir={folder.root}", "study=s"])
    with (study.folder / "report/table.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["kind"] == "trial"]
    frame = study.to_frame()
    assert [line["key"] for line in lines] == list(frame["key"])
    assert [line["best"] == "yes" for line in lines] == list(frame["best"])
    assert [line["error"] for line in lines] == list(frame["error"].fillna(""))
    assert [float(line["eval/loss"] or "nan") for line in lines] == pytest.approx(
        list(frame["eval/loss"]), nan_ok=True
    )
    assert study.report_file.is_file()


def test_the_frame_gives_loss_over_rank(study: lab.Study) -> None:
    frame = study.to_frame()
    compared = frame[frame["compared"]]
    means = compared.pivot_table(index="lora.r", columns="data.n", values="eval/loss")
    by_hand = [
        trial.metrics["eval/loss"]
        for trial in study.trials
        if trial.state == "done" and (trial.swept["lora.r"], trial.swept["data.n"]) == (4, 250)
    ]
    assert means.loc[4, 250] == pytest.approx(sum(by_hand) / 3)
    assert (means[250] > means[1000]).all()  # as simulated: more rows help much


def test_module_names_are_one_cell_that_can_be_grouped_by(tmp_path: Path) -> None:
    targets = [["q_proj", "v_proj"], "all_linear"]
    simulated_study(tmp_path, {"lora.targets": targets}, [0], steps=0)
    frame = lab.load_study("s", tmp_path).to_frame()
    assert set(frame.groupby("lora.targets").groups) == {"q_proj+v_proj", "all_linear"}


# ---- trials, bases -------------------------------------------------------------------------


def test_the_best_trial_has_the_lowest_loss_and_the_base_its_own(study: lab.Study) -> None:
    best = study.best()
    losses = {t.key: t.metrics["eval/loss"] for t in study.trials if t.state == "done"}
    assert best is not None and losses[best.key] == min(losses.values())
    base = study.base()
    assert base.metrics["eval/loss"] > max(losses.values()) and base.config["lora"] is None
    assert repr(base) == f"Trial(base, done, eval/loss {base.metrics['eval/loss']:.3f})"


def test_several_bases_are_listed_and_none_is_the_base(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"quant.kind": ["none", "nf4"]}, [0], steps=0)
    study = lab.load_study("s", tmp_path)
    assert {base.swept["quant.kind"] for base in study.bases} == {"none", "nf4"}
    assert {repr(base).partition(",")[0] for base in study.bases} == {
        "Trial(base quant=none",
        "Trial(base quant=nf4",
    }
    with pytest.raises(lab.LabError, match=r"needs a study with one base, got 2.*study\.bases"):
        study.base()


def test_a_trial_knows_its_settings_and_its_folder(trial: lab.Trial) -> None:
    assert trial.config["lora"]["r"] == trial.swept["lora.r"] == 4
    assert trial.folder.name == f"{trial.name}-{trial.key}" and trial.error is None
    loss = trial.metrics["eval/loss"]
    assert repr(trial).endswith(f"done, eval/loss {loss:.3f})") and "r=4" in repr(trial)


def test_a_trial_that_failed_says_why(study: lab.Study) -> None:
    (failed,) = (trial for trial in study.trials if trial.state == "oom")
    assert failed.error == "out of memory" and "eval/loss" not in failed.metrics
    (missing,) = (trial for trial in study.trials if trial.state == "missing")
    assert missing.metrics == {} and missing.error is None
    assert missing.per_example().empty and missing.generations().empty


def test_the_history_has_the_steps_in_order_and_a_repeated_one_once(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [4, 8]}, [0], steps=5)
    trial = lab.load_study("s", tmp_path).trials[0]
    log = EventLog(trial.folder / "events.jsonl")
    log.append("note", text="resumed after step 3")
    log.append("metric", step=4, values={"train/loss": 0.5, "train/lr": 2e-3}, tokens=99)
    log.append("heldout", step=4, values={"heldout/loss": 2.5}, examples=[2.5])
    history = trial.history()
    assert list(history["step"]) == [1, 2, 3, 4, 5]
    assert history["heldout/loss"].dropna().to_dict() == {3: 2.5}
    assert list(history["train/loss"] == 0.5) == [False, False, False, True, False]
    assert history["tokens"].max() == 99 and str(history["time"].dt.tz) == "UTC"
    assert lab.load_study("s", tmp_path).base().history().empty


def test_losses_of_examples_add_up_to_the_loss_of_the_trial(trial: lab.Trial) -> None:
    examples = trial.per_example()
    assert len(examples) == 64 and {"example", "loss", "tokens"} <= set(examples)
    loss = examples["loss"].sum() / examples["tokens"].sum()
    assert loss == pytest.approx(trial.metrics["eval/loss"])


def test_generations_are_text_with_one_column_for_each_score(trial: lab.Trial) -> None:
    file = next(trial.folder.rglob("generations.jsonl"))
    before = file.read_text()
    record = json.loads(before.splitlines()[0]) | {"scores": {"bleu": 1.5}, "output": "a\u2028b"}
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    generations = trial.generations()
    assert generations["scores/bleu"].tolist() == [1.5]
    assert generations["output"].tolist() == ["a\u2028b"]  # no line ends there
    file.write_text(before)


def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [4, 8]}, [0], steps=0)
    trial = lab.load_study("s", tmp_path).trials[0]
    next(trial.folder.rglob("generations.jsonl")).write_text('{"prompt": "a"}\n{"pro')
    with pytest.raises(lab.LabError, match=r"generations.jsonl.*damaged.*run its command again"):
        trial.generations()


# ---- verdicts and the recommendation -------------------------------------------------------


def test_verdicts_are_those_that_the_report_prints(study: lab.Study, printed: str) -> None:
    verdicts, recommendation = study.verdicts(), study.recommendation()
    assert {(v.key, v.first, v.second) for v in verdicts} == {
        ("lora.r", 4, 16),
        ("data.n", 250, 1000),
    }
    assert all(f"  {verdict}\n" in printed for verdict in verdicts)
    assert all(f"{sentence}\n" in printed for sentence in recommendation.sentences)
    assert str(recommendation) in printed


def test_a_verdict_holds_the_numbers_of_its_sentence(study: lab.Study) -> None:
    (rows,) = (verdict for verdict in study.verdicts() if verdict.key == "data.n")
    # simulated: log2(1000 / 250) * 0.12 = 0.24 nats lower
    assert rows.verdict == "better" and rows.low < -0.24 < rows.high < 0
    assert rows.low < rows.difference < rows.high and rows.p < 0.05 and rows.seeds == 3
    assert f"{abs(rows.difference):.3f} {rows.unit} lower" in rows.sentence


def test_the_recommendation_names_settings_and_their_trials(study: lab.Study) -> None:
    recommendation = study.recommendation()
    assert str(recommendation).startswith("Take ")
    losses = [trial.metrics["eval/loss"] for trial in recommendation.trials]
    assert losses == sorted(losses) and len(losses) == 3
    assert recommendation.loss == pytest.approx(sum(losses) / 3)
    for trial in recommendation.trials:
        assert {k: v for k, v in trial.swept.items() if k != "seed"} == recommendation.settings


def test_a_wide_margin_makes_the_cheapest_good_enough(study: lab.Study) -> None:
    assert study.recommendation().settings["data.n"] == 1000
    cheapest = study.recommendation(margin=5.0)
    assert cheapest.settings == {"lora.r": 4, "data.n": 250}
    words = {verdict.verdict for verdict in study.verdicts(margin=5.0)}
    assert words == {"equivalent within margin"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda study: study.verdicts(margin=0), "margin must be a number above 0, got 0"),
        (lambda study: study.verdicts(pairs="some"), "pairs must be one of"),
        (lambda study: study.verdicts(correction="none"), "correction must be one of"),
        (lambda study: study.recommendation(cost="money"), "cost must be one of.*'money'"),
    ],
)
def test_an_argument_out_of_its_bounds_is_refused(study: lab.Study, call: Any, said: str) -> None:
    with pytest.raises(lab.LabError, match=said):
        call(study)


def test_a_study_without_a_trial_that_is_done_recommends_nothing(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [4, 8]}, [0], states=lambda values: State.OOM)
    study = lab.load_study("s", tmp_path)
    recommendation = study.recommendation()
    assert recommendation.settings == {} and recommendation.trials == ()
    assert recommendation.loss is None and "oom" in str(recommendation)
    assert study.best() is None and study.verdicts() == []
    assert isinstance(study.to_frame(), pd.DataFrame) and not study.to_frame()["compared"].any()


def test_a_search_with_goals_of_its_own_recommends_nothing(tmp_path: Path) -> None:
    folder = simulated_study(tmp_path, {"lora.r": [4, 8]}, [0], steps=0)
    goals = {"lines": [], "command": [], "objectives": ["eval/bleu"], "constraints": []}
    folder.search_file.write_text(json.dumps(goals))
    assert lab.load_study("s", tmp_path).recommendation().settings == {}


# ---- loading -------------------------------------------------------------------------------


def test_a_missing_study_is_refused_with_the_existing_ones(folder: StudyFolder) -> None:
    with pytest.raises(lab.LabError, match="nope holds no trials; studies here: s"):
        lab.load_study("nope", folder.root)
    with pytest.raises(lab.LabError, match="study must be 1 to 64 letters"):
        lab.load_study("s t", folder.root)
    assert not (folder.root / "nope").exists()


def test_a_path_is_answered_with_the_call_that_loads_the_study(folder: StudyFolder) -> None:
    with pytest.raises(lab.LabError, match="must get the name of a study, got the path") as caught:
        lab.load_study(str(folder.folder))
    (call,) = re.findall("; type (load_study.*)$", str(caught.value))
    assert eval(call, {"load_study": lab.load_study}).folder == folder.folder


def test_a_loaded_study_stays_readable_from_another_working_folder(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.root.parent)
    study = lab.load_study("s")
    monkeypatch.chdir(tmp_path)
    assert study.folder == folder.folder and len(study.trials[0].per_example()) == 64


def test_loading_a_study_writes_nothing(tmp_path: Path) -> None:
    simulated_study(tmp_path, {"lora.r": [4, 8]}, [0, 1], steps=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    study = lab.load_study("s", tmp_path)
    study.to_frame(), study.verdicts(), study.recommendation(), study.base().per_example()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert repr(study) == "Study(s: 4 trials, 4 done)"
