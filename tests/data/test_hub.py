"""The Hugging Face cache read as files, and the messages if neither it nor the hub helps."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllama_lab.data import hub
from tinyllama_lab.data.snapshots import _may_be_causal
from tinyllama_lab.errors import DataError, ModelError

COMMIT, OTHER = "a" * 40, "b" * 40
TINY = {
    "config.json": '{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
}
SHARDS = {f"model-0000{i}-of-00002.safetensors": f"shard {i}" for i in (1, 2)}
INDEX = {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": dict(zip("ab", SHARDS, strict=True))}
    )
}
HEAD = {name: TINY[name] for name in ("config.json", "tokenizer.json")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, with the hub unreachable."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home" / "hub"


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def snapshot(
    cache: Path, repo: str, files: dict[str, str], commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """Create a snapshot as huggingface_hub does: blobs, and links to them."""
    folder = cache / repo
    for name, content in files.items():
        blob = fill(folder / "blobs", {f"{commit[:4]}-{name.replace('/', '-')}": content})
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob / f"{commit[:4]}-{name.replace('/', '-')}")
    if ref:
        fill(folder / "refs", {ref: commit})
    return folder / "snapshots" / commit


@pytest.mark.parametrize(
    "files",
    [
        TINY,
        HEAD | SHARDS | INDEX,
        HEAD | SHARDS,
        # the pickle is not read
        TINY | {"pytorch_model.bin": "weights"},
    ],
)
def test_a_whole_model_is_found(cache: Path, files: dict[str, str]) -> None:
    folder = snapshot(cache, "models--o--m", files)
    assert hub.cached_snapshot("o/m", None, "model") == folder
    assert hub.cached_snapshot("o/m", "main", "model") == folder
    assert hub.cached_snapshot("o/m", COMMIT, "model") == folder
    assert hub.cached_snapshot("o/m", "v2", "model") is None
    assert hub.cached_snapshot("o/m", None, "dataset") is None
    assert hub.resolve("o/m", None, "model") == COMMIT
    assert hub.download("o/m", COMMIT, "model") == folder


FIRST = dict(list(SHARDS.items())[:1])


@pytest.mark.parametrize(
    "files",
    [
        {},
        {name: TINY[name] for name in ("tokenizer.json", "model.safetensors")},
        {name: TINY[name] for name in ("config.json", "model.safetensors")},
        HEAD,
        HEAD | FIRST | INDEX,
        HEAD | FIRST,
        HEAD | SHARDS | {"model.safetensors.index.json": "{not json"},
        HEAD | {"adapter_model.safetensors": "no base"},
        HEAD | {"pytorch_model.bin": "a pickle"},
    ],
)
def test_a_model_with_something_missing_is_not_found(cache: Path, files: dict[str, str]) -> None:
    snapshot(cache, "models--o--m", files)
    assert hub.cached_snapshot("o/m", None, "model") is None


def test_a_link_to_a_lost_blob_does_not_count(cache: Path) -> None:
    snapshot(cache, "models--o--m", TINY)
    (cache / "models--o--m/blobs/aaaa-model.safetensors").unlink()
    assert hub.cached_snapshot("o/m", None, "model") is None


def test_a_large_file_that_was_changed_does_not_count(cache: Path) -> None:
    """The cache of huggingface_hub names it by its SHA-256."""
    folder = snapshot(cache, "models--o--m", TINY)
    weights = folder / "model.safetensors"
    content = b"w" * 99
    blob = weights.resolve().with_name(hashlib.sha256(content).hexdigest())
    blob.write_bytes(content)
    weights.unlink()
    weights.symlink_to(blob)
    assert hub.cached_snapshot("o/m", None, "model") == folder
    blob.write_bytes(b"v" + content[1:])
    assert hub.cached_snapshot("o/m", None, "model") is None


def test_data_sets_are_found_by_their_files(cache: Path) -> None:
    folder = snapshot(cache, "datasets--o--d", {"data/train-00000-of-00001-ab.parquet": "x"})
    assert hub.cached_snapshot("o/d", None, "dataset") == folder
    snapshot(cache, "datasets--o--e", {"README.md": "x", "dataset_infos.json": "{}"})
    assert hub.cached_snapshot("o/e", None, "dataset") is None
    snapshot(cache, "datasets--o--f", {"data/train-00001-of-00003-ab.parquet": "x"})
    assert hub.cached_snapshot("o/f", None, "dataset") is None


def test_without_a_revision_the_only_whole_snapshot_counts(cache: Path) -> None:
    # a client that only looked for news moved `main` and fetched nothing but config.json
    whole = snapshot(cache, "models--o--m", TINY, OTHER, ref=None)
    snapshot(cache, "models--o--m", {"config.json": "{}"}, COMMIT)
    assert hub.cached_snapshot("o/m", None, "model") == whole
    assert hub.cached_snapshot("o/m", "main", "model") is None
    snapshot(cache, "models--o--m", TINY, "c" * 40, ref=None)
    assert hub.cached_snapshot("o/m", None, "model") is None  # which of the two, nobody said


def test_branches_with_a_slash(cache: Path) -> None:
    (cache / "models--o--m/refs/pr").mkdir(parents=True)
    folder = snapshot(cache, "models--o--m", TINY, ref="pr/1")
    assert hub.cached_snapshot("o/m", "pr/1", "model") == folder


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HUB_CACHE": "{0}/x", "HF_HOME": "{0}/no"}, "x"),
        ({"HF_HOME": "{0}/y"}, "y/hub"),
        ({"XDG_CACHE_HOME": "{0}/z"}, "z/huggingface/hub"),
        ({"HOME": "{0}/h"}, "h/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_client_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    folder = snapshot(tmp_path / place, "models--gpt2", TINY)
    assert hub.cached_snapshot("gpt2", None, "model") == folder


@pytest.mark.parametrize("repo", ["../x", "a/../b", "/etc", "a/b/c", "", "a\x1b/b", "a/.."])
def test_a_repository_name_cannot_leave_the_cache(repo: str) -> None:
    with pytest.raises(DataError, match="data.repo must be a hub repository.*or use data=travel"):
        hub.cached_snapshot(repo, None, "dataset")
    for revision in ("../..", "/etc", "a//b", ""):
        with pytest.raises(ModelError, match="model.revision must be a branch.*revision=main"):
            hub.cached_snapshot("o/m", revision, "model")


def test_a_damaged_ref_is_not_followed(cache: Path) -> None:
    snapshot(cache, "models--o--m", TINY, ref=None)
    fill(cache / "models--o--m/refs", {"main": "../../../etc\n"})
    assert hub.cached_snapshot("o/m", "main", "model") is None


def test_offline_the_message_names_both_ways(cache: Path) -> None:
    with pytest.raises(ModelError) as model:
        hub.resolve("o/m", None, "model")
    assert str(model.value) == (
        "model.repo=o/m must be in the Hugging Face cache or on the hub, got neither: it is not "
        f"whole in {cache}, and HF_HUB_OFFLINE forbids connections to the hub; with a connection, "
        "configuration, tokenizer and weights are downloaded at the first use; without one, run "
        "`hf download o/m` on a machine that has one and copy its models--o--m into "
        f"{cache}, or use profile=embedded, or model=local model.path=/a/folder"
    )
    with pytest.raises(DataError, match="`hf download o/d --repo-type dataset`.*or use data=trav"):
        hub.download("o/d", COMMIT, "dataset")


def test_has_tinyllama(cache: Path) -> None:
    assert not hub.has_tinyllama()
    snapshot(cache, "models--TinyLlama--TinyLlama-1.1B-Chat-v1.0", TINY)
    begin = time.perf_counter()
    assert hub.has_tinyllama()
    assert time.perf_counter() - begin < 0.1


def test_the_digest_follows_what_a_model_is(tmp_path: Path) -> None:
    mib = 2**20
    folder = fill(tmp_path / "m", HEAD | {"model.safetensors": "a" * 3 * mib})
    seen = [hub.model_folder_digest(folder)]
    (tmp_path / "m").rename(tmp_path / "moved")
    folder = fill(tmp_path / "moved", {"README.md": "does not count", "training_args.bin": "x"})
    assert hub.model_folder_digest(folder) == seen[0]
    for changed in (
        {"model.safetensors": "a" * (3 * mib - 1) + "b"},
        {"model.safetensors": "b" + "a" * (3 * mib - 1)},
        {"model.safetensors": "a" * (3 * mib + 1)},
        {"tokenizer.json": '{"x": 1}'},
        {"chat_template.jinja": "x"},
        {"config.json": '{"architectures": ["LlamaForCausalLM"], "x": 1}'},
    ):
        seen.append(hub.model_folder_digest(fill(folder, changed)))
    assert len(set(seen)) == 7
    assert all(len(each) == 12 and int(each, 16) >= 0 for each in seen)


def test_the_digest_counts_every_shard(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", HEAD | SHARDS | INDEX)
    before = hub.model_folder_digest(folder)
    assert hub.model_folder_digest(fill(folder, {list(SHARDS)[1]: "other"})) != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, r"got no tokenizer \(.*\), no weights \(.*; point model.path"),
        (HEAD | FIRST, "got no 1 of the 2 shards of model"),
        (HEAD | FIRST | INDEX, "got no model-00002-of-00002.safetensors"),
        (TINY | {"config.json": "{"}, "must name a causal language model .*got none"),
        (TINY | {"config.json": '{"architectures": ["BertModel"]}'}, "got BertModel; choose"),
    ],
)
def test_a_folder_that_is_no_causal_model(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        hub.model_folder_digest(fill(tmp_path / "m", files))


LLAMA = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": json.dumps({**LLAMA, "quantization_config": {"load_in_4bit": True}})},
            "was saved quantized; take the model it was made from, and set quant=nf4",
        ),
        ({"adapter_config.json": "{}"}, "got an adapter next to it, which would be loaded"),
    ],
)
def test_a_model_that_would_not_be_what_its_name_says_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    folder = fill(tmp_path / "m", TINY | {"config.json": json.dumps(LLAMA)})
    hub.model_folder_digest(folder)
    with pytest.raises(ModelError, match=message):
        hub.model_folder_digest(fill(folder, files))


def test_no_folder_and_no_shard_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got no folder there; point model.path at"):
        hub.model_folder_digest(tmp_path / "none")


ADAPTER = {"adapter_config.json": '{"base_model_name_or_path": "o/base"}'}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (ADAPTER, "got an adapter alone; take the base it was made for: model=hub model.repo=o/b"),
        (
            ADAPTER | {"tokenizer.json": "{}", "adapter_model.safetensors": ""},
            "got an adapter alone; take the base it was made for: model=hub model.repo=o/base",
        ),
        ({"adapter_config.json": "{}"}, "an adapter alone, which does not name its base"),
        ({"tokenizer.json": "{}"}, "got no config.json, no weights"),
        ({"tokenizer.json": "{}", "config.json": "{}"}, "got no weights"),
        ({"model.safetensors": "", "config.json": "{}"}, "with tokenizer.save_pretrained"),
        ({"model.safetensors": "", "tokenizer.json": "{}"}, "got no config.json; point"),
    ],
)
def test_a_part_of_a_model_is_called_what_it_is(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    with pytest.raises(ModelError) as caught:
        hub.model_folder_digest(fill(tmp_path / "m", files))
    assert said in str(caught.value)


def test_an_adapter_names_its_base_as_one_types_it(tmp_path: Path) -> None:
    base = fill(tmp_path / "a base", TINY)
    settings = json.dumps({"base_model_name_or_path": str(base)})
    folder = fill(tmp_path / "m", {"adapter_config.json": settings})
    with pytest.raises(ModelError) as caught:
        hub.model_folder_digest(folder)
    assert f"""model=local 'model.path="{base}"'""" in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", TINY)
    with pytest.raises(ModelError, match=f"got a file; point .* such as {folder}$"):
        hub.model_folder_digest(folder / "model.safetensors")


def test_importing_brings_no_heavy_package() -> None:
    heavy = "torch transformers datasets pandas pyarrow huggingface_hub hydra mlflow".split()
    code = "import sys, tinyllama_lab.data.hub, tinyllama_lab.data.splits.splits;"
    code += f"print(set({heavy}) & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "set()"


CAUSAL = [
    ["GPT2LMHeadModel"],
    ["LlamaForCausalLM"],
    ["OpenAIGPTLMHeadModel"],
    ["XLMWithLMHeadModel"],
    ["Gemma3ForConditionalGeneration"],
    ["BertForMaskedLM", "BertLMHeadModel"],
    ["SomethingNew"],
]


@pytest.mark.parametrize("names", CAUSAL, ids=str)
def test_any_class_that_may_be_causal_is_taken(tmp_path: Path, names: list[str]) -> None:
    config = {"config.json": json.dumps({"architectures": names})}
    assert hub.model_folder_digest(fill(tmp_path / "m", TINY | config))


def test_a_folder_that_names_no_class_is_left_to_the_loader(tmp_path: Path) -> None:
    files = TINY | {"config.json": '{"model_type": "gpt2"}'}
    assert hub.model_folder_digest(fill(tmp_path / "m", files))


ANOTHER_TASK = [
    ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5For"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": ["Qwen2ForTokenClassification"]}, "Qwen2ForTokenClassification"),
    ({"architectures": ["ViTForImageClassification"]}, "ViTForImageClassification"),
    ({"architectures": ["MistralModel"]}, "MistralModel"),
]


@pytest.mark.parametrize(("config", "got"), ANOTHER_TASK)
def test_a_class_for_another_task_is_refused_by_its_name(
    tmp_path: Path, config: dict[str, object], got: str
) -> None:
    files = TINY | {"config.json": json.dumps(config)}
    with pytest.raises(ModelError, match=f"got {got}.*; choose a model that was trained"):
        hub.model_folder_digest(fill(tmp_path / "m", files))


def test_every_causal_class_of_transformers_is_taken_and_other_tasks_are_not() -> None:
    from transformers.models.auto import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert all(_may_be_causal(name, False) for name in causal if isinstance(name, str))
    for mapping in (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        names = {name for name in mapping.values() if isinstance(name, str)} - causal
        assert names and not any(_may_be_causal(name, True) for name in names)
