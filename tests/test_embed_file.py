"""HDF5 files of embeddings, and the mix of layers of the embed command."""

import gzip
import json
from dataclasses import asdict, replace

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lines import LINES

from elmo_jax import embed_file as module
from elmo_jax.data.text import read_lines
from elmo_jax.elmo import Elmo
from elmo_jax.embed_file import Dump, DumpConfig
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.combiners import CombinerConfig, Mix, make_combiner
from elmo_jax.storage.files import tree_digest
from elmo_jax.training.checkpoint import RESULTS, Position, Run
from elmo_jax.training.objectives import init_params
from experiments import embed
from experiments.common.config import SourceConfig

# The models of these tests know few words.
pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the vocabulary:UserWarning")


def write(elmo, text, mix=None, **settings):
    dump = Dump(elmo, text, text.with_name("out.h5"), DumpConfig(**settings), mix)
    dump.prepare(resume=True, overwrite=False)
    dump.write()
    with h5py.File(dump.target) as file:
        return {name: data[...] for name, data in file.items()}, dump


@pytest.mark.parametrize("long", [module._LONG, 2])
@pytest.mark.parametrize("layers", ["all", "top", "average", "mix", "normed mix"])
def test_file_holds_the_embeddings(elmo, text, layers, long, monkeypatch):
    monkeypatch.setattr(module, "_LONG", long)
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    lambdas = [0.5, -1.0, 2.0]
    mix = Mix(lambdas, layers == "normed mix") if "mix" in layers else None
    found, dump = write(elmo, text, mix, layers=layers.removeprefix("normed "))
    assert json.loads(found.pop("sentence_to_index")[0]) == {line: str(i) for i, line in enumerate(LINES)}
    assert found.keys() == set(map(str, range(5)))
    weights = {"top": [0, 0, 1], "average": [1 / 3] * 3}.get(layers, lambdas)
    for i, embedded in enumerate(elmo.embed([line.split() for line in LINES])):
        if layers == "normed mix":
            combiner = make_combiner(CombinerConfig(layer_norm=True))
            expected = combiner.apply({"params": {"weights": jnp.array(lambdas)}}, embedded[:, None])[0]
        else:
            expected = embedded if layers == "all" else np.einsum("l,ltf->tf", weights, embedded)
        assert found[str(i)].dtype == np.float32
        np.testing.assert_allclose(found[str(i)], expected, atol=5e-6)
    assert not dump.parts.exists()
    assert dump.size == sum(a.nbytes for a in found.values())


def test_large_index_is_split_into_pieces(elmo, text, monkeypatch):
    monkeypatch.setattr(module, "_INDEX_BYTES", 20)
    found, _ = write(elmo, text)
    pieces = [json.loads(piece) for piece in found["sentence_to_index"]]
    assert len(pieces) == 2 and list(pieces[1].values()) == ["3", "4"]
    assert pieces[0] | pieces[1] == {line: str(i) for i, line in enumerate(LINES)}


@pytest.mark.parametrize("damage", ["truncated", "changed byte", "missing dataset"])
def test_damaged_part_is_written_again(elmo, text, monkeypatch, damage):
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    complete, _ = write(elmo, text)
    dump = Dump(elmo, text, text.with_name("again.h5"), DumpConfig())
    dump.prepare(resume=False, overwrite=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dump, "_join_parts", lambda self: None)
        dump.write()
    part = sorted(dump.parts.glob("*.h5"))[0]
    data = bytearray(part.read_bytes())
    if damage == "truncated":
        part.write_bytes(data[: len(data) // 2])
    elif damage == "changed byte":
        at = data.find(complete["0"][0, :, :4].tobytes())
        data[at] ^= 1
        assert at > 0
        part.write_bytes(data)
    else:
        with h5py.File(part, "r+") as file:
            del file["0"]
    dump.prepare(resume=True, overwrite=False)
    with pytest.warns(UserWarning, match=r"000000\.h5: is damaged and is written again") as warned:
        dump.write()
    assert len(warned) == 1
    with h5py.File(dump.target) as file:
        for name, data in complete.items():
            np.testing.assert_array_equal(file[name][...], data)


def test_float16_and_checksums(elmo, text):
    found, dump = write(elmo, text, dtype="float16")
    assert found["0"].dtype == np.float16
    with h5py.File(dump.target) as file:
        assert file["0"].fletcher32


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (b"the bank\nthe \xff bank\n", {}, r"in\.txt:2: byte 0xff is not UTF-8"),
        (b"the\nthe bank rose\n", {"long": "refuse", "max_length": 2}, r"in\.txt:2: has 3 tokens"),
        (None, {}, r"in\.txt: cannot be read"),
    ],
)
def test_wrong_text_is_refused(elmo, text, data, settings, message):
    text.unlink() if data is None else text.write_bytes(data)
    with pytest.raises(InputError, match=message):
        write(elmo, text, **settings)


def test_gzipped_text_gives_the_same_file(elmo, text, monkeypatch):
    packed = text.with_name("in.txt.gz")
    packed.write_bytes(gzip.compress(text.read_bytes()))
    monkeypatch.setattr(module, "_INDEX_BYTES", 1)
    expected, _ = write(elmo, text)
    dump = Dump(elmo, packed, text.with_name("packed.h5"), DumpConfig())
    dump.prepare(resume=False, overwrite=False)
    dump.write()
    with h5py.File(dump.target) as got:
        for name in expected:
            np.testing.assert_array_equal(got[name][...], expected[name])
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"in\.txt\.gz: cannot be read \(.*\); check the file"):
        list(read_lines(packed, str.split))


def test_carriage_return_does_not_end_a_line(elmo, text):
    text.write_bytes(b"the bank\rbank\r\nbank the\n")
    found, _ = write(elmo, text)
    index = json.loads(found.pop("sentence_to_index")[0])
    assert index == {"the bank\rbank": "0", "bank the": "1"} and found.keys() == {"0", "1"}


def test_embed_command(elmo, text, tmp_path, capsys, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    out, model = tmp_path / "out.h5", ["--pretrained", tmp_path / "model"]
    assert tiny.call(embed.main, monkeypatch, text, out, *model, "--layers", "top") == 0
    assert out.exists() and "5 lines, 27 tokens" in capsys.readouterr().out
    refused(embed.main, [text, out, *model], "out.h5: already exists")
    refused(embed.main, [text, out], "give one of --pretrained RUN and --bilm")
    refused(embed.main, [text, out, *model, "--layers", "mix"], "--mix-from")


def downstream_run(path, elmo, lambdas=(1, 1, 1), finished=True, combiner="trainable", **source):
    """Make a run as downstream leaves it, with a changed language model if it is fine-tuned."""
    combiner = CombinerConfig(combiner, layer_norm=True)
    config = {"source": asdict(SourceConfig(**source)), "combiner": asdict(combiner)}
    config["model"] = tree_digest(elmo.params)
    run = Run.create(path, config, monitor="val_loss", overwrite=True)
    params = {"combiner": {"weights": np.array(lambdas, np.float32)}}
    if source.get("finetune"):
        params["bilm"] = jax.tree.map(lambda a: a + np.float32(0.1), elmo.params)
    run.save({"params": params}, Position(step=1))
    run.close()
    if finished:
        (path / RESULTS).write_text("{}")
    return path


def test_mix_is_the_trained_one(elmo, tmp_path):
    path = downstream_run(tmp_path / "down", elmo, [0.5, -1, 2])
    same, mix = embed.load_mix(elmo, path)
    assert same is elmo and mix == Mix([0.5, -1.0, 2.0], layer_norm=True)
    tuned, mix = embed.load_mix(elmo, downstream_run(path, elmo, finetune=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.1, atol=1e-6), tuned.params, elmo.params)
    assert tuned.vocabulary is elmo.vocabulary and mix.layer_norm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combiner": "function"}, "has no lambdas"),
        ({"finished": False}, "give a finished run"),
        ({"untrained": True}, "its language model is untrained"),
    ],
)
def test_run_without_a_mix_is_refused(elmo, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        embed.load_mix(elmo, downstream_run(tmp_path / "down", elmo, **settings))


def test_mix_of_another_model_is_refused(elmo, tmp_path):
    path = downstream_run(tmp_path / "down", elmo)
    wider = BiLM(replace(elmo.model.config, cells=6), len(elmo.vocabulary))
    other = Elmo(wider, init_params(wider, jax.random.key(0)), elmo.vocabulary)
    with pytest.raises(InputError, match="uses another language model"):
        embed.load_mix(other, path)
    elmo.save_pretrained(tmp_path / "export")
    with pytest.raises(InputError, match=r"is not a run of downstream"):
        embed.load_mix(elmo, tmp_path / "export")


def test_raw_text_is_tokenized(elmo, text):
    text.write_text("The bank's river rose\n")
    found, _ = write(elmo, text, tokenize=True)
    expected = elmo.embed([["the", "bank", "'", "s", "river", "rose"]])[0]
    np.testing.assert_allclose(found["0"], expected, atol=1e-6)


def test_bfloat16_differs_little_and_does_not_resume_float32(elmo, text, tmp_path, monkeypatch):
    elmo.save_pretrained(tmp_path / "model")
    got = []
    for name, more in (("a.h5", []), ("b.h5", ["--precision", "bfloat16"])):
        args = [text, tmp_path / name, "--pretrained", tmp_path / "model", *more]
        assert tiny.call(embed.main, monkeypatch, *args) == 0
        with h5py.File(tmp_path / name) as file:
            got.append(file["2"][...])
    assert 0 < np.abs(got[0] - got[1]).max() < 0.05
    half = Elmo.from_pretrained(tmp_path / "model", dtype="bfloat16")
    np.testing.assert_array_equal(half.embed([LINES[2].split()])[0], got[1])
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16, not 'float16'"):
        Elmo.from_pretrained(tmp_path / "model", dtype="float16")
    Dump(elmo, text, tmp_path / "c.h5", DumpConfig()).prepare(resume=False, overwrite=False)
    with pytest.raises(InputError, match="another text, model or settings"):
        Dump(half, text, tmp_path / "c.h5", DumpConfig()).prepare(resume=True, overwrite=False)
