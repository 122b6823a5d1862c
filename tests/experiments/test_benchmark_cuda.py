"""The benchmark command from flags to results, with a GPU's cases on a machine without one."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import cuda
import jax
import numpy as np
import pytest
from benchmark_cases import CudnnBackward, CudnnForward, build, tiny
from jax.experimental import rnn

from elmo_jax.ops import lstm_pallas
from experiments.benchmark import __main__ as benchmark, flax_baseline, workloads
from experiments.benchmark.__main__ import BenchmarkConfig, Goal, judge
from experiments.benchmark.cases import (
    AG_NEWS,
    CASES,
    CUDNN,
    OURS,
    SCAN,
    Rates,
    cuda_cases,
    find_rates,
    machine_cases,
    make_inputs,
)
from experiments.benchmark.runner import BUILDERS, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def _baselines_mix_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_cudnn_baseline_computes_what_elmo_jax_computes(monkeypatch, precision):
    forward = CudnnForward()
    monkeypatch.setattr(rnn, "rnn_fwd_p", forward)
    monkeypatch.setattr(rnn, "rnn_bwd_p", CudnnBackward())
    case = replace(tiny("lstm"), precision=precision)
    expected = build(workloads, case, "_scan").check()
    found = build(flax_baseline, case, "_cudnn").check()
    assert set(forward.calls) == {precision == "tf32"}
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5, key


def test_on_cuda_elmo_jax_runs_its_kernel_and_the_scan_runs_none(monkeypatch):
    case = replace(tiny("lstm"), layers=1)
    arrays, _ = make_inputs(case, seed=1)
    cuda.pretend(monkeypatch)
    launched, launch = [], lstm_pallas._call
    monkeypatch.setattr(
        lstm_pallas, "_call", lambda *args: (launched.append(args[0].__name__), launch(*args))[1]
    )
    expected = workloads.build_lstm_scan(case, arrays).check()["loss"]
    assert launched == []
    assert relative_error(workloads.build_lstm(case, arrays).check()["loss"], expected) < 1e-5
    assert {"forward_kernel", "backward_kernel"} <= set(launched)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_torch_stays_near_in_other_precisions(precision):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline

    case = replace(tiny("step"), precision=precision)
    expected, found = (build(module, case).check() for module in (workloads, torch_baseline))
    errors = [relative_error(found[name], value) for name, value in expected.items()]
    assert max(errors) < TOLERANCE[precision] / 2
    exact = build(torch_baseline, tiny("step")).check()["loss"]
    assert np.array_equal(found["loss"], exact) == (precision == "tf32")  # a CPU has no TF32


def test_a_gpu_has_each_precision_and_its_baselines():
    known = {case.name: case for case in cuda_cases(CASES)}
    assert known.keys() > {case.name for case in CASES}
    for name in ("step", "lstm"):
        assert {CUDNN, SCAN, "torch", OURS} <= set(known[name].implementations)
        assert {CUDNN, SCAN, "torch", OURS} <= set(known[f"{name}-tf32"].implementations)
        case = known[f"{name}-bfloat16"]
        assert SCAN in case.implementations and CUDNN not in case.implementations
        assert case.precision == "bfloat16"
    assert known["step-b1024-bfloat16"].batch == 1024 and "step-b1024" not in {c.name for c in CASES}
    assert {name for case in known.values() for name in case.implementations} <= BUILDERS.keys()
    assert {goal.case for goal in benchmark.CUDA_GOALS} <= known.keys() | {AG_NEWS.name}


def test_a_case_is_measured_against_the_rate_of_its_own_precision():
    assert [c.name for c in machine_cases(True)] == ["matmul", "matmul-tf32", "matmul-bfloat16", "copy"]
    rates = {"matmul": 1.0, "matmul-bfloat16": 2.0}
    assert find_rates(rates, "float32") is None
    assert find_rates(rates | {"copy": 3.0}, "bfloat16") == Rates(2.0, 3.0)
    assert find_rates(rates | {"copy": 3.0}, "tf32") is None


def _found(**records):
    return {"x": {"implementations": records}}


@pytest.mark.parametrize(
    ("goal", "found", "value", "text"),
    [
        (
            Goal("x", "speedup", 2.0, "torch"),
            _found(torch={"speedup": 2.5}),
            2.5,
            "2.50x as fast as torch, goal at least 2x: met",
        ),
        (
            Goal("x", "roofline_fraction", 0.4),
            _found(elmo_jax={"roofline_fraction": 0.3}),
            0.3,
            "30% of the roofline, goal at least 40%: missed",
        ),
        (
            Goal("x", "matmul_fraction", 0.4),
            _found(elmo_jax={"matmul_fraction": 0.5}),
            0.5,
            "50% of the machine's matmul rate, goal at least 40%: met",
        ),
        (
            Goal("x", "median", 60),
            _found(elmo_jax={"median": 50.0}),
            50,
            "trained in 50 s, goal at most 60 s: met",
        ),
        (
            Goal("x", "memory", 0.5, "torch"),
            _found(torch={"memory": 0.25}),
            0.25,
            "0.25x the peak memory of torch, goal at most 0.5x: met",
        ),
    ],
)
def test_goals_are_judged(goal, found, value, text):
    judged = judge(goal, found)
    assert judged is not None and judged["value"] == pytest.approx(value) and judged["line"] == f"x: {text}"
    assert judged["met"] == text.endswith(": met")
    assert judge(goal, {}) is None and judge(goal, _found(elmo_jax={"not_timed": "?"})) is None


def test_a_ratio_within_the_noise_of_its_bound_says_so():
    def verdict(ratio):
        found = _found(elmo_jax={"spread": 0.1}, torch={"speedup": ratio, "spread": 0.05})
        return judge(Goal("x", "speedup", 2.0, "torch"), found)["line"].rpartition(": ")[2]

    assert verdict(2.3) == verdict(2.35) == "met (within the noise)"
    assert verdict(2.36) == "met" and verdict(1.7) == "missed"
    assert verdict(1.8) == "missed (within the noise)"


def test_cases_are_chosen_by_name():
    names = lambda **flags: [case.name for case in benchmark.choose(BenchmarkConfig(**flags), CASES)]  # noqa: E731
    assert names() == [case.name for case in CASES]
    assert names(only=("lstm", "softmax*")) == ["lstm", "softmax", "softmax-2048"]
    assert names(quick=True) == ["step", "lstm", "softmax", "embed"]


def test_command_writes_results_and_a_plot(tmp_path, monkeypatch, capsys):
    """A GPU's cases from a folder other than the checkout; cuDNN says that it cannot run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roofline.png").write_text("of older results")
    machine = tuple(replace(c, steps=32, implementations=(OURS,)) for c in machine_cases(True))
    config = BenchmarkConfig(only=("step-tf32",), rounds=2, least=0.01, output=str(tmp_path), overwrite=True)
    case = replace(tiny("step"), layers=1, implementations=(OURS,))
    results = benchmark.benchmark(config, (case,), machine, cuda=True)
    assert results["rates"].keys() == {"matmul-tf32", "copy"} and results["cases"].keys() == {"step-tf32"}
    records = results["cases"]["step-tf32"]["implementations"]
    assert records.keys() == {OURS, SCAN, CUDNN} and records[SCAN]["speedup"] > 0
    assert records[CUDNN]["not_timed"].startswith("AttributeError")
    ours = records[OURS]
    assert ours["compile_seconds"] > 0 and ours["peak_bytes"] > 1e8 and len(ours["seconds"]) == 2
    assert ours["matmul_fraction"] > 0 and ours["tokens_per_second"] == pytest.approx(12 / ours["median"])
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "no CUDA device" not in out and f"{CUDNN:<9} not timed" in out


def test_cases_after_the_deadline_are_not_started(tmp_path, capsys):
    config = BenchmarkConfig(quick=True, only=("step", "lstm"), output=str(tmp_path))
    results = benchmark.benchmark(config, deadline=time.monotonic() - 1)
    assert results["cases"] == {name: {"not_timed": "out of time"} for name in ("step", "lstm")}
    assert results["rates"] == {} and capsys.readouterr().out.count("not timed: out of time") == 4


def test_bad_flags_are_refused_before_anything_is_written(tmp_path, refused):
    (tmp_path / "benchmark.json").write_text("{}")
    refused(benchmark.main, ["--output", tmp_path], "--overwrite")
    refused(benchmark.main, ["--output", tmp_path / "x", "--only", "lstn"], "--only lstn: no such case; give")
    refused(benchmark.main, ["--only", "ag-news"], "--only ag-news: no such case")
    refused(benchmark.main, ["--quick", "--data-dir", "x"], "--data-dir")
    refused(
        benchmark.main, ["--output", tmp_path / "x", "--data-dir", tmp_path / "nowhere"], "no such folder"
    )
    assert (tmp_path / "benchmark.json").read_text() == "{}" and not (tmp_path / "x").exists()


def test_a_pretraining_run_is_read_and_printed(trained):
    record = benchmark.read_pretraining(trained[0])
    assert len(record["seconds_by_epoch"]) == 2 and record["median"] == sum(record["seconds_by_epoch"])
    (line,) = benchmark.table_rows(AG_NEWS, {"implementations": {OURS: record}})
    assert f"{record['tokens_per_second']:,.0f}" in line and line.startswith("ag-news")


def test_a_failed_pretraining_run_says_why():
    config = BenchmarkConfig(data_dir="nowhere")
    found = benchmark.measure(AG_NEWS, config, {}, None)
    assert found["implementations"][OURS]["not_timed"].startswith("ended with code 2: error: ")
    (line,) = benchmark.table_rows(AG_NEWS, found)
    assert "not timed" in line and "nowhere" in line


def test_help_imports_neither_jax_nor_matplotlib():
    script = """
import sys
from experiments.benchmark import __main__
print(sorted({"jax", "matplotlib"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
