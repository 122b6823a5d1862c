"""The benchmark's cases, its implementations, and its timing in worker processes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from benchmark_cases import BY_NAME, build, tiny

from experiments.benchmark import cases, flax_baseline, runner, workloads
from experiments.benchmark.cases import OURS, SCAN, Case, Phase, Rates, Workload, least_work, make_inputs
from experiments.benchmark.runner import Stopwatch, Worker, reject_different, relative_error

pytestmark = pytest.mark.usefixtures("standard_promotion")
IN_TORCH = ("lstm", "softmax", "softmax-2048", "step", "recipe", "small", "embed")


@pytest.fixture(autouse=True)
def _baselines_mix_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_least_work_equals_a_count_by_hand():
    numbers = 2 * 30_000 * 150 + 30_000 + 2 * 2 * (300 * 600 + 600)
    counts = {"positions": 1280, "steps": 1, "parameters": numbers}
    lstm, softmax, update = least_work(BY_NAME["step"], counts)
    # 2 directions, 2 layers, 300 x 600 weights, 2 operations each, three times for training
    assert lstm.flops / 1280 == 3 * 2 * 2 * 2 * 300 * 600 == 4_320_000
    assert softmax.flops / 1280 == 3 * 2 * 2 * 150 * 30_000 == 54_000_000
    assert update.bytes == 28 * numbers
    sampled = least_work(BY_NAME["softmax-2048"], {"positions": 1})[0]
    assert sampled.flops == 3 * 2 * 2 * 150 * 2049
    word, _ = least_work(BY_NAME["embed"], {"positions": 0, "types": 1})
    kinds = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    filters = sum(w * 16 * n * (51 - w) for w, n in kinds)
    assert word.flops == 2 * (filters + 2 * 2048 * 2048 + 2048 * 128)


def test_parameters_of_the_default_step_equal_a_count_by_hand():
    shapes = workloads.weight_shapes(BY_NAME["step"])
    numbers = 2 * 30_000 * 150 + 30_000 + 2 * 2 * (300 * 600 + 600)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == numbers
    assert all(map(cases.is_weight, shapes))


def test_an_update_of_few_rows_moves_the_bytes_of_these_rows():
    case = replace(tiny("small"), vocabulary=3000)
    arrays, counts = make_inputs(case, seed=1)
    used = set(arrays["words"].ravel().tolist())
    assert len(used) <= counts["rows"] <= len(used) + 7
    update, dense = (least_work(case, known)[2].bytes for known in (counts, counts | {"rows": 3000}))
    assert dense == 20 * sum(a.size for name, a in arrays.items() if cases.is_weight(name))
    assert dense - update == 20 * (3000 - counts["rows"]) * (4 + 1)  # a vector of 4 and a bias


def test_a_phase_is_bound_by_the_slower_of_two_rates():
    rates = Rates(flops=100.0, bytes=10.0)
    assert [phase.seconds(rates) for phase in (Phase(200.0, 5.0), Phase(10.0, 30.0))] == [2, 3]


@pytest.mark.parametrize("name", ["softmax-2048", "small", "embed"])
def test_cases_without_a_jax_baseline_run(name):
    workload = build(workloads, tiny(name))
    assert all(np.isfinite(array).all() and np.any(array) for array in workload.check().values())
    workload.timed[0][0](1)


@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_computes_what_elmo_jax_computes(name):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline

    case = tiny(name)
    expected, found = (build(module, case).check() for module in (workloads, torch_baseline))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5, key


def test_torch_holds_the_logits_of_one_direction_at_a_time(monkeypatch):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline

    done = []

    class Watched(torch_baseline.LanguageModel):
        def forward(self, *args):
            done.append([stack.weight_ih_l0.grad is not None for stack in self.stacks])
            return super().forward(*args)

    monkeypatch.setattr(torch_baseline, "LanguageModel", Watched)
    build(torch_baseline, tiny("step")).timed[0][0](1)
    assert done == [[False, False], [True, False]]


def test_torch_updates_only_the_softmax_rows_that_a_step_uses(monkeypatch):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_baseline

    optimizers = []

    class Recorded(torch.optim.Adagrad):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "Adagrad", Recorded)
    case = replace(tiny("small"), vocabulary=3000)
    arrays, counts = make_inputs(case, seed=1)
    before = {name: arrays[name].copy() for name in ("softmax_table", "softmax_bias")}
    torch_baseline.build_official(case, arrays).timed[0][0](1)
    large = [p for group in optimizers[0].param_groups for p in group["params"] if len(p) == 3000]
    for p, start in zip(large, before.values(), strict=True):
        assert p.grad.is_sparse and 0 < p.grad.coalesce().indices().shape[1] <= 2 * counts["rows"]
        g = p.grad.to_dense().numpy()
        dense = start.reshape(p.shape) - 1e-3 * g / (np.sqrt(1 + g**2) + 1e-7)
        assert np.abs(g).max() > 1e-3 and np.allclose(p.detach().numpy(), dense, atol=1e-7)


@pytest.mark.parametrize("name", ["lstm", "softmax", "step"])
def test_flax_computes_what_elmo_jax_computes(name):
    case = tiny(name)
    expected, found = (build(module, case).check() for module in (workloads, flax_baseline))
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-5, key


def test_gensim_learns_as_much_in_an_epoch():
    pytest.importorskip("gensim")
    case = replace(tiny("sgns"), vocabulary=5000, sentences=100, width=16)
    expected = build(workloads, case).check()["loss"]
    found = flax_baseline.build_gensim(case, make_inputs(case, seed=1)[0]).check()["loss"]
    assert expected < 0.98 * 6 * np.log(2) and abs(found / expected - 1) < 0.1


def test_the_second_epoch_of_sgns_compiles_nothing():
    workload = build(workloads, tiny("sgns"))
    compilations = runner.record_compilations()
    workload.check()
    first = len(compilations)
    workload.timed[0][0](1)
    assert 0 < first == len(compilations)


def test_an_epoch_of_fit_equals_its_compiled_calls():
    case = replace(tiny("fit"), layers=1)
    arrays, _ = make_inputs(replace(case, sentences=24), seed=1)
    arrays |= {"ids": arrays["ids"][:480], "offsets": np.arange(0, 481, 6)}  # 80 documents of one length
    through, replay = workloads.build_fit(case, arrays), workloads.build_replay(case, arrays)
    first = through.check()["loss"]
    assert relative_error(first, replay.check()["loss"]) < 1e-6
    assert cases.stream_documents(case, arrays).steps_per_epoch == 27
    assert through.timed[0][0](2) < first and replay.timed[0][0](2) < first


def test_an_error_in_fit_is_raised(monkeypatch):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(workloads, "fit", broken)
    with pytest.raises(ValueError, match="broken"):
        build(workloads, replace(tiny("fit"), sentences=40)).check()


def test_an_implementation_that_always_compiles_is_timed_all_the_same():
    compilations, calls = [], []

    def run(n):
        calls.append(n)
        compilations.append(1.0)

    Stopwatch(Workload(dict, [(run, 1.0)]), 0.0, compilations)
    assert 1 < len(calls) < 10


class FakeWorker:
    """A worker that has computed something."""

    def __init__(self, name, checked):
        self.name, self.checked, self.seconds, self.info, self.error = name, checked, [1.0, 2.0], {}, None


def test_an_implementation_with_another_loss_is_not_timed():
    right, wrong = {"loss": np.ones(3)}, {"loss": np.array([1, 1, 1.01])}
    workers = [FakeWorker(OURS, right), FakeWorker("flax", right), FakeWorker("torch", wrong)]
    workers[0].info["peak_bytes"], workers[1].info["peak_bytes"] = 1, 4
    reject_different(BY_NAME["step"], workers)
    assert [worker.error is None for worker in workers] == [True, True, False]
    assert workers[2].error.startswith("its loss differs from elmo_jax's")
    counts = {"tokens": 10}
    found = runner.summarize(BY_NAME["step"], workers, counts, [Phase(3.0)], Rates(6.0, 1.0))
    records = found["implementations"]
    assert "median" not in records["torch"]
    assert records["flax"]["speedup"] == 1.0 and records["flax"]["memory"] == 0.25
    assert records[OURS]["roofline_fraction"] == records[OURS]["matmul_fraction"] == 0.5 / 1.5


def test_gradients_tell_a_step_from_another_models(monkeypatch):
    """The losses of all new models are near log V; the gradients of the first step differ."""
    case = replace(tiny("step"), layers=1, precision="bfloat16")  # the largest tolerance
    arrays, _ = make_inputs(case, seed=1)
    without_memory = {n: 0 * a if "recurrent" in n else a for n, a in arrays.items()}
    found = {OURS: workloads.build_step(case, arrays).check()}
    for name, given in (("flax", arrays), ("without memory", without_memory)):
        found[name] = flax_baseline.build_step(case, given).check()
    monkeypatch.setattr(flax_baseline, "reverse_valid", lambda words, lengths: words)
    found["not reversed"] = flax_baseline.build_step(case, arrays).check()
    assert {"d:lstm_0/recurrent_kernel", "d:softmax_bias"} < found[OURS].keys()
    for name in ("without memory", "not reversed"):
        found[name]["loss"] = found[OURS]["loss"]
    workers = [FakeWorker(name, values) for name, values in found.items()]
    reject_different(case, workers)
    assert [worker.error is None for worker in workers] == [True, True, False, False]


def test_speedup_is_the_median_of_ratios_within_a_round():
    assert runner.speedup([2.0, 40.0, 2.0], [1.0, 20.0, 1.0]) == 2.0


def test_a_failed_worker_reports_its_exception(tmp_path):
    case = Case("bad", "sgns", (OURS,), vocabulary=40)
    (worker,) = runner.time_case(case, {}, tmp_path, 1, 0.0)
    assert worker.seconds == [] and worker.error == "KeyError: 'ids is not a file in the archive'"


def test_a_worker_killed_between_rounds_does_not_stop_the_others(tmp_path, monkeypatch):
    measure = Worker.measure

    def measure_and_kill(worker):
        measure(worker)
        if worker.name == SCAN and len(worker.seconds) == 1:
            worker.process.kill()

    monkeypatch.setattr(Worker, "measure", measure_and_kill)
    case = replace(tiny("lstm"), layers=1, implementations=(OURS, SCAN))
    ours, killed = runner.time_case(case, make_inputs(case, seed=1)[0], tmp_path, 3, 0.0)
    assert ours.error is None and len(ours.seconds) == 3
    assert killed.error == "ended with code -9; is there enough memory?"


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = replace(BY_NAME["step"], implementations=("torch",))
    (worker,) = runner.time_case(case, {}, tmp_path, 1, 0.1)
    assert worker.error == "torch is not installed; run pip install 'elmo_jax[benchmark]'"
