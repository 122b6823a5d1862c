import json
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from benchmark_cases import _BY_NAME, side, tiny

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark.__main__ import BenchmarkConfig
from experiments.benchmark.cases import (
    CASES,
    MACHINE,
    OURS,
    SCAN,
    Case,
    Phase,
    Rates,
    floor_seconds,
    parameters,
    phases,
)
from experiments.benchmark.inputs import make_inputs, make_weights
from experiments.benchmark.runner import (
    Built,
    Lane,
    Stopwatch,
    _compare,
    _count_compilation,
    difference,
    is_weight,
    race,
    ratio,
    results_of,
)


def test_the_work_of_the_seed_shape_counted_by_hand():
    step = _BY_NAME["step"]
    lstm, softmax, update = phases(step, {"positions": 1280, "steps": 1})
    # 2 directions, 2 layers, 300 x 600 weights, 2 operations each, three times for training
    assert lstm.flops / 1280 == 3 * 2 * 2 * 2 * 300 * 600 == 4_320_000
    assert softmax.flops / 1280 == 3 * 2 * 2 * 150 * 30_000 == 54_000_000
    numbers = 2 * 30_000 * 150 + 30_000 + 2 * 2 * (300 * 600 + 600)
    assert update.bytes == 28 * numbers
    sampled = phases(_BY_NAME["softmax-2048"], {"positions": 1})[0]
    assert sampled.flops == 3 * 2 * 2 * 150 * 2049
    (word, _) = phases(_BY_NAME["embed"], {"positions": 0, "types": 1})
    kinds = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    filters = sum(w * 16 * n * (51 - w) for w, n in kinds)
    assert word.flops == 2 * (filters + 2 * 2048 * 2048 + 2048 * 128)


def test_of_a_table_only_the_rows_that_a_step_names_need_be_moved():
    case = replace(tiny("small"), vocabulary=3000)
    arrays, counts = make_inputs(case, seed=1)
    names = set(arrays["words"].ravel().tolist())
    assert len(names) <= counts["rows"] <= len(names) + 7
    update, dense = (phases(case, known)[2].bytes for known in (counts, counts | {"rows": 3000}))
    assert dense == 20 * parameters(case)
    assert dense - update == 20 * (3000 - counts["rows"]) * (4 + 1)  # a vector of 4 and a bias


def test_phases_follow_each_other_and_each_is_bound_by_the_slower_of_two_rates():
    rates = Rates(flops=100.0, bytes=10.0)
    assert floor_seconds([Phase(200.0, 5.0), Phase(10.0, 30.0)], rates) == 2 + 3


@pytest.mark.parametrize("name", ["step", "recipe", "small", "embed"])
def test_parameters_counted_are_those_of_the_model(name):
    case = tiny(name)
    weights = make_weights(case, np.random.default_rng(0))
    made = sum(a.size for n, a in weights.items())
    assert all(map(is_weight, weights))
    softmax = case.vocabulary * (case.width + 1) if name == "embed" else 0
    assert parameters(case) == made + softmax


PEERS = ("lstm", "softmax", "softmax-2048", "step", "recipe", "small", "embed")


@pytest.mark.parametrize("name", PEERS)
def test_torch_computes_what_this_library_does(name, standard_promotion):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline as peers, workloads as ours

    with jax.numpy_rank_promotion("allow"):
        case = tiny(name)
        expected, found = side(ours, case).check(), side(peers, case).check()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert difference(found[key], value) < 1e-5, key


def test_torch_holds_the_logits_of_one_direction_alone(monkeypatch, standard_promotion):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline as peers

    done = []

    class Watched(peers.Model):
        def forward(self, *args):
            done.append([stack.weight_ih_l0.grad is not None for stack in self.stacks])
            return super().forward(*args)

    monkeypatch.setattr(peers, "Model", Watched)
    side(peers, tiny("step")).runs[0][0](1)
    assert done == [[False, False], [True, False]]


def test_torch_moves_of_a_large_softmax_the_rows_that_a_step_names(monkeypatch, standard_promotion):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline as peers

    kept = []

    class Kept(torch.optim.Adagrad):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(torch.optim, "Adagrad", Kept)
    case = replace(tiny("small"), vocabulary=3000)
    arrays, counts = make_inputs(case, seed=1)
    before = {name: arrays[name].copy() for name in ("softmax_table", "softmax_bias")}
    peers.build(case, arrays).runs[0][0](1)
    large = [p for group in kept[0].param_groups for p in group["params"] if len(p) == 3000]
    for p, start in zip(large, before.values(), strict=True):
        assert p.grad.is_sparse and 0 < p.grad.coalesce().indices().shape[1] <= 2 * counts["rows"]
        g = p.grad.to_dense().numpy()
        dense = start.reshape(p.shape) - 1e-3 * g / (np.sqrt(1 + g**2) + 1e-7)
        assert np.abs(g).max() > 1e-3 and np.allclose(p.detach().numpy(), dense, atol=1e-7)


@pytest.mark.parametrize("name", ["lstm", "softmax", "step"])
def test_flax_computes_what_this_library_does(name, standard_promotion):
    from experiments.benchmark import flax_baseline as jax_peers, workloads as ours

    with jax.numpy_rank_promotion("allow"):
        case = tiny(name)
        arrays, _ = make_inputs(case, seed=1)
        expected = ours.build(case, arrays).check()
        found = jax_peers.build_flax(case, arrays).check()
    for key, value in expected.items():
        assert difference(found[key], value) < 1e-5, key


def test_gensim_learns_as_much_in_an_epoch(standard_promotion):
    pytest.importorskip("gensim")
    from experiments.benchmark import gensim_baseline as gensim_peer, workloads as ours

    case = replace(tiny("sgns"), vocabulary=5000, sentences=100, width=16)
    with jax.numpy_rank_promotion("allow"):
        expected, found = side(ours, case).check()["loss"], side(gensim_peer, case).check()["loss"]
    assert expected < 0.98 * 6 * np.log(2) and abs(found / expected - 1) < 0.1


def test_an_epoch_of_sgns_compiles_nothing_the_second_time(standard_promotion):
    from experiments.benchmark import workloads as ours

    with jax.numpy_rank_promotion("allow"):
        built = side(ours, tiny("sgns"))
        spent = _count_compilation()
        built.check()
        first = len(spent)
        for run, _ in built.runs:
            run(1)
    assert 0 < first == len(spent)


def test_a_peer_that_compiles_in_every_unit_is_timed_all_the_same():
    spent, calls = [], []

    def run(n):
        calls.append(n)
        spent.append(1.0)

    Stopwatch(Built(dict, [(run, 1.0)]), 0.0, spent)
    assert 1 < len(calls) < 10


class Silent:
    """A lane that computed something, and was not timed."""

    def __init__(self, peer, folder, values):
        self.peer, self.seconds, self.about, self.why = peer, [1.0, 2.0], {}, None
        np.savez(folder / f"{peer}.npz", **values)


def test_a_peer_of_another_loss_is_not_timed(tmp_path):
    right, wrong = {"loss": np.ones(3)}, {"loss": np.array([1, 1, 1.01])}
    lanes = [Silent(OURS, tmp_path, right), Silent("flax", tmp_path, right), Silent("torch", tmp_path, wrong)]
    _compare(_BY_NAME["step"], lanes, tmp_path)  # type: ignore[arg-type]
    assert [lane.why is None for lane in lanes] == [True, True, False]
    assert lanes[2].why.startswith("its loss is not this library's")
    found = results_of(_BY_NAME["step"], lanes, {"tokens": 10}, [Phase(3.0)], Rates(6.0, 1.0))
    assert "median" not in found["peers"]["torch"] and found["peers"]["flax"]["times"] == 1.0
    assert found["peers"][OURS]["of_floor"] == 0.5 / 1.5


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_whole_step_is_told_from_another_models(precision, tmp_path, monkeypatch, standard_promotion):
    """Losses of new models are all near log V; the first step's gradients are not alike."""
    from experiments.benchmark import flax_baseline as jax_peers, workloads as ours

    case = replace(tiny("step"), precision=precision)
    arrays, _ = make_inputs(case, seed=1)
    without = {n: 0 * a if "recurrent" in n else a for n, a in arrays.items()}
    with jax.numpy_rank_promotion("allow"):
        found = {OURS: ours.build(case, arrays).check()}
        for peer, given in (("flax", arrays), ("memoryless", without)):
            found[peer] = jax_peers.build_flax(case, given).check()
        monkeypatch.setattr(jax_peers, "reverse_valid", lambda words, lengths: words)
        found["unturned"] = jax_peers.build_flax(case, arrays).check()
    assert {"d:lstm_1/recurrent_kernel", "d:softmax_bias"} < found[OURS].keys()
    for peer in ("memoryless", "unturned"):
        found[peer]["loss"] = found[OURS]["loss"]
    lanes = [Silent(peer, tmp_path, values) for peer, values in found.items()]
    _compare(case, lanes, tmp_path)  # type: ignore[arg-type]
    assert [lane.why is None for lane in lanes] == [True, True, False, False]


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 40.0, 2.0], [1.0, 20.0, 1.0]) == 2.0


def test_a_worker_that_dies_says_why(tmp_path):
    case = Case("bad", "sgns", (OURS,), vocabulary=40)
    (lane,) = race(case, {}, tmp_path, 1, 0.0, lambda: None)
    assert lane.seconds == [] and "KeyError: 'ids is not a file in the archive'" in lane.why


def test_a_worker_killed_between_rounds_leaves_the_others_to_be_timed(tmp_path, monkeypatch):
    started, ticks = [], []

    class Kept(Lane):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    def tick():
        ticks.append(1)
        if len(ticks) == 3:  # both are ready, and one round is over
            started[1]._process.kill()
            started[1]._process.wait()

    monkeypatch.setattr("experiments.benchmark.runner.Lane", Kept)
    case = replace(tiny("lstm"), peers=(OURS, SCAN))
    arrays, _ = make_inputs(case, seed=1)
    ours, killed = race(case, arrays, tmp_path, 3, 0.0, tick)
    assert ours.why is None and len(ours.seconds) == 3 and len(ticks) == 5
    assert killed.why.startswith("ended with code -9")
    assert [lane._process.returncode is None for lane in started] == [False, False]


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lane = Lane(_BY_NAME["step"], "torch", tmp_path, 0.1, None)
    lane.ready()
    lane.measure()
    lane.close()
    assert lane.why == "torch is not installed (pip install 'elmo_jax[benchmark]')"


def test_cases_are_chosen_by_name():
    names = lambda **flags: [case.name for case in benchmark.choose(BenchmarkConfig(**flags), CASES)]  # noqa: E731
    assert names() == [case.name for case in CASES]
    assert names(only=("lstm", "embed*")) == ["lstm", "embed"]
    assert names(quick=True) == ["step", "lstm", "softmax", "embed"]


def test_from_flags_to_results(tmp_path, standard_promotion):
    cases = (
        replace(tiny("step"), peers=(OURS,)),
        replace(tiny("step"), name="step-b8", peers=(OURS,), batch=8),
    )
    machine = tuple(replace(case, steps=32, peers=(OURS,)) for case in MACHINE)
    config = BenchmarkConfig(rounds=2, least=0.01, output=str(tmp_path))
    results = benchmark.benchmark(config, cases, machine)
    assert results["cases"].keys() == {"step", "step-b8"}
    ours = results["cases"]["step"]["peers"][OURS]
    assert ours["compile_seconds"] > 0 and ours["peak_bytes"] > 1e8 and len(ours["seconds"]) == 2
    assert ours["tokens_per_second"] == pytest.approx(3 * 4 / ours["median"])
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "floors.png").stat().st_size > 5000


def test_what_the_time_does_not_reach_is_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "make_inputs", None)  # or it would be called
    config = BenchmarkConfig(quick=True, only=("step", "lstm"), output=str(tmp_path))
    results = benchmark.benchmark(config, CASES, MACHINE, began=time.monotonic() - 90)
    assert results["cases"] == {name: {"not_timed": "the time was over"} for name in ("step", "lstm")}
    assert results["rates"] == {} and capsys.readouterr().out.count("not timed: the time was over") == 4
    assert json.loads((tmp_path / "benchmark.json").read_text())["cases"] == results["cases"]


def test_pictures_of_older_results_go_with_them(tmp_path, monkeypatch):
    for name in ("benchmark.json", "floors.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(benchmark, "_measure", lambda case, *_: {"not_timed": "a test"})
    benchmark.benchmark(BenchmarkConfig(overwrite=True, output=str(tmp_path)), CASES[:1], ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "notes.txt"]


def test_results_are_not_replaced_unasked(tmp_path, refused):
    (tmp_path / "benchmark.json").write_text("{}")
    refused(benchmark.main, ["--output", tmp_path], "--overwrite")
    refused(benchmark.main, ["--output", tmp_path / "x", "--only", "lstn"], "--only lstn: no such case")
    told = "nowhere: no such folder; give one that holds train.csv and test.csv"
    refused(benchmark.main, ["--output", tmp_path / "x", "--data-dir", tmp_path / "nowhere"], told)
    assert (tmp_path / "benchmark.json").read_text() == "{}" and not (tmp_path / "x").exists()
