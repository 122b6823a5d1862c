"""The benchmark's longest case: pre-training on AG News as a user types it."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmo_jax.checkpoint import METRICS, RESULTS
from experiments.cases import AG_NEWS, OURS, Case

CASE = Case(AG_NEWS, "pretrain", (OURS,), negatives=2048)


def flags_of(data_dir: str) -> list[str]:
    """What the command is given: the report's sizes, and so 10 epochs."""
    return ["--dataset", "ag_news", "--data-dir", data_dir, "--preset", "report"]


def pretraining(flags: Sequence[str]) -> dict[str, Any]:
    """Run ``experiments.pretrain`` into a folder that is thrown away.

    Args:
        flags: of the command, but for its output.

    Returns:
        The case's figures as `race.results_of` gives them. Seconds are the training's, as the
        run itself reports them; ``whole_seconds`` are those of the process, with reading, compiling
        and evaluating; ``seconds_by_epoch`` and the best ``perplexity`` are beside them.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        began = time.perf_counter()
        command = [sys.executable, "-m", "experiments.pretrain", *flags, "--output", str(run)]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        if ended.returncode:
            said = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            record: dict[str, Any] = {"not_timed": f"ended with code {ended.returncode}: {said[0][:200]}"}
        else:
            results = json.loads((run / RESULTS).read_text())
            epochs = [json.loads(line)["seconds"] for line in (run / METRICS).read_text().splitlines()]
            record = {"seconds": [sum(epochs)], "median": sum(epochs), "whole_seconds": seconds}
            record |= {"seconds_by_epoch": epochs, "perplexity": results["perplexity"]}
            record |= {"tokens_per_second": results["tokens_per_second"]}
            record["spread"] = (max(epochs) - min(epochs)) / 2 / statistics.median(epochs)
    return {
        "case": dataclasses.asdict(CASE),
        "counts": {},
        "flops": 0.0,
        "bytes": 0.0,
        "peers": {OURS: record},
    }
