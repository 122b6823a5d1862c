"""A full disk stops a command with a one-line error and damages no complete file."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from official import make

from elmo_jax import embed_file as module
from elmo_jax.storage.hdf5 import create
from experiments import embed

ROOT = Path(__file__).parents[2]
PART = 500  # tokens, of 96 bytes each

# Separate processes, because HDF5 also reports failed writes when the interpreter ends.
EMBED = f"""
import resource, sys
from elmo_jax.data import text as lines
from experiments import embed
limit, *sys.argv = sys.argv[1:]
lines.BLOCK_TOKENS = {PART}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
sys.exit(embed.main())
"""

SHORT, LONG = "the river bank . " * 500, "the river bank . " * (module._LONG // 4 + 1)
FULL = {  # the text, the maximum file size in bytes, and the number of parts that fit
    "a part": (["the bank " * PART, *[SHORT] * 3], 120_000, 1),
    "a line of any length": (["the bank " * PART, LONG], 120_000, 1),
    "the parts joined": (["the bank " * PART] * 2, 150_000, 2),
}


@pytest.mark.parametrize("name", FULL)
def test_embedding_on_a_full_disk_is_a_one_line_error_and_can_be_resumed(name, elmo, tmp_path, monkeypatch):
    lines, limit, parts = FULL[name]
    text, out, model = tmp_path / "in.txt", tmp_path / "out.h5", tmp_path / "model"
    text.write_text("\n".join(lines) + "\n")
    elmo.save_pretrained(model)
    args = [str(text), str(out), "--pretrained", str(model)]
    command = [sys.executable, "-c", EMBED, str(limit), "prog", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr[:2000]
    assert f"{out}: cannot be written (File too large); make room and " in done.stderr
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.h5.parts").glob("*.h5")}
    assert len(written) == parts and not out.exists() and not list(tmp_path.rglob("*.part"))

    join = module.Dump._join_parts
    kept = {}

    def record_times(dump):
        kept.update({part: part.stat().st_mtime_ns for part in written if part.exists()})
        join(dump)

    monkeypatch.setattr(module.Dump, "_join_parts", record_times)
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", PART)
    monkeypatch.setattr(sys, "argv", ["prog", *args, "--resume"])
    assert embed.main() == 0
    assert kept == written  # no part was written twice
    monkeypatch.setattr(sys, "argv", ["prog", str(text), str(tmp_path / "whole.h5"), *args[2:]])
    assert embed.main() == 0
    with h5py.File(out) as got, h5py.File(tmp_path / "whole.h5") as want:
        assert got.keys() == want.keys()
        for data in want:
            np.testing.assert_array_equal(got[data], want[data])


def overwrite(path):
    with create(path) as file:
        file["a"] = np.arange(10_000)


def test_hdf5_on_a_full_disk_keeps_the_previous_file(tmp_path):
    path = tmp_path / "a.h5"
    with create(path) as file:
        file["a"] = np.arange(10)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            overwrite(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_saving_a_model_on_a_full_disk_is_a_one_line_error(tmp_path):
    make(tmp_path)
    before = (tmp_path / "weights.hdf5").read_bytes()
    script = f"""
import resource, sys
from elmo_jax import Elmo
elmo = Elmo.from_bilm(r"{tmp_path}/options.json", r"{tmp_path}/weights.hdf5")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    elmo.save_bilm(r"{tmp_path}/options.json", r"{tmp_path}/weights.hdf5")
except Exception as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr[:2000]
    assert "weights.hdf5: cannot be written (File too large); make room, or give" in done.stderr
    assert (tmp_path / "weights.hdf5").read_bytes() == before


# The run writes to a small disk that exists only in its process. The disk fills up while a step is being
# written, after the check of the free space.
RUN = """
import contextlib, io, json, sys, warnings
from pathlib import Path
from elmo_jax.training.checkpoint import Run, StepStore
from experiments import pretrain

data, disk = map(Path, sys.argv[1:])
path, filler, look = disk / "run", disk / "filler", StepStore._free_bytes
flags = "--embedding 64 --cells 64 --layers 1 --batch-size 8 --min-count 1 --softmax full".split()

def call(epochs):
    sys.argv = ["x", "--dataset", str(data), "--output", str(path), "--epochs", str(epochs), *flags]
    sys.argv += ["--resume"] * path.exists()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = pretrain.main()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = list(Run.open(path).steps.valid())
    records = [json.loads(line)["epoch"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    parts = [p.name for p in (path / "checkpoints").glob("*.part")]
    return {"code": code, "said": said.getvalue(), "steps": steps, "records": records, "parts": parts}

def fill(count):
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(bytes(4096))

def then_fill(steps):
    free = look(steps)
    fill(10**9)
    return free

outcomes = [call(1)]
StepStore._free_bytes = then_fill
outcomes.append(call(3))
StepStore._free_bytes = look
fill(3 * 2**20 // 4096)
outcomes.append(call(3))
filler.unlink()
outcomes.append(call(3))
print(json.dumps(outcomes))
"""


def test_a_disk_that_fills_up_during_a_save_is_a_one_line_error(tmp_path):
    disk, rows = tmp_path / "disk", [f"{'ab'[i % 2]},the bank of {i % 7}" for i in range(40)]
    disk.mkdir()
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    small = f"mount -t tmpfs -o size=20m none '{disk}' && "
    try:
        subprocess.run([*mount, f"{small} true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk may not be mounted here")
    command = [*mount, small + 'exec "$@"', "sh", sys.executable, "-c", RUN, str(tmp_path), str(disk)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, full, refused, after = json.loads(done.stdout)
    (first,) = whole["steps"]
    assert whole["code"] == 0 and whole["records"] == [1]
    for told, reason in ((full, "No space left on device"), (refused, r"\d+ MB are free, \d+ MB needed")):
        assert told["code"] == 2 and told["said"].count("\n") == 1
        step = rf"run/checkpoints/{2 * first}: could not be saved \({reason}\); earlier steps are kept"
        assert re.search(step, told["said"]), told["said"]
        assert (told["steps"], told["records"], told["parts"]) == ([first], [1], [])
    assert after["code"] == 0 and after["records"] == [1, 2, 3] and after["steps"][0] == 3 * first
