"""A recommendation is confirmed with fresh seeds, on rows that no choice has seen."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests import grid, searches, studies
from tests.stream_worker import StreamWorkers
from tinyllama_lab.config import schema as config
from tinyllama_lab.data.sources import load_rows
from tinyllama_lab.data.splits.splits import Split, split_records
from tinyllama_lab.report.analysis import analysis, trial_rows
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.confirmation import RivalPair, RivalResult, with_own
from tinyllama_lab.report.analysis.statistics import Luck
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.findings import print_findings
from tinyllama_lab.report.page.page import write_report
from tinyllama_lab.report.table import write_table
from tinyllama_lab.study.pack import Exit, Pack, Task
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep import run as sweep_run
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.settings import identify

ROWS = 32
TOKENS = np.full(ROWS, 40)
Loss = Callable[[int, bool], float]  # of the rank, and of whether confirmation rows are scored
RANKS = ("lora.r=4,16", "seed=0,1,2", "confirm=auto")
write_page = sweep_run._write_report


def flat(rank: int, confirms: bool) -> float:
    """All ranks have the same true loss, so that the cheapest is recommended."""
    return 2.0 if not confirms else 2.1


def falling(rank: int, confirms: bool) -> float:
    return 2.2 - 0.01 * rank


def losses_of(config: dict[str, Any], loss: Loss) -> Any:
    """Return the loss of every row, with a random part for the row and one for the run."""
    rank, seed, rows = config["lora"]["r"], config["seed"], config["eval"]["rows"]
    confirms = rows == "confirmation"
    hardness = np.random.default_rng(1 + confirms).normal(0, 0.3, ROWS)
    own = np.random.default_rng([rank, seed, confirms]).normal(0, 0.02, ROWS)
    return TOKENS * (loss(rank, confirms) + hardness + own)


@dataclass
class Workers:
    """Completes every trial of a pack in `start`, except those in `killed`."""

    loss: Loss = flat
    confirmation_rows: int | None = ROWS
    killed: Callable[[dict[str, Any]], bool] = lambda config: False
    packs: list[list[str]] = field(default_factory=list)

    def start(self, pack: Pack) -> Workers:
        tasks = pack.read().tasks
        self.packs.append([task.trial.name for task in tasks])
        for task in tasks:
            self._do(task)
        return self

    def close(self) -> None:
        """Nothing was started ahead."""

    def exit_code(self) -> int:
        return int(Exit.DONE)

    def stop(self, patience_s: float) -> None:
        """Do nothing: the worker has ended."""

    def _do(self, task: Task) -> None:
        trial, config, result_folder = task.trial, task.read_config(), task.result_folder
        evaluation = trial.evaluation(config["eval"])
        if self.killed(config):
            error = {"class": "killed", "message": "killed on purpose", "log_tail": ""}
            result_folder.commit(Result(result_folder.key, trial.name, State.FAILED, error))
            return
        rank, losses = config["lora"]["r"], losses_of(config, self.loss)
        studies.write_losses(trial, losses, TOKENS, evaluation)
        evaluation.write_config({"eval": config["eval"]})
        metrics = {
            "eval/loss": float(losses.sum() / TOKENS.sum()),
            "eval/perplexity": 1.0,
            "perf/train_tflop": 1.0 + rank,
            "size/adapter_mib": float(rank),
        }
        data = {"eval_fingerprint": config["eval"]["rows"], "train_fingerprint": "t"}
        if self.confirmation_rows is not None:
            data["confirmation_rows"] = self.confirmation_rows  # type: ignore[assignment]
        result = Result(result_folder.key, trial.name, State.DONE, metrics=metrics, data=data)
        result.evaluation = evaluation.key if result_folder == trial else None
        result.model = {"name": "tiny_random", "revision": "1"}
        result.overrides = list(task.overrides)
        result_folder.commit(result)


@cache
def travel() -> Split:
    data = config.load(grid.plain(*grid.SMALL)).data
    return split_records(load_rows(data), data)


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the travel set once for all tests."""
    monkeypatch.setattr(identify, "load_split", lambda *_: travel())


@pytest.fixture
def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a grid in the study `s` and returns what it prints."""
    monkeypatch.setattr(schedule, "POLL_S", 0)
    monkeypatch.setattr(sweep_run, "_write_report", lambda plan, session: None)

    def run(workers: Workers, *typed: str) -> str:
        monkeypatch.setattr(sweep_run, "workers", lambda name, stopped: workers)
        named = typed if "study=other" in typed else ("study=s", *typed)
        cells = grid.cells(f"sweeps_dir={tmp_path}", *named)
        sweep_run.run_grid(cells, "inline", tmp_path)
        return " ".join(capsys.readouterr().out.split())

    return run


def confirming(root: Path) -> list[tuple[int, int]]:
    """Return rank and seed of every confirmation trial."""
    rows = read_study(StudyFolder(root, "s")).confirmation
    return sorted((row.settings["lora.r"], row.settings["seed"]) for row in rows)


def read(study: StudyFolder) -> str:
    """Return the findings below the table, as a report prints them."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    print_findings(study, Analysis(read_study(study)), console)
    return " ".join(text.getvalue().split())


# ---- which trials are run ----------------------------------------------------------------------


def test_a_grid_is_followed_by_one_pack_that_confirms(
    tmp_path: Path, sweep: Callable[..., str]
) -> None:
    workers = Workers()
    text = sweep(workers, *RANKS)
    assert [len(pack) for pack in workers.packs] == [6, 4]
    assert confirming(tmp_path) == [(4, 3), (4, 4), (16, 3), (16, 4)]
    assert all("confirmation" in name for name in workers.packs[1])
    assert "confirming r=4, r=16 on rows that no choice has seen: 4 trials" in text
    assert (
        "Take r=4." in text
        and "How sure: on 32 other rows with 2 fresh seeds, its loss is" in text
    )
    assert "these rows show that r=4 and r=16 differ by less than 0.02" in text
    assert "provisional" not in text and "not compared" not in text
    again = Workers()
    assert "these rows show that" in sweep(again, *RANKS) and again.packs == []


def test_the_chance_of_a_confirmation_is_printed_before_training(
    sweep: Callable[..., str],
) -> None:
    """It is low if the cheaper setting is worse by nearly the margin, and not printed if high."""

    def close(rank: int, confirms: bool) -> float:
        return 2.0 - (0.0145 if rank == 16 else 0.0)

    text = sweep(Workers(close), "study=close", "lora.r=4,16", "seed=0,1,2", "confirm=auto")
    chance = re.search(r"about (\d+) of 100 such confirmations settle", text)
    assert chance and int(chance.group(1)) < 80
    text = sweep(Workers(falling), "study=falling", "lora.r=4,16", "seed=0,1,2", "confirm=auto")
    assert "confirming r=16, r=4" in text and "such confirmations" not in text


def test_a_confirmation_that_was_interrupted_goes_on(
    tmp_path: Path, sweep: Callable[..., str]
) -> None:
    def is_lost(config: dict[str, Any]) -> bool:
        return bool(config["eval"]["rows"] == "confirmation" and config["lora"]["r"] == 4)

    assert "provisional" in sweep(Workers(killed=is_lost), *RANKS)
    workers = Workers()
    assert "these rows show that" in sweep(workers, *RANKS)
    assert workers.packs == [["r4-confirmation-seed3", "r4-confirmation-seed4"]]


@pytest.mark.parametrize(
    ("typed", "rows", "trials", "said"),
    [
        (("lora.r=4,16", "seed=0,1", "confirm=off"), ROWS, 0, "provisional"),
        (
            ("lora.r=4,16", "seed=0,1", "confirm=3"),
            ROWS,
            6,
            "on 32 other rows with 3 fresh seeds",
        ),
        (("lora.r=4", "seed=0,1", "confirm=auto"), ROWS, 0, "Only one setting"),
        (("lora.r=4,16", "seed=0,1", "confirm=auto"), 7, 0, "8 confirmation rows are needed"),
        (("lora.r=4,16", "confirm=auto"), None, 0, "before confirmation rows were counted"),
        (("lora.r=4,16", "eval.rows=confirmation", "confirm=auto"), ROWS, 0, "Take r="),
    ],
)
def test_what_is_confirmed_where_and_how_often(
    tmp_path: Path,
    sweep: Callable[..., str],
    typed: tuple[str, ...],
    rows: int | None,
    trials: int,
    said: str,
) -> None:
    assert said in sweep(Workers(confirmation_rows=rows), *typed)
    assert len(confirming(tmp_path)) == trials


def test_recommended_best_and_cheapest_rival_are_confirmed(
    tmp_path: Path, sweep: Callable[..., str]
) -> None:
    """The rival is a setting that is not worse; if there is none, the second best."""
    sweep(Workers(), "lora.r=2,4,8,16,32", "seed=0,1,2", "confirm=auto")
    lowest = min(
        (2, 4, 8, 16, 32),
        key=lambda rank: sum(
            losses_of({"lora": {"r": rank}, "seed": s, "eval": {"rows": "heldout"}}, flat).sum()
            for s in (0, 1, 2)
        ),
    )
    assert {rank for rank, _ in confirming(tmp_path)} == {2, lowest} | (
        {4} if lowest == 2 else set()
    )
    sweep(Workers(falling), "study=other", "lora.r=4,16", "seed=0,1,2", "confirm=auto")
    rows = read_study(StudyFolder(tmp_path, "other")).confirmation
    assert [row.settings["lora.r"] for row in rows] == [4, 4, 16, 16]


def test_seeds_stay_fresh_when_a_study_grows(tmp_path: Path, sweep: Callable[..., str]) -> None:
    sweep(Workers(), *RANKS)
    sweep(Workers(), "lora.r=4,16", "seed=3,4", "confirm=off")
    assert "provisional" in read(StudyFolder(tmp_path, "s"))  # no longer fresh
    workers = Workers()
    assert "fresh seeds, its loss" in sweep(workers, "lora.r=4,16", "seed=3,4", "confirm=auto")
    assert {seed for _, seed in confirming(tmp_path)} == {5, 6}


def test_a_search_by_loss_ends_with_a_confirmation(tmp_path: Path) -> None:
    class Measured(StreamWorkers):
        """Run a stream like the base class; complete a fixed pack immediately."""

        others = Workers(falling)

        def start(self, pack: Pack) -> Any:
            return super().start(pack) if pack.read().stream else self.others.start(pack)

    workers = Measured()
    settings = {"n_trials": 4, "at_once": 4, "sampler": "random"}
    searches.search(tmp_path, workers, *searches.SPACE, "confirm=auto", **settings)
    assert workers.others.packs == []  # these workers write no losses: nothing is recommended
    for trial in searches.trials(tmp_path):
        trial.result_file.unlink()
        workers.others._do(Task(trial, trial, ()))
    searches.search(tmp_path, workers, *searches.SPACE, "confirm=auto", **settings)
    (pack,) = workers.others.packs
    assert 2 <= len(pack) <= 6 and len(confirming(tmp_path)) == len(pack)
    searches.search(tmp_path, workers, *searches.SPACE, "confirm=auto", **settings)
    assert len(workers.others.packs) == 1


# ---- what the report says ----------------------------------------------------------------------


def test_confirmed_numbers_are_those_of_the_confirmation_rows(
    tmp_path: Path, sweep: Callable[..., str]
) -> None:
    text = sweep(Workers(), *RANKS)
    losses = {}
    for rank in (4, 16):
        configs = [
            {"lora": {"r": rank}, "seed": seed, "eval": {"rows": "confirmation"}}
            for seed in (3, 4)
        ]
        sums = [losses_of(each, flat).sum() for each in configs]
        losses[rank] = np.mean(sums) / TOKENS.sum()
    assert "r=4 and r=16 differ by less than 0.02 nats per token" in text
    assert f"its loss is {losses[4]:.3f}, " in text
    assert abs(losses[4] - losses[16]) < 0.0005
    assert "0.000 nats per token lower or higher than that of r=16 (95 % " in text


def test_nothing_is_confirmed_without_the_rival(tmp_path: Path, sweep: Callable[..., str]) -> None:
    def is_lost(config: dict[str, Any]) -> bool:
        return bool(config["eval"]["rows"] == "confirmation" and config["lora"]["r"] == 16)

    text = sweep(Workers(killed=is_lost), *RANKS)
    assert "these rows show" not in text and "the fresh runs of its rivals have no score" in text


def test_a_claim_that_turns_on_other_rows_is_believed_no_more(sweep: Callable[..., str]) -> None:
    """The held-out rows show rank 16 to be better, fresh ones the reverse; rank 4 is cheaper."""

    def shaky(rank: int, confirms: bool) -> float:
        return 2.0 + 0.03 * (rank == 4) - 0.045 * (confirms and rank == 4)

    text = sweep(Workers(shaky), *RANKS)
    assert "Take r=4." in text and ", and it is the cheaper one." in text
    assert "this contradicts the held-out rows, which recommend r=16" in text


@pytest.mark.parametrize(
    ("fresh", "take", "said"),
    [
        (0.035, "Take r=16.", "the held-out rows alone could not tell r=4 and r=16 apart"),
        (0.008, "Take r=4.", "these rows show that r=4 and r=16 differ by less than 0.02"),
    ],
)
def test_where_nothing_was_shown_other_rows_decide(
    sweep: Callable[..., str], fresh: float, take: str, said: str
) -> None:
    """Rank 4 is cheaper and looks as good; on fresh rows it is worse by so much."""

    def shaky(rank: int, confirms: bool) -> float:
        return 2.0 + fresh * (confirms and rank == 4)

    text = sweep(Workers(shaky), *RANKS)
    assert take in text and said in text


def test_a_contradicting_confirmation_changes_the_recommendation(
    sweep: Callable[..., str],
) -> None:
    def turns(rank: int, confirms: bool) -> float:
        return (2.5 if confirms else 1.9) if rank == 4 else 2.0

    text = sweep(Workers(turns), *RANKS)
    assert "Take r=16." in text
    assert "this contradicts the held-out rows, which recommend r=4" in text
    assert "0.500 nats per token lower than that of r=4 (95 % interval" in text
    assert "Take r=4" not in text


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ({(4, 3)}, "Take r=4; but 1 of 2 fresh runs of r=4 ended without a score."),
        ({(4, 3), (4, 4)}, "because 2 of 2 fresh runs of r=4 ended without a score."),
        ({(16, 3)}, "1 of 2 fresh runs of r=16 ended without a score."),
        ({(16, 3), (16, 4)}, "the fresh runs of its rivals have no score."),
    ],
)
def test_a_fresh_run_without_a_score_confirms_nothing(
    sweep: Callable[..., str], lost: set[tuple[int, int]], said: str
) -> None:
    """The runs that are left show the same as the held-out rows, or are better."""

    def is_lost(config: dict[str, Any]) -> bool:
        confirms = config["eval"]["rows"] == "confirmation"
        return bool(confirms and (config["lora"]["r"], config["seed"]) in lost)

    text = sweep(Workers(killed=is_lost), *RANKS)
    assert said in text and "these rows show" not in text and "confirm that" not in text


def test_each_rival_is_compared_on_all_seeds_that_it_shares(sweep: Callable[..., str]) -> None:
    """Two seeds confirm ranks 4 and 16; then rank 2 joins, is cheapest, and has six."""

    def steep(rank: int, confirms: bool) -> float:
        return 2.0 + 0.015 * (rank == 2)

    sweep(Workers(steep), *RANKS)
    text = sweep(Workers(steep), "lora.r=2,4,16", "seed=0,1,2", "confirm=6")
    assert "with 6 fresh seeds" in text


def test_confirmation_trials_stand_apart(tmp_path: Path, sweep: Callable[..., str]) -> None:
    """They enter no comparison, add no column, and have a table of their own."""
    sweep(Workers(), "lora.r=4,16", "confirm=off")
    study = StudyFolder(tmp_path, "s")
    before = [(row.trial.key, row.swept) for row in read_study(study).trials]
    told = read(study)
    sweep(Workers(), "lora.r=4,16", "confirm=auto")
    assert [(row.trial.key, row.swept) for row in read_study(study).trials] == before
    why, _, rest = told.partition("Why: its held-out ")[2].partition(" How sure: provisional")
    losses = rest.partition("Held-out loss, ")[2].partition(" Cost: ")[0]
    assert why in read(study) and f"{losses} These rows made the choice." in read(study)
    assert rest.partition("Loss in nats")[2] in read(study)
    rows = read_study(study)
    write_table(study, rows)
    record = json.loads(study.metrics_file.read_text())
    assert (len(record["trials"]), len(record["confirmation"])) == (2, 4)
    assert record["confirmation"][0]["swept"] == {"lora.r": 4, "seed": 1}
    table, _, apart = study.table_file.read_text().partition("Confirmation trials")
    assert (table.count("done"), apart.count("done")) == (2, 4)
    page = write_report(study, Analysis(rows))
    text = page.read_text(encoding="utf-8")
    assert "<h3>Confirmation</h3>" in text and text.count("-confirmation-") >= 4


@pytest.mark.parametrize(
    ("typed", "again", "reads", "judged", "pages"),
    [
        (["confirm=off"], False, 1, 1, 1),
        # before the confirmation is trained, for the speed of its trials, and after it
        (["confirm=auto"], False, 3, 2, 1),
        (["confirm=auto"], True, 1, 1, 0),  # nothing is left to do: the table alone
    ],
)
def test_a_command_reads_its_study_once(
    sweep: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    typed: list[str],
    again: bool,
    reads: int,
    judged: int,
    pages: int,
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    if again:
        sweep(Workers(), *RANKS[:2], *typed)
    monkeypatch.setattr(trial_rows, "_read_trials", counted("read", trial_rows._read_trials))
    monkeypatch.setattr(analysis, "make_comparison", counted("compare", analysis.make_comparison))
    monkeypatch.setattr(analysis, "main_effects", counted("judge", analysis.main_effects))
    monkeypatch.setattr(sweep_run, "_write_report", counted("page", write_page))
    sweep(Workers(), *RANKS[:2], *typed)
    assert calls == Counter(read=reads, compare=judged, judge=1, page=pages)


CONFIRM, NEITHER = "these rows confirm that A", "these rows neither confirm nor contradict that A"


@pytest.mark.parametrize(
    ("claim", "is_cheaper", "interval", "said", "is_settled", "overturns"),
    [
        ("better", False, (-0.3, -0.1), f"{CONFIRM} is better", True, False),
        ("better", False, (-0.3, 0.1), f"{NEITHER} is better", False, False),
        ("better", False, (0.01, 0.1), "doubtful: the held-out rows showed", False, False),
        ("better", True, (0.01, 0.1), "doubtful: the held-out rows showed", False, True),
        ("better", False, (0.03, 0.1), "doubtful: the held-out rows showed", False, True),
        ("close", False, (-0.3, 0.01), f"{CONFIRM} is not worse", True, False),
        ("close", False, (0.01, 0.1), f"{NEITHER} is not worse", False, False),
        ("close", False, (0.03, 0.1), "doubtful: the held-out rows showed", False, True),
        ("", False, (-0.3, -0.1), "these rows show that A is better than B", True, False),
        ("", False, (-0.3, 0.01), "these rows show that A is not worse than B", True, False),
        ("", False, (0.005, 0.01), "these rows show that A and B differ by less", True, False),
        ("", False, (-0.3, 0.1), "these rows cannot tell A and B apart either", False, False),
        ("", False, (0.01, 0.1), "these rows cannot tell", False, True),
        ("", True, (-0.3, -0.1), "these rows show that A is better than B", True, False),
        ("", True, (-0.3, 0.01), "these rows cannot tell A and B apart either", False, False),
        ("", True, (-0.01, 0.01), "these rows show that A and B differ by less", True, True),
    ],
)
def test_only_what_new_rows_show_is_said_and_decides(
    claim: str,
    is_cheaper: bool,
    interval: tuple[float, float],
    said: str,
    is_settled: bool,
    overturns: bool,
) -> None:
    """A is recommended, B the rival, which may be cheaper; the interval is that of A minus B."""
    a: Any = SimpleNamespace(beside=lambda _: "A", is_best=claim != "close", is_within_margin=True)
    p_worse = 0.0 if claim == "better" else 1.0
    b: Any = SimpleNamespace(beside=lambda _: "B", is_best=claim == "close", p_worse=p_worse)
    estimate: Any = SimpleNamespace(interval=lambda: interval, difference=sum(interval) / 2)
    rival = RivalResult(RivalPair(a, b, is_cheaper), [], estimate)
    assert rival.outcome(0.02, "0.02").startswith(said)
    assert (rival.is_settled(0.02), rival.overturns(0.02)) == (is_settled, overturns)
    lost = RivalResult(RivalPair(a, b, is_cheaper), [], estimate, lost=1)
    assert not lost.overturns(0.02) and "without a score" in lost.outcome(0.02, "0.02")


def test_the_confirmation_measures_the_luck_of_a_run_as_well() -> None:
    """Assumed: a variance of 0.0018 with 4 degrees of freedom; measured: 0.02 with 2."""
    ours: Any = [SimpleNamespace(loss=loss) for loss in (2.0, 2.2, 2.4)]
    theirs: Any = [SimpleNamespace(loss=loss) for loss in (2.0, 2.0, 2.0)]
    luck = with_own(Luck(0.0018, 4.0), ours, theirs)
    assert luck.variance == pytest.approx((4 * 0.0018 + 2 * 0.04) / 6)
    assert (luck.freedom, luck.known) == (6.0, 4.0)
