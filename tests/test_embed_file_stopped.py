"""Embedding files that are interrupted, resumed, overwritten, or written by two processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from lines import LINES

from elmo_jax.elmo import Elmo
from elmo_jax.embed_file import Dump, DumpConfig
from elmo_jax.errors import InputError
from experiments import embed

# The model of these tests knows four words.
pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the vocabulary:UserWarning")

ROOT = Path(__file__).parent.parent


def test_interrupted_file_is_resumed_at_the_missing_part(elmo, text, monkeypatch):
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    dump = Dump(elmo, text, text.with_name("out.h5"), DumpConfig())
    dump.prepare(resume=False, overwrite=False)
    written, real = [], Dump._write_part

    def count(self, path, lines):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(self, path, lines)

    monkeypatch.setattr(Dump, "_write_part", count)
    with pytest.raises(KeyboardInterrupt):
        dump.write()
    with pytest.raises(InputError, match="is unfinished; pass resume=True or overwrite=True"):
        dump.prepare(resume=False, overwrite=False)
    other = Elmo(elmo.model, jax.tree.map(lambda a: a + 1, elmo.params), elmo.vocabulary)
    with pytest.raises(InputError, match="another text, model or settings"):
        Dump(other, text, dump.target, DumpConfig()).prepare(resume=True, overwrite=False)
    monkeypatch.setattr(
        Dump, "_write_part", lambda self, path, lines: (written.append(path.name), real(self, path, lines))
    )
    seen = []
    dump.prepare(resume=True, overwrite=False)
    dump.write(seen.append)
    assert sorted(written) == sorted(set(written)) and sum(seen) == dump.tokens
    with h5py.File(dump.target) as file:
        np.testing.assert_allclose(file["4"], elmo.embed([LINES[4].split()])[0], atol=1e-6)


def test_full_disk_is_refused_before_writing(elmo, text, monkeypatch):
    monkeypatch.setattr(Dump, "size", 10**18)
    for _ in range(2):
        with pytest.raises(InputError, match="GB free"):
            prepare(elmo, text)
    assert [path.name for path in text.parent.iterdir()] == ["in.txt"]


def prepare(elmo, text, resume=False, overwrite=False):
    dump = Dump(elmo, text, text.with_name("out.h5"), DumpConfig())
    dump.prepare(resume, overwrite)
    return dump


def unfinished(elmo, text, **more):
    """Write all parts without joining them."""
    dump = prepare(elmo, text, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dump, "_join_parts", lambda self: None)
        dump.write()
    return dump


def test_existing_file_is_not_lost(elmo, text):
    dump = prepare(elmo, text)
    dump.write()
    before = dump.target.read_bytes()
    with pytest.raises(InputError, match="contradict each other"):
        prepare(elmo, text, resume=True, overwrite=True)
    for resume in (False, True):
        with pytest.raises(InputError, match=r"out\.h5: already exists; pass overwrite=True to replace it"):
            prepare(elmo, text, resume=resume)
        assert not dump.parts.exists()
    unfinished(elmo, text, overwrite=True)
    assert dump.target.read_bytes() == before  # until the new one is whole
    with pytest.raises(InputError, match="is the text itself"):
        Dump(elmo, text, text, DumpConfig()).prepare(resume=False, overwrite=True)
    text.write_text(text.read_text().replace("rose", "bank"))  # as many lines and tokens
    dump.target.unlink()
    with pytest.raises(InputError, match="another text"):
        prepare(elmo, text, resume=True)


def test_file_made_since_the_interruption_is_not_replaced(elmo, text):
    dump = unfinished(elmo, text)
    dump.target.write_bytes(b"mine")
    parts = sorted(dump.parts.iterdir())
    with pytest.raises(InputError, match=r"out\.h5: already exists; move it away to resume"):
        prepare(elmo, text, resume=True)
    assert dump.target.read_bytes() == b"mine" and sorted(dump.parts.iterdir()) == parts
    dump.target.unlink()
    prepare(elmo, text, resume=True).write()
    assert h5py.is_hdf5(dump.target)


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"overwrite": true}'])
def test_parts_of_another_text_are_refused(elmo, text, content):
    before, settings = text.read_text(), unfinished(elmo, text).parts / "settings.json"
    settings.unlink() if content is None else settings.write_bytes(content)
    text.write_text(before.replace("rose", "bank"))  # the same number of tokens
    with pytest.raises(InputError, match="another text, model or settings; pass overwrite=True"):
        prepare(elmo, text, resume=True)
    dump = prepare(elmo, text, overwrite=True)
    dump.write()
    with h5py.File(dump.target) as file:
        np.testing.assert_allclose(file["0"], elmo.embed([["the", "bank", "bank", "."]])[0], atol=1e-6)


def test_resumed_file_keeps_the_permission_to_overwrite(elmo, text):
    out = text.with_name("out.h5")
    out.write_bytes(b"old")
    unfinished(elmo, text, overwrite=True)
    assert out.read_bytes() == b"old"
    prepare(elmo, text, resume=True).write()
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["4"], elmo.embed([LINES[4].split()])[0], atol=1e-6)
    assert sorted(path.name for path in text.parent.iterdir()) == ["in.txt", "out.h5"]


# Writes a part, prints "written", and waits for a line before it writes the others.
SLOW = """
import sys
from elmo_jax.data import text as lines
from elmo_jax.embed_file import Dump
from experiments import embed

lines.BLOCK_TOKENS, real = 6, Dump._write_part

def write_slowly(self, path, part):
    real(self, path, part)
    if path.name == "000000.h5":
        print("written", flush=True)
        sys.stdin.readline()

Dump._write_part = write_slowly
sys.exit(embed.main())
"""


def test_second_process_is_refused_until_the_first_is_killed(elmo, text, refused, monkeypatch):
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    model, out, other = text.with_name("model"), text.with_name("out.h5"), text.with_name("other.txt")
    elmo.save_pretrained(model)
    other.write_text("the bank\n")
    args = [str(out), "--pretrained", str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SLOW, str(text), *args]
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as first:
        try:
            assert first.stdout is not None and "written\n" in iter(first.stdout.readline, "")
            for flags in ([], ["--resume"], ["--overwrite"]):
                for source in (text, other):
                    refused(embed.main, [source, *args, *flags], "out.h5: another process writes it; wait")
        finally:
            first.kill()
    monkeypatch.setattr(sys, "argv", ["x", str(text), *args, "--resume"])
    assert embed.main() == 0
    assert {path.name for path in text.parent.iterdir()} == {"in.txt", "other.txt", "model", "out.h5"}
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["4"], elmo.embed([LINES[4].split()])[0], atol=1e-6)


def test_writer_that_starts_while_another_ends_keeps_its_files(elmo, text, monkeypatch):
    first, later, real = prepare(elmo, text), [], os.unlink

    def unlink(path, **more):
        real(path, **more)
        if Path(path).name == ".lock" and not later:
            later.append(prepare(elmo, text, overwrite=True))

    monkeypatch.setattr(os, "unlink", unlink)
    first.write()
    assert [path.name for path in later[0]._existing_files()] == ["settings.json"]
    later[0].write()
    assert sorted(path.name for path in text.parent.iterdir()) == ["in.txt", "out.h5"]
