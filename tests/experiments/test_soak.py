"""Tests of the soak command."""

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from experiments import soak

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_slope_is_fitted_to_block_means(rng):
    x, noise = np.arange(240.0), rng.normal(size=240)
    means = [[np.mean(part) for part in np.array_split(a, soak.BLOCKS)] for a in (x, 2 * x + noise)]
    line = stats.linregress(*means)
    got = soak.fit_slope(x, 2 * x + noise)
    np.testing.assert_allclose(got, (line.slope, line.stderr * stats.t.ppf(0.975, soak.BLOCKS - 2)), 1e-3)
    assert abs(got[0] - 2) < got[1] < 0.01


def test_intervals_cover_the_slope_of_correlated_noise(rng):
    hits = 0
    for _ in range(400):
        y = np.zeros(1200)
        for i, step in enumerate(rng.normal(size=1199)):
            y[i + 1] = 0.9 * y[i] + step
        slope, error = soak.fit_slope(range(1200), y)
        hits += abs(slope) < error
    assert 0.91 < hits / 400 < 0.99


def test_a_run_is_sampled_and_stopped(tmp_path, monkeypatch, capsys):
    for part in ("train", "test"):
        rows = [f"{'ab'[i % 2]},the bank of {i % 7}" for i in range(40)]
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    tiny = "--embedding 4 --cells 4 --layers 1 --batch-size 8 --min-count 1 --every 0.02 --minutes 0.05"
    monkeypatch.setattr(
        "sys.argv", ["x", "--dataset", str(tmp_path), "--output", str(tmp_path / "run"), *tiny.split()]
    )
    assert soak.main() == 0
    captured = capsys.readouterr()
    assert "MiB an hour (95 %)" in captured.out
    samples = [json.loads(line) for line in (tmp_path / "run" / "memory.jsonl").read_text().splitlines()]
    assert len(samples) > 24
    assert all(sample["rss_bytes"] > 2**24 and sample["open_files"] > 2 for sample in samples)
    assert (tmp_path / "run" / "memory.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path / "short"), "--epochs", "0"])
    assert soak.main() == 2


def test_too_few_samples_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "pretrain", lambda config: None)
    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path)])
    assert soak.main() == 2
    assert "0 samples are too few; lower --every" in capsys.readouterr().err


HOARD = """
import sys, threading, jax
from experiments.common import cli
if sys.argv[1] == "kept":
    assert cli.configure_malloc()
lot = []
barrier = threading.Barrier(12)
def work():
    barrier.wait()
    lot.append([bytes(60_000) for _ in range(20)])
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
[t.start() for t in threads], [t.join() for t in threads]
print(sum("[heap]" in line or " 00000000 00:00 0" in line for line in open("/proc/self/maps")))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heaps")
def test_threads_share_heaps():
    counts = [
        int(subprocess.run([sys.executable, "-c", HOARD, how], check=True, capture_output=True).stdout)
        for how in ("kept", "not")
    ]
    assert counts[0] < counts[1]
