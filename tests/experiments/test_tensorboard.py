"""Tests of the TensorBoard events, read back from the file."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from elmo_jax import parallel as processes
from elmo_jax.training.checkpoint import EVENTS, Run
from experiments.common import cli

RECORD = {"event": "epoch", "epoch": 3, "step": 12, "loss": 0.5, "lambdas": [0.25, 0.75], "none": None}


def scalars(folder):
    """Return every value by tag and step; a TFRecord is a length, a checksum, the data and a checksum."""
    found = {}
    for path in folder.glob("events.out.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 12 + size + 4
    return found


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    yield run
    run.close()


def test_every_number_of_a_record_is_an_event(run):
    with cli.tensorboard(run, enabled=True) as write:
        write(RECORD)
        write(RECORD | {"epoch": 4, "loss": 0.25, "lambdas": None})
    assert scalars(run.path / EVENTS) == {
        ("epoch", 3): 3,
        ("step", 3): 12,
        ("loss", 3): 0.5,
        ("lambdas/0", 3): 0.25,
        ("lambdas/1", 3): 0.75,
        ("epoch", 4): 4,
        ("step", 4): 12,
        ("loss", 4): 0.25,
    }


def test_only_the_first_process_writes_and_only_when_enabled(run, monkeypatch):
    with cli.tensorboard(run, enabled=False) as write:
        write(RECORD)
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    with cli.tensorboard(run, enabled=True) as write:
        write(RECORD)
    assert not (run.path / EVENTS).exists()


def test_a_replaced_run_leaves_no_events(run):
    with cli.tensorboard(run, enabled=True) as write:
        write(RECORD)
    run.close()
    Run.create(run.path, {}, monitor="loss", overwrite=True).close()
    assert not (run.path / EVENTS).exists()
