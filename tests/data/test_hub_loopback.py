"""Models and data sets from a hub on loopback, with the client of huggingface_hub as installed."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import Client, Outcome, hub_client
from tests.hub_server import PAGE, TOKEN, Fault, HubServer, hub_server

MIB = 2**20
CHUNK = 10 * MIB  # the client keeps whole chunks of this size of a cut file
MODEL = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# A model\n",
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "model.safetensors": bytes(range(256)) * 1000,
    "onnx/model.onnx": b"another format",
    "pytorch_model.bin": b"the same weights",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
}
WANTED = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "README.md"),
}
SHARDS = {f"model-0000{n}-of-00002.safetensors": b"shard %d" % n for n in (1, 2)}
INDEX = {"weight_map": dict(zip("ab", SHARDS, strict=True))}
SHARDED = {
    **{name: content for name, content in MODEL.items() if "model." not in name},
    **SHARDS,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}
ROWS = {"README.md": b"# Rows\n", "rows.jsonl": b'{"prompt": "a", "response": "b"}\n'}
ADAPTER = b'{"base_model_name_or_path": "o/base"}'


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        server.add("model", "o/m", MODEL)
        server.add("model", "o/sharded", SHARDED)
        server.add("model", "o/gated", MODEL, gated=True)
        server.add("model", "o/private", MODEL, private=True)
        server.add("dataset", "o/d", ROWS)
        server.add("dataset", "o/gated", ROWS, gated=True)
        server.add("dataset", "o/private", ROWS, private=True)
        server.add("model", "o/card", {"README.md": b"# No weights\n"})
        server.add("dataset", "o/card", {"README.md": b"# No rows\n"})
        server.add("model", "o/adapter", {"adapter_config.json": ADAPTER, "README.md": b""})
        yield server


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """The server without faults, and with no request noted."""
    server.faults, server.requests, server.sent = [], [], {}
    return server


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Iterator[Client]:
    """Asks from a machine with an empty cache."""
    with hub_client(tmp_path / "home", hub.url) as client:
        yield client


def files(folder: Outcome) -> dict[str, bytes]:
    """Return the content of a snapshot."""
    top = Path(str(folder))
    paths = [path for path in top.rglob("*") if path.is_file()]
    return {str(path.relative_to(top)): path.read_bytes() for path in paths}


def test_what_is_needed_arrives_whole_and_is_asked_for_once(hub: HubServer, ask: Client) -> None:
    wanted = (("model", "o/m", None), ("model", "o/sharded", "main"), ("dataset", "o/d", None))
    model, sharded, rows = ask(*wanted)
    assert files(model) == {name: MODEL[name] for name in WANTED}
    assert files(sharded) == {
        name: content for name, content in SHARDED.items() if name[0] not in ".o"
    }
    assert files(rows) == ROWS
    for name in ("model.safetensors", *SHARDS, "rows.jsonl"):
        assert hub.sent[name] == len({**MODEL, **SHARDED, **ROWS}[name])
    for folder, repo in ((model, "m"), (sharded, "sharded")):
        assert Path(str(folder)).name == hub.commit("model", f"o/{repo}")
    hub.requests.clear()
    offline = [("model", "o/m", "main"), *wanted]
    assert ask(*offline, HF_HUB_OFFLINE="1") == [model, model, sharded, rows]
    assert ask(*offline, endpoint="http://127.0.0.1:9") == [model, model, sharded, rows]
    assert hub.requests == []
    elsewhere = ask(("model", "o/m", None), HF_HUB_OFFLINE="1", HF_HOME=str(hub))
    assert "HF_HUB_OFFLINE forbids connections" in elsewhere[0][1]


def test_the_token_goes_to_the_hub_and_never_to_its_cdn(hub: HubServer, ask: Client) -> None:
    asked = (
        ("model", "o/gated", None),
        ("model", "o/private", None),
        ("dataset", "o/gated", None),
    )
    assert all(isinstance(folder, str) for folder in ask(*asked, HF_TOKEN=TOKEN))
    from_cdn = [request for request in hub.requests if request.path.startswith("/model/")]
    others = [request for request in hub.requests if "/o/" in request.path]
    assert from_cdn and {request.token for request in from_cdn} == {None}
    assert {r.token for r in others if r not in from_cdn and "/dataset/" not in r.path} == {TOKEN}


def test_a_cut_file_resumes_and_is_never_sent_twice(hub: HubServer, ask: Client) -> None:
    weights = os.urandom(CHUNK + 2 * MIB)
    hub.add("model", "o/large", {**MODEL, "model.safetensors": weights})
    hub.faults = [Fault("model.safetensors", sent=CHUNK + MIB)]
    (folder,) = ask(("model", "o/large", None))
    assert files(folder)["model.safetensors"] == weights
    from_cdn = hub.asked("GET", "model.safetensors")
    assert [request.range for request in from_cdn] == [None, f"bytes={CHUNK}-"]
    assert hub.sent["model.safetensors"] == len(weights) + MIB  # less than a chunk again


def test_what_fails_in_passing_is_asked_for_again(
    hub: HubServer, ask: Client, tmp_path: Path
) -> None:
    busy = {"Retry-After": "1"}
    hub.faults = [
        Fault("/api/models/o/m", status=429, headers=busy),
        Fault("config.json", status=500),
        Fault("model.safetensors", sent=1000, is_reset=True),
        Fault("rows.jsonl", damages=True),
    ]
    commit = hub.commit("model", "o/sharded")
    pages = -(-len(SHARDED) // PAGE)  # of this project's own list; then the client lists
    hub.faults.append(Fault(f"sharded/tree/{commit}", status=403, skips=pages))
    (tmp_path / "home/hub/models--o--sharded/snapshots" / commit).mkdir(parents=True)
    asked = (("model", "o/m", None), ("dataset", "o/d", None), ("model", "o/sharded", None))
    model, rows, sharded = ask(*asked)
    assert files(model) == {name: MODEL[name] for name in WANTED} and files(rows) == ROWS
    assert {fault.times for fault in hub.faults} == {0}
    assert files(sharded).keys() == SHARDED.keys() - {".gitattributes"}
    first, second = hub.asked("GET", "/api/models/o/m")
    assert second.at - first.at >= 1
    # what has arrived is not sent again: once for each of the two models
    assert hub.sent["generation_config.json"] == 2 * len(MODEL["generation_config.json"])


def test_the_hub_that_stays_broken_is_given_up(hub: HubServer, ask: Client) -> None:
    hub.faults = [
        Fault("/api/models/o/m", status=429, headers={"Retry-After": "300"}, times=9),
        Fault("rows.jsonl", status=503, times=9),
    ]
    model, rows = ask(("model", "o/m", None), ("dataset", "o/d", None))
    assert model == [
        "ModelError",
        "the hub must answer the requests for model.repo=o/m, got 429 Too Many Requests; run the "
        "same command again in 300 s, or use profile=embedded, or model=local "
        "model.path=/a/folder",
    ]
    assert rows == [
        "DataDownloadError",
        "the hub must answer the requests for data.repo=o/d, got 503 Service Unavailable; run the "
        "same command again later, or use data=travel, or data=file data.path=my.jsonl",
    ]
    assert len(hub.asked("GET", "/api/models/o/m")) == 1  # a wait of 300 s is the user's choice
    assert len(hub.asked("GET", "rows.jsonl")) == 3
    # what a failed download left behind does not count as the data set
    hub.faults, hub.requests = [], []
    assert "it is not whole in" in ask(("dataset", "o/d", None), HF_HUB_OFFLINE="1")[0][1]
    assert files(ask(("dataset", "o/d", None))[0]) == ROWS


def test_a_download_that_lost_a_small_file_is_not_whole(hub: HubServer, ask: Client) -> None:
    hub.faults = [Fault("tokenizer_config.json", status=500, times=3)]
    (failed,) = ask(("model", "o/m", None))
    assert "got 500 Internal Server Error" in failed[1]
    assert hub.sent["model.safetensors"] == len(MODEL["model.safetensors"])
    (folder,) = ask(("model", "o/m", None))
    assert files(folder) == {name: MODEL[name] for name in WANTED}
    assert hub.sent["model.safetensors"] == len(MODEL["model.safetensors"])


MODELS, SETS = "profile=embedded, or model=local", "data=travel, or data=file data.path=my.jsonl"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_may_not_be_read_says_why_and_what_to_type(
    hub: HubServer, ask: Client, kind: str
) -> None:
    key = "model" if kind == "model" else "data"
    ways = f"{MODELS} model.path=/a/folder" if kind == "model" else SETS
    page = f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}o/gated"
    name = {"model": "o/m", "dataset": "o/d"}[kind]
    asked = [(kind, repo, None) for repo in ("o/gated", "o/private", "o/none")]
    other, wrong = {"HF_TOKEN": "hf_other"}, {"HF_TOKEN": "hf_wrong"}
    outcomes = ask(
        *asked,
        (kind, name, "v9"),
        *((*repository, other) for repository in asked),
        (kind, name, None, wrong),
    )
    gated, private, none, revision = outcomes[:4]
    # everyone sees the information on a gated repository: the sweep is refused before it starts
    assert [r.method for r in hub.requests if "o/gated" in r.path][:2] == ["GET", "HEAD"]
    assert gated[1] == (
        f"{key}.repo=o/gated must be a repository that you may download, got a gated one and no "
        f"token; accept its terms at {page} and run `hf auth login`, or use {ways}"
    )
    for refused, repo in ((private, "o/private"), (none, "o/none")):
        assert refused[1] == (
            f"{key}.repo={repo} must be a {kind} on the hub, got a name that it does not have, or "
            f"a private {kind} and no token; correct the name, run `hf auth login` with a token "
            f"that may read it, or use {ways}"
        )
    assert revision[1] == (
        f"{key}.revision must be a branch, tag or commit of {name} on the hub, got 'v9'; set "
        f"{key}.revision=main"
    )
    gated, private, none, refused = outcomes[4:]
    assert f"a gated one and a token without access to it; accept its terms at {page} " in gated[1]
    assert f"or a private {kind} and a token that may not read it" in private[1]
    assert none[1] == private[1].replace("o/private", "o/none")
    assert refused[1] == (
        f"{key}.repo={name} must be downloaded with a valid token or without one, got 401 "
        f"Unauthorized; correct or unset HF_TOKEN, or use {ways}"
    )


def test_a_repository_without_what_is_needed_says_what_it_lacks(
    hub: HubServer, ask: Client
) -> None:
    hub.faults = [Fault("/api/models/o/m", status=403, times=9)]
    asked = (("model", "o/card", None), ("dataset", "o/card", None), ("model", "o/adapter", None))
    no_weights, no_rows, adapter, forbidden = ask(*asked, ("model", "o/m", None))
    assert no_weights[0] == "ModelError" and no_weights[1].startswith(
        "model.repo=o/card must hold configuration, tokenizer and weights, got a repository "
        "without config.json, tokenizer ("
    )
    assert no_rows[0] == "DataError"  # not retried: the same commit will never have rows
    assert "data.repo=o/card must hold data files, got a repository without a data" in no_rows[1]
    assert (
        "got an adapter alone; take the base it was made for: model=hub model.repo=o/base"
        in (adapter[1])
    )
    assert "got 403 Forbidden; run `hf auth login` with a token" in forbidden[1]


def test_a_download_that_does_not_fit_says_where_to_put_it(
    hub: HubServer, ask: Client, tmp_path: Path
) -> None:
    hub.add("model", "o/large", {**MODEL, "model.safetensors": bytes(12 * MIB)})
    model = ("model", "o/large", None)
    small, full = ask((*model, {"DISK": "small"}), ("dataset", "o/d", None, {"DISK": "full"}))
    assert small == [
        "ModelError",
        f"model.repo=o/large must fit onto the disk of {tmp_path}/home/hub, got 0 MiB free of 12 "
        "MiB; free some space, or set HF_HOME=/another/folder",
    ]
    assert full == [
        "DataDownloadError",
        f"data.repo=o/d must fit onto the disk of {tmp_path}/home/hub, got a full disk; free some "
        "space, or set HF_HOME=/another/folder",
    ]
    assert not hub.asked("GET", "model.safetensors")  # refused before it was sent


def test_damage_that_stays_is_refused_and_not_kept(
    hub: HubServer, ask: Client, tmp_path: Path
) -> None:
    hub.faults = [Fault("rows.jsonl", damages=True, times=3)]
    (refused,) = ask(("dataset", "o/d", None))
    assert refused == [
        "DataDownloadError",
        "data.repo=o/d must arrive as the hub has it, got rows.jsonl missing or with another "
        "SHA-256 3 times; run the same command again, or on another network",
    ]
    assert not list(tmp_path.rglob("rows.jsonl"))


def test_a_proxy_is_named_with_its_variable(hub: HubServer, ask: Client) -> None:
    model = ("model", "o/m", None)
    proxy = hub.url.replace("//", "//me:secret@")
    hub.faults = [Fault("/o/m", status=407, times=9)]
    unknown, closed, plain, beside = ask(
        (*model, {"HTTP_PROXY": "gopher://127.0.0.1:9"}),
        (*model, {"HTTP_PROXY": "http://me:secret@127.0.0.1:9"}),
        (*model, {"HTTP_PROXY": proxy, "http_proxy": proxy}),
        ("dataset", "o/d", None, {"NO_PROXY": "127.0.0.1"}),
    )
    (tunnel,) = ask(model, HTTPS_PROXY=proxy, endpoint="https://hub.invalid")
    assert files(beside) == ROWS
    assert "got Unknown scheme for proxy URL" in unknown[1] and "; correct HTTP" in unknown[1]
    assert closed[1].startswith(
        "model.repo=o/m must be reachable through the proxy HTTP_PROXY=http://127.0.0.1:9, got "
        "[Errno 111] Connection refused; correct HTTP_PROXY or unset it, or use profile=embedded"
    )
    for refused, variable in ((plain, "http_proxy"), (tunnel, "HTTPS_PROXY")):
        assert refused[1].startswith(
            f"model.repo=o/m must be reachable through the proxy {variable}={hub.url}, got 407 "
            f"Proxy Authentication Required; set {variable}=http://user:password@host:port, or use"
        )
    assert not any("secret" in refused[1] for refused in (closed, plain, tunnel))


def test_a_hub_that_is_none_says_which_variable_to_correct(hub: HubServer, ask: Client) -> None:
    model = ("model", "o/m", None)
    (unreachable,) = ask(model, endpoint="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer ([Errno 111] Connection refused); with a" in str(
        unreachable[1]
    )
    (no_scheme,) = ask(model, endpoint="hf-mirror.com")
    assert no_scheme[1] == (
        "HF_ENDPOINT must be an address such as https://huggingface.co, got 'hf-mirror.com'; "
        "correct it or unset HF_ENDPOINT"
    )
    (portal,) = ask(model, endpoint=f"{hub.url}/portal")
    assert portal[1] == (
        f"model.repo=o/m must come from a hub, got an answer from {hub.url}/portal that is not a "
        "hub's; sign in to your network, or correct HF_ENDPOINT"
    )


def test_an_unknown_certificate_names_the_variable_that_trusts_it(
    tmp_path: Path, ask: Client
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = (
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"),
        *("-subj", "/CN=hub", "-addext", "subjectAltName=IP:127.0.0.1"),
    )
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    model = ("model", "o/m", None)
    with hub_server(context) as secure:
        secure.add("model", "o/m", MODEL)
        (refused,) = ask(model, endpoint=secure.url)
        (trusted,) = ask(model, endpoint=secure.url, SSL_CERT_FILE=str(certificate))
    assert refused[1].startswith(
        f"model.repo=o/m must come from a server whose certificate is known, got {secure.url} ("
    )
    assert refused[1].endswith("set SSL_CERT_FILE=/the/authority.pem")
    assert files(trusted) == {name: MODEL[name] for name in WANTED}


def test_a_moved_branch_stays_where_it_was_until_the_cache_is_gone(
    hub: HubServer, ask: Client, tmp_path: Path
) -> None:
    branch, tag = ("model", "o/moves", "main"), ("model", "o/moves", "v1")
    old = hub.add("model", "o/moves", MODEL)
    hub.repositories["model", "o/moves"].refs["v1"] = old
    (first,) = ask(branch)
    new = hub.add("model", "o/moves", {**MODEL, "config.json": b'{"architectures": ["GPT2"]}'})
    hub.requests.clear()
    assert ask(branch, ("model", "o/moves", None)) == [first, first]
    assert hub.requests == []  # the cache answers, so a sweep keeps its keys
    by_commit, by_tag = ask(("model", "o/moves", new), tag)
    assert Path(str(by_commit)).name == new and by_tag == first
    assert ask(("model", "o/moves", None), tag, HF_HUB_OFFLINE="1") == [first, first]
    (elsewhere,) = ask(branch, HF_HOME=str(tmp_path / "another"))
    assert Path(str(elsewhere)).name == new
