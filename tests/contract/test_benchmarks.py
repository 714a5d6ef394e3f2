"""The benchmarks: every arm does the same work, and the numbers are computed as documented."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import search, sweep
from benchmarks.arm import measure
from benchmarks.command import cells, overrides
from benchmarks.flop_count import training_flops
from benchmarks.job import (
    BenchmarkError,
    Grid,
    Job,
    Prepared,
    Record,
    Round,
    Setup,
    Trained,
    count_labels,
    together,
)
from benchmarks.memory import PeakWatcher
from benchmarks.ours import sweep_command
from benchmarks.peer_settings import lora_config, rows_at_once
from benchmarks.results import check_same_tokens, crossing, ratio, regime, summary, utilisation
from benchmarks.show import markdown
from benchmarks.stages import STAGES, Options, planned
from tests import grid
from tinyllama_lab.config.schema import load
from tinyllama_lab.sweep.plan import check_cells

ROOT = Path(__file__).parents[2]
SETUP = Setup("tiny_random", None, None, rows=4, eval_rows=1, device="cpu")
STEP = Round(Grid(targets=("attention_qv",)), rows=4, batch_size=4)
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="the peers need trl: pip install '.[bench]'",
)


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (8, 8), (10, 5), (12, 6), (16, 8), (32, 8), (11, 11)]
)
def test_p3_accumulates_batches_whose_rows_would_not_fit(batch: int, rows: int) -> None:
    assert rows_at_once(batch) == rows


def test_ours_and_the_peers_use_the_same_alpha_and_settings() -> None:
    ranks = Grid(ranks=(2, 8, 64), rates=(1e-3,), seeds=(3,))
    configs = check_cells(cells(SETUP, Round(ranks, rows=4, batch_size=4)))
    peers = [lora_config(adapter, SETUP) for adapter in ranks.adapters()]
    for config, peer, rank in zip(configs, peers, (2, 8, 64), strict=True):
        assert config.lora.scale_alpha / config.lora.r == peer.lora_alpha / peer.r == 2
        assert (config.lora.r, peer.r) == (rank, rank)
        assert config.lora.dropout == peer.lora_dropout == 0
        assert (config.train.lr, config.seed) == (1e-3, 3)


def test_ours_and_the_peers_train_the_same_variant() -> None:
    for variant, uses in (("lora", (False, False)), ("dora", (True, False))):
        setup = replace(SETUP, lora_variant=variant)
        (config,) = check_cells(cells(setup, Round(Grid(), rows=4, batch_size=4)))
        (adapter,) = Grid().adapters()
        peer = lora_config(adapter, setup)
        assert config.lora.variant == variant
        assert (peer.use_dora, peer.use_rslora) == uses


def test_the_timed_sweep_trains_the_trials_of_the_peers_and_no_others() -> None:
    one = Grid(ranks=(4,))
    typed = sweep_command(SETUP, Round(one, rows=4, batch_size=4))
    config = grid.plain(*typed[typed.index("tinyllama_lab") + 2 :])  # after -m
    assert (config["confirm"], config["tune"], config["seed"]) == ("off", None, 0)
    assert load(config).lora.scale_alpha == 8
    assert load(config).train.lr == one.rates[0] == 5e-4


def test_the_search_trains_with_the_alpha_of_its_published_numbers() -> None:
    asked = search.parser().parse_args(["--json", "out.json", "--model", "tiny_random"])
    for rank in (4, 32):
        config = grid.plain(*search.settings(asked), f"lora.r={rank}")
        assert load(config).lora.scale_alpha == 2 * rank
        assert (config["confirm"], config["tune"]) == ("off", None)


@pytest.fixture(scope="module")
def prepared_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "prepared.json"
    path.write_text(json.dumps(measure(Job("prepare", "prepare", SETUP)), default=str))
    return str(path)


@pytest.fixture
def prepared(prepared_file: str) -> Prepared:
    return Prepared.read(prepared_file)


def check_sane(report: dict[str, Any], prepared: Prepared) -> None:
    (only,) = report["rounds"]
    trained = Trained(**only)
    assert trained.tokens == sum(len(row["input_ids"]) for row in prepared.train)
    assert trained.labels == sum(count_labels(row["labels"]) for row in prepared.train)
    assert (trained.adapters, trained.steps) == (1, 1)
    assert trained.seconds > 0 and trained.tokens_per_s > 0
    assert 0 < trained.losses[0] < 20


def test_ours_trains_on_the_prepared_tokens(prepared_file: str, prepared: Prepared) -> None:
    job = Job("train", "ours", SETUP, (STEP,), prepared=prepared_file)
    assert Job.from_json(job.to_json()) == job
    report = measure(job)
    check_sane(report, prepared)
    assert report["settings"]["lora"]["targets"] == "attention_qv"
    assert report["settings"]["hardware"]["device"] == "cpu"


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "variant", "checkpointing"),
    [("P2", "", True), ("P3", "hf-sdpa", False), ("P3", "trl-eager", False)],
)
def test_a_peer_trains_on_the_prepared_tokens(
    arm: str,
    variant: str,
    checkpointing: bool,
    prepared_file: str,
    prepared: Prepared,
) -> None:
    job = Job("train", arm, SETUP, (STEP,), prepared=prepared_file, variant=variant)
    report = measure(job)
    check_sane(report, prepared)
    assert report["settings"]["trainer"]["gradient_checkpointing"] is checkpointing
    assert report["settings"]["adapter"]["r"] == 8


@needs_trl
def test_tokens_of_batches_are_counted_without_padding() -> None:
    import torch

    from benchmarks.peers import CountingCollator

    padded = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 7], [8, 9, -100]]),
    }
    collator = CountingCollator(lambda rows: padded)
    assert collator([]) is padded and (collator.tokens, collator.labels) == (5, 3)
    flat = {name: padded[name][:1] for name in ("input_ids", "labels")}
    collator = CountingCollator(lambda rows: flat)
    collator([])
    assert (collator.tokens, collator.labels) == (3, 2)


@needs_trl
def test_rows_of_similar_length_share_a_batch_and_an_incomplete_batch_is_last() -> None:
    from benchmarks.peers import group_by_length

    rows = [{"input_ids": [0] * n, "labels": [0] * n} for n in (3, 9, 1, 7, 5)]
    lengths = [len(row["input_ids"]) for row in group_by_length(rows, 2, seed=0)]
    assert lengths[-1] == 1
    assert sorted([lengths[:2], lengths[2:4]]) == [[5, 3], [9, 7]]


def test_shapes_and_flops_of_the_model_equal_a_hand_computation(prepared: Prepared) -> None:
    # q and o 64x64, k and v 32x64, gate and up 128x64, down 64x128, in two layers
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert sum(out * into * count for out, into, count in prepared.linears) == 2 * layer
    vocabulary = prepared.head // 64
    assert prepared.head == vocabulary * 64
    flops = training_flops(prepared.linears, prepared.head, tokens=10, labels=3)
    assert flops == 4 * (2 * layer * 10 + vocabulary * 64 * 3)


@needs_trl
def test_missing_tinyllama_weights_are_replaced_by_random_ones_of_the_same_shape(
    tmp_path: Path,
) -> None:
    from benchmarks.rows import linear_shapes
    from benchmarks.tinyllama import architecture

    assert options("--model", "tinyllama").setup.model == "local"
    assert str(options("--device", "cuda").setup.model_path).endswith("tinyllama-1.1b-random-1")
    architecture().save_pretrained(tmp_path)
    linears, head = linear_shapes(tmp_path)
    blocks = sum(out * into * count for out, into, count in linears)
    norms = (2 * 22 + 1) * 2048
    assert blocks + 2 * head + norms == 1_100_048_384  # head and embeddings are not tied


def test_gemm_rates_are_measured_in_both_precisions(prepared_file: str) -> None:
    rates = measure(Job("gemm", "gemm", SETUP, prepared=prepared_file))
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0


def record(arm: str, stage: str, repeat: int, seconds: float, **more: Any) -> Record:
    done = Trained(adapters=2, batch_size=4, tokens=1000, labels=100, steps=2, seconds=seconds)
    return Record(stage, arm, repeat, [done], more.pop("wall_s", 0.0), more.pop("peak_mib", None))


def test_medians_ratios_and_ranges_of_known_records(prepared: Prepared) -> None:
    assert ratio([8.0, 10.0, 30.0], [4.0, 5.0, 5.0]) == (2.0, [2.0, 6.0])
    assert ratio([], [1.0]) == (None, [])
    records = [record("ours", "throughput", n, s) for n, s in ((1, 1.0), (2, 2.0), (3, 4.0))]
    records += [record("P2", "throughput", n, s) for n, s in ((1, 8.0), (2, 8.0), (3, 4.0))]
    records += [
        record("P1", "sweep", 1, 5.0, wall_s=60.0, peak_mib=900.0),
        record("ours", "sweep", 1, 1.0, wall_s=15.0, peak_mib=100.0),
    ]
    numbers = summary(records, [{"float32": 1e-3, "bfloat16": 2e-3}], prepared)
    assert numbers["arms"]["ours"]["tokens_per_s"] == [1000.0, 500.0, 250.0]
    assert numbers["arms"]["P1"] == {
        "tokens_per_s": [200.0],
        "wall_s": [60.0],
        "peak_mib": [900.0],
    }
    ratios = numbers["ratios"]
    assert (ratios["throughput_vs_p2"], ratios["sweep_vs_p1"]) == (4.0, 4.0)
    assert numbers["ratio_ranges"]["throughput_vs_p2"] == [1.0, 8.0]
    assert (ratios["memory_vs_processes"], ratios["nf4_vs_p3"]) == (9.0, None)
    flops = training_flops(prepared.linears, prepared.head, 1000, 100)
    shares = utilisation(records, 1e-3, prepared)
    assert shares["ours"] == pytest.approx(flops / 2.0 / 1e6)
    assert set(shares) == {"ours", "P2"}


def test_the_regime_curve_says_where_the_gain_falls_to_one() -> None:
    assert crossing([(100, 2.0), (200, 1.5), (400, 0.5)]) == 300
    assert crossing([(100, 2.0), (200, 1.5)]) is None
    assert crossing([(100, 0.9), (200, 0.8)]) == 100
    solo = Record("regime", "P3", 1, [Trained(3, 4, 300, 30, 3, 3.0)], 0.0, None)
    packed = Record("regime", "ours", 1, [Trained(8, 4, 800, 80, 8, 4.0)], 0.0, None)
    curve = regime([solo, packed])
    assert curve["falls_to_one"] == {"8": None}
    (point,) = curve["points"]
    assert (point["gain"], point["tokens_per_step"], point["adapters"]) == (2.0, 100.0, 8)


def test_arms_that_trained_on_different_tokens_are_not_compared() -> None:
    same = [record("P2", "throughput", 1, 1.0), record("ours", "throughput", 1, 1.0)]
    check_same_tokens(same)
    other = Record("throughput", "P3", 1, [Trained(2, 4, 999, 100, 2, 1.0)], 0.0, None)
    with pytest.raises(BenchmarkError, match="the same tokens and labels, got .*P3"):
        check_same_tokens([*same, other])
    both = together([same[0].rounds[0], other.rounds[0]])
    assert (both.adapters, both.tokens, both.seconds) == (4, 1999, 2.0)


def options(*typed: str) -> Options:
    return sweep.options(sweep.parser().parse_args(typed))


@needs_trl
def test_the_grids_have_the_documented_sizes() -> None:
    stages = {s.name: s for s in planned(options("--model", "tiny_random", "--device", "cpu"))}
    assert list(stages) == ["throughput", "nf4", "sweep", "regime"]
    sizes = {n: len(list(s.rounds[0].grid.adapters())) for n, s in stages.items()}
    assert (sizes["throughput"], sizes["nf4"], sizes["sweep"]) == (8, 8, 16)
    assert stages["sweep"].arms == ("P1", "P2", "P3", "ours")
    assert len(stages["regime"].rounds) == 25 and len(stages["regime"].solo) == 5
    only = planned(options("--model", "tiny_random", "--only", "memory", "--quick"))
    assert [(s.name, s.arms) for s in only] == [("sweep", ("P1", "ours"))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (object(), f"--only must name some of {', '.join(STAGES)}, got 'speed'"),
        (
            None,
            "the peers need the package trl, which is not installed; run pip install '.[bench]'",
        ),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(
    spec: object, message: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--json", "out.json", "--only", "speed"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_file_of_rows_is_read_by_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "my rows.jsonl"
    file.write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}))
    settings = overrides(Setup("tiny_random", None, str(file), 4, 1, "cpu"), 4, 4)
    assert "data.columns.context=input" in settings and f"data.path='{file}'" in settings
    file.write_text(json.dumps({"question": "a"}))
    with pytest.raises(BenchmarkError, match="got question; rename the columns of my rows.jsonl"):
        overrides(Setup("tiny_random", None, str(file), 4, 1, "cpu"), 4, 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_the_peak_of_a_process_includes_its_child() -> None:
    child = "import time; taken = b'x' * (200 * 2**20); time.sleep(0.6)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    with PeakWatcher(process) as watcher:
        process.wait()
    assert watcher.peak_mib is not None and 200 < watcher.peak_mib < 400


def test_results_become_markdown_tables(prepared: Prepared) -> None:
    records = [record("ours", "throughput", 1, 1.0), record("P3", "throughput", 1, 2.0)]
    run_settings = {"model": "tiny", "random_weights": True, "data": "travel", "rows": 4}
    run_settings |= {"batch_size": 4, "repeats": 1, "quick": True}
    results = summary(records, [{"float32": 10.0, "bfloat16": 5.0}], prepared)
    results |= {"machine": prepared.machine, "settings": {"run": run_settings}}
    text = markdown(results)
    assert "random weights, travel" in text and "quick, not for comparison" in text
    assert "| training tokens/s, one pack to P3 | 2.00 | 2.00–2.00 |" in text
