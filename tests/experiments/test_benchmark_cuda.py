"""The benchmark's CUDA side where there is no CUDA, what the host costs, and AG News."""

import csv
from dataclasses import replace

import cuda
import jax
import numpy as np
import pytest
from benchmark_cases import side, tiny

from elmo_jax.ops import lstm_pallas as persistent
from experiments.benchmark import (
    __main__ as benchmark,
    __main__ as whole,
    flax_baseline as jax_peers,
    workloads as host,
    workloads as ours,
)
from experiments.benchmark.__main__ import BenchmarkConfig
from experiments.benchmark.cases import (
    CASES,
    CUDA_GOALS,
    CUDA_MACHINE,
    CUDNN,
    MACHINE,
    OURS,
    REPLAY,
    SCAN,
    Case,
    Goal,
    Rates,
    cuda_cases,
    judge,
    needed,
    rates_of,
)
from experiments.benchmark.inputs import make_inputs
from experiments.benchmark.runner import _MAKERS, TOLERANCE, difference, results_of

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def _peers_mix_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("name", "precision"), [("lstm", "float32"), ("lstm", "tf32"), ("step", "float32")])
def test_cudnns_lane_computes_what_this_library_does(played, name, precision):
    case = replace(tiny(name), precision=precision)
    arrays, _ = make_inputs(case, seed=1)
    played.clear()  # shapes of weights are found by tracing the model
    expected = ours.build_scan(case, arrays).check()
    assert played == []
    found = jax_peers.build_cudnn(case, arrays).check()
    assert set(played) == {(False, precision == "tf32")}
    for key, value in expected.items():
        assert difference(found[key], value) < 1e-5, key


@pytest.mark.parametrize("name", ["lstm", "step"])
def test_this_library_runs_its_own_kernel_on_cuda_and_its_scan_when_asked(monkeypatch, name):
    cuda.pretend(monkeypatch)
    launched, launch = [], persistent._call
    monkeypatch.setattr(persistent, "_call", lambda *args: (launched.append(args[0]), launch(*args))[1])
    case = tiny(name)
    arrays, _ = make_inputs(case, seed=1)
    launched.clear()
    expected = ours.build_scan(case, arrays).check()["loss"]
    assert launched == []
    assert difference(ours.build(case, arrays).check()["loss"], expected) < 1e-5
    assert launched.count("forward") >= 2 and launched.count("backward") >= 2  # layers


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_torch_stays_near_in_other_precisions(precision):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline as peers

    case = replace(tiny("step"), precision=precision)
    expected, found = (side(module, case).check() for module in (ours, peers))
    assert max(difference(found[name], value) for name, value in expected.items()) < TOLERANCE[precision] / 2
    exact = side(peers, tiny("step")).check()["loss"]
    assert np.array_equal(found["loss"], exact) == (precision == "tf32")  # which a CPU has not


def test_training_on_cuda_is_timed_in_each_precision_beside_what_can_do_it():
    cases = {case.name: case for case in cuda_cases(CASES)}
    assert cases.keys() > {case.name for case in CASES}
    for name in ("step", "lstm"):
        assert {CUDNN, SCAN, "torch", OURS} <= set(cases[name].peers)
        assert {CUDNN, SCAN, "torch", OURS} <= set(cases[f"{name}-tf32"].peers)
        assert SCAN in cases[f"{name}-bfloat16"].peers and CUDNN not in cases[f"{name}-bfloat16"].peers
        assert cases[f"{name}-bfloat16"].precision == "bfloat16"
    assert cases["step-b1024-bfloat16"].batch == 1024 and "step-b1024" not in {c.name for c in CASES}
    assert {peer for case in cases.values() for peer in case.peers} <= _MAKERS.keys()
    assert {goal.case for goal in CUDA_GOALS} <= cases.keys() | {whole.CASE.name}


def test_a_case_is_measured_against_the_rate_of_its_own_precision():
    machine = needed(CUDA_MACHINE, (cuda_cases((tiny("step"),))[2],))
    assert [case.name for case in machine] == ["product-bfloat16", "copy"]
    rates = {"product": 1.0, "product-bfloat16": 2.0}
    assert rates_of(rates, "float32") is None
    assert rates_of(rates | {"copy": 3.0}, "bfloat16") == Rates(2.0, 3.0)
    assert rates_of(rates | {"copy": 3.0}, "tf32") is None


def _found(**peers):
    return {"x": {"peers": peers}}


@pytest.mark.parametrize(
    ("goal", "found", "value", "said"),
    [
        (
            Goal("x", "torch", 2.0),
            _found(torch={"times": 2.5}),
            2.5,
            "2.50x as fast as torch, goal at least 2x: met",
        ),
        (
            Goal("x", None, 0.4),
            _found(elmo_jax={"of_floor": 0.3}),
            0.3,
            "30% of the floor, goal at least 40%: missed",
        ),
        (
            Goal("x", None, 0.4, "products"),
            _found(elmo_jax={"of_products": 0.5}),
            0.5,
            "50% of the machine's product rate, goal at least 40%: met",
        ),
        (
            Goal("x", REPLAY, 0.02, "host"),
            _found(replay={"times": 0.97}),
            0.03,
            "3.0% of fit's time outside compiled code, goal at most 2%: missed",
        ),
        (
            Goal("x", None, 60, "seconds"),
            _found(elmo_jax={"median": 50.0}),
            50,
            "trained in 50 s, goal at most 60 s: met",
        ),
        (
            Goal("x", "torch", 0.5, "memory"),
            _found(elmo_jax={"median": 1, "peak_bytes": 1}, torch={"median": 1, "peak_bytes": 4}),
            0.25,
            "peak memory 0.25x torch's, goal at most 0.5x: met",
        ),
    ],
)
def test_goals_are_judged(goal, found, value, said):
    judged = judge(goal, found)
    assert judged is not None and judged["value"] == pytest.approx(value) and judged["line"] == f"x: {said}"
    assert judged["met"] == said.endswith(": met")
    assert judge(goal, {}) is None and judge(goal, _found(elmo_jax={"not_timed": "?"})) is None


def test_a_peak_that_is_not_known_meets_no_goal():
    known, unknown = {"median": 1, "peak_bytes": 4}, {"median": 1, "peak_bytes": 0}
    for ours_, other in ((known, unknown), (unknown, known)):
        assert judge(Goal("x", "torch", 0.5, "memory"), _found(elmo_jax=ours_, torch=other)) is None


def test_a_ratio_within_the_noise_of_its_bound_is_judged_and_says_so():
    def said(goal, times):
        found = _found(elmo_jax={"median": 1, "spread": 0.1}, torch={"times": times, "spread": 0.05})
        return judge(goal, found)["line"].rpartition(": ")[2]

    speed, host = Goal("x", "torch", 2.0), Goal("x", "torch", 0.02, "host")
    assert said(speed, 2.3) == said(speed, 2.35) == "met (within the noise)"
    assert said(speed, 2.36) == "met" and said(speed, 1.7) == "missed"
    assert said(speed, 1.8) == said(host, 0.9) == "missed (within the noise)"
    assert said(host, 0.8) == "missed" and said(host, 1.2) == "met"


def test_a_host_that_took_no_time_is_not_said_to_have_given_some():
    judged = judge(Goal("x", REPLAY, 0.02, "host"), _found(replay={"times": 1.01}))
    assert judged["line"].startswith("x: 0.0% of fit's") and judged["met"] and judged["value"] < 0


def test_from_flags_to_results_as_on_cuda(tmp_path, monkeypatch, capsys):
    """With the precisions and lanes of CUDA; the one that needs it says so and is not timed."""
    monkeypatch.setattr(benchmark, "on_cuda", lambda: True)
    monkeypatch.setattr(
        benchmark, "CUDA_MACHINE", tuple(replace(c, steps=32, peers=(OURS,)) for c in CUDA_MACHINE)
    )
    case = replace(tiny("step"), peers=(OURS,))
    config = BenchmarkConfig(only=("step-tf32",), rounds=2, least=0.01, output=str(tmp_path))
    results = benchmark.benchmark(config, (case,), MACHINE)
    assert results["rates"].keys() == {"product-tf32", "copy"} and results["cases"].keys() == {"step-tf32"}
    peers = results["cases"]["step-tf32"]["peers"]
    assert peers[OURS]["of_products"] > 0 and peers[SCAN]["times"] > 0 and peers.keys() == {OURS, SCAN, CUDNN}
    assert peers[CUDNN]["not_timed"].startswith("ended with code 1")
    out = capsys.readouterr().out
    assert "no CUDA here" not in out and f"{CUDNN:<9} not timed" in out


def test_an_epoch_of_fit_and_its_dispatches_bare_do_the_same():
    case = replace(tiny("fit"), sentences=80, steps=8)
    arrays, counts = make_inputs(case, seed=1)
    through, bare = host.build_fit(case, arrays), host.build_replay(case, arrays)
    first = through.check()["loss"]
    assert difference(first, bare.check()["loss"]) < 1e-6
    ((run, _),) = through.runs
    assert counts["steps"] > 20 and run(2) < first and bare.runs[0][0](2) < first


def test_what_fails_in_fit_is_told(monkeypatch):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(host, "fit", broken)
    case = replace(tiny("fit"), sentences=40)
    with pytest.raises(ValueError, match="broken"):
        side(_Fit, case).check()


class _Fit:
    build = staticmethod(host.build_fit)


def test_useful_products_are_set_beside_the_machines():
    lane = type("Lane", (), {"peer": OURS, "seconds": [2.0, 2.0], "why": None, "about": {}})()
    found = results_of(
        tiny("step"),
        [lane],
        {"tokens": 1},
        benchmark.phases(tiny("step"), {"positions": 20}),
        Rates(7.0, 1.0),
    )
    assert found["peers"][OURS]["of_products"] == pytest.approx(found["flops"] / 7.0 / 2.0)


def test_a_whole_training_run_is_timed(tmp_path):
    for part in ("train", "test"):
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([i % 2 + 1, f"the bank raised rates {i % 7}"] for i in range(40))
    flags = ["--dataset", str(tmp_path), "--epochs", "2", "--cells", "4", "--embedding", "4", "--layers", "1"]
    found = whole.pretraining([*flags, "--batch-size", "4", "--min-count", "1"])
    record = found["peers"][OURS]
    assert "median" in record, record
    assert len(record["seconds_by_epoch"]) == 2 and 0 < record["median"] < record["whole_seconds"]
    (line,) = benchmark.rows(whole.CASE, found)
    assert f"{record['tokens_per_second']:,.0f}" in line and line.startswith("ag-news")


def test_a_training_run_that_ends_badly_says_why():
    found = whole.pretraining(whole.flags_of("nowhere"))
    assert found["peers"][OURS]["not_timed"].startswith("ended with code 2: error: ")
    (line,) = benchmark.rows(whole.CASE, found)
    assert "not timed" in line and "nowhere" in line


def test_ag_news_is_timed_where_its_folder_is_given(refused):
    assert "sentences" in Case.__doc__ and whole.CASE not in CASES
    assert whole.flags_of("x")[-2:] == ["--preset", "report"]
    refused(benchmark.main, ["--quick", "--data-dir", "x"], "--data-dir")
    refused(benchmark.main, ["--only", "ag-news"], "--only ag-news: no such case")
