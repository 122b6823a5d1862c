"""Child processes of tests: start, wait, and read what a run holds."""

import json
import multiprocessing
import time

from elmo_jax.training.checkpoint import Run

PROCESSES = multiprocessing.get_context("forkserver")


PROCESSES.set_forkserver_preload(["elmo_jax", "experiments.pretrain", "pytest"])


def finish(process):
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def steps(path):
    folder = path / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0), any(
        n.endswith(".part") for n in names
    )


def wait_for(condition):
    until = time.monotonic() + 300  # on a busy machine
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    assert condition()


def outcome(path):
    run = Run.open(path)
    (newest, *_), lines = run.steps.valid(), (path / "metrics.jsonl").read_text().splitlines()
    times = {"seconds", "tokens_per_second"}
    records = [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]
    return newest, records, run.steps.load(newest, run.steps.shapes(newest))
