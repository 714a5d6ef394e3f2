"""`python -m tinyllama_lab data` shows what a command would train on, without training."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid
from tests.driver.test_cli import command, made
from tests.made_tokenizers import MADE
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.data_report import TOKENS_SHOWN, report
from tinyllama_lab.core.dataset.dataset import DataCache, changes
from tinyllama_lab.core.dataset.example import token_text
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import ConfigError, DataError, LabError
from tinyllama_lab.sweep.check import single_values
from tinyllama_lab.sweep.plan import check_cells


def written(folder: Path, count: int = 40, **changes: Any) -> Path:
    """Write a file whose row 3 has no response and whose row 5 has a long one."""
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}."} for n in range(1, count + 1)]
    rows[2]["response"] = ""
    rows[4]["response"] = "word " * 200
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({**row, **changes}) + "\n" for row in rows))
    return path


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    raw = grid.plain("model=tiny_random", "data=file")
    data = {**raw["data"], "path": str(path), "eval_n": 4, "max_length": 128, **changes}
    model = {**raw["model"], "identity": "tiny_random-1"}
    return {"model": model, "data": data, "eval": raw["eval"]}


def shown(*configs: dict[str, Any], is_terminal: bool = False) -> tuple[str, list[LabError]]:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=is_terminal, color_system=None)
    refused = report(configs, console)
    return text.getvalue(), refused


def line(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{name}\s+(.*)$", text, flags=re.MULTILINE)
    return str(found)


def test_rows_lengths_and_fingerprints_are_those_of_a_trial(
    tmp_path: Path, tiny_base: Base
) -> None:
    asked = settings(written(tmp_path))
    text, refused = shown(asked)
    facts = DataCache(tiny_base.tokenizer).prepare(part(DataConfig, asked["data"])).facts
    assert refused == [] and line(text, "data").endswith("mine.jsonl: 40 rows")
    for name, key in (("training", "train"), ("held out", "eval")):
        begin = f"{facts[f'{key}_rows']} rows, {facts[f'{key}_tokens']:,} tokens"
        assert line(text, name).startswith(begin)
        assert f"{facts[f'{key}_label_tokens']:,} of them supervised" in line(text, name)
    assert line(text, "fingerprints") == (
        f"training {facts['train_fingerprint']}, held out {facts['eval_fingerprint']}"
    )
    assert line(text, "left out") == "1 of 40 rows left out: 1 empty response (first: row 3)"
    cut = facts["cut_rows"] + facts["eval_cut_rows"]
    assert cut == 1 and line(text, "cut") == "1 answer is cut at data.max_length=128"


def test_three_rows_are_shown_with_what_is_supervised(tmp_path: Path) -> None:
    text, _ = shown(settings(written(tmp_path)))
    rows = re.findall(
        r"^row (\d+)\n(.*?)\ntokens: ([^\n]*)$", text, flags=re.DOTALL | re.MULTILINE
    )
    assert len(rows) == 3
    for number, as_text, as_tokens in rows:
        question, answer = f"Question {number}?", f"Answer {number}.</s>"
        if number == "5":
            continue  # the long one
        assert as_text == f"<|user|>{question}</s>\n<|assistant|>>>>{answer}<<<"
        inside = as_tokens.partition(">>> ")[2].partition(" <<<")[0]
        pieces = re.findall(r"\d+ '(.*?)'(?= |$)", inside)
        assert "".join(pieces) == answer
        assert len(pieces) == len(answer) - len("</s>") + 1  # a byte is a token, the end is one


def test_the_rows_that_are_shown_differ(tmp_path: Path) -> None:
    """A row of another form is among them, however many rows are alike."""
    rows = [
        {
            "instruction": f"Do {n}",
            "input": f"with {n}" * (n == 30),
            "output": "good " * (n % 9 + 2),
        }
        for n in range(60)
    ]
    rows[17]["output"], rows[44]["output"] = "a", "long " * 40
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = settings(path, eval_n=2, max_length=1000)
    text, _ = shown(asked)
    numbers = [int(number) for number in re.findall(r"^row (\d+)$", text, flags=re.MULTILINE)]
    assert numbers == [18, 31, 45]
    assert shown(asked)[0] == text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if not row["input"]))
    text, _ = shown(asked)
    alike = re.findall(r"^row (\d+)$", text, flags=re.MULTILINE)
    assert len(set(alike)) == 3 and {"18", "44"} <= set(alike)


def test_the_command_says_what_is_not_used(tmp_path: Path) -> None:
    path = written(tmp_path, split="train", topic="x")
    columns = {**settings(path)["data"]["columns"], "prompt": "prompt", "response": "response"}
    text, _ = shown(settings(path, columns=columns))
    assert (
        "data: recognised the split in 'split', besides the columns that are set; not used: topic"
    ) in text


SAID = ("a ticket costs nine euros", "we leave at noon today", "eat until ten in the hall")
UNCONFIRMED: list[tuple[Callable[[int], dict[str, str]], str]] = [
    (
        lambda n: {"prompt": f"q {n}", "response": f"{SAID[n % 3]} {n}"},
        "each of the 4 rows in reserve belongs together with a held-out row (its group, its "
        "question or much the same answer)",
    ),
    (
        lambda n: {"prompt": f"q {n}", "response": f"{n}", "split": "val" if n < 4 else "train"},
        "all rows that are marked as held out are scored, and none is marked as test",
    ),
    (
        lambda n: {
            "prompt": f"q {n} {'word ' * 200 * (n < 4)}",
            "response": f"{n}",
            "split": "test" if n < 4 else "train",
        },
        "none of the 4 rows marked as test is usable once it is tokens",
    ),
]


@pytest.mark.parametrize(("row", "why"), UNCONFIRMED)
def test_why_no_row_confirms_is_said(
    tmp_path: Path, row: Callable[[int], dict[str, str]], why: str
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(40)))
    assert line(shown(settings(path))[0], "confirmation") == f"0 rows: {why}"


def test_the_rows_of_each_reason_are_listed(tmp_path: Path) -> None:
    path = written(tmp_path)
    rows = path.read_text().splitlines()
    rows += [rows[2].replace("3", "x"), rows[6], rows[7]]
    path.write_text("\n".join(rows))
    text, _ = shown(settings(path))
    lines = [each.strip() for each in text.splitlines()]
    assert "empty responses: rows 3, 41" in lines
    assert "duplicates: rows 42 (same as 7), 43 (same as 8)" in lines


def test_rows_that_are_all_too_long_are_refused_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "word " * 50 + str(n), "response": "r"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, (error,) = shown(settings(path, max_length=16))
    assert str(error).startswith(
        "data=file has no usable row: all are unusable once they are tokens"
    )
    assert len(error.problems) == 1 and "data.max_length=" in str(error)
    assert "add rows" not in text


def test_all_problems_of_the_file_are_reported_as_before_a_sweep(tmp_path: Path) -> None:
    path = written(tmp_path, split="tset")
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError) as caught:
        shown(settings(path))
    not_json, split = caught.value.problems
    assert "line 41 must be valid JSON" in not_json and "got 'tset' (39 rows" in split


def test_a_refusal_is_printed_once(tmp_path: Path) -> None:
    text, refused = shown(settings(written(tmp_path), n=900))
    assert len(refused) == 1 and "needs 900" not in text  # the status line says it
    both, refused = shown(settings(written(tmp_path), n=900), settings(written(tmp_path)))
    assert len(refused) == 1 and both.count("needs 900") == 1


@pytest.mark.parametrize("name", ["TinyLlama", "Qwen"])
def test_a_token_that_is_part_of_a_character_is_shown_as_bytes(name: str) -> None:
    tokenizer = MADE[name]()
    ids = tokenizer("a€😀", add_special_tokens=False)["input_ids"]
    literals = [ast.literal_eval(token_text(token, tokenizer)) for token in ids]
    assert b"\xe2" in literals and b"\x80" in literals
    text = b"".join(each if isinstance(each, bytes) else each.encode() for each in literals)
    assert text.removeprefix(b" ") == "a€😀".encode()


def test_of_a_long_answer_the_ends_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"q {n}", "response": f"{n}" * 100} for n in range(1, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = shown(settings(path, max_length=1000))
    left_out = re.search(r"\.\.\. (\d+) tokens \.\.\.", text)
    assert left_out and int(left_out[1]) in {
        100 + 1 - 2 * TOKENS_SHOWN,
        200 + 1 - 2 * TOKENS_SHOWN,
    }


def test_data_that_cannot_be_trained_on_is_shown_and_refused(tmp_path: Path) -> None:
    text, (error,) = shown(settings(written(tmp_path), n=50))
    assert line(text, "data") and "data.n=50 needs 50 usable training rows" in str(error)


@pytest.mark.parametrize("style", ["chat", "instruction_response"])
@pytest.mark.parametrize("split", ["", "train", "validation", "test"])
@pytest.mark.parametrize(
    ("count", "every", "changes"),
    [
        (60, 3, {"eval_n": 16}),
        (70, 7, {"eval_n": 16}),
        (40, 2, {"eval_n": 4}),
        (64, 5, {"eval_n": 6, "n": 11}),
        (64, 4, {"eval_n": 6, "n": 500}),  # refused, and shown all the same
        (41, 41, {"eval_n": 4, "n": 1}),
        (45, 3, {"eval_n": 16}),
    ],
)
def test_every_row_is_in_one_place(
    tmp_path: Path, style: str, split: str, count: int, every: int, changes: dict[str, Any]
) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {
            "question": f"Place {n} " + "word " * 900 * (n % every == 0),
            "answer": f"good {n}" if n % 10 else "",
            "split": (split if n % 4 else "train") if split else "",
        }
        for n in range(count)
    ]
    rows += rows[1:3]  # duplicates
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = shown(settings(path, style=style, **changes))
    parts = ("training", "held out", "confirmation")
    numbers = [int(line(text, name).partition(" ")[0]) for name in parts]
    is_marked = split in ("validation", "test")
    kept = "held-out rows that are not scored" if is_marked else "rows in reserve"
    reserve, beyond = re.findall(rf"(\d+) (?:{kept}|beyond)", text + " 0 beyond")[:2]
    left_out, of = re.findall(r"(\d+) of (\d+) rows left out", text)[0]
    assert int(of) == count + 2 and text.count("rows left out") == 1
    assert sum(numbers) + int(reserve) + int(beyond) + int(left_out) == count + 2
    assert ("beyond" in text) == ("n" in changes)


def test_what_prevents_training_is_reported_first(tmp_path: Path) -> None:
    asked = settings(written(tmp_path, 20), eval_n=19, n=1)
    text, (error,) = shown(asked, is_terminal=True)
    assert "data.eval_n=19" in str(error)
    assert " ".join(text.split()).startswith(f"error: {' '.join(str(error).split())} data ")


def test_a_row_that_loses_white_space_is_said_to_be_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"text": "", "prompt": f"q {n}", "response": f"a {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "changed" not in shown(settings(path))[0]
    assert list(changes(0, 0, 40)) == []
    assert list(changes(0, 1, 40)) == [
        "in 1 of 40 rows an answer begins with white space, which the tokenizer would join to "
        "the prompt: these rows are used, without that white space"
    ]


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text, _ = shown(settings(written(tmp_path, prompt="\x1b[31mred\x07")))
    assert "\x1b" not in text and "\\x1b[31mred\\x07" in text


def test_only_sweeps_over_model_and_data_are_gone_through() -> None:
    found = single_values(["lora.r=2,4", "data.n=8,16", "model=tiny_random", "seed=range(0,3)"])
    assert found["data.n"] == ["data.n=8", "data.n=16"] and len(found["seed"]) == 3
    assert found["model"] == ["model=tiny_random"]
    assert single_values(["experiment=quickstart"])["lora.r"] == ["lora.r=4", "lora.r=16"]
    search = single_values(["experiment=search_travel"])
    assert search["train.lr"] == []  # an interval


@pytest.mark.slow
def test_the_command_shows_and_makes_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    small = ["model=tiny_random", "data=file", "data.path=mine.jsonl", "data.eval_n=4"]
    ended = command(tmp_path, "data", "-m", *small, "data.n=8,16", "lora.r=2,4", "seed=0,1,2")
    assert ended.code == 0, ended.error
    assert re.findall(r"^training\s+(\d+) rows", ended.out, flags=re.MULTILINE) == ["8", "16"]
    assert "recognised prompts and responses" in ended.out
    assert "torch" not in ended.modules and made(tmp_path) == {"mine.jsonl"}
    ended = command(tmp_path, "data", *small, "data.n=900")
    assert ended.code == 2 and "data.n=900 needs 900" in ended.error
    assert "training" in ended.out and "Traceback" not in ended.error


@pytest.mark.slow
def test_a_refusal_of_data_names_the_command_that_shows_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    typed = ["model=tiny_random", "data=file", f"data.path={path}", "data.n=900", "lora.r=2"]
    with pytest.raises(ConfigError) as caught:
        check_cells([dataclasses.replace(grid.COMPOSER(typed), overrides=tuple(typed))])
    said = str(caught.value).splitlines()[-1].partition(": ")[2]
    words = shlex.split(said)
    assert words[:4] == ["python", "-m", "tinyllama_lab", "data"] and "lora.r=2" not in words
    done = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2 and "mine.jsonl: 40 rows" in done.stdout


def test_other_refusals_do_not_name_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check_cells([grid.COMPOSER(["model=tiny_random", "data=travel", "lora.targets=[x_proj]"])])
    assert "tinyllama_lab data" not in str(caught.value)


def test_a_missing_optional_package_is_not_told_as_a_failed_installation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
    logger.warning("anything else")
    assert [record.getMessage() for record in caplog.records] == ["anything else"]
