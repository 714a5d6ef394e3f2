"""The evaluation of the base: looked up, made once, and kept if it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from filelock import FileLock

from tests.packs import QUIET, Lab, events, quickly, result, states
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.evaluation.run import score
from tinyllama_lab.core.training import finish
from tinyllama_lab.errors import BaseError, StoppedError
from tinyllama_lab.study.trial import Result, State


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def make(lab: Lab, changes: dict[str, Any], place: str) -> Result:
    """The evaluation of the base alone, as a pool has it made."""
    context = lab.context()
    bases, engine = Bases(context), PackedEngine(lab.base)
    trial = lab.trial({**QUIET, **changes})
    base, science = lab.base_trial(trial, place), part(Science, trial.read_config())
    with bases.missing([(base, science)]) as subjects:
        score(context, engine, subjects)
        bases.commit(subjects)
    return bases.result_of(base)


def test_the_base_is_scored_whatever_a_trial_wants_to_train_on(lab: Lab) -> None:
    plain = make(lab, {}, "one")
    found = make(lab, {"data.n": 10**6, "data.balance_by": "intent"}, "two")
    assert found.data == plain.data and found.metrics["eval/loss"] == plain.metrics["eval/loss"]
    assert not {"train_rows", "train_tokens"} & found.data.keys()
    assert found.model["trainable_params"] == 0


def test_another_pack_takes_what_is_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run([lab.trial(QUIET)])
    sizes: list[int] = []

    def watched(context: Any, engine: Any, subjects: Any) -> None:
        sizes.append(len(subjects))
        score(context, engine, subjects)

    monkeypatch.setattr(finish, "score", watched)
    found, other = lab.run([lab.trial({**QUIET, "seed": s}) for s in (1, 2)])
    assert sizes == [2]  # the base is not among them
    assert found.metrics["base/loss"] == other.metrics["base/loss"]


def test_trials_scored_on_other_rows_have_a_base_of_their_own(lab: Lab) -> None:
    found = lab.run([lab.trial({**QUIET, "data.eval_n": n}) for n in (3, 4)])
    assert len({each.metrics["base/loss"] for each in found}) == 2
    assert [each.data["eval_rows"] for each in found] == [3, 4]


def test_a_base_of_another_precision_is_scored_again(lab: Lab) -> None:
    trial = lab.trial(QUIET)
    lab.run([trial])
    base = lab.base_trial(trial)
    other = result(base)
    other.environment["dtype"] = "bfloat16"
    base.commit(other)
    lab.run([lab.trial({**QUIET, "seed": 3})])
    assert result(base).environment["dtype"] == "float32"
    assert states(base) == ["running", "done", "running", "done"]


def test_a_base_that_was_scored_on_other_tokens_is_scored_again(lab: Lab) -> None:
    """A chat template may tell the date: its tokens are others on another day."""
    first = lab.trial(QUIET)
    (before,) = lab.run([first])
    base = lab.base_trial(first)
    right = result(base)
    old = result(base)
    old.data["eval_fingerprint"] = "another"
    old.metrics["eval/loss"] = 99.0
    base.commit(old)
    (found,) = lab.run([lab.trial({**QUIET, "seed": 3})])
    assert found.state == State.DONE
    assert result(base).data["eval_fingerprint"] == before.data["eval_fingerprint"]
    assert found.metrics["base/loss"] == right.metrics["eval/loss"]
    assert states(base) == ["running", "done", "running", "done"]


def raising(error: Exception, when: Callable[[Any], bool]) -> Callable[..., None]:
    def fails(context: Any, engine: Any, subjects: Any) -> None:
        if any(when(subject) for subject in subjects):
            raise error
        score(context, engine, subjects)

    return fails


@pytest.mark.parametrize(
    ("error", "ended", "message"),
    [
        (ZeroDivisionError("odd"), State.FAILED, "the base could not be scored: odd"),
        (
            MemoryError("4 GiB"),
            State.OOM,
            "the base must fit into memory to be scored, got: 4 GiB",
        ),
    ],
)
def test_a_base_that_cannot_be_scored_fails_its_own_trials_alone(
    error: Exception, ended: State, message: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, fine = (lab.trial({**QUIET, "data.eval_n": n}) for n in (4, 3))
    bad = lab.base_trial(mine)
    odd = raising(error, lambda subject: subject.trial == bad)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "score", odd)
        found, other = lab.run([mine, fine])
    assert (found.state, other.state) == (ended, State.DONE)
    assert found.error is not None and found.error["class"] == "no_base"
    assert found.error["message"].startswith(message)
    assert bad.read_result() == (None, None)  # the next command tries it again
    (later,) = lab.run([lab.trial({**QUIET, "seed": 5})])
    assert later.state == State.DONE and result(bad).state == State.DONE


def test_a_failure_is_remembered(lab: Lab) -> None:
    context = lab.context()
    bases, trial = Bases(context), lab.trial({**QUIET, "data.max_length": 8})
    base, science = lab.base_trial(trial), part(Science, trial.read_config())
    for _ in range(2):
        with bases.missing([(base, science)]) as subjects:
            assert subjects == []  # its data cannot be had
        with pytest.raises(BaseError, match="could not be scored: data=travel has no usable row"):
            bases.result_of(base)
    assert len(events(base, "state")) == 1


def test_one_that_another_process_scores_is_waited_for(lab: Lab) -> None:
    trial = lab.trial(QUIET)
    base, science = lab.base_trial(trial), part(Science, trial.read_config())
    base.folder.mkdir(parents=True)
    calls: list[int] = []
    context = lab.context(lambda: bool(calls.append(1)) or len(calls) > 1)
    with FileLock(base.folder / "base.lock"), pytest.raises(StoppedError):  # the other process
        with Bases(context).missing([(base, science)]):
            raise AssertionError("it was taken")
    assert len(calls) == 2
    with Bases(lab.context()).missing([(base, science)]) as subjects:
        assert len(subjects) == 1
