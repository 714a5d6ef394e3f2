"""The commands of `python -m tinyllama_lab.deploy`, on an adapter of the tiny base."""

from __future__ import annotations

import io
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from tinyllama_lab.deploy.__main__ import main
from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.forms import Measured, Task
from tinyllama_lab.errors import ConfigError, ModelError, StudyError
from tinyllama_lab.study.exports import ExportRow, Exports
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder, trial_key

GREEDY = ["tokens=6", "device=cpu"]


@pytest.fixture(scope="module")
def study(another_lab: Any) -> StudyFolder:
    """Two ranks, trained on the tiny base."""
    study = StudyFolder(another_lab.folder / "sweeps", "tiny")
    for rank in (2, 4):
        config = another_lab.configure({"lora.r": rank, "train.lr": 0.05})
        trial = TrialFolder(study.trials_dir / f"r{rank}-{trial_key(config)}")
        trial.write_config(config)
        another_lab.run([trial])
    return study


def run(study: StudyFolder, *arguments: str) -> None:
    main([*arguments[:1], f"sweeps_dir={study.root}", "study=tiny", *arguments[1:]])


def test_one_answer_goes_to_standard_output_and_all_else_to_standard_error(
    study: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(study, "chat", "trial=r=4", "--once", "Book a room", *GREEDY)
    first = capsys.readouterr()
    run(study, "chat", "trial=r=4", "--once", "Book a room", *GREEDY)
    assert capsys.readouterr().out == first.out
    assert "study tiny: r=4" in first.err
    assert re.search(r"\(\d+ tokens, .*first after \d+ ms, [\d,]+ MiB\)", first.err)
    assert "study" not in first.out
    assert "(cut at tokens=6; for more: tokens=12)" in first.err


def test_a_conversation_switches_between_adapters_and_the_base(
    study: StudyFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/adapter r=2", "/compare", "Book a room", "/base", "Book a room", "/nonsense"]
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("\n".join([*lines, "/adapter r=9", "/quit", "x"]))
    )
    run(study, "chat", "trial=r=4", *GREEDY)
    printed = capsys.readouterr()
    assert "answers come from r=2" in printed.err
    assert "[base]" in printed.out and "[r=2]" in printed.out
    of_base = printed.out.split("[base]\n")[1].split("[r=2]")[0]
    assert printed.out.endswith(of_base)  # the same alone, in a new conversation
    assert "/adapter r=16" in printed.err  # the help, after an unknown command
    assert "error: trial='r=9' must be" in printed.err
    assert printed.err.count("tokens") >= 3


def test_an_export_never_replaces_the_working_folder(
    study: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for to in (".", "..", str(tmp_path)):
        with pytest.raises(StudyError, match="a folder of its own"):
            run(study, "merge", "trial=r=4", f"to={to}", "force=true")
    assert (tmp_path / "here").is_dir()


@pytest.mark.parametrize("to", ["{}/file", "{}/file/below", "/proc/model"])
@pytest.mark.parametrize("force", ["true", "false"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(
    study: StudyFolder, tmp_path: Path, to: str, force: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StudyError, match=r"a merged model .*, got .*; set another to="):
        run(study, "merge", "trial=r=4", f"to={to.format(tmp_path)}", f"force={force}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("holds", ["thesis.tex", "config.json and photos/", "notes.txt"])
def test_force_replaces_an_earlier_export_and_no_other_folder(
    study: StudyFolder, tmp_path: Path, holds: str
) -> None:
    """The folder is deleted first, and a user may type `to=.` or the name of a home folder."""
    for name in holds.split(" and "):
        path = tmp_path / "mine" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("mine")
    for force in ("force=true", "force=false"):
        with pytest.raises(StudyError, match="nothing but an earlier export, and .* holds"):
            run(study, "merge", "trial=r=4", f"to={tmp_path / 'mine'}", force)
    assert len([*(tmp_path / "mine").iterdir()]) == len(holds.split(" and "))


def test_merge_and_gguf_write_what_transformers_and_llama_cpp_read(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(study, "merge", "trial=r=4", f"to={tmp_path / 'merged'}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == "llama"
    with pytest.raises(StudyError, match="exists; set force=true"):
        run(study, "merge", "trial=r=4", f"to={tmp_path / 'merged'}")
    run(study, "merge", "trial=r=4", f"to={tmp_path / 'merged'}", "force=true")
    run(study, "gguf", "trial=r=4", "types=q8_0")
    written = [line.removeprefix("written: ") for line in capsys.readouterr().out.splitlines()]
    assert GGUFReader(written[-2]).tensors
    modelfile = Path(written[-1])
    assert modelfile.read_text().startswith("FROM ./model-q8_0.gguf\n")
    assert (modelfile.parent / "model-q8_0.gguf").is_file()
    shutil.rmtree(modelfile.parent)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["chat", "tokens=0"], "tokens must be an integer from 1, got '0'"),
        (["chat", "temperature=hot"], "temperature must be a number from 0, got 'hot'"),
        (["chat", "temperature=nan"], "temperature must be a number from 0, got 'nan'"),
        (["chat", "types=f16"], "this command takes .*got 'types=f16'"),
        (["gguf", "types=q3"], "types must be of f16, q8_0, q4_0, q4_k_m, lora, got 'q3'"),
        (["gguf", "base=lora"], "base must be f16 or q8_0 or q4_0 or q4_k_m, got 'lora'"),
        (["gguf", "types="], "types must name a type of GGUF file"),
        (["merge", "into=4bit"], "into must be dequantized or original, got '4bit'"),
        (["merge", "force=yes"], "force must be true or false, got 'yes'"),
        (["chat", "temperature=inf"], "temperature must be a number from 0, got 'inf'"),
        (["chat", "device=tpu", "--once", "x"], "device must be one of auto, cpu, cuda"),
        (["merge", "device=cpu"], "this command takes .*got 'device=cpu'"),
        (["chat", "talk"], "this command takes .*got 'talk'"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(
    study: StudyFolder, arguments: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        run(study, *arguments)


def test_a_mistyped_command_is_told_the_commands() -> None:
    with pytest.raises(ConfigError, match="must be one of chat, serve, merge.*got 'mrege'"):
        main(["mrege"])


def test_without_llama_cpp_nothing_is_begun_that_needs_it(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama_lab.deploy.llama_cpp.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llama-cpp-python"):
        main([f"sweeps_dir={study.root}", "study=tiny", "trial=r=4"])
    assert not any(study.trials_dir.glob("*/deploy"))


def test_without_llama_cpp_only_types_of_its_own_quantizer_are_refused(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama_lab.deploy.llama_cpp.find_spec", lambda name: None)
    problem = "installed to write q4_k_m.*pip install.*choose of f16, q8_0, q4_0"
    for arguments in (["types=f16,q4_k_m"], ["types=lora", "base=q4_k_m"]):
        with pytest.raises(ModelError, match=problem):
            run(study, "gguf", "trial=r=4", *arguments)
    assert not any(study.trials_dir.glob("*/deploy")) and not study.deploy_dir.exists()


def test_adapters_alone_share_one_file_of_their_base(
    study: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(study, "gguf", "trial=r=2", "types=lora")
    (base,) = study.deploy_dir.glob("*.gguf")
    written = base.stat().st_mtime_ns
    capsys.readouterr()
    run(study, "gguf", "trial=r=4", "types=lora")
    assert [path.stat().st_mtime_ns for path in study.deploy_dir.glob("*.gguf")] == [written]
    paths = [line.removeprefix("written: ") for line in capsys.readouterr().out.splitlines()]
    adapter, shared, modelfile = map(Path, paths)
    assert shared == base
    assert GGUFReader(adapter).fields["adapter.type"].contents() == "lora"
    assert modelfile.read_text().splitlines()[:2] == [
        f"FROM {base.resolve()}",
        "ADAPTER ./adapter.gguf",
    ]
    with pytest.raises(StudyError, match="adapter.gguf exists; set force=true"):
        run(study, "gguf", "trial=r=4", "types=lora")
    for folder in (study.deploy_dir, *study.trials_dir.glob("*/deploy")):
        shutil.rmtree(folder)


def test_base_and_adapter_read_their_own_answers_alone(
    study: StudyFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that reads the answers of another one imitates them."""
    asked: list[tuple[str | None, list[Any]]] = []
    request = Assistant.request

    def noted(self: Assistant, label: str | None, messages: Any, *rest: Any) -> Any:
        asked.append((label, list(messages)))
        return request(self, label, messages, *rest)

    monkeypatch.setattr(Assistant, "request", noted)
    lines = ["Book a room", "/compare", "Book a room", "And a bus?", "/compare", "Hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run(study, "chat", "trial=r=4", *GREEDY)
    texts = [[m["content"] for m in messages] for _, messages in asked]
    of = [label or "base" for label, _ in asked]
    assert of == [of[0], "base", of[0], "base", of[0], of[0]] and of[0] != "base"
    assert texts[1] == texts[2] == ["Book a room"] and texts[5] == ["Hello"]
    printed = capsys.readouterr()
    answers = re.split(r"\[.*?\]\n", printed.out)[1:]
    assert texts[3] == ["Book a room", answers[0].strip(), "And a bus?"]
    assert texts[4] == ["Book a room", answers[1].strip(), "And a bus?"]
    assert answers[0] != answers[1] and "(base: 6 tokens" in printed.err


def test_one_answer_needs_a_question(study: StudyFolder) -> None:
    for words in (["--once"], ["--once", ""]):
        with pytest.raises(ConfigError, match="--once needs a question, got none; type --once"):
            run(study, "chat", *words)


def test_forms_are_measured_beside_the_adapter_as_trained(
    study: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["f16", "q4_k_m", "lora"] if find_spec("llama_cpp") else []
    typed = ["study=tiny", "trial=r=4", f"types={','.join(kinds)}", "device=cpu"]
    main([f"sweeps_dir={study.root}", *typed])
    (file,) = study.trials_dir.glob("*/deploy/measured.json")
    rows = {row["form"]: row for row in json.loads(file.read_text())}
    assert list(rows) == ["base", "adapter", "merged", *kinds]
    for kind in set(kinds) - {"q4_k_m"}:
        assert abs(rows[kind]["difference"]) < 0.002
        assert rows[kind]["same_tokens"] >= 0.99
    trial = TrialFolder(file.parents[1])
    result, _ = trial.read_result()
    assert result is not None
    recorded = result.metrics["eval/loss"]
    assert rows["adapter"]["loss"] == pytest.approx(recorded, abs=1e-5)
    assert abs(rows["merged"]["difference"]) < 1e-4 < abs(rows["base"]["difference"])
    assert rows["merged"]["same_tokens"] == 1.0
    assert re.search(r"merged: [+-]0\.0 % perplexity", capsys.readouterr().out)
    shutil.rmtree(file.parent)
    shutil.rmtree(study.deploy_dir, ignore_errors=True)


def test_a_form_that_cannot_be_measured_leaves_the_others_in_the_table(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_task(task: Task) -> Measured:
        if task.form == "merged":
            raise ModelError("merged cannot be measured: it is damaged")
        losses = [1.0] * len(task.examples)
        return Measured(losses, [[1]], ["a"], None, 9.0, 1.0, 10.0, "cpu", "float32")

    monkeypatch.setattr("tinyllama_lab.deploy.measure._run", run_task)
    (trial,) = study.trials_dir.glob("r2-*")
    with pytest.raises(ModelError, match="merged cannot be measured: it is damaged"):
        main([f"sweeps_dir={study.root}", "study=tiny", "trial=r=2", "types=", "device=cpu"])
    rows = json.loads((trial / "deploy" / "measured.json").read_text())
    assert [row["form"] for row in rows] == ["base", "adapter"]
    shutil.rmtree(trial / "deploy")


def test_models_come_before_files_and_large_files_before_small_ones(tmp_path: Path) -> None:
    sizes = {"q4_0": 87.0, "merged": 513.0, "f16": 258.0, "adapter": 532.0, "q8_0": 138.0}
    exports = Exports(tmp_path)
    exports.merged_dir.mkdir()
    for form, mib in sizes.items():  # one after another, as commands measure them
        exports.gguf_file(form).write_text("")
        row = ExportRow(form, form, 2.0, 0.0, 0.0, 0.0, {}, 1.0, 9.0, 9.0, 9.0, mib)
        rows = exports.add_measured([row])
    assert [row.form for row in rows] == ["adapter", "merged", "f16", "q8_0", "q4_0"]
    assert exports.read_measured() == (rows, None)


def measured_of(trial: Path) -> dict[str, float]:
    rows = json.loads((trial / "deploy" / "measured.json").read_text())
    return {row["form"]: row["loss"] for row in rows}


def test_a_second_measurement_keeps_what_the_first_one_found(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter(range(1, 99))

    def run_task(task: Task) -> Measured:
        count = len(task.examples)
        return Measured([float(next(losses))] * count, [[1]], ["a"], None, 9.0, 1.0, 9.0, "c", "f")

    monkeypatch.setattr("tinyllama_lab.deploy.measure._run", run_task)
    monkeypatch.setattr("tinyllama_lab.deploy.export.check_installed", lambda *_: None)
    (trial,) = study.trials_dir.glob("r2-*")
    typed = [f"sweeps_dir={study.root}", "study=tiny", "trial=r=2", "device=cpu"]
    main([*typed, "types=f16"])
    first = measured_of(trial)
    assert list(first) == ["base", "adapter", "merged", "f16"]
    main([*typed, "types=q8_0"])
    second = measured_of(trial)
    assert list(second) == ["base", "adapter", "merged", "f16", "q8_0"]
    assert second["f16"] == first["f16"] and second["merged"] > first["merged"]
    assert (trial / "deploy" / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\n")
    main([*typed, "types=f16,q8_0"])
    assert (trial / "deploy" / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\n")
    capsys.readouterr()
    run(study, "merge", "trial=r=2", f"to={study.root / 'mine'}")
    assert "measured already" in capsys.readouterr().err
    run(study, "gguf", "trial=r=2", "types=f16", "force=true")  # and it is not measured yet
    assert "not measured yet" in capsys.readouterr().err
    assert list(measured_of(trial)) == ["base", "adapter", "merged", "q8_0"]
    (trial / "deploy" / "model-q8_0.gguf").unlink()
    main([*typed, "types="])
    assert list(measured_of(trial)) == ["base", "adapter", "merged"]
    shutil.rmtree(trial / "deploy")


def test_a_prompt_that_is_longer_than_the_context_is_refused(study: StudyFolder) -> None:
    from tinyllama_lab.errors import DataError

    with pytest.raises(DataError, match="must fit 2048 tokens"):
        run(study, "chat", "trial=r=4", "--once", "a room " * 4000, *GREEDY)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("chat", "merge", "gguf", "study="))
